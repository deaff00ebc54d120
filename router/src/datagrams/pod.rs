//! One UDP session with a pod of this node, by a socket of the pod's network namespace.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::flow::frame::{Cause, Refused};
use servicekeel_core::handoff::DescriptorKind;
use servicekeel_core::mesh::outcome::Outcome;
use servicekeel_core::mesh::table::Candidate;
use servicekeel_core::name::ServicePort;
use servicekeel_runtime::net::{Datagrams, Net};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::debug;

use super::link::Outbox;
use super::{QUEUE, Queued, Signs, receive};
use crate::node::Node;
use crate::rooms::Account;

/// How often it is told at most that an endpoint which has answered refuses.
const TELL: Duration = Duration::from_secs(1);

/// Where the pod's answers go.
pub(crate) enum Answers<N: Net> {
    /// To a client of this node, from the import's own socket.
    Client(Arc<N::UdpSocket>, SocketAddr, Signs),
    /// To another router; what waits counts against it.
    Session(Outbox<N>, u64, Arc<Account>),
}

impl<N: Net> Answers<N> {
    async fn send(&self, datagram: &[u8]) -> bool {
        match self {
            Self::Client(socket, client, signs) => {
                signs.answer();
                socket.send_to(datagram, *client).await.is_ok()
            }
            Self::Session(outbox, session, owner) => {
                Queued::new(datagram, owner).is_some_and(|datagram| outbox.send_datagram(*session, datagram))
            }
        }
    }
}

/// The queue to a session that [`run`] serves.
pub(crate) fn queue() -> (mpsc::Sender<Queued>, mpsc::Receiver<Queued>) {
    mpsc::channel(QUEUE)
}

/// Carries one session until its queue closes or its endpoint is gone; says why no endpoint takes its first datagram.
pub(crate) async fn run<N: Net>(
    node: &Arc<Node<N>>,
    wanted: &ServicePort,
    candidates: Vec<Candidate>,
    mut queue: mpsc::Receiver<Queued>,
    answers: Answers<N>,
) -> Result<(), Refused> {
    let Ok(_permit) = node.flows.clone().try_acquire_owned() else {
        node.counters.datagrams_dropped.inc();
        let reason = "the router carries as many flows as it may".into();
        return Err(Refused { cause: Cause::Busy, reason });
    };
    // The last one, kept until something answers: it is sent again to the next address where one refuses.
    let Some(mut last) = queue.recv().await else { return Ok(()) };
    let mut reason = String::from("none is there");
    for candidate in candidates {
        let Candidate::Local(id) = candidate else { continue };
        let Some(endpoint) = node.endpoints().get(&id).cloned() else { continue };
        let taken = endpoint.pod.stock.take(DescriptorKind::UdpUnconnected).await;
        let adopted = match taken {
            Ok(descriptor) => node.net.adopt_udp(descriptor).await,
            Err(error) => Err(error),
        };
        let socket = match adopted {
            Ok(socket) => socket,
            Err(error) => {
                reason = error.to_string();
                node.report(wanted, &candidate, Outcome::Away, &reason);
                continue;
            }
        };
        let addresses: Vec<_> = endpoint.addresses().collect();
        for (number, addr) in addresses {
            if let Err(error) = socket.connect(addr).await {
                reason = format!("{addr}: {error}");
                continue;
            }
            let health = |outcome, reason: &str| {
                if outcome == Outcome::Taken {
                    endpoint.answered(number);
                }
                node.report(wanted, &candidate, outcome, reason);
            };
            match converse(node, &socket, addr, &mut last, &mut queue, &answers, health).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    debug!(%wanted, %addr, %error, "an address takes no datagrams");
                    reason = format!("{addr}: {error}");
                }
            }
        }
        node.report(wanted, &candidate, Outcome::Refused, &reason);
    }
    node.counters.datagrams_dropped.inc();
    let reason = format!("no endpoint of {wanted} at {} takes the datagram: {reason}", node.id);
    Err(Refused { cause: Cause::Unreachable, reason })
}

/// Carries datagrams both ways. An error before the first answer, however late, means that the next address may do better
/// with the `last` datagram. `report` is told the first answer, and refusals behind an answer.
async fn converse<N: Net>(
    node: &Node<N>,
    socket: &N::UdpSocket,
    addr: SocketAddr,
    last: &mut Queued,
    queue: &mut mpsc::Receiver<Queued>,
    answers: &Answers<N>,
    report: impl Fn(Outcome, &str),
) -> io::Result<()> {
    // An answer came at any time; and it was the last thing that came.
    let (mut heard, mut well) = (false, false);
    let mut told: Option<Instant> = None;
    // An ICMP refusal: the port is closed. It comes to whoever asks the socket next, so both ways end here.
    let mut refuse = |error: io::Error, heard: bool, well: &mut bool| {
        if !heard {
            return Err(error);
        }
        // One that answered before may only be restarting.
        debug!(%addr, %error, "an endpoint refuses datagrams");
        node.counters.datagrams_dropped.inc();
        let now = Instant::now();
        if std::mem::replace(well, false) || told.is_none_or(|told| now - told >= TELL) {
            told = Some(now);
            report(Outcome::Refused, &format!("{addr}: {error}"));
        }
        Ok(())
    };
    socket.send_to(&last.bytes, addr).await?;
    node.counters.datagrams.inc();
    loop {
        tokio::select! {
            biased;
            received = receive(socket, &node.buffers) => match received {
                Ok((datagram, _)) => {
                    if !well {
                        (heard, well) = (true, true);
                        report(Outcome::Taken, "");
                    }
                    let sent = answers.send(&datagram).await;
                    if sent { node.counters.datagrams.inc() } else { node.counters.datagrams_dropped.inc() };
                }
                Err(error) => refuse(error, heard, &mut well)?,
            },
            datagram = queue.recv() => {
                let Some(datagram) = datagram else { return Ok(()) };
                *last = datagram;
                match socket.send_to(&last.bytes, addr).await {
                    Ok(()) => {
                        node.counters.datagrams.inc();
                    },
                    Err(error) => refuse(error, heard, &mut well)?,
                }
            }
        }
    }
}
