//! Flows of this node's pods: from the import's socket to a pod here, or to another router.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use servicekeel_core::flow::frame::{Cause, Open};
use servicekeel_core::mesh::outcome::Outcome;
use servicekeel_core::mesh::table::Candidate;
use servicekeel_core::name::{RouterId, ServicePort};
use servicekeel_runtime::net::{Net, Stream};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::debug;

use crate::bounds::{Held, Owner};
use crate::ended::{End, gone, has_ended};
use crate::endpoint::{self, AS_TCP, BRIEFLY, Reply};
use crate::flow::{self, Answer};
use crate::guest::Guest;
use crate::imports::Import;
use crate::node::{Node, ROUTE_PATIENCE};
use crate::peers::Checkout;
use crate::tls::ChannelError;

/// How much longer the other router may take to say whether the flow is open than its pod may take to answer.
const OPEN_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a question waits on a connection that was used before until its system has acknowledged it, at the least ...
const UNHEARD: Duration = Duration::from_millis(500);
/// ... and as a multiple of the time after which the path sends again: then it has done so twice.
const RETRANSMITS: u32 = 4;
/// Pauses between the attempts of a flow where an endpoint's router has no room for more flows of this one.
const BUSY_PAUSES: [u64; 4] = [100, 200, 400, 800];
/// Why a client that has ended is reset: it may have wanted an answer.
const MADE_ROOM: &str = "the client had ended, and as many wait as may: it makes room for another";
/// How long the room that a client has made takes to be there, also at another router.
const MADE: Duration = Duration::from_millis(100);

/// Carries one connection of a pod to a service, to its end, on a thread of the pod. It is `held` in the pod's name.
pub(crate) async fn flow<N: Net>(node: Arc<Node<N>>, app: N::TcpStream, import: Arc<Import>, held: Held) {
    let wanted = &import.wanted;
    let owner = held.owner().clone();
    let guest = Guest::new((app, held));
    let found = tokio::select! {
        biased;
        found = find(&node, &guest, &import, &owner) => Ok(found),
        end = gone(&guest, &import.ended) => Err(end),
    };
    let Some((app, _held)) = guest.take() else { return };
    match found {
        // Then it has been taken.
        Ok(Ok(Path::Here)) => {}
        Ok(Ok(Path::There(connection, candidate))) => {
            import.leaves_node.store(true, Ordering::Relaxed);
            carry(&node, app, *connection, candidate, wanted).await;
        }
        Ok(Err(reason)) => {
            import.tell_no_flow(&node, reason);
            node.counters.flows_failed.inc();
            app.reset();
        }
        Err(End::GaveUp) => {
            debug!(%wanted, "client gave up before an endpoint accepted its flow");
            app.reset();
        }
        Err(End::MadeRoom) => {
            import.tell_no_flow(&node, Some(MADE_ROOM.into()));
            node.counters.flows_failed.inc();
            app.reset();
        }
    }
}

/// A client that waits for an endpoint, and the room that its flow takes.
type Client<N> = Guest<(<N as Net>::TcpStream, Held)>;

/// Finds an endpoint that takes a flow: the next one where one refuses, or is slow. Where there is no other than those
/// that are slow, the first of them has as long as TCP would take.
///
/// # Errors
/// The last endpoint's reason; none where there is no endpoint.
async fn find<N: Net>(
    node: &Arc<Node<N>>,
    client: &Client<N>,
    import: &Arc<Import>,
    owner: &Owner,
) -> Result<Path<N>, Option<String>> {
    let wanted = &import.wanted;
    let mut last = None;
    let deadline = Instant::now() + ROUTE_PATIENCE;
    let mut changed = node.changed.subscribe();
    let mut busy_pauses = BUSY_PAUSES.into_iter().map(Duration::from_millis);
    loop {
        changed.mark_unchanged();
        let candidates = node.candidates(wanted);
        let (mut answered, mut busy) = (false, false);
        let mut slow = None;
        for candidate in &candidates {
            let tried = match candidates.len() {
                1 => patiently(node, client, candidate, import, owner).await,
                _ => attempt(node, client, candidate, import, (owner, BRIEFLY)).await,
            };
            match tried {
                Ok(path) => return Ok(path),
                Err((outcome, reason)) => {
                    answered |= outcome.is_answer();
                    busy |= outcome == Outcome::Rejected(Cause::Busy);
                    slow = slow.or(outcome.is_slow().then_some(candidate));
                    last = Some(reason);
                }
            }
        }
        if let Some(candidate) = slow.filter(|_| candidates.len() > 1) {
            match patiently(node, client, candidate, import, owner).await {
                Ok(path) => return Ok(path),
                Err((_, reason)) => last = Some(reason),
            }
        }
        // Room comes with every flow that ends, and a burst waits here as it does at this router's own bound.
        if busy && let Some(pause) = busy_pauses.next() {
            sleep(pause).await;
            continue;
        }
        // Endpoints that refuse are an answer; none, or only those of a sidecar that restarts, may be a blip.
        if answered || timeout_at(deadline, changed.changed()).await.is_err() {
            return Err(last);
        }
    }
}

/// Tries one candidate for as long as TCP would. Where as many of the pod's flows wait there as may, a client that has ended
/// makes room for one that has not.
async fn patiently<N: Net>(
    node: &Arc<Node<N>>,
    client: &Client<N>,
    candidate: &Candidate,
    import: &Arc<Import>,
    owner: &Owner,
) -> Result<Path<N>, (Outcome, String)> {
    loop {
        let begun = Instant::now();
        let tried = attempt(node, client, candidate, import, (owner, AS_TCP)).await;
        // Here, or at the router where it is.
        let silent = matches!(&tried, Err((Outcome::Silent | Outcome::Rejected(Cause::Unreachable), _)));
        let was_cut_short = silent && (BRIEFLY..AS_TCP / 2).contains(&begun.elapsed());
        if !was_cut_short || has_ended(client) || !import.ended.make_room() {
            return tried;
        }
        sleep(MADE).await;
    }
}

/// Tries one candidate, and takes down how it went.
async fn attempt<N: Net>(
    node: &Arc<Node<N>>,
    client: &Client<N>,
    candidate: &Candidate,
    import: &Arc<Import>,
    (owner, patience): (&Owner, Duration),
) -> Result<Path<N>, (Outcome, String)> {
    let wanted = &import.wanted;
    let trying = async {
        match candidate {
            Candidate::Local(id) => {
                let (task, import, taken) = (node.clone(), import.clone(), candidate.clone());
                let carry = move |service, client, taken_by: Reply<()>| {
                    carry_here(task.clone(), client, service, taken.clone(), import.clone(), taken_by)
                };
                match endpoint::connect(node, *id, owner, patience, client, carry).await {
                    Ok(_) => Ok(Path::Here),
                    Err(error) => Err((error.outcome(), error.to_string())),
                }
            }
            Candidate::Remote(router) => {
                // The other router tries one address after the other, and has the last word on why none answers.
                let behind = if patience > BRIEFLY { 2 * BRIEFLY } else { Duration::ZERO };
                let connection = open(node, router, wanted, owner, patience + behind + OPEN_TIMEOUT).await?;
                node.report(wanted, candidate, Outcome::Taken, "");
                Ok(Path::There(Box::new(connection), candidate.clone()))
            }
        }
    };
    let tried = endpoint::watched(node, wanted, candidate, || client.is_taken(), trying).await;
    if let Err((outcome, reason)) = &tried {
        debug!(%wanted, ?candidate, %reason, "endpoint did not accept the flow; trying the next");
        node.report(wanted, candidate, *outcome, reason);
    }
    tried
}

enum Path<N: Net> {
    /// To a pod of this node. It has been, to its end.
    Here,
    There(Box<Checkout<N>>, Candidate),
}

/// Carries a flow between two pods of this node, on a thread of the one that serves it.
async fn carry_here<N: Net>(
    node: Arc<Node<N>>,
    (app, _held): (N::TcpStream, Held),
    service: N::TcpStream,
    candidate: Candidate,
    import: Arc<Import>,
    reply: Reply<()>,
) {
    let wanted = &import.wanted;
    import.leaves_node.store(false, Ordering::Relaxed);
    import.taken.put(reply);
    node.report(wanted, &candidate, Outcome::Taken, "");
    let _carrying = node.carrying(candidate);
    node.counters.flows_local.inc();
    let counting = node.clone();
    let count = move |sent, received| counting.counters.count_bytes(sent, received);
    if let Err(error) = node.net.splice(app, service, count).await {
        debug!(%wanted, %error, "flow reset");
    }
}

/// Carries a flow to another router.
async fn carry<N: Net>(
    node: &Arc<Node<N>>,
    app: N::TcpStream,
    mut connection: Checkout<N>,
    candidate: Candidate,
    wanted: &ServicePort,
) {
    let _carrying = node.carrying(candidate);
    node.counters.flows_outbound.inc();
    let lost = connection.standing.lost();
    let peer = connection.peer.clone();
    let count = |sent, received| node.counters.count_bytes(sent, received);
    match flow::carry(&mut connection.channel, app, &peer.owner, lost, count).await {
        Ok(()) => connection.put_back(node),
        Err(error) => {
            debug!(%wanted, peer = %peer.id, %error, "flow lost its path; reset");
            node.counters.flows_lost.inc();
        }
    }
}

/// Opens a flow at another router, on a connection of the pool or a new one.
async fn open<N: Net>(
    node: &Arc<Node<N>>,
    router: &RouterId,
    wanted: &ServicePort,
    owner: &Owner,
    limit: Duration,
) -> Result<Checkout<N>, (Outcome, String)> {
    let refused = |reason: String| (Outcome::Refused, reason);
    let peer = node.peer(router).ok_or_else(|| refused("it is not known any more".into()))?;
    let consumer = owner.number();
    let request = Open { flow: node.seed(), wanted: wanted.clone(), namespace: None, consumer };
    let deadline = Instant::now() + limit;
    let mut broke = false;
    // Where the connection is found dead, nothing was lost by it but time.
    loop {
        let mut connection = peer.checkout(node).await.map_err(|error| {
            // Behind a link that broke there is no answer yet.
            let outcome = if broke { Outcome::Away } else { Outcome::Refused };
            (outcome, error.to_string())
        })?;
        let asked = Instant::now();
        match ask(&mut connection, &request, deadline).await {
            Ok(Answer::Opened) => return Ok(connection),
            Ok(Answer::Refused(refused)) => {
                connection.put_back(node);
                if refused.cause == Cause::Busy {
                    peer.note_full_there(&refused.reason);
                }
                return Err((Outcome::Rejected(refused.cause), refused.reason));
            }
            Err(NoAnswer::Broken(error)) if connection.pooled => {
                debug!(peer = %router, %error, "pooled connection was dead")
            }
            Err(NoAnswer::Unheard) if connection.pooled && Instant::now() < deadline => {
                debug!(peer = %router, "pooled connection is silent; trying another");
                peer.suspect(asked);
            }
            Err(NoAnswer::Path) => {
                debug!(peer = %router, "link down while a flow waited for an answer");
                broke = true;
            }
            Err(error @ (NoAnswer::Broken(_) | NoAnswer::Unheard)) => {
                return Err(refused(error.to_string()));
            }
            Err(NoAnswer::Late) => {
                return Err((Outcome::Silent, format!("{router} did not answer for {} s", limit.as_secs())));
            }
        }
    }
}

/// Why another router said nothing to a flow.
#[derive(Debug, thiserror::Error)]
enum NoAnswer {
    #[error("{0}")]
    Broken(#[from] ChannelError),
    /// Its system has not acknowledged the question.
    #[error("data sent to the peer is not acknowledged")]
    Unheard,
    #[error("link down")]
    Path,
    #[error("no answer in time")]
    Late,
}

/// Asks for a flow. How long the answer may take is the endpoint's affair, for as long as the path is known to be good:
/// the question is acknowledged, and no link has broken since.
async fn ask<N: Net>(
    connection: &mut Checkout<N>,
    request: &Open,
    deadline: Instant,
) -> Result<Answer, NoAnswer> {
    let Checkout { peer, channel, standing, pooled, .. } = connection;
    // Since it was taken from the pool: a break in the very moment counts too.
    let breaks = standing.breaks();
    let asking = async {
        let asked = Instant::now();
        let by = |wait| deadline.min(asked + wait);
        let unheard = if *pooled { UNHEARD } else { BRIEFLY + OPEN_TIMEOUT };
        if let Ok(answer) = timeout_at(by(unheard), flow::open(channel, request)).await {
            return Ok(answer?);
        }
        // Most are answered before the system need be asked how long the path takes.
        if *pooled {
            let wait = channel.retransmits_after().map_or(Duration::MAX, |after| after * RETRANSMITS);
            let wait = wait.max(UNHEARD).min(BRIEFLY + OPEN_TIMEOUT);
            if let Ok(answer) = timeout_at(by(wait), flow::answer(channel)).await {
                return Ok(answer?);
            }
        }
        if !channel.is_taken() {
            return Err(NoAnswer::Unheard);
        }
        match timeout_at(deadline, flow::answer(channel)).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(NoAnswer::Late),
        }
    };
    tokio::select! {
        biased;
        answer = asking => answer,
        () = standing.lost() => Err(NoAnswer::Path),
        () = peer.broke_since(breaks) => Err(NoAnswer::Path),
    }
}

#[cfg(test)]
mod tests {
    use servicekeel_core::flow::frame::{Kind, Refused};
    use servicekeel_runtime::net::os::OsStream;
    use tokio::sync::mpsc;

    use super::*;
    use crate::peers::tests::{id, later, link, node, stand, web};
    use crate::peers::{Ask, LinkState};
    use crate::tls::tests::channels;

    /// A connection that has carried a flow, and whose other end takes nothing any more, not even by its system.
    async fn silent() -> (crate::tls::Channel<OsStream>, crate::tls::Channel<OsStream>) {
        let (mut near, far) = channels().await;
        near.mark_used();
        // What is on its way to a system that has room is taken a moment later.
        let mut full = 0;
        while full < 10 {
            if near.is_taken() {
                near.send_payload(Kind::Datagram, 0, &[0; 60_000]).unwrap();
                near.flush().await.unwrap();
            }
            sleep(Duration::from_millis(20)).await;
            full = if near.is_taken() { 0 } else { full + 1 };
        }
        (near, far)
    }

    #[tokio::test]
    async fn a_flow_that_finds_a_pooled_connection_silent_takes_a_new_one_soon() {
        let node = node();
        let peer = node.peer(&id("b.local")).unwrap();
        let (ask, mut asked) = mpsc::channel(16);
        assert!(peer.link_up(1, 7, LinkState { ask, ..link() }, None).is_ok());
        let mut fars = Vec::new();
        for _ in 0..3 {
            let (near, far) = silent().await;
            peer.put(&node, near, stand(&peer, later(60)));
            fars.push(far);
        }
        let answers = async {
            assert!(matches!(asked.recv().await, Some(Ask::Flows(_))));
            let (near, mut far) = channels().await;
            peer.put_dialled_back(&node, near, stand(&peer, later(60)));
            assert!(flow::next_open(&mut far, &peer.owner).await.unwrap().is_some());
            flow::accept(&mut far).await.unwrap();
            far
        };
        let start = Instant::now();
        let wanted = web("b.local");
        let opens = open(&node, &peer.id, &wanted, &peer.holder, BRIEFLY + OPEN_TIMEOUT);
        let opens = async {
            let opened = opens.await;
            (opened, start.elapsed())
        };
        // Where it does not ask for a new one, nobody answers.
        let both = Box::pin(async { tokio::join!(opens, answers) });
        let both = tokio::time::timeout(Duration::from_secs(10), both).await;
        let ((opened, took), _far) = both.expect("it takes no other");
        assert!(opened.is_ok(), "{:?}", opened.err());
        assert!(took < Duration::from_secs(2), "it took {took:?}");
        assert_eq!(peer.describe().1, 0, "the others that are as old wait for the next flows");
    }

    #[tokio::test]
    async fn a_peer_that_has_no_room_for_more_is_told() {
        let node = node();
        let peer = node.peer(&id("b.local")).unwrap();
        assert!(peer.link_up(1, 7, link(), None).is_ok());
        let (near, mut far) = channels().await;
        peer.put(&node, near, stand(&peer, later(60)));
        let answers = async {
            assert!(flow::next_open(&mut far, &peer.owner).await.unwrap().is_some());
            let refused = Refused { cause: Cause::Busy, reason: "it holds 42".into() };
            flow::refuse(&mut far, &refused).await.unwrap();
        };
        let wanted = web("b.local");
        let opens = open(&node, &peer.id, &wanted, &peer.holder, AS_TCP);
        let (opened, ()) = tokio::join!(opens, answers);
        assert!(matches!(opened, Err((Outcome::Rejected(Cause::Busy), _))));
        let told = peer.fullness();
        assert!(told[0].starts_with("b.local/n rejected a flow 0 s ago: it holds 42"), "{told:?}");
        assert_eq!(told.len(), 1);
        peer.busy(&node);
        let here = "further flows and UDP sessions of b.local/n were rejected 0 s ago: ";
        assert!(peer.fullness()[0].starts_with(here), "{:?}", peer.fullness());
    }

    /// On another thread a link breaks while a flow is about to ask: it does not wait for as long as an endpoint may take.
    #[tokio::test]
    async fn a_link_that_breaks_before_the_question_is_not_waited_past() {
        let node = node();
        let peer = node.peer(&id("b.local")).unwrap();
        assert!(peer.link_up(1, 7, link(), None).is_ok());
        // Its system acknowledges, and it says nothing.
        let (near, _far) = channels().await;
        peer.put(&node, near, stand(&peer, later(60)));
        let mut connection = peer.checkout(&node).await.unwrap();
        peer.link_broke();
        let request = Open { flow: 1, wanted: web("b.local"), namespace: None, consumer: None };
        let asked = ask(&mut connection, &request, Instant::now() + AS_TCP);
        let answer = tokio::time::timeout(Duration::from_secs(2), asked).await;
        assert!(matches!(answer.expect("it waits"), Err(NoAnswer::Path)));
    }
}
