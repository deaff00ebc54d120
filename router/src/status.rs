//! What `/status` shows, read from the data path itself.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use servicekeel_core::mesh::table::Candidate;
use servicekeel_core::name::ServicePort;
use servicekeel_runtime::net::Net;
use tokio::time::Instant;

use crate::absence::{absence, bare_absence};
use crate::identity::Date;
use crate::node::Node;
use crate::peers::Peer;
use crate::pods::State;
use crate::successor::GRACE;

/// The router as it is now.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) cluster: String,
    pub(crate) node: String,
    pub(crate) draining: bool,
    /// What keeps it from its work and does not heal by itself. Empty: nothing is known.
    #[serde(default)]
    pub(crate) problems: Vec<String>,
    /// What is well, and not yet as somebody may expect.
    #[serde(default)]
    pub(crate) notes: Vec<String>,
    pub(crate) peers: Vec<PeerStatus>,
    /// The addresses of the config's `peers`.
    pub(crate) dials: Vec<DialStatus>,
    pub(crate) sidecars: Vec<SidecarStatus>,
    /// Pods whose sidecar went without a word and has not come back, for an hour: connections to and from them wait or
    /// fail.
    #[serde(default)]
    pub(crate) missing: Vec<MissingStatus>,
    pub(crate) imports: Vec<ImportStatus>,
    pub(crate) exports: Vec<ExportStatus>,
    /// What neighbours offer.
    pub(crate) offers: Vec<OfferStatus>,
    pub(crate) flows: FlowStatus,
    /// When the node's certificate expires, or expired, seconds since 1970; absent without one.
    pub(crate) certificate_ends: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PeerStatus {
    pub(crate) router: String,
    /// `up` while a link is, `down` while none is, `expired` where a link is and no new flow can be made: a certificate
    /// has expired.
    pub(crate) state: String,
    /// Why it is `expired`.
    #[serde(default)]
    pub(crate) reason: Option<String>,
    pub(crate) links: Vec<LinkStatus>,
    pub(crate) idle_connections: usize,
    pub(crate) flows: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct DialStatus {
    pub(crate) address: String,
    /// Why there is no link; absent where there is one, or the first dial is on its way.
    pub(crate) problem: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LinkStatus {
    /// Where it was dialled; absent where the peer dialled.
    pub(crate) dialled: Option<String>,
    pub(crate) seconds: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SidecarStatus {
    pub(crate) pod: String,
    pub(crate) namespace: String,
    pub(crate) uid: String,
    pub(crate) process: i32,
    pub(crate) user: u32,
    pub(crate) state: String,
    pub(crate) addresses: Vec<String>,
    pub(crate) tcp_sockets: usize,
    pub(crate) udp_sockets: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MissingStatus {
    pub(crate) pod: String,
    pub(crate) namespace: String,
    pub(crate) user: u32,
    /// So long ago it went.
    pub(crate) gone_seconds: u64,
    /// So long its sockets are kept still, and its imports served; 0: they are closed.
    pub(crate) sockets_kept_seconds: u64,
}

/// Attempts at an endpoint, or at a router, that failed one after the other.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FailureStatus {
    pub(crate) times: u32,
    pub(crate) last_seconds_ago: u64,
    pub(crate) reason: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ImportStatus {
    pub(crate) service: String,
    pub(crate) pod: String,
    /// Where its next flow goes first.
    pub(crate) route: Option<String>,
    /// Why it goes nowhere, where it does.
    pub(crate) reason: Option<String>,
    /// How the route has failed lately.
    #[serde(default)]
    pub(crate) failing: Option<FailureStatus>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ExportStatus {
    pub(crate) service: String,
    pub(crate) pod: String,
    pub(crate) target: u16,
    /// Who may use it; absent: every member of the mesh.
    pub(crate) allow: Option<Vec<String>>,
    /// The pod takes no connections there.
    #[serde(default)]
    pub(crate) failing: Option<FailureStatus>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct OfferStatus {
    pub(crate) service: String,
    pub(crate) router: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FlowStatus {
    pub(crate) active: i64,
    pub(crate) local: u64,
    pub(crate) outbound: u64,
    pub(crate) inbound: u64,
    pub(crate) failed: u64,
    pub(crate) lost: u64,
}

/// The most imports without a route for which it is looked what was perhaps meant: it costs a look at every offer.
const MAX_EXPLAINED: usize = 32;

fn failure<N: Net>(
    node: &Node<N>,
    service: &ServicePort,
    candidate: &Candidate,
    now: Instant,
) -> Option<FailureStatus> {
    let routes = node.routes();
    let failing = routes.table.failure(service, candidate)?;
    Some(FailureStatus {
        times: failing.times,
        last_seconds_ago: now.into_std().saturating_duration_since(failing.last).as_secs(),
        reason: failing.reason.clone(),
    })
}

/// Why a peer that is linked takes no new connections, where it is its certificate.
fn lapsed<N: Net>(node: &Node<N>, peer: &Peer<N>) -> Option<String> {
    let now = node.settings().identity.as_ref()?.now();
    let expired = Date(peer.expired(now)?);
    Some(format!("the certificate of {} expired on {expired}: renew it there; new flows to it fail", peer.id))
}

pub(crate) fn read<N: Net>(node: &Arc<Node<N>>) -> Status {
    let now = Instant::now();
    let settings = node.settings();
    let untimely = settings.untimely().map(|untimely| untimely.to_string());
    let mut problems: Vec<String> = untimely.iter().cloned().collect();
    problems.extend(settings.pending.refused.as_ref().map(ToString::to_string));
    let waits = settings.pending.at_next_start.iter();
    let notes = waits.map(|what| format!("{what} has changed in the config: takes effect at the next start"));
    let notes = notes.collect();
    let peers = node.all_peers().into_iter().map(|peer| {
        let (links, idle_connections, flows) = peer.describe();
        let lapsed = lapsed(node, &peer);
        problems.extend(lapsed.clone());
        let reason = lapsed.or(untimely.clone()).filter(|_| !links.is_empty());
        PeerStatus {
            router: peer.id.to_string(),
            state: match (&reason, links.is_empty()) {
                (_, true) => "down",
                (Some(_), false) => "expired",
                (None, false) => "up",
            }
            .to_owned(),
            reason,
            links: links
                .into_iter()
                .map(|(dialled, since)| LinkStatus { dialled, seconds: (now - since).as_secs() })
                .collect(),
            idle_connections,
            flows,
        }
    });
    let peers: Vec<_> = peers.collect();
    let dials = node.dials().clone().into_iter();
    let dials = dials.map(|(address, problem)| DialStatus { address, problem }).collect();
    let pods: Vec<_> = node.pods().values().cloned().collect();
    let sidecars = pods.iter().map(|pod| {
        let (tcp_sockets, udp_sockets) = pod.stock.held();
        SidecarStatus {
            pod: pod.claim.name.clone(),
            namespace: pod.claim.namespace.to_string(),
            uid: pod.claim.uid.clone(),
            process: pod.credentials.pid,
            user: pod.credentials.uid,
            state: match *pod.state.borrow() {
                State::Connected => "connected",
                State::Gone => "gone",
                State::Superseded => "superseded",
            }
            .to_owned(),
            addresses: pod.addresses.iter().map(ToString::to_string).collect(),
            tcp_sockets,
            udp_sockets,
        }
    });
    let sidecars = sidecars.collect();
    let missing = node.missing.all().into_iter().map(|gone| MissingStatus {
        pod: gone.claim.name,
        namespace: gone.claim.namespace.to_string(),
        user: gone.user,
        gone_seconds: (now - gone.since).as_secs(),
        sockets_kept_seconds: GRACE.saturating_sub(now - gone.since).as_secs(),
    });
    let missing = missing.collect();
    let (mut imports, mut explained) = (Vec::new(), 0);
    for pod in &pods {
        let wanted: Vec<_> = pod.imports().values().map(|served| served.wanted.clone()).collect();
        for service in wanted {
            let first = node.candidates(&service).into_iter().next();
            let failing = first.as_ref().and_then(|first| failure(node, &service, first, now));
            let (route, reason) = match &first {
                None if explained < MAX_EXPLAINED => {
                    explained += 1;
                    (None, Some(absence(node, &service)))
                }
                None => (None, Some(bare_absence(node, &service))),
                Some(Candidate::Local(_)) => (Some("this node".to_owned()), None),
                Some(Candidate::Remote(router)) => {
                    let expired = peers.iter().find(|peer| peer.router == router.to_string());
                    match expired.and_then(|peer| peer.reason.clone()) {
                        Some(reason) => (None, Some(reason)),
                        None => (Some(router.to_string()), None),
                    }
                }
            };
            let (service, pod) = (service.to_string(), pod.claim.name.clone());
            imports.push(ImportStatus { service, pod, route, reason, failing });
        }
    }
    let pod_of = |id| node.endpoints().get(&id).map(|e| e.pod.claim.name.clone()).unwrap_or_default();
    let (exports, offers) = {
        let routes = node.routes();
        let exports: Vec<_> = routes.table.local().map(|(id, e)| (id, e.clone())).collect();
        let offers = routes
            .table
            .remote()
            .map(|(port, router)| OfferStatus { service: port.to_string(), router: router.to_string() });
        (exports, offers.collect())
    };
    let exports = exports.into_iter().map(|(id, endpoint)| ExportStatus {
        service: endpoint.port.to_string(),
        pod: pod_of(id),
        target: endpoint.target.get(),
        failing: failure(node, &endpoint.port, &Candidate::Local(id), now),
        allow: endpoint.allow.map(|rules| rules.iter().map(ToString::to_string).collect()),
    });
    let c = &node.counters;
    Status {
        cluster: node.id.cluster.to_string(),
        node: node.id.node.to_string(),
        draining: *node.draining.borrow(),
        problems,
        notes,
        peers,
        dials,
        sidecars,
        missing,
        imports,
        exports: exports.collect(),
        offers,
        flows: FlowStatus {
            active: c.flows_active.get(),
            local: c.flows_local.get(),
            outbound: c.flows_outbound.get(),
            inbound: c.flows_inbound.get(),
            failed: c.flows_failed.get(),
            lost: c.flows_lost.get(),
        },
        certificate_ends: node.settings().certificate_ends(),
    }
}
