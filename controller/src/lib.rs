//! The controller: writes the export annotations of pods from Services.
//!
//! [`run`] follows Services, namespaces and pods, and writes `servicekeel.io/exported-services` of each pod that runs
//! a sidecar, by server-side apply. What a pod exports is decided by `core::plan`; here are the API and the loop.

pub mod args;
pub mod convert;
mod error;
mod memory;
mod reconcile;
mod run;
#[cfg(test)]
mod tests;
mod watch;

pub use run::{Output, RunError, Settings, run};

/// The field manager that owns what the controller writes.
pub const FIELD_MANAGER: &str = "servicekeel-controller";
/// The name of the container, or init container, by which a pod is known to run a sidecar.
pub const SIDECAR_CONTAINER: &str = "servicekeel-sidecar";
