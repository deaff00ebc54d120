//! An exported port of a pod of this node: dialled with the pod's own sockets, in its network namespace.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use servicekeel_core::handoff::DescriptorKind;
use servicekeel_core::mesh::outcome::Outcome;
use servicekeel_core::mesh::table::EndpointId;
use servicekeel_runtime::net::Net;
use tokio::time::timeout;

use crate::node::{Node, dialable};
use crate::pods::Pod;

/// How long the application may take to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The exported port, and where its pod answers.
pub(crate) struct PodPort<N: Net> {
    pub(crate) pod: Arc<Pod<N>>,
    target: NonZeroU16,
    /// Which of the addresses took the last flow: tried first.
    last: AtomicUsize,
}

impl<N: Net> PodPort<N> {
    pub(crate) fn new(pod: Arc<Pod<N>>, target: NonZeroU16) -> Self {
        Self { pod, target, last: AtomicUsize::new(0) }
    }

    /// The pod's addresses, then its loopback, the one that answered last first; each with its number.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = (usize, SocketAddr)> + '_ {
        let last = self.last.load(Ordering::Relaxed);
        let all = || {
            let loopback = std::iter::once(IpAddr::V4(Ipv4Addr::LOCALHOST));
            self.pod.addresses.iter().copied().filter(dialable).chain(loopback).enumerate()
        };
        all()
            .filter(move |(i, _)| *i == last)
            .chain(all().filter(move |(i, _)| *i != last))
            .map(|(i, addr)| (i, SocketAddr::new(addr, self.target.get())))
            .filter(|(_, addr)| !self.is_import(*addr))
    }

    /// Whether the pod's own import listens there: what is dialled there comes back to this router, which dials again,
    /// for as long as there are descriptors. Imports have loopback addresses.
    fn is_import(&self, addr: SocketAddr) -> bool {
        addr.ip().is_loopback() && self.pod.imports().values().any(|served| served.at == addr)
    }

    pub(crate) fn answered(&self, address: usize) {
        self.last.store(address, Ordering::Relaxed);
    }
}

/// Why an endpoint took no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The application or the pod's network refused: an answer.
    #[error("{0}")]
    Refused(io::Error),
    /// The router has no way into the pod just now, such as while its sidecar restarts: no answer yet.
    #[error("{0}")]
    Away(io::Error),
}

impl ConnectError {
    /// What it is, for the endpoint's health and for who waits.
    pub(crate) fn outcome(&self) -> Outcome {
        match self {
            Self::Refused(error) if error.kind() == io::ErrorKind::TimedOut => Outcome::Silent,
            Self::Refused(_) => Outcome::Refused,
            Self::Away(_) => Outcome::Away,
        }
    }
}

/// Connects to an endpoint. The stream is polled on the thread of its pod.
///
/// # Errors
/// The last address's error, where none takes the connection.
pub(crate) async fn connect<N: Net>(
    node: &Node<N>,
    id: EndpointId,
) -> Result<(N::TcpStream, N::Thread), ConnectError> {
    let endpoint = node.endpoints().get(&id).cloned();
    let Some(endpoint) = endpoint else {
        return Err(ConnectError::Away(io::Error::new(io::ErrorKind::NotFound, "the endpoint is gone")));
    };
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for (number, addr) in endpoint.addresses() {
        let stock = &endpoint.pod.stock;
        let socket = stock.take(DescriptorKind::TcpUnconnected).await.map_err(ConnectError::Away)?;
        match timeout(CONNECT_TIMEOUT, node.net.connect_descriptor(socket, addr)).await {
            Ok(Ok(stream)) => {
                endpoint.answered(number);
                return Ok((stream, endpoint.pod.thread.clone()));
            }
            Ok(Err(error)) => last = io::Error::new(error.kind(), format!("{addr}: {error}")),
            Err(_) => last = io::Error::new(io::ErrorKind::TimedOut, format!("{addr}: no answer")),
        }
    }
    Err(ConnectError::Refused(last))
}
