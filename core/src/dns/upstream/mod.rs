//! The upstreams: which is asked what and when, and what is remembered of each.
//!
//! [`Servers`] is what a pod knows of its upstreams, [`Asking`] one question to them. Both take events and the time,
//! and say what to do; sockets are elsewhere.

mod asking;
mod servers;
#[cfg(test)]
mod tests;

pub use asking::{Asking, Fault, Send, Times, TryId};
pub use servers::{Health, News, Servers};

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No upstream is configured.
    NoUpstream,
    /// Too much is under way.
    Busy,
    /// None answered in time, or each refused.
    Unreachable,
    /// None gave a better code than this one.
    Said(u16),
}
