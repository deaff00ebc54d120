//! The parts of the demo: the pods' manifests, their applications, a path that can be cut, and clients that measure.

pub mod content;
pub mod cut;
pub mod ending;
pub mod fetch;
pub mod manifest;
pub mod pods;
pub mod report;
pub mod server;
pub mod stage;
pub mod steps;
pub mod uplink;
