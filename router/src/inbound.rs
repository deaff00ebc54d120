//! What peers dial, and the flows that they open to pods of this node.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use servicekeel_core::admission::{Admission, Network};
use servicekeel_core::flow::frame::{Cause, Open, Purpose, Refused};
use servicekeel_core::mesh::outcome::Outcome;
use servicekeel_core::mesh::table::{Candidate, Consumer};
use servicekeel_core::name::{Protocol, RouterId, ServicePort};
use servicekeel_runtime::net::{Listener, Net, PodThread, Stream};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{debug, warn};

use crate::endpoint::{AS_TCP, BRIEFLY};
use crate::links::{self, LinkError, Met};
use crate::node::{Node, ROUTE_PATIENCE};
use crate::peers::{Busy, IDLE_TIMEOUT, Peer, Standing};
use crate::tls::{Channel, ChannelError};
use crate::{datagrams, endpoint, flow, link};

/// An unused connection of a peer is closed a little later than the peer itself closes it.
const UNUSED: Duration = IDLE_TIMEOUT.saturating_add(Duration::from_secs(15));
/// The most handshakes with peers at once, half of them for peers that are known by their address.
const MAX_HANDSHAKES: usize = 256;
/// As many where descriptors are short.
const FEW_HANDSHAKES: usize = 8;
/// How long to wait where the system can't give another descriptor.
const PAUSE: Duration = Duration::from_millis(50);
/// Between two connections where descriptors are short.
const PACE: Duration = Duration::from_millis(10);

/// The handshakes that go on.
#[derive(Default)]
struct Handshakes(Mutex<Going>);

#[derive(Default)]
struct Going {
    admission: Admission,
    /// Dropped, they end.
    keep: BTreeMap<u64, oneshot::Sender<()>>,
}

impl Handshakes {
    fn lock(&self) -> MutexGuard<'_, Going> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one in, of `most`. The receiver fails when it is to make room. Says from where those came that do so now.
    fn begin(
        &self,
        id: u64,
        from: IpAddr,
        known: bool,
        most: usize,
    ) -> (oneshot::Receiver<()>, Vec<Network>) {
        let (keep, evicted) = oneshot::channel();
        let mut going = self.lock();
        going.keep.insert(id, keep);
        let mut gone = Vec::new();
        for (id, from) in going.admission.enter(id, from, known, most) {
            going.keep.remove(&id);
            gone.push(from);
        }
        (evicted, gone)
    }

    fn end(&self, id: u64) {
        let mut going = self.lock();
        going.admission.leave(id);
        going.keep.remove(&id);
    }
}

/// Accepts peers for ever.
pub(crate) async fn listen<N: Net>(node: Arc<Node<N>>, listener: N::TcpListener) {
    let handshakes = Arc::new(Handshakes::default());
    let mut failing = false;
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                failing = false;
                let id = node.next_id();
                let (task, handshakes) = (node.clone(), handshakes.clone());
                let short = node.relieve();
                let most = if short { FEW_HANDSHAKES } else { MAX_HANDSHAKES };
                let known = node.knows(from.ip());
                let (evicted, gone) = handshakes.begin(id, from.ip(), known, most);
                for network in gone {
                    node.counters.peers_refused.inc();
                    if let Some(suppressed) = node.crowds.permit() {
                        warn!(
                            from = %network,
                            limit = most,
                            suppressed,
                            "too many connections that do not say who they are: the oldest of the network with most of them is closed"
                        );
                    }
                }
                node.tasks.spawn(async move {
                    let node = task;
                    let accepted = tokio::select! {
                        biased;
                        _ = evicted => None,
                        accepted = links::accept(&node, stream, from) => Some(accepted),
                    };
                    handshakes.end(id);
                    match accepted {
                        Some(Ok(met)) => serve(&node, met, false).await,
                        Some(Err(error @ LinkError::Short)) => {
                            debug!(%from, %error, "a connection is refused")
                        }
                        Some(Err(error)) => {
                            node.counters.peers_refused.inc();
                            if let Some(suppressed) = node.refusals.permit() {
                                warn!(%from, %error, suppressed, "peer connection rejected");
                            }
                        }
                        None => debug!(%from, "handshake evicted to make room"),
                    }
                });
                if short {
                    // What makes room, or is refused, is closed before the next one takes a descriptor of the reserve.
                    sleep(PACE).await;
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    warn!(%error, "cannot accept peers; retrying");
                }
                node.relieve();
                sleep(PAUSE).await;
            }
        }
    }
}

/// Serves a connection on which the peer opens flows, or puts it where this side opens them. `dialled`: this side
/// dialled it.
pub(crate) async fn serve<N: Net>(node: &Arc<Node<N>>, met: Met<N>, dialled: bool) {
    match (met.purpose, dialled) {
        // Why it does not come to be is told where it is decided.
        (Purpose::Link, _) => drop(link::run(node, met, None).await),
        (Purpose::Flows, false) | (Purpose::FlowsBack, true) => {
            flows(node, met.channel, &met.peer, Arc::new(met.standing)).await;
        }
        (Purpose::Datagrams, false) | (Purpose::DatagramsBack, true) => {
            datagrams::serve::run(node.clone(), met.channel, met.peer, &met.standing).await;
        }
        (Purpose::FlowsBack, false) => met.peer.put_dialled_back(met.channel, met.standing),
        (Purpose::DatagramsBack, false) => met.peer.datagrams_dialled_back(met.channel, met.standing),
        // What this side dials to open flows on never comes here.
        (Purpose::Flows | Purpose::Datagrams, true) => {}
    }
}

/// Serves one flow after the other on a connection, until the peer closes it.
async fn flows<N: Net>(
    node: &Arc<Node<N>>,
    mut channel: Channel<N::TcpStream>,
    peer: &Arc<Peer<N>>,
    standing: Arc<Standing<N>>,
) {
    let mut relieved = node.relieved.subscribe();
    let mut used = false;
    loop {
        relieved.mark_unchanged();
        let Ok(unused) = peer.unused.clone().try_acquire_owned() else {
            debug!(peer = %peer.id, "a peer has more unused connections than it may; one is closed");
            return;
        };
        let next = tokio::select! {
            biased;
            next = timeout(UNUSED, flow::next_open(&mut channel)) => next,
            () = standing.lost() => return,
            // The peer has another before long. A new one is what a flow waits for.
            _ = relieved.changed(), if used => return,
        };
        drop(unused);
        used = true;
        let request = match next {
            Ok(Ok(Some(request))) => request,
            // Between two flows nothing is lost, however the connection ends.
            Ok(Ok(None) | Err(ChannelError::Cut | ChannelError::Io(_))) | Err(_) => return,
            Ok(Err(error)) => {
                node.counters.peers_refused.inc();
                if let Some(suppressed) = node.refusals.permit() {
                    warn!(peer = %peer.id, %error, suppressed, "peer violated the protocol; connection closed");
                }
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
        let busy = Busy::new(peer.clone());
        let connected = tokio::select! {
            biased;
            connected = connect(node, &peer.id, &request) => connected,
            // Before the answer the peer says nothing: it gave up, or broke the rules.
            _ = channel.recv() => return,
            () = standing.lost() => return,
        };
        let done = match connected {
            Ok((app, candidate, thread)) => {
                // On the pod's own thread, since the socket is still the pod's.
                let flow = carry(node.clone(), channel, app, candidate, peer.clone(), standing.clone());
                let Some((returned, done)) = thread.run_flow(flow).await else { return };
                channel = returned;
                done
            }
            Err(refused) => {
                debug!(peer = %peer.id, wanted = %request.wanted, reason = %refused.reason, "a flow is refused");
                flow::refuse(&mut channel, &refused).await.is_ok()
            }
        };
        drop((busy, permit));
        if !done || *node.draining.borrow() {
            return;
        }
    }
}

/// Carries a flow, and gives back the connection and whether it is free for the next.
async fn carry<N: Net>(
    node: Arc<Node<N>>,
    mut channel: Channel<N::TcpStream>,
    app: N::TcpStream,
    candidate: Candidate,
    peer: Arc<Peer<N>>,
    standing: Arc<Standing<N>>,
) -> (Channel<N::TcpStream>, bool) {
    let _carrying = node.carrying(candidate);
    node.counters.flows_inbound.inc();
    if flow::accept(&mut channel).await.is_err() {
        app.reset();
        return (channel, false);
    }
    let count = |received, sent| node.counters.count_bytes(sent, received);
    let carried = flow::carry(&mut channel, app, &peer.owner, standing.lost(), count).await;
    if let Err(error) = &carried {
        debug!(peer = %peer.id, %error, "a flow lost its path");
        node.counters.flows_lost.inc();
    }
    (channel, carried.is_ok())
}

/// Whether a peer's consumer may use what it wants here, or why not.
pub(crate) fn admit<N: Net>(
    node: &Node<N>,
    peer: &RouterId,
    request: &Open,
) -> Result<Vec<Candidate>, Refused> {
    let wanted = &request.wanted;
    // What the peer says of its consumer's namespace is a claim: a rule by namespace lets nobody in.
    let consumer = Consumer { cluster: &peer.cluster, namespace: None };
    let (permitted, candidates) = node.local_candidates(wanted, consumer);
    if permitted == Some(true) {
        return Ok(candidates);
    }
    if permitted == Some(false)
        && let Some(suppressed) = node.refusals.permit()
    {
        warn!(%peer, %wanted, suppressed, "a flow is refused: `allow` does not let the peer's cluster in");
    }
    // Whoever may not use it is not told that it is there.
    let reason = format!("{} does not export {wanted} to {}", node.id, peer.cluster);
    Err(Refused { cause: Cause::NotExported, reason })
}

async fn connect<N: Net>(
    node: &Arc<Node<N>>,
    peer: &RouterId,
    request: &Open,
) -> Result<(N::TcpStream, Candidate, N::Thread), Refused> {
    let wanted = &request.wanted;
    if wanted.protocol != Protocol::Tcp {
        return Err(Refused { cause: Cause::NotExported, reason: format!("{wanted} is not TCP") });
    }
    let deadline = Instant::now() + ROUTE_PATIENCE;
    let mut changed = node.changed.subscribe();
    loop {
        changed.mark_unchanged();
        let mut answered = false;
        let mut reason = String::from("none is there");
        let candidates = admit(node, peer, request)?;
        let mut slow = None;
        for candidate in &candidates {
            let patience = if candidates.len() == 1 { AS_TCP } else { BRIEFLY };
            match attempt(node, wanted, candidate, patience).await {
                Ok((app, thread)) => return Ok((app, candidate.clone(), thread)),
                Err((outcome, text)) => {
                    answered |= outcome.is_answer();
                    slow = slow.or(outcome.is_slow().then_some(candidate));
                    reason = text;
                }
            }
        }
        // As for a flow of this node: where no other takes it, a slow one has its time.
        if let Some(candidate) = slow.filter(|_| candidates.len() > 1) {
            match attempt(node, wanted, candidate, AS_TCP).await {
                Ok((app, thread)) => return Ok((app, candidate.clone(), thread)),
                Err((_, text)) => reason = text,
            }
        }
        // As for a flow of this node: a sidecar that restarts is a blip.
        if answered || timeout_at(deadline, changed.changed()).await.is_err() {
            let reason = format!("no endpoint of {wanted} at {} takes the connection: {reason}", node.id);
            return Err(Refused { cause: Cause::Unreachable, reason });
        }
    }
}

/// Tries one endpoint, and takes down how it went.
async fn attempt<N: Net>(
    node: &Arc<Node<N>>,
    wanted: &ServicePort,
    candidate: &Candidate,
    patience: Duration,
) -> Result<(N::TcpStream, N::Thread), (Outcome, String)> {
    let Candidate::Local(id) = candidate else {
        return Err((Outcome::Away, "it is not of this node".into()));
    };
    let trying = endpoint::connect(node, *id, patience);
    match endpoint::watched(node, wanted, candidate, trying).await {
        Ok(connected) => {
            node.report(wanted, candidate, Outcome::Taken, "");
            Ok(connected)
        }
        Err(error) => {
            let (outcome, reason) = (error.outcome(), error.to_string());
            node.report(wanted, candidate, outcome, &reason);
            Err((outcome, reason))
        }
    }
}
