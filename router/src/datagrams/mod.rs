//! UDP sessions: datagrams between a pod's import and an endpoint, with their boundaries, up to 65,507 bytes.
//!
//! A session is an import and a client's address. It sticks to its endpoint while that lives and ends after
//! [`SESSION_IDLE`] without a datagram. To another router the sessions share one connection.

pub(crate) mod import;
pub(crate) mod link;
pub(crate) mod pod;
pub(crate) mod serve;

use std::time::Duration;

/// How long a session lives without a datagram.
pub(crate) const SESSION_IDLE: Duration = Duration::from_secs(60);
/// The most sessions of one import, and of one connection between two routers.
pub(crate) const MAX_SESSIONS: usize = 4096;
/// The most bytes of a datagram: what IPv4 carries (65,535 less the headers of IP and UDP).
pub(crate) const MAX_DATAGRAM: usize = 65_507;
/// Datagrams that wait for a slow receiver; further ones are dropped, as a network would.
pub(crate) const QUEUE: usize = 128;
