//! What `/status` shows, read from the data path itself.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use servicekeel_core::mesh::table::Candidate;
use servicekeel_core::name::{ClusterName, RouterId, ServicePort};
use servicekeel_runtime::net::Net;
use tokio::task::yield_now;
use tokio::time::Instant;

use crate::absence::{absence, bare_absence};
use crate::endpoint::MORE_PORTS;
use crate::node::Node;
use crate::pods::State;
use crate::strangers;
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
    /// What neighbours offer, [`MAX_LISTED`] of a router and [`MAX_LISTED_OF_CLUSTER`] of a cluster at most.
    pub(crate) offers: Vec<OfferStatus>,
    pub(crate) flows: FlowStatus,
    /// When the node's certificate expires, or expired, seconds since 1970; absent without one.
    pub(crate) certificate_ends: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PeerStatus {
    pub(crate) router: String,
    /// `up` while a link is, `down` while none is, `expired` where a link is and no new flow can be made: a certificate
    /// has expired; `rejected` the same where one of the two routers rejects the other's new connections.
    pub(crate) state: String,
    /// Why it is `expired`, `rejected` or `down`, as far as that is known.
    #[serde(default)]
    pub(crate) reason: Option<String>,
    pub(crate) links: Vec<LinkStatus>,
    /// How many ports it offers, on the link on which it offers most; more than are listed, perhaps.
    #[serde(default)]
    pub(crate) offers: usize,
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
/// The most offers of one router that are listed; the others are counted.
const MAX_LISTED: usize = 1000;
/// ... and of all routers of one cluster.
const MAX_LISTED_OF_CLUSTER: usize = 4000;
/// Imports between which others have their turn.
const MAX_AT_ONCE: usize = 64;
/// The most peers of which it is told that offers are not taken, this router's own cluster first.
const MAX_DECLINED: usize = 8;

/// Clusters of which no further router is taken.
fn crowded<N: Net>(node: &Node<N>) -> Vec<String> {
    let clusters: BTreeMap<_, _> =
        node.all_peers().into_iter().map(|peer| (peer.id.cluster.clone(), peer.holder.clone())).collect();
    let full = clusters.into_iter().filter(|(_, holder)| !node.names.has_room(holder));
    full.map(|(cluster, holder)| {
        let known = node.names.held_with(&holder);
        format!(
            "{cluster}: {known} of its routers are known, as many as may be beside others; the one that has been without a link for longest is forgotten for a new one, which is rejected where all are in use"
        )
    })
    .collect()
}

/// That offers are not taken, by a peer or of it.
fn declined<N: Net>(node: &Node<N>) -> Vec<String> {
    let mut peers = node.all_peers();
    peers.sort_by_key(|peer| peer.id.cluster != node.id.cluster);
    let mut all: Vec<_> = peers.iter().filter_map(|peer| peer.declined()).collect();
    let more = all.len().saturating_sub(MAX_DECLINED);
    all.truncate(MAX_DECLINED);
    if more > 0 {
        all.push(format!("so it is with {more} more peers"));
    }
    all
}

/// What neighbours offer, in the order of their names, and how many ports each offers. Nothing is held for longer than it
/// takes to look at one link.
async fn offers<N: Net>(node: &Node<N>) -> (Vec<OfferStatus>, BTreeMap<RouterId, usize>) {
    let mut links: Vec<_> = node.routes().table.links().collect();
    links.sort_by(|a, b| a.from.cmp(&b.from));
    let (mut all, mut counts) = (Vec::new(), BTreeMap::new());
    let mut of_cluster: BTreeMap<ClusterName, usize> = BTreeMap::new();
    for links in links.chunk_by(|a, b| a.from == b.from) {
        let Some(from) = links.first().map(|link| &link.from) else { continue };
        let listed = of_cluster.entry(from.cluster.clone()).or_default();
        let most = MAX_LISTED.min(MAX_LISTED_OF_CLUSTER.saturating_sub(*listed));
        let mut ports = BTreeSet::new();
        for link in links {
            let on_link: Vec<_> = node.routes().table.offered_on(link.link, most).cloned().collect();
            ports.extend(on_link);
            yield_now().await;
        }
        let ports = ports.into_iter().take(most);
        let before = all.len();
        all.extend(ports.map(|port| OfferStatus { service: port.to_string(), router: from.to_string() }));
        *listed += all.len() - before;
        counts.insert(from.clone(), links.iter().map(|link| link.ports).max().unwrap_or(0));
    }
    (all, counts)
}

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

pub(crate) async fn read<N: Net>(node: &Arc<Node<N>>) -> Status {
    let now = Instant::now();
    let (offers, counts) = offers(node).await;
    let settings = node.settings();
    let untimely = settings.untimely().map(|untimely| untimely.to_string());
    let mut problems: Vec<String> = untimely.iter().cloned().collect();
    problems.extend(settings.pending.refused.as_ref().map(ToString::to_string));
    let waits = settings.pending.at_next_start.iter();
    let notes = waits.map(|what| format!("{what} changed in the config: takes effect after a restart"));
    let mut notes: Vec<_> = notes.collect();
    notes.extend(settings.renewal());
    notes.extend(node.rejected.told());
    notes.extend(strangers::all(node));
    notes.extend(declined(node));
    notes.extend(crowded(node));
    let peers = node.all_peers().into_iter().map(|peer| {
        let (links, idle_connections, flows) = peer.describe();
        let lapsed = node.expired(&peer);
        problems.extend(lapsed.clone());
        let lapsed = lapsed.or(untimely.clone());
        let rejection = peer.rejection().filter(|_| lapsed.is_none());
        problems.extend(rejection.iter().cloned().chain(peer.twin()));
        notes.extend(peer.fullness());
        let (state, reason) = match (lapsed, rejection) {
            (lapsed, _) if links.is_empty() => ("down", lapsed.or_else(|| node.trouble(&peer))),
            (Some(reason), _) => ("expired", Some(reason)),
            (None, Some(reason)) => ("rejected", Some(reason)),
            (None, None) => ("up", None),
        };
        PeerStatus {
            router: peer.id.to_string(),
            state: state.to_owned(),
            reason,
            links: links
                .into_iter()
                .map(|(dialled, since)| LinkStatus { dialled, seconds: (now - since).as_secs() })
                .collect(),
            offers: counts.get(&peer.id).copied().unwrap_or(0),
            idle_connections,
            flows,
        }
    });
    let peers: Vec<_> = peers.collect();
    let unlisted = counts.values().sum::<usize>().saturating_sub(offers.len());
    if unlisted > 0 {
        notes.push(format!(
            "{unlisted} offers of other routers are not listed: {MAX_LISTED} of a router are at most, and {MAX_LISTED_OF_CLUSTER} of a cluster"
        ));
    }
    let dials = node.dials().clone();
    // That no dial succeeds with a certificate that has expired is told already.
    for (address, dial) in dials.iter().filter(|_| untimely.is_none()) {
        let is_up =
            |id: &RouterId| peers.iter().any(|peer| peer.router == id.to_string() && !peer.links.is_empty());
        let trouble = dial.trouble(now, is_up);
        problems.extend(
            trouble.map(|reason| format!("the peer {address} of the config is not reached: {reason}")),
        );
    }
    let dials = dials.into_iter();
    let dials = dials.map(|(address, dial)| DialStatus { address, problem: dial.problem }).collect();
    let pods: Vec<_> = node.pods().values().cloned().collect();
    notes.extend(pods.iter().filter(|pod| node.flows.waits(&pod.party.owner)).map(|pod| {
        let held = node.flows.held(&pod.party.owner);
        format!(
            "{}/{}: its network namespace holds {held} flows and UDP sessions, as many as it may beside others; further connections wait",
            pod.claim.namespace, pod.claim.name
        )
    }));
    notes.extend(pods.iter().filter(|pod| pod.party.lacks_sessions()).map(|pod| {
        let held = node.flows.held(&pod.party.owner);
        format!(
            "{}/{}: its network namespace has as many UDP sessions at a router as it may beside others, and holds {held} flows and UDP sessions here; datagrams of further clients are dropped",
            pod.claim.namespace, pod.claim.name
        )
    }));
    notes.extend(pods.iter().filter(|pod| pod.party.lacks_ports()).map(|pod| {
        format!(
            "{}/{}: connections to what it exports found no local port left in it within the last minute, and wait; {MORE_PORTS}",
            pod.claim.namespace, pod.claim.name
        )
    }));
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
    let expired = peers.iter().filter(|peer| ["expired", "rejected"].contains(&&*peer.state));
    let expired: BTreeMap<_, _> = expired.map(|peer| (peer.router.as_str(), &peer.reason)).collect();
    let (mut imports, mut explained) = (Vec::new(), 0);
    for pod in &pods {
        let wanted: Vec<_> = pod.imports().values().map(|served| served.wanted.clone()).collect();
        for (number, service) in wanted.into_iter().enumerate() {
            if number % MAX_AT_ONCE == 0 {
                yield_now().await;
            }
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
                    let router = router.to_string();
                    match expired.get(router.as_str()) {
                        Some(reason) => (None, (*reason).clone()),
                        None => (Some(router), None),
                    }
                }
            };
            let (service, pod) = (service.to_string(), pod.claim.name.clone());
            imports.push(ImportStatus { service, pod, route, reason, failing });
        }
    }
    let pod_of = |id| node.endpoints().get(&id).map(|e| e.pod.claim.name.clone()).unwrap_or_default();
    let exports: Vec<_> = node.routes().table.local().map(|(id, e)| (id, e.clone())).collect();
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

#[cfg(test)]
mod tests;
