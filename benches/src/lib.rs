//! Benchmarks: criterion, and the side-by-side harness against peers.
