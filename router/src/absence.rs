//! Why a flow has nowhere to go, in the words of whoever set it up.

use std::hash::Hash;

use servicekeel_core::mesh::table::{Consumer, nearest};
use servicekeel_core::name::{ClusterName, ServicePort};
use servicekeel_runtime::net::Net;

use crate::identity::Untimely;
use crate::node::Node;

/// Why [`Node::candidates`] has none, and what was perhaps meant.
pub(crate) fn absence<N: Net>(node: &Node<N>, wanted: &ServicePort) -> String {
    let reason = bare_absence(node, wanted);
    let like = {
        let consumer = Consumer { cluster: &node.id.cluster, namespace: None };
        let routes = node.routes();
        // Of a Service that is there the reason says it all.
        let there = !routes.table.ports_of(&wanted.service).is_empty();
        if there { Vec::new() } else { routes.table.like(wanted, consumer) }
    };
    let near = nearest(like, wanted);
    let near: Vec<_> = near.iter().map(ToString::to_string).collect();
    match near.as_slice() {
        [] => reason,
        [one] => format!("{reason}; did you mean {one}?"),
        several => format!("{reason}; did you mean one of {}?", several.join(", ")),
    }
}

/// As [`absence`], without what was perhaps meant, for which all offers are looked at.
pub(crate) fn bare_absence<N: Net>(node: &Node<N>, wanted: &ServicePort) -> String {
    Absence::of(node, wanted).words(node, wanted)
}

/// The kinds of reasons, which are found by a few looks into tables: for those who must not look at more.
pub(crate) enum Absence {
    NotAllowed,
    /// The Service is offered at these ports.
    Elsewhere(Vec<ServicePort>),
    OwnCluster,
    Untimely(Untimely),
    NoIdentity,
    NotTrusted,
    /// It is up to the routers of its cluster.
    NotOffered,
}

impl Absence {
    pub(crate) fn of<N: Net>(node: &Node<N>, wanted: &ServicePort) -> Self {
        let (offered, others) = {
            let routes = node.routes();
            (routes.table.is_offered(wanted), routes.table.ports_of(&wanted.service))
        };
        if offered {
            return Self::NotAllowed;
        }
        if !others.is_empty() {
            return Self::Elsewhere(others);
        }
        let cluster = &wanted.service.cluster;
        if *cluster == node.id.cluster {
            return Self::OwnCluster;
        }
        let settings = node.settings();
        if let Some(untimely) = settings.untimely() {
            return Self::Untimely(untimely);
        }
        match &settings.identity {
            None => Self::NoIdentity,
            Some(identity) if !identity.trust().any(|bundle| bundle.cluster() == cluster) => Self::NotTrusted,
            Some(_) => Self::NotOffered,
        }
    }

    /// What tells one from another.
    pub(crate) fn kind(&self) -> impl Hash + use<> {
        std::mem::discriminant(self)
    }

    fn words<N: Net>(self, node: &Node<N>, wanted: &ServicePort) -> String {
        let cluster = &wanted.service.cluster;
        match self {
            Self::NotAllowed => "its `allow` does not include this cluster".into(),
            Self::Elsewhere(others) => {
                let others: Vec<_> =
                    others.iter().map(|port| format!("{}/{}", port.port, port.protocol)).collect();
                let others = others.join(" and ");
                format!("it is offered at {others}, not at {}/{}", wanted.port, wanted.protocol)
            }
            Self::OwnCluster => "no pod on this node exports it, and no linked router offers it".into(),
            Self::Untimely(untimely) => untimely.to_string(),
            Self::NoIdentity => {
                "this router has no `identity` in its config: it serves its own node only".into()
            }
            Self::NotTrusted => format!("{cluster} is not in this router's `trust`"),
            Self::NotOffered => unoffered(node, cluster),
        }
    }
}

/// How it stands with the routers of a cluster none of which offers something.
fn unoffered<N: Net>(node: &Node<N>, cluster: &ClusterName) -> String {
    let peers = node.all_peers().into_iter().filter(|peer| peer.id.cluster == *cluster);
    let (up, down): (Vec<_>, Vec<_>) = peers.partition(|peer| peer.is_up());
    let names: Vec<_> = down.iter().map(|peer| peer.id.node.to_string()).collect();
    let why = match down.as_slice() {
        [one] => node.trouble(one).map_or(String::new(), |reason| format!(" ({reason})")),
        _ => String::new(),
    };
    let names = names.join(", ");
    match (up.is_empty(), down.is_empty()) {
        (true, true) => format!("no router of {cluster} has ever been linked{}", unmet(node)),
        (true, false) => format!("no router of {cluster} is linked: {names} is down{why}"),
        (false, true) => format!("no linked router of {cluster} offers it"),
        (false, false) => {
            format!("no linked router of {cluster} offers it, and {names} is down{why}")
        }
    }
}

/// The address of the config where nobody was met yet, and why, where there is one: it may be the one that is missed.
fn unmet<N: Net>(node: &Node<N>) -> String {
    let dials = node.dials();
    let mut unmet = dials.iter().filter(|(_, dial)| dial.is_unmet());
    match (unmet.next(), unmet.next()) {
        (Some((address, dial)), None) => dial.failure().map_or(String::new(), |reason| {
            format!("; the peer {address} of the config is not reached: {reason}")
        }),
        _ => String::new(),
    }
}
