//! Tests of the built programs, from outside, as processes: this library starts them, the tests use them.

mod apps;
mod http;
mod name;
mod pair;
mod process;
mod stand;

pub use apps::{Echo, UdpEcho};
pub use http::get;
pub use name::{Answer, ask};
pub use pair::Pair;
pub use process::Process;
pub use stand::{Place, Router, RouterOptions, Sidecar, SidecarOptions, Stand, annotation, wait_for};
