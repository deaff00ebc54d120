//! Tests of the built programs, from outside, as processes: this library starts them, the tests use them.

mod apps;
#[cfg(feature = "containers")]
mod contained;
#[cfg(feature = "containers")]
mod engine;
mod http;
mod name;
mod namespaces;
mod pair;
mod panics;
mod place;
mod process;
mod running;
mod stand;

pub use apps::{Echo, UdpEcho, ping};
#[cfg(feature = "containers")]
pub use contained::{Contained, Node, NodeOptions, Pod, PodOptions, until};
#[cfg(feature = "containers")]
pub use engine::Engine;
pub use http::get;
pub use name::{Answer, ask};
pub use namespaces::{Namespaces, Refusal};
pub use pair::{Pair, programs};
pub use place::Place;
pub use process::{Process, output};
pub use running::{Router, Sidecar};
pub use stand::{RouterOptions, SidecarOptions, Stand, annotation, wait_for};
