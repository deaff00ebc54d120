//! An exported port of a pod of this node: dialled with the pod's own sockets, in its network namespace.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use servicekeel_core::flow::frame::Cause;
use servicekeel_core::handoff::DescriptorKind;
use servicekeel_core::mesh::outcome::Outcome;
use servicekeel_core::mesh::table::{Candidate, EndpointId};
use servicekeel_core::name::ServicePort;
use servicekeel_runtime::net::Net;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};

use crate::bounds::{Bound, Owner};
use crate::guest::Guest;
use crate::node::{Node, dialable};
use crate::pods::Pod;
use crate::successor;

/// How long an address may take to answer before the next is tried beside it, and an endpoint, by all of its addresses,
/// where there is another.
pub(crate) const BRIEFLY: Duration = Duration::from_secs(2);
/// How long an endpoint may take where there is no other: as long as TCP itself tries, 127 s by tcp_syn_retries of 6
/// (tcp(7)). A backlog that is full takes a connection at one of the tries.
pub(crate) const AS_TCP: Duration = Duration::from_secs(130);

/// What helps a pod that has no local port left.
pub(crate) const MORE_PORTS: &str =
    "widen net.ipv4.ip_local_port_range there, or set net.ipv4.tcp_tw_reuse to 1";

/// The exported port, and where its pod answers.
pub(crate) struct PodPort<N: Net> {
    pub(crate) pod: Arc<Pod<N>>,
    target: NonZeroU16,
    /// Which of the addresses took the last flow: tried first.
    last: AtomicUsize,
    /// One of the pod's own addresses has taken a flow.
    met: AtomicBool,
    /// Flows that wait for longer than [`BRIEFLY`].
    patient: Arc<Bound>,
    /// The log says that it is failing.
    pub(crate) failure_told: AtomicBool,
}

impl<N: Net> PodPort<N> {
    pub(crate) fn new(pod: Arc<Pod<N>>, target: NonZeroU16) -> Self {
        Self {
            pod,
            target,
            last: AtomicUsize::new(0),
            met: AtomicBool::new(false),
            patient: Bound::of_patience(),
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

    /// What was not tried, and may be where the application listens.
    pub(crate) fn not_dialled(&self) -> Option<String> {
        let address = self.pod.addresses.iter().find(|address| address.is_ipv6())?;
        Some(format!("{address}: not dialled, pods are dialled over IPv4 only"))
    }

    /// Whether it is the same port of the same pod, which may have another sidecar by now.
    pub(crate) fn is_where(&self, earlier: &Self) -> bool {
        self.target == earlier.target
            && (Arc::ptr_eq(&self.pod, &earlier.pod) || successor::is_next(&self.pod, &earlier.pod))
    }

    pub(crate) fn answered(&self, address: usize) {
        self.last.store(address, Ordering::Relaxed);
        if !self.is_fallback(address) {
            self.met.store(true, Ordering::Relaxed);
        }
    }

    /// Whether it is the number of the loopback behind the pod's own addresses. A flow that comes by it looks to the
    /// application like the pod's own: where that listens at an address of the pod, nobody can bring it about by having
    /// that address be slow.
    fn is_fallback(&self, address: usize) -> bool {
        address == self.pod.addresses.iter().filter(|addr| dialable(addr)).count()
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
    /// The pod's network namespace has no local port left for a connection there: each that has ended keeps one for 60 s,
    /// where it was not the application that ended it first (TIME_WAIT, RFC 9293 §3.6).
    #[error("{0}: its pod has no local port left for a connection; {MORE_PORTS}")]
    NoPort(SocketAddr),
}

impl ConnectError {
    /// What it is, for the endpoint's health and for who waits.
    pub(crate) fn outcome(&self) -> Outcome {
        match self {
            Self::Silent(_) => Outcome::Silent,
            Self::Refused(_) => Outcome::Refused,
            Self::Away(_) => Outcome::Away,
            Self::NoPort(_) => Outcome::Rejected(Cause::Busy),
        }
    }
}

/// Tries a candidate, and takes down meanwhile that it is slow, so that others are tried first and the status has it.
/// Once it `is_taken`, it goes on for as long as it likes.
pub(crate) async fn watched<N: Net, T>(
    node: &Node<N>,
    wanted: &ServicePort,
    candidate: &Candidate,
    is_taken: impl Fn() -> bool,
    trying: impl Future<Output = T>,
) -> T {
    let mut trying = std::pin::pin!(trying);
    let slow = BRIEFLY * 2;
    match timeout(slow, trying.as_mut()).await {
        Ok(tried) => tried,
        Err(_) => {
            if !is_taken() {
                let reason = format!("no answer for {} s; waiting", slow.as_secs());
                node.report(wanted, candidate, Outcome::Silent, reason);
            }
            trying.await
        }
    }
}

/// How an attempt tells whoever waits for it what came of it.
pub(crate) struct Reply<T>(oneshot::Sender<io::Result<T>>);

impl<T> Reply<T> {
    pub(crate) fn new() -> (Self, oneshot::Receiver<io::Result<T>>) {
        let (sender, outcome) = oneshot::channel();
        (Self(sender), outcome)
    }

    /// Says that the flow is taken, and what came of it.
    pub(crate) fn taken(self, outcome: T) {
        // Nobody may wait any more.
        let _ = self.0.send(Ok(outcome));
    }

    fn failed(self, error: io::Error) {
        let _ = self.0.send(Err(error));
    }
}

/// Connects to an endpoint, and goes on with what waits for that; gives what came of it, or `None` where that panicked.
/// Both are done on a thread of the endpoint's pod, in one task. The endpoint's addresses are tried one after the other,
/// the next at once where one refuses and after 2 s where it does not answer, which it still may then. `patience`: how
/// long all may take behind the last one's start, where not too many flows of the same `owner` wait there already; where
/// it is 2 s, all addresses together have no more. A thread that is blocked holds up none of this.
///
/// # Errors
/// What each address said, where none takes the connection; the guest still waits then.
pub(crate) async fn connect<N: Net, T: Send + 'static, R: Send + 'static, F>(
    node: &Node<N>,
    id: EndpointId,
    owner: &Owner,
    patience: Duration,
    guest: &Guest<T>,
    go_on: impl Fn(N::TcpStream, T, Reply<R>) -> F + Clone + Send + 'static,
) -> Result<Option<R>, ConnectError>
where
    F: Future<Output = ()> + Send + 'static,
{
    let endpoint = node.endpoints().get(&id).cloned();
    let Some(endpoint) = endpoint else {
        return Err(ConnectError::Away(io::Error::new(io::ErrorKind::NotFound, "the endpoint is gone")));
    };
    let patient = (patience > BRIEFLY).then(|| endpoint.patient.take(owner)).flatten();
    let patience = if patient.is_some() { patience } else { patience.min(BRIEFLY) };
    let round = guest.begin(patient);
    let mut addresses = endpoint.addresses().collect::<Vec<_>>().into_iter();
    let hurries = patience <= BRIEFLY;
    let each = if hurries { patience / addresses.len().max(1) as u32 } else { BRIEFLY };
    let mut waiting = Vec::new();
    let mut attempts = FuturesUnordered::new();
    let mut reasons = Vec::new();
    let mut deadline = None;
    let mut without_port = None;
    loop {
        if !round.is_taken()
            && let Some((number, addr)) = addresses.next()
            && (waiting.is_empty()
                || !endpoint.is_fallback(number)
                || !(hurries || endpoint.met.load(Ordering::Relaxed)))
        {
            match endpoint.pod.stock.take(DescriptorKind::TcpUnconnected, owner).await {
                Ok(stocked) => {
                    let socket = stocked.socket;
                    waiting.push(addr);
                    let (net, port, round, go_on) =
                        (node.net.clone(), endpoint.clone(), round.clone(), go_on.clone());
                    let (mut reply, outcome) = Reply::new();
                    let task = async move {
                        let connected = tokio::select! {
                            biased;
                            connected = net.connect_descriptor(socket, addr) => connected,
                            () = reply.0.closed() => return,
                        };
                        let stream = match connected {
                            Ok(stream) => stream,
                            Err(error) => return reply.failed(error),
                        };
                        // One that is too late is dropped, which resets it.
                        let Some(held) = round.take() else { return reply.failed(late()) };
                        port.answered(number);
                        go_on(stream, held, reply).await;
                    };
                    node.tasks.spawn_flow(&endpoint.pod.thread, true, task);
                    attempts.push(async move { (addr, outcome.await.ok()) });
                }
                Err(error) if attempts.is_empty() && reasons.is_empty() => {
                    round.end();
                    return Err(ConnectError::Away(error));
                }
                Err(error) => reasons.push(format!("{addr}: {error}")),
            }
        }
        let (now, is_last) = (Instant::now(), addresses.len() == 0);
        if hurries || is_last {
            deadline.get_or_insert(now + patience);
        }
        let until = deadline.filter(|_| is_last).unwrap_or(now + each);
        match timeout_at(until, attempts.next()).await {
            Ok(Some((_, Some(Ok(done))))) => return Ok(Some(done)),
            Ok(Some((addr, Some(Err(error))))) => {
                waiting.retain(|other| *other != addr);
                // The kernel's own patience is over.
                if error.kind() == io::ErrorKind::TimedOut {
                    waiting.push(addr);
                } else if error.kind() == io::ErrorKind::AddrNotAvailable {
                    // Nobody can bring it about that a flow comes by another address than others do.
                    addresses = Vec::new().into_iter();
                    without_port = Some(addr);
                } else {
                    reasons.push(format!("{addr}: {error}"));
                }
            }
            Ok(Some((addr, None))) => {
                waiting.retain(|other| *other != addr);
                reasons.push(format!("{addr}: the attempt panicked"));
            }
            Ok(None) | Err(_) if addresses.len() > 0 && !round.is_taken() => {}
            Ok(None) | Err(_) if round.end() => break,
            Ok(None) => return Ok(None),
            // One attempt has it. What it makes of it has no limit, and the others come too late.
            Err(_) => {
                while let Some((_, outcome)) = attempts.next().await {
                    if let Some(Ok(done)) = outcome {
                        return Ok(Some(done));
                    }
                }
                return Ok(None);
            }
        }
    }
    if let Some(addr) = without_port
        && waiting.is_empty()
    {
        endpoint.pod.party.note_no_port();
        return Err(ConnectError::NoPort(addr));
    }
    reasons.extend(waiting.iter().map(|addr| format!("{addr}: no answer")));
    reasons.extend(endpoint.not_dialled());
    if reasons.is_empty() {
        reasons.push("no address to connect to".into());
    }
    let reasons = reasons.join("; ");
    Err(if waiting.is_empty() { ConnectError::Refused(reasons) } else { ConnectError::Silent(reasons) })
}

/// Another attempt was first, or nobody waits any more.
fn late() -> io::Error {
    io::ErrorKind::TimedOut.into()
}
