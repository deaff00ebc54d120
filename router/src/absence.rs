//! Why a flow has nowhere to go, in the words of whoever set it up.

use servicekeel_core::mesh::table::Consumer;
use servicekeel_core::name::ServicePort;
use servicekeel_runtime::net::Net;

use crate::node::Node;

/// Why [`Node::candidates`] has none, and what was perhaps meant.
pub(crate) fn absence<N: Net>(node: &Node<N>, wanted: &ServicePort) -> String {
    let reason = bare_absence(node, wanted);
    let near = {
        let consumer = Consumer { cluster: &node.id.cluster, namespace: None };
        let routes = node.routes();
        // Of a Service that is there the reason says it all.
        let there = !routes.table.ports_of(&wanted.service).is_empty();
        if there { Vec::new() } else { routes.table.near(wanted, consumer) }
    };
    let near: Vec<_> = near.iter().map(ToString::to_string).collect();
    match near.as_slice() {
        [] => reason,
        [one] => format!("{reason}; did you mean {one}?"),
        several => format!("{reason}; did you mean one of {}?", several.join(", ")),
    }
}

/// As [`absence`], without what was perhaps meant, for which all offers are looked at.
pub(crate) fn bare_absence<N: Net>(node: &Node<N>, wanted: &ServicePort) -> String {
    let (offered, others) = {
        let routes = node.routes();
        (routes.table.is_offered(wanted), routes.table.ports_of(&wanted.service))
    };
    if offered {
        return "its `allow` does not let this cluster in".into();
    }
    if !others.is_empty() {
        let others: Vec<_> = others.iter().map(|port| format!("{}/{}", port.port, port.protocol)).collect();
        return format!(
            "it is offered at {}, not at {}/{}",
            others.join(" and "),
            wanted.port,
            wanted.protocol
        );
    }
    let cluster = &wanted.service.cluster;
    if *cluster == node.id.cluster {
        return "no pod of this node exports it, and no router that is linked to this one offers it".into();
    }
    let settings = node.settings();
    if let Some(untimely) = settings.untimely() {
        return untimely.to_string();
    }
    let Some(identity) = &settings.identity else {
        return "this router has no `identity` in its config: it serves its own node only".into();
    };
    if !identity.trust().any(|bundle| bundle.cluster() == cluster) {
        return format!("{cluster} is not in this router's `trust`");
    }
    let peers = node.all_peers().into_iter().filter(|peer| peer.id.cluster == *cluster);
    let (up, down): (Vec<_>, Vec<_>) = peers.partition(|peer| peer.is_up());
    let names: Vec<_> = down.iter().map(|peer| peer.id.node.to_string()).collect();
    let names = names.join(", ");
    match (up.is_empty(), down.is_empty()) {
        (true, true) => format!("no router of {cluster} was ever linked to this one"),
        (true, false) => format!("no router of {cluster} is linked to this one: {names} is down"),
        (false, true) => format!("no router of {cluster} that is linked to this one offers it"),
        (false, false) => {
            format!("no router of {cluster} that is linked to this one offers it, and {names} is down")
        }
    }
}
