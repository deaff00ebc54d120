//! The pure core of ServiceKeel: names, annotations, leases, DNS answers, frames, the mesh.
//!
//! Nothing here reads a clock, the environment or a random number, and nothing does I/O: time and seeds
//! come in by argument, decisions go out as values. Machines speak one dialect: `handle_*(input, now)`,
//! `handle_timeout(now)`, `poll_*() -> Option<_>`, `poll_timeout() -> Option<Instant>`.

pub mod admission;
pub mod annotation;
pub mod dns;
pub mod flow;
pub mod handoff;
pub mod lease;
pub mod mesh;
pub mod name;
pub mod near;
pub mod pace;
pub mod plan;
pub mod reason;
mod rules;
pub mod session;
pub mod shares;
pub mod sidecar;
pub mod yaml;
