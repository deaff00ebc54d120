//! An exported port of a pod of this node: dialled with the pod's own sockets, in its network namespace.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use servicekeel_core::handoff::DescriptorKind;
use servicekeel_core::mesh::outcome::Outcome;
use servicekeel_core::mesh::table::{Candidate, EndpointId};
use servicekeel_core::name::ServicePort;
use servicekeel_runtime::net::Net;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};

use crate::node::{Node, dialable};
use crate::pods::Pod;

/// How long an address may take to answer before the next is tried beside it, and an endpoint where there is another.
pub(crate) const BRIEFLY: Duration = Duration::from_secs(2);
/// How long an endpoint may take where there is no other: as long as TCP itself tries, 127 s by tcp_syn_retries of 6
/// (tcp(7)). A backlog that is full takes a connection at one of the tries.
pub(crate) const AS_TCP: Duration = Duration::from_secs(130);
/// How many flows may wait for one endpoint for longer than [`BRIEFLY`].
const MAX_PATIENT: usize = 256;

/// The exported port, and where its pod answers.
pub(crate) struct PodPort<N: Net> {
    pub(crate) pod: Arc<Pod<N>>,
    target: NonZeroU16,
    /// Which of the addresses took the last flow: tried first.
    last: AtomicUsize,
    /// For flows that wait as long as TCP would.
    patient: Semaphore,
    /// The log says that it is failing.
    pub(crate) failure_told: AtomicBool,
}

impl<N: Net> PodPort<N> {
    pub(crate) fn new(pod: Arc<Pod<N>>, target: NonZeroU16) -> Self {
        Self {
            pod,
            target,
            last: AtomicUsize::new(0),
            patient: Semaphore::new(MAX_PATIENT),
            failure_told: AtomicBool::new(false),
        }
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
    /// The application or the pod's network refused: an answer. The reasons of all addresses.
    #[error("{0}")]
    Refused(String),
    /// At least one address did not answer in time. The reasons of all addresses.
    #[error("{0}")]
    Silent(String),
    /// The router has no way into the pod just now, such as while its sidecar restarts: no answer yet.
    #[error("{0}")]
    Away(io::Error),
}

impl ConnectError {
    /// What it is, for the endpoint's health and for who waits.
    pub(crate) fn outcome(&self) -> Outcome {
        match self {
            Self::Silent(_) => Outcome::Silent,
            Self::Refused(_) => Outcome::Refused,
            Self::Away(_) => Outcome::Away,
        }
    }
}

/// Tries a candidate, and takes down meanwhile that it is slow, so that others are tried first and the status has it.
pub(crate) async fn watched<N: Net, T>(
    node: &Node<N>,
    wanted: &ServicePort,
    candidate: &Candidate,
    trying: impl Future<Output = T>,
) -> T {
    let mut trying = std::pin::pin!(trying);
    let slow = BRIEFLY * 2;
    match timeout(slow, trying.as_mut()).await {
        Ok(tried) => tried,
        Err(_) => {
            let reason = format!("no answer for {} s; waiting", slow.as_secs());
            node.report(wanted, candidate, Outcome::Silent, reason);
            trying.await
        }
    }
}

/// Connects to an endpoint: its addresses one after the other, the next at once where one refuses and after 2 s where it
/// does not answer, which it still may then. `patience`: how long all may take behind the last one's start.
///
/// # Errors
/// What each address said, where none takes the connection.
pub(crate) async fn connect<N: Net>(
    node: &Node<N>,
    id: EndpointId,
    patience: Duration,
) -> Result<(N::TcpStream, N::Thread), ConnectError> {
    let endpoint = node.endpoints().get(&id).cloned();
    let Some(endpoint) = endpoint else {
        return Err(ConnectError::Away(io::Error::new(io::ErrorKind::NotFound, "the endpoint is gone")));
    };
    let patient = endpoint.patient.try_acquire();
    let patience = if patient.is_ok() { patience } else { patience.min(BRIEFLY) };
    let mut addresses = endpoint.addresses().collect::<Vec<_>>().into_iter();
    let mut waiting = Vec::new();
    let mut attempts = FuturesUnordered::new();
    let mut reasons = Vec::new();
    let mut deadline = None;
    loop {
        if let Some((number, addr)) = addresses.next() {
            match endpoint.pod.stock.take(DescriptorKind::TcpUnconnected).await {
                Ok(socket) => {
                    waiting.push(addr);
                    attempts
                        .push(async move { (number, addr, node.net.connect_descriptor(socket, addr).await) });
                }
                Err(error) if attempts.is_empty() && reasons.is_empty() => {
                    return Err(ConnectError::Away(error));
                }
                Err(error) => reasons.push(format!("{addr}: {error}")),
            }
        }
        let until = if addresses.len() > 0 {
            Instant::now() + BRIEFLY
        } else {
            *deadline.get_or_insert_with(|| Instant::now() + patience)
        };
        match timeout_at(until, attempts.next()).await {
            Ok(Some((number, _, Ok(stream)))) => {
                endpoint.answered(number);
                return Ok((stream, endpoint.pod.thread.clone()));
            }
            Ok(Some((_, addr, Err(error)))) => {
                waiting.retain(|other| *other != addr);
                // The kernel's own patience is over.
                if error.kind() == io::ErrorKind::TimedOut {
                    waiting.push(addr);
                } else {
                    reasons.push(format!("{addr}: {error}"));
                }
            }
            Ok(None) if addresses.len() > 0 => {}
            Err(_) if addresses.len() > 0 => {}
            Ok(None) | Err(_) => break,
        }
    }
    reasons.extend(waiting.iter().map(|addr| format!("{addr}: no answer")));
    if reasons.is_empty() {
        reasons.push("it has no address that can be dialled".into());
    }
    let reasons = reasons.join("; ");
    Err(if waiting.is_empty() { ConnectError::Refused(reasons) } else { ConnectError::Silent(reasons) })
}
