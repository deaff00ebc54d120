//! Exports whose `allow` names a cluster that this router does not trust: nobody of it gets in, and it is most likely a
//! slip.

use std::collections::BTreeSet;

use servicekeel_core::annotation;
use servicekeel_core::mesh::table::Endpoint;
use servicekeel_core::name::{AllowRule, ClusterName};
use servicekeel_runtime::net::Net;

use crate::node::Node;

/// The most exports of a router, and the most rules of one export, that are told.
const MAX_TOLD: usize = 16;

/// What is to be told of an export's rules.
pub(crate) fn of(allow: Option<&[AllowRule]>, mesh: &BTreeSet<ClusterName>) -> Vec<String> {
    let named: BTreeSet<_> = allow.unwrap_or_default().iter().map(|rule| &rule.cluster).collect();
    named.into_iter().filter_map(|cluster| annotation::stranger(cluster, mesh)).take(MAX_TOLD).collect()
}

/// Of all exports, for the status.
pub(crate) fn all<N: Net>(node: &Node<N>) -> Vec<String> {
    let Some(mesh) = node.settings().mesh() else { return Vec::new() };
    let routes = node.routes();
    let told = |export: &Endpoint| {
        let strangers = of(export.allow.as_deref(), &mesh).join("; ");
        (!strangers.is_empty()).then(|| format!("`allow` of the export {}: {strangers}", export.port))
    };
    // Many pods may export one Service.
    let all: BTreeSet<_> = routes.table.local().filter_map(|(_, export)| told(export)).collect();
    all.into_iter().take(MAX_TOLD).collect()
}
