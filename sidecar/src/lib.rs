//! The sidecar: DNS, addresses and sockets of one pod.

mod alone;
mod disk;
pub mod dns;
mod driver;
mod link;
mod metrics;
mod notices;
mod run;
pub mod settings;
pub mod source;
pub mod state;
mod status;

pub use run::{RunError, run};
