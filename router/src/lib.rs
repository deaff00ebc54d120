//! The router: carries flows between the pods of its node, and to other routers over mutual TLS.
//!
//! [`run`] is the program; everything that it starts ends when its future is dropped.

mod absence;
mod bounds;
pub mod command;
mod counters;
mod datagrams;
mod ended;
mod endpoint;
pub mod flow;
mod guest;
mod held;
pub mod identity;
mod imports;
mod inbound;
mod link;
mod links;
mod missing;
mod node;
mod outbound;
mod paces;
mod peers;
pub mod pki;
mod pods;
mod rejected;
mod rooms;
mod run;
pub mod settings;
mod shortage;
mod sockets;
mod status;
mod stock;
mod strangers;
mod successor;
mod tasks;
pub mod tls;
mod turns;

pub use run::run;
