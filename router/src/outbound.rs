//! Flows of this node's pods: from the import's socket to a pod here, or to another router.

use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::flow::frame::Open;
use servicekeel_core::mesh::outcome::Outcome;
use servicekeel_core::mesh::table::Candidate;
use servicekeel_core::name::{RouterId, ServicePort};
use servicekeel_runtime::net::{Net, Stream};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{debug, warn};

use crate::absence::absence;
use crate::endpoint::{self, AS_TCP, BRIEFLY};
use crate::flow::{self, Answer};
use crate::imports::Import;
use crate::node::{Node, ROUTE_PATIENCE};
use crate::peers::Checkout;
use crate::tls::ChannelError;

/// How much longer the other router may take to say whether the flow is open than its pod may take to answer.
const OPEN_TIMEOUT: Duration = Duration::from_secs(1);
/// For how long it is not asked whether the client is still there: one that ends at once may only have nothing to say.
const ASK_CLIENT: Duration = Duration::from_secs(3);

/// Carries one connection of a pod to a service, to its end.
pub(crate) async fn flow<N: Net>(node: Arc<Node<N>>, mut app: N::TcpStream, import: Arc<Import>) {
    let wanted = &import.wanted;
    let gone = async {
        sleep(ASK_CLIENT).await;
        app.gone().await;
    };
    let found = tokio::select! {
        biased;
        found = find(&node, wanted) => Some(found),
        () = gone => None,
    };
    match found {
        Some(Ok((path, candidate))) => carry(&node, app, path, candidate, wanted).await,
        Some(Err(reason)) => {
            if let Some(suppressed) = import.failures.permit() {
                let reason = reason.unwrap_or_else(|| absence(&node, wanted));
                warn!(%wanted, reason, suppressed, "no endpoint accepted the connection; client reset");
            }
            node.counters.flows_failed.inc();
            app.reset();
        }
        None => {
            debug!(%wanted, "the client gave up before an endpoint took its flow");
            app.reset();
        }
    }
}

/// Finds an endpoint that takes a flow: the next one where one refuses, or is slow. Where there is no other than those
/// that are slow, the first of them has as long as TCP would take.
///
/// # Errors
/// The last endpoint's reason; none where there is no endpoint.
async fn find<N: Net>(
    node: &Arc<Node<N>>,
    wanted: &ServicePort,
) -> Result<(Path<N>, Candidate), Option<String>> {
    let mut last = None;
    let deadline = Instant::now() + ROUTE_PATIENCE;
    let mut changed = node.changed.subscribe();
    loop {
        changed.mark_unchanged();
        let candidates = node.candidates(wanted);
        let mut answered = false;
        let mut slow = None;
        for candidate in &candidates {
            let patience = if candidates.len() == 1 { AS_TCP } else { BRIEFLY };
            match attempt(node, candidate, wanted, patience).await {
                Ok(path) => return Ok((path, candidate.clone())),
                Err((outcome, reason)) => {
                    answered |= outcome.is_answer();
                    slow = slow.or(outcome.is_slow().then_some(candidate));
                    last = Some(reason);
                }
            }
        }
        if let Some(candidate) = slow.filter(|_| candidates.len() > 1) {
            match attempt(node, candidate, wanted, AS_TCP).await {
                Ok(path) => return Ok((path, candidate.clone())),
                Err((_, reason)) => last = Some(reason),
            }
        }
        // Endpoints that refuse are an answer; none, or only those of a sidecar that restarts, may be a blip.
        if answered || timeout_at(deadline, changed.changed()).await.is_err() {
            return Err(last);
        }
    }
}

/// Tries one candidate, and takes down how it went.
async fn attempt<N: Net>(
    node: &Arc<Node<N>>,
    candidate: &Candidate,
    wanted: &ServicePort,
    patience: Duration,
) -> Result<Path<N>, (Outcome, String)> {
    let trying = async {
        match candidate {
            Candidate::Local(id) => {
                let connected = endpoint::connect(node, *id, patience).await;
                connected.map(|(service, _)| Path::Here(service)).map_err(|e| (e.outcome(), e.to_string()))
            }
            Candidate::Remote(router) => {
                let opened = open(node, router, wanted, patience + OPEN_TIMEOUT).await;
                opened.map(|connection| Path::There(Box::new(connection)))
            }
        }
    };
    let tried = endpoint::watched(node, wanted, candidate, trying).await;
    match &tried {
        Ok(_) => node.report(wanted, candidate, Outcome::Taken, ""),
        Err((outcome, reason)) => {
            debug!(%wanted, ?candidate, %reason, "an endpoint does not take a flow; trying the next");
            node.report(wanted, candidate, *outcome, reason);
        }
    }
    tried
}

enum Path<N: Net> {
    Here(N::TcpStream),
    There(Box<Checkout<N>>),
}

async fn carry<N: Net>(
    node: &Arc<Node<N>>,
    app: N::TcpStream,
    path: Path<N>,
    candidate: Candidate,
    wanted: &ServicePort,
) {
    let _carrying = node.carrying(candidate);
    let counting = node.clone();
    let count = move |sent, received| counting.counters.count_bytes(sent, received);
    match path {
        Path::Here(service) => {
            node.counters.flows_local.inc();
            if let Err(error) = node.net.splice(app, service, count).await {
                debug!(%wanted, %error, "a flow ended by a reset");
            }
        }
        Path::There(mut connection) => {
            node.counters.flows_outbound.inc();
            let lost = connection.standing.lost();
            let peer = connection.peer.clone();
            match flow::carry(&mut connection.channel, app, &peer.owner, lost, count).await {
                Ok(()) => connection.put_back(),
                Err(error) => {
                    debug!(%wanted, peer = %connection.peer.id, %error, "a flow lost its path: reset");
                    node.counters.flows_lost.inc();
                }
            }
        }
    }
}

/// Opens a flow at another router, on a connection of the pool or a new one.
async fn open<N: Net>(
    node: &Arc<Node<N>>,
    router: &RouterId,
    wanted: &ServicePort,
    limit: Duration,
) -> Result<Checkout<N>, (Outcome, String)> {
    let refused = |reason: String| (Outcome::Refused, reason);
    let peer = node.peer(router).ok_or_else(|| refused("it is not known any more".into()))?;
    let request = Open { flow: node.seed(), wanted: wanted.clone(), namespace: None };
    let deadline = Instant::now() + limit;
    let mut broke = false;
    // Where the connection is found dead, nothing was lost by it but time.
    loop {
        let mut connection = peer.checkout(node).await.map_err(|error| {
            // Behind a link that broke there is no answer yet.
            let outcome = if broke { Outcome::Away } else { Outcome::Refused };
            (outcome, error.to_string())
        })?;
        match ask(&mut connection, &request, deadline).await {
            Ok(Answer::Opened) => return Ok(connection),
            Ok(Answer::Refused(refused)) => {
                connection.put_back();
                return Err((Outcome::Rejected(refused.cause), refused.reason));
            }
            Err(NoAnswer::Broken(error)) if connection.pooled => {
                debug!(peer = %router, %error, "a pooled connection was dead")
            }
            Err(NoAnswer::Path) => {
                debug!(peer = %router, "a link broke while a flow waited for an answer");
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
    #[error("what is sent to the peer does not come through")]
    Unheard,
    #[error("the link broke")]
    Path,
    #[error("no answer came in time")]
    Late,
}

/// Asks for a flow. How long the answer may take is the endpoint's affair, for as long as the path is known to be good:
/// the question is acknowledged, and no link has broken since.
async fn ask<N: Net>(
    connection: &mut Checkout<N>,
    request: &Open,
    deadline: Instant,
) -> Result<Answer, NoAnswer> {
    let Checkout { peer, channel, standing, .. } = connection;
    let breaks = peer.breaks();
    let asking = async {
        let brief = deadline.min(Instant::now() + BRIEFLY + OPEN_TIMEOUT);
        match timeout_at(brief, flow::open(channel, request)).await {
            Ok(answer) => Ok(answer?),
            Err(_) if !channel.is_taken() => Err(NoAnswer::Unheard),
            Err(_) => match timeout_at(deadline, flow::answer(channel)).await {
                Ok(answer) => Ok(answer?),
                Err(_) => Err(NoAnswer::Late),
            },
        }
    };
    tokio::select! {
        biased;
        answer = asking => answer,
        () = standing.lost() => Err(NoAnswer::Path),
        () = peer.broke_since(breaks) => Err(NoAnswer::Path),
    }
}
