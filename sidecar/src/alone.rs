//! One address and port of a network namespace means one Service.
//!
//! Two sidecars of one namespace, as those of the host's network may be, do not see each other's sockets: SO_REUSEPORT,
//! by which a sidecar that restarts binds beside what the router still holds of its earlier run, would share every
//! connection out among both, whatever Service each means. So a sidecar takes two names for each socket that it makes,
//! which are gone with its process and never handed over: one for the address and port, and one that says the Service
//! too. Where another has the first and not the second, it means another Service there. Where another has both, it is
//! the same one, such as the pod's earlier sidecar that is just ending, and no connection can go wrong.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::SocketAddrV4;

use servicekeel_core::name::ServicePort;
use servicekeel_runtime::net::Net;

/// Another sidecar means another Service there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "another sidecar on this loopback has it for another Service: give each of them a range of its own \
     (SIDECAR_IP_RANGE), or end the other one"
)]
pub(crate) struct Taken;

/// The names of one socket, until it is dropped.
#[derive(Debug)]
pub(crate) struct Claim<N: Net> {
    _names: [Option<N::Reservation>; 2],
}

impl<N: Net> Claim<N> {
    /// Takes the names of a socket for `port` at `addr`. Where the system has no such names, it does without.
    pub(crate) fn new(net: &N, port: &ServicePort, addr: SocketAddrV4) -> Result<Self, Taken> {
        let address = format!("{addr}/{}", port.protocol);
        // The Service's own name may be longer than a socket's.
        let mut hasher = DefaultHasher::new();
        port.hash(&mut hasher);
        let service = format!("{address}/{:016x}", hasher.finish());
        match net.reserve(&address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => match net.reserve(&service) {
                Ok(_) => Err(Taken),
                Err(_) => Ok(Self { _names: [None, None] }),
            },
            address => Ok(Self { _names: [address.ok(), net.reserve(&service).ok()] }),
        }
    }
}
