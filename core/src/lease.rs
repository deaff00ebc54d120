//! Leases: which imported Service has which address, across reloads and restarts.
