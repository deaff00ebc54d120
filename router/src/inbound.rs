//! What peers dial, and the flows that they open to pods of this node.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use servicekeel_core::admission::{Admission, Network};
use servicekeel_core::flow::frame::{Cause, Open, Purpose, Refused};
use servicekeel_core::mesh::outcome::Outcome;
use servicekeel_core::mesh::table::{Candidate, Consumer};
use servicekeel_core::name::{Protocol, RouterId};
use servicekeel_runtime::net::{Listener, Net, Stream};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{debug, warn};

use crate::bounds::{Held, Owner};
use crate::endpoint::{AS_TCP, BRIEFLY, Reply};
use crate::guest::Guest;
use crate::links::{self, LinkError, Met, SEND_TIMEOUT};
use crate::node::{Node, ROUTE_PATIENCE};
use crate::peers::{Busy, IDLE_TIMEOUT, Peer, Standing};
use crate::tls::{Channel, ChannelError};
use crate::{datagrams, endpoint, flow, link};

/// An unused connection of a peer is closed a little later than the peer itself closes it.
const UNUSED: Duration = IDLE_TIMEOUT.saturating_add(Duration::from_secs(15));
/// So long a flow may wait for a connection that was made for it.
const FRESH: Duration = Duration::from_secs(3);
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
                            "too many unidentified connections; closing the oldest of the network with the most"
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
                            debug!(%from, %error, "connection rejected")
                        }
                        Some(Err(error @ LinkError::Crowd(..))) => {
                            node.counters.peers_refused.inc();
                            if let Some(suppressed) = node.crowds.permit() {
                                warn!(%from, %error, suppressed, "peer connection rejected");
                            }
                        }
                        Some(Err(error)) => {
                            node.counters.peers_refused.inc();
                            if let Some(error) = error.certificate() {
                                node.note_refused(from.ip(), error);
                            }
                            if error.is_alert() {
                                node.note_alert(from.ip(), &error.to_string());
                            }
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
            let (task, standing) = (node.clone(), Arc::new(met.standing));
            let flows = async move { self::flows(&task, met.channel, &met.peer, standing, met.place).await };
            node.tasks.spawn_flow(&node.own_threads, true, flows);
        }
        (Purpose::Datagrams, false) | (Purpose::DatagramsBack, true) => {
            // One carries all of a peer's sessions, and counts as one that carries no flow.
            let _place = met.place;
            datagrams::serve::run(node.clone(), met.channel, met.peer, &met.standing).await;
        }
        (Purpose::FlowsBack, false) => {
            drop(met.place);
            met.peer.put_dialled_back(node, met.channel, met.standing);
        }
        // The one that was asked for, if any.
        (Purpose::DatagramsBack, false) => met.peer.datagrams_dialled_back(met.channel, met.standing),
        // What this side dials to open flows on never comes here.
        (Purpose::Flows | Purpose::Datagrams, true) => {}
    }
}

/// Serves one flow after the other on a connection, until the peer closes it.
async fn flows<N: Net>(
    node: &Arc<Node<N>>,
    channel: Channel<N::TcpStream>,
    peer: &Arc<Peer<N>>,
    standing: Arc<Standing<N>>,
    mut place: Option<Held>,
) {
    // It goes from hand to hand: each of the tasks would have room for all of it, more than once.
    let mut channel = Box::new(channel);
    if channel.come_here().is_err() {
        return;
    }
    let mut relieved = node.relieved.subscribe();
    let mut used = false;
    loop {
        relieved.mark_unchanged();
        let Some(unused) = place.take().or_else(|| node.connections.take_sparing(&peer.holder)) else {
            debug!(peer = %peer.id, "too many unused connections from a peer; closing one");
            return;
        };
        let unused_for = UNUSED.min(standing.left(node.time()));
        let next = tokio::select! {
            biased;
            next = timeout(unused_for, flow::next_open(&mut channel, &peer.owner)) => next,
            () = standing.lost() => return,
            // The peer has another before long.
            _ = relieved.changed(), if used => return,
            () = outlived(node, &peer.holder), if !used => return,
        };
        used = true;
        let request = match next {
            Ok(Ok(Some(request))) => request,
            // Between two flows nothing is lost, however the connection ends.
            Ok(Ok(None) | Err(ChannelError::Cut | ChannelError::Io(_))) | Err(_) => return,
            Ok(Err(error @ ChannelError::Begun)) => {
                if let Some(suppressed) = node.crowds.permit() {
                    warn!(peer = %peer.id, %error, suppressed, "peer connection closed");
                }
                return;
            }
            Ok(Err(error)) => {
                node.counters.peers_refused.inc();
                if let Some(suppressed) = node.refusals.permit() {
                    warn!(peer = %peer.id, %error, suppressed, "peer violated the protocol; connection closed");
                }
                return;
            }
        };
        if standing.is_over(node.time()) {
            debug!(peer = %peer.id, "a flow on a connection of an expired certificate; it is closed");
            return;
        }
        let owner = peer.holder.for_consumer(request.consumer);
        let Some(held) = node.flows.take(&owner) else {
            let refused = peer.busy(node);
            if !refuse(&mut channel, &refused, &standing).await {
                return;
            }
            // It carries no flow still.
            place = Some(unused);
            continue;
        };
        drop(unused);
        let busy = Busy::new(peer.clone());
        let request = Arc::new(request);
        let guest = Guest::new(channel);
        let served = tokio::select! {
            biased;
            served = connect(node, (peer, &standing), &request, &owner, &guest) => served,
            // Before the answer the peer says nothing: it gave up, or broke the rules.
            () = guest.watch(|channel, cx| channel.poll_frame(cx).map(drop)) => return,
            () = lost(&standing, &guest) => return,
        };
        let done = match served {
            Ok(None) => return,
            Ok(Some((returned, done))) => {
                channel = returned;
                done && channel.come_here().is_ok()
            }
            Err(refused) => {
                let Some(back) = guest.take() else { return };
                channel = back;
                debug!(peer = %peer.id, wanted = %request.wanted, reason = %refused.reason, "flow rejected");
                refuse(&mut channel, &refused, &standing).await
            }
        };
        drop((busy, held));
        if !done || *node.draining.borrow() {
            return;
        }
    }
}

/// Says that a flow is refused, and whether the connection is good for another. One that does not read that is not.
async fn refuse<N: Net>(
    channel: &mut Channel<N::TcpStream>,
    refused: &Refused,
    standing: &Standing<N>,
) -> bool {
    tokio::select! {
        biased;
        said = timeout(SEND_TIMEOUT, flow::refuse(channel, refused)) => matches!(said, Ok(Ok(()))),
        () = standing.lost() => false,
    }
}

/// Resolves when a connection that no flow has used is to make room. A new one is what a flow waits for, for a moment.
async fn outlived<N: Net>(node: &Node<N>, owner: &Owner) {
    sleep(FRESH).await;
    let mut relieved = node.relieved.subscribe();
    // The node holds the sender for as long as anything runs.
    while relieved.changed().await.is_ok() && !node.connections.gives_back(owner) {}
}

/// Resolves when the path is lost while its flow is not served yet. One that is hears of it itself.
async fn lost<N: Net>(standing: &Standing<N>, guest: &Guest<Box<Channel<N::TcpStream>>>) {
    standing.lost().await;
    if guest.is_taken() {
        std::future::pending::<()>().await;
    }
}

/// A connection that has carried a flow, and whether it is free for the next.
type Served<N> = (Box<Channel<<N as Net>::TcpStream>>, bool);

/// Carries a flow, on a thread of the pod that serves it, since the socket is still the pod's.
async fn carry<N: Net>(
    node: Arc<Node<N>>,
    mut channel: Box<Channel<N::TcpStream>>,
    app: N::TcpStream,
    candidate: Candidate,
    (peer, standing): (Arc<Peer<N>>, Arc<Standing<N>>),
    request: Arc<Open>,
) -> Served<N> {
    node.report(&request.wanted, &candidate, Outcome::Taken, "");
    let _carrying = node.carrying(candidate);
    node.counters.flows_inbound.inc();
    let opened = tokio::select! {
        biased;
        opened = flow::accept(&mut channel) => opened,
        () = standing.lost() => Err(ChannelError::Lost),
    };
    // What tells of the connection need not wake two threads, while the flow lasts.
    if opened.and_then(|()| channel.come_here()).is_err() {
        app.reset();
        return (channel, false);
    }
    let count = |received, sent| node.counters.count_bytes(sent, received);
    let carried = flow::carry(&mut channel, app, &peer.owner, standing.lost(), count).await;
    if let Err(error) = &carried {
        debug!(peer = %peer.id, %error, "flow lost its path");
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
        warn!(%peer, %wanted, suppressed, "flow denied: `allow` does not include the peer's cluster");
    }
    // Whoever may not use it is not told that it is there.
    let reason = format!("{} does not export {wanted} to {}", node.id, peer.cluster);
    Err(Refused { cause: Cause::NotExported, reason })
}

/// Serves a flow by an endpoint of this node, to its end. `None` where that panicked.
///
/// # Errors
/// Why no endpoint takes it. The connection waits on.
async fn connect<N: Net>(
    node: &Arc<Node<N>>,
    (peer, standing): (&Arc<Peer<N>>, &Arc<Standing<N>>),
    request: &Arc<Open>,
    owner: &Owner,
    guest: &Guest<Box<Channel<N::TcpStream>>>,
) -> Result<Option<Served<N>>, Refused> {
    let wanted = &request.wanted;
    if wanted.protocol != Protocol::Tcp {
        return Err(Refused { cause: Cause::NotExported, reason: format!("{wanted} is not TCP") });
    }
    let deadline = Instant::now() + ROUTE_PATIENCE;
    let mut changed = node.changed.subscribe();
    loop {
        changed.mark_unchanged();
        let (mut answered, mut busy) = (false, false);
        let mut reason = String::from("none is there");
        let candidates = admit(node, &peer.id, request)?;
        let mut slow = None;
        for candidate in &candidates {
            let patience = if candidates.len() == 1 { AS_TCP } else { BRIEFLY };
            match attempt(node, (peer, standing), request, candidate, (owner, patience), guest).await {
                Ok(served) => return Ok(served),
                Err((outcome, text)) => {
                    answered |= outcome.is_answer();
                    busy |= outcome == Outcome::Rejected(Cause::Busy);
                    slow = slow.or(outcome.is_slow().then_some(candidate));
                    reason = text;
                }
            }
        }
        // As for a flow of this node: where no other takes it, a slow one has its time.
        if let Some(candidate) = slow.filter(|_| candidates.len() > 1) {
            match attempt(node, (peer, standing), request, candidate, (owner, AS_TCP), guest).await {
                Ok(served) => return Ok(served),
                Err((_, text)) => reason = text,
            }
        }
        // As for a flow of this node: a sidecar that restarts is a blip.
        if answered || timeout_at(deadline, changed.changed()).await.is_err() {
            let reason = format!("no endpoint of {wanted} at {} takes the connection: {reason}", node.id);
            // Room comes with time, and the peer asks again.
            let cause = if busy { Cause::Busy } else { Cause::Unreachable };
            return Err(Refused { cause, reason });
        }
    }
}

/// Tries one endpoint, and takes down how it went.
async fn attempt<N: Net>(
    node: &Arc<Node<N>>,
    (peer, standing): (&Arc<Peer<N>>, &Arc<Standing<N>>),
    request: &Arc<Open>,
    candidate: &Candidate,
    (owner, patience): (&Owner, Duration),
    guest: &Guest<Box<Channel<N::TcpStream>>>,
) -> Result<Option<Served<N>>, (Outcome, String)> {
    let Candidate::Local(id) = candidate else {
        return Err((Outcome::Away, "it is not on this node".into()));
    };
    let wanted = &request.wanted;
    let carry = {
        let (node, of) = (node.clone(), (peer.clone(), standing.clone()));
        let (candidate, request) = (candidate.clone(), request.clone());
        move |app, channel, reply: Reply<Served<N>>| {
            let carrying = carry(node.clone(), channel, app, candidate.clone(), of.clone(), request.clone());
            async move { reply.taken(carrying.await) }
        }
    };
    let trying = endpoint::connect(node, *id, owner, patience, guest, carry);
    let tried = endpoint::watched(node, wanted, candidate, || guest.is_taken(), trying).await;
    tried.map_err(|error| {
        let (outcome, reason) = (error.outcome(), error.to_string());
        node.report(wanted, candidate, outcome, &reason);
        (outcome, reason)
    })
}

#[cfg(test)]
mod tests {
    use servicekeel_core::flow::frame::Kind;
    use tokio::task::JoinSet;

    use super::*;
    use crate::peers::tests::{id, later, link, node, stand, web};
    use crate::tls::tests::channels;

    /// It has as many flows as it may, asks for ever more, and reads no answer.
    #[tokio::test]
    async fn a_peer_that_reads_no_refusal_keeps_its_place_and_for_a_while_only() {
        let node = node();
        let peer = node.peer(&id("b.local")).unwrap();
        assert!(peer.link_up(1, 7, link(), None).is_ok());
        let owner = peer.holder.for_consumer(None);
        let _flows: Vec<_> =
            std::iter::repeat_with(|| node.flows.take(&owner)).map_while(|held| held).collect();
        let request = Open { flow: 1, wanted: web("a.local"), namespace: None, consumer: None };
        let (near, mut far) = channels().await;
        let standing = Arc::new(stand(&peer, later(60)));
        let (task, of) = (node.clone(), peer.clone());
        let mut serving = JoinSet::new();
        serving.spawn(async move { flows(&task, near, &of, standing, None).await });
        let asks = async {
            loop {
                for _ in 0..100 {
                    far.send_message(Kind::Open, 0, &request).unwrap();
                }
                if timeout(Duration::from_millis(500), far.flush()).await.is_err() {
                    return;
                }
            }
        };
        timeout(Duration::from_secs(30), asks).await.expect("it never waits for the peer");
        assert!(serving.try_join_next().is_none());
        assert_eq!(node.connections.held(&peer.holder), 1, "it holds a connection that nobody counts");
        tokio::time::pause();
        let ends = timeout(2 * SEND_TIMEOUT, serving.join_next());
        ends.await.expect("it waits for ever").unwrap().unwrap();
        assert_eq!(node.connections.held(&peer.holder), 0);
    }
}
