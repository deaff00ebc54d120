//! What `/status` shows, read from the data path itself.

use std::sync::Arc;

use serde::Serialize;
use servicekeel_runtime::net::Net;
use tokio::time::Instant;

use crate::node::Node;
use crate::pods::State;

/// The router as it is now.
#[derive(Debug, Serialize)]
pub(crate) struct Status {
    cluster: String,
    node: String,
    draining: bool,
    peers: Vec<PeerStatus>,
    sidecars: Vec<SidecarStatus>,
    imports: Vec<ImportStatus>,
    exports: Vec<ExportStatus>,
    /// What neighbours offer.
    offers: Vec<OfferStatus>,
    flows: FlowStatus,
    /// When the node's certificate ends, seconds since 1970; absent without an identity.
    certificate_ends: Option<u64>,
}

#[derive(Debug, Serialize)]
struct PeerStatus {
    router: String,
    /// `up` while a link is.
    state: &'static str,
    links: Vec<LinkStatus>,
    idle_connections: usize,
    flows: usize,
}

#[derive(Debug, Serialize)]
struct LinkStatus {
    /// Where it was dialled; absent where the peer dialled.
    dialled: Option<String>,
    seconds: u64,
}

#[derive(Debug, Serialize)]
struct SidecarStatus {
    pod: String,
    namespace: String,
    uid: String,
    process: i32,
    user: u32,
    state: &'static str,
    addresses: Vec<String>,
    tcp_sockets: usize,
    udp_sockets: usize,
}

#[derive(Debug, Serialize)]
struct ImportStatus {
    service: String,
    pod: String,
    /// Where its next flow goes first; absent where nothing offers it.
    route: Option<String>,
}

#[derive(Debug, Serialize)]
struct ExportStatus {
    service: String,
    pod: String,
    target: u16,
    /// Who may use it; absent: every member of the mesh.
    allow: Option<Vec<String>>,
}

#[derive(Debug, Serialize)]
struct OfferStatus {
    service: String,
    router: String,
}

#[derive(Debug, Serialize)]
struct FlowStatus {
    active: i64,
    local: u64,
    outbound: u64,
    inbound: u64,
    failed: u64,
    lost: u64,
}

pub(crate) fn read<N: Net>(node: &Arc<Node<N>>) -> Status {
    let now = Instant::now();
    let peers = node.all_peers().into_iter().map(|peer| {
        let (links, idle_connections, flows) = peer.describe();
        PeerStatus {
            router: peer.id.to_string(),
            state: if links.is_empty() { "down" } else { "up" },
            links: links
                .into_iter()
                .map(|(_, dialled, since)| LinkStatus { dialled, seconds: (now - since).as_secs() })
                .collect(),
            idle_connections,
            flows,
        }
    });
    let peers = peers.collect();
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
            },
            addresses: pod.addresses.iter().map(ToString::to_string).collect(),
            tcp_sockets,
            udp_sockets,
        }
    });
    let sidecars = sidecars.collect();
    let mut imports = Vec::new();
    for pod in &pods {
        let wanted: Vec<_> =
            pod.imports.lock().unwrap_or_else(std::sync::PoisonError::into_inner).values().cloned().collect();
        for service in wanted {
            let route = node.candidates(&service).first().map(|candidate| match candidate {
                servicekeel_core::mesh::table::Candidate::Local(_) => "this node".to_owned(),
                servicekeel_core::mesh::table::Candidate::Remote(router) => router.to_string(),
            });
            imports.push(ImportStatus { service: service.to_string(), pod: pod.claim.name.clone(), route });
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
        allow: endpoint.allow.map(|rules| rules.iter().map(ToString::to_string).collect()),
    });
    let c = &node.counters;
    Status {
        cluster: node.id.cluster.to_string(),
        node: node.id.node.to_string(),
        draining: *node.draining.borrow(),
        peers,
        sidecars,
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
        certificate_ends: node.settings().identity.as_ref().map(|identity| {
            let ends = identity.not_after().duration_since(std::time::UNIX_EPOCH);
            ends.unwrap_or_default().as_secs()
        }),
    }
}
