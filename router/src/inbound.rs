//! What peers dial, and the flows that they open to pods of this node.

use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::flow::frame::{Cause, Open, Preface, Purpose, Refused};
use servicekeel_core::mesh::table::{Candidate, Consumer};
use servicekeel_core::name::{Protocol, RouterId};
use servicekeel_runtime::net::{Listener, Net};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use crate::node::Node;
use crate::peers::{IDLE_TIMEOUT, Peer};
use crate::tls::Channel;
use crate::{datagrams, endpoint, flow, links};

/// An unused connection of a peer is closed a little later than the peer itself closes it.
const UNUSED: Duration = IDLE_TIMEOUT.saturating_add(Duration::from_secs(15));

/// Accepts peers for ever.
pub(crate) async fn listen<N: Net>(node: Arc<Node<N>>, listener: N::TcpListener) {
    loop {
        let Ok(permit) = node.handshakes.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, from)) => {
                let owner = node.clone();
                let node = node.clone();
                owner.tasks.spawn(async move {
                    let accepted = links::accept(&node, stream).await;
                    drop(permit);
                    match accepted {
                        Ok((channel, preface)) => {
                            let purpose = preface.purpose;
                            serve(&node, channel, preface, purpose, false).await;
                        }
                        Err(error) => {
                            node.counters.peers_refused.inc();
                            warn!(%from, %error, "a connection to the peers' port is refused");
                        }
                    }
                });
            }
            Err(error) => {
                warn!(%error, "a peer can't be accepted; trying again");
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Serves a connection on which the peer opens flows, or puts it where this side opens them. `dialled`: this side
/// dialled it, for `purpose`.
pub(crate) async fn serve<N: Net>(
    node: &Arc<Node<N>>,
    channel: Channel<N::TcpStream>,
    preface: Preface,
    purpose: Purpose,
    dialled: bool,
) {
    let peer = node.peer(&preface.sender);
    match (purpose, dialled) {
        (Purpose::Link, _) => links::run(node, channel, preface, None).await,
        (Purpose::Flows, false) | (Purpose::FlowsBack, true) => flows(node, channel, &peer).await,
        (Purpose::Datagrams, false) | (Purpose::DatagramsBack, true) => {
            datagrams::serve::run(node.clone(), channel, peer).await;
        }
        (Purpose::FlowsBack, false) => peer.put_dialled_back(channel),
        (Purpose::DatagramsBack, false) => peer.datagrams_dialled_back(channel),
        // What this side dials to open flows on never comes here.
        (Purpose::Flows | Purpose::Datagrams, true) => {}
    }
}

/// Serves one flow after the other on a connection, until the peer closes it.
async fn flows<N: Net>(node: &Arc<Node<N>>, mut channel: Channel<N::TcpStream>, peer: &Arc<Peer<N>>) {
    let epoch = peer.epoch();
    loop {
        let next = tokio::select! {
            biased;
            next = timeout(UNUSED, flow::next_open(&mut channel)) => next,
            () = peer.lost(epoch) => return,
        };
        let request = match next {
            Ok(Ok(Some(request))) => request,
            Ok(Ok(None)) | Err(_) => return,
            Ok(Err(error)) => {
                warn!(peer = %peer.id, %error, "a peer broke the protocol; its connection is closed");
                node.counters.peers_refused.inc();
                return;
            }
        };
        let Ok(permit) = node.flows.clone().try_acquire_owned() else {
            let refused =
                Refused { cause: Cause::Busy, reason: "the router carries as many flows as it may".into() };
            if flow::refuse(&mut channel, &refused).await.is_err() {
                return;
            }
            continue;
        };
        let done = match connect(node, &peer.id, &request).await {
            Ok((app, candidate)) => carry(node, &mut channel, app, candidate, peer, epoch).await,
            Err(refused) => {
                debug!(peer = %peer.id, wanted = %request.wanted, reason = %refused.reason, "a flow is refused");
                flow::refuse(&mut channel, &refused).await.is_ok()
            }
        };
        drop(permit);
        if !done || *node.draining.borrow() {
            return;
        }
    }
}

async fn carry<N: Net>(
    node: &Arc<Node<N>>,
    channel: &mut Channel<N::TcpStream>,
    app: N::TcpStream,
    candidate: Candidate,
    peer: &Arc<Peer<N>>,
    epoch: u64,
) -> bool {
    let _carrying = node.carrying(candidate);
    node.counters.flows_inbound.inc();
    if flow::accept(channel).await.is_err() {
        return false;
    }
    let carried = flow::carry(channel, app, peer.lost(epoch)).await;
    node.counters.bytes_sent.inc_by(carried.received);
    node.counters.bytes_received.inc_by(carried.sent);
    if let Err(error) = &carried.end {
        debug!(peer = %peer.id, %error, "a flow lost its path");
        node.counters.flows_lost.inc();
    }
    carried.end.is_ok()
}

/// Whether a peer's consumer may use what it wants here, or why not.
pub(crate) fn admit<N: Net>(
    node: &Node<N>,
    peer: &RouterId,
    request: &Open,
) -> Result<Vec<Candidate>, Refused> {
    let wanted = &request.wanted;
    let consumer = Consumer { cluster: &peer.cluster, namespace: request.namespace.as_ref() };
    let (permitted, candidates) = node.local_candidates(wanted, consumer);
    let refused = |cause, reason| Err(Refused { cause, reason });
    match permitted {
        None => refused(Cause::NotExported, format!("{} does not export {wanted}", node.id)),
        Some(false) => refused(Cause::NotAllowed, format!("{wanted} is not open to {}", peer.cluster)),
        Some(true) => Ok(candidates),
    }
}

async fn connect<N: Net>(
    node: &Arc<Node<N>>,
    peer: &RouterId,
    request: &Open,
) -> Result<(N::TcpStream, Candidate), Refused> {
    let wanted = &request.wanted;
    let mut reason = format!("{wanted} is not TCP");
    if wanted.protocol == Protocol::Tcp {
        for candidate in admit(node, peer, request)? {
            let Candidate::Local(id) = candidate else { continue };
            match endpoint::connect(node, id).await {
                Ok(app) => {
                    node.succeeded(wanted, &candidate);
                    return Ok((app, candidate));
                }
                Err(error) => {
                    node.failed(wanted, &candidate);
                    reason = format!("no endpoint of {wanted} at {} takes the connection: {error}", node.id);
                }
            }
        }
    }
    Err(Refused { cause: Cause::Unreachable, reason })
}
