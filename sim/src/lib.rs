//! Simulation of the production programs on turmoil.
