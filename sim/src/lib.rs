//! Simulation of the production programs on turmoil.
//!
//! The `run()`s of sidecar and router, as they are, on a simulated network, under faults that are drawn from a seed,
//! with an oracle that checks every byte. One thread, simulated time: an hour takes seconds, and the same seed gives
//! the same trace, byte for byte.
//!
//! ```sh
//! cargo test -p sim                                  # every scenario, 20 seeds and more
//! SEED=17 cargo test -p sim --test mixed             # one seed again
//! SEEDS=1000 cargo test -p sim --test mixed          # more seeds
//! ```
//!
//! A failure says its seed and shows the end of its trace.
//!
//! | simulated | how |
//! |---|---|
//! | the programs | [`servicekeel_router::run`] and [`servicekeel_sidecar::run`], started and killed as tasks of their node's host ([`world`]) |
//! | sockets of pods, SCM_RIGHTS | a kernel of each node ([`net`]) |
//! | TCP between nodes | turmoil, with cuts, retransmission, timeouts and paths that forget ([`network`]) |
//! | DNS | real packets, answered by `sidecar::dns` ([`dns`]) |
//! | TLS | real, with fresh keys: the bytes on the wire differ from run to run, and nothing depends on them |
//! | annotations and settings | given as values; that files are watched is tested elsewhere |
//! | whoever means harm | a pod that speaks to its router itself, and a peer or a stranger that dials one ([`hostile`]) |
//! | time | tokio's, paused, of each node's runtime; the certificates' clock too |
//!
//! Not simulated: the kernel (see `e2e` for network namespaces), files, the admin endpoint, upstream DNS, more than one
//! thread.

#![allow(clippy::panic, reason = "a simulation that sees a broken invariant ends there: it is a test")]

pub mod client;
pub mod content;
pub mod datagram;
pub mod dns;
pub mod flow;
mod host;
pub mod hostile;
mod identities;
pub mod net;
pub mod network;
pub mod oracle;
pub mod random;
pub mod simulation;
pub mod stage;
pub mod trace;
pub mod world;
