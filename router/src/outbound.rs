//! Flows of this node's pods: from the import's socket to a pod here, or to another router.

use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::flow::frame::Open;
use servicekeel_core::mesh::outcome::Outcome;
use servicekeel_core::mesh::table::Candidate;
use servicekeel_core::name::{RouterId, ServicePort};
use servicekeel_runtime::net::{Net, Stream};
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, warn};

use crate::absence::absence;
use crate::endpoint;
use crate::flow::{self, Answer};
use crate::imports::Import;
use crate::node::{Node, ROUTE_PATIENCE};
use crate::peers::Checkout;

/// How long the other router may take to say whether the flow is open: its pod has 2 s for each address.
const OPEN_TIMEOUT: Duration = Duration::from_secs(3);

/// Carries one connection of a pod to a service, to its end.
pub(crate) async fn flow<N: Net>(node: Arc<Node<N>>, app: N::TcpStream, import: Arc<Import>) {
    let wanted = &import.wanted;
    let mut last = None;
    let deadline = Instant::now() + ROUTE_PATIENCE;
    let mut changed = node.changed.subscribe();
    loop {
        changed.mark_unchanged();
        let mut answered = false;
        for candidate in node.candidates(wanted) {
            let path = match &candidate {
                Candidate::Local(id) => {
                    let connected = endpoint::connect(&node, *id).await;
                    connected
                        .map(|(service, _)| Path::Here(service))
                        .map_err(|e| (e.outcome(), e.to_string()))
                }
                Candidate::Remote(router) => {
                    open(&node, router, wanted).await.map(|connection| Path::There(Box::new(connection)))
                }
            };
            match path {
                Ok(path) => {
                    node.report(wanted, &candidate, Outcome::Taken, "");
                    return carry(&node, app, path, candidate, wanted).await;
                }
                Err((outcome, reason)) => {
                    debug!(%wanted, ?candidate, %reason, "an endpoint does not take a flow; trying the next");
                    node.report(wanted, &candidate, outcome, &reason);
                    answered |= outcome.is_answer();
                    last = Some(reason);
                }
            }
        }
        // Endpoints that refuse are an answer; none, or only those of a sidecar that restarts, may be a blip.
        if answered || timeout_at(deadline, changed.changed()).await.is_err() {
            if let Some(suppressed) = import.failures.permit() {
                let reason = last.unwrap_or_else(|| absence(&node, wanted));
                warn!(%wanted, reason, suppressed, "no endpoint accepted the connection; client reset");
            }
            node.counters.flows_failed.inc();
            app.reset();
            return;
        }
    }
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
) -> Result<Checkout<N>, (Outcome, String)> {
    let refused = |reason: String| (Outcome::Refused, reason);
    let peer = node.peer(router).ok_or_else(|| refused("it is not known any more".into()))?;
    let request = Open { flow: node.seed(), wanted: wanted.clone(), namespace: None };
    // A pooled connection may have died unnoticed: it fails at the first word, and nothing was lost by it.
    loop {
        let mut connection = peer.checkout(node).await.map_err(|error| refused(error.to_string()))?;
        match timeout(OPEN_TIMEOUT, flow::open(&mut connection.channel, &request)).await {
            Ok(Ok(Answer::Opened)) => return Ok(connection),
            Ok(Ok(Answer::Refused(refused))) => {
                connection.put_back();
                return Err((Outcome::Rejected(refused.cause), refused.reason));
            }
            Ok(Err(error)) if connection.pooled => {
                debug!(peer = %router, %error, "a pooled connection was dead")
            }
            Ok(Err(error)) => return Err(refused(error.to_string())),
            Err(_) => {
                let reason = format!("{router} did not answer for {} s", OPEN_TIMEOUT.as_secs());
                return Err((Outcome::Silent, reason));
            }
        }
    }
}
