//! Tests of the built programs, from outside, as processes: this library starts them, the tests use them.

mod apps;
mod http;
mod name;
mod namespaces;
mod pair;
mod place;
mod process;
mod running;
mod stand;

pub use apps::{Echo, UdpEcho, ping};
pub use http::get;
pub use name::{Answer, ask};
pub use namespaces::{Namespaces, Refusal};
pub use pair::{Pair, programs};
pub use place::Place;
pub use process::Process;
pub use running::{Router, Sidecar};
pub use stand::{RouterOptions, SidecarOptions, Stand, annotation, wait_for};
