//! Which Services were perhaps meant by a name that nobody offers.

use super::{Consumer, Table, permits};
use crate::name::{ServiceName, ServicePort};
use crate::near::is_near;

/// The most that are named.
pub const MAX_NEAR: usize = 3;

impl Table {
    /// The Services that `consumer` may use and among which [`nearest`] finds what was meant: all of this node's, and of
    /// the offers of neighbours some thousands at most.
    pub fn like(&self, wanted: &ServicePort, consumer: Consumer<'_>) -> Vec<ServiceName> {
        let local = self.by_port.iter().filter(|(_, ids)| {
            let endpoints = ids.iter().filter_map(|id| self.endpoints.get(id));
            endpoints.into_iter().any(|endpoint| permits(endpoint.allow.as_deref(), consumer))
        });
        // What neighbours offer this cluster may use, or it would not be here.
        local.map(|(port, _)| &port.service).chain(self.offers.like(wanted)).cloned().collect()
    }
}

/// Those that are nearly the wanted one: of the same name in another cluster or namespace, or of a name that is a few slips
/// away. The nearest first, [`MAX_NEAR`] at most.
pub fn nearest(services: Vec<ServiceName>, wanted: &ServicePort) -> Vec<ServiceName> {
    let mut near: Vec<(u8, ServiceName)> = Vec::new();
    for service in services {
        let Some(rank) = rank(&service, &wanted.service) else { continue };
        let ranked = (rank, service);
        if let Err(at) = near.binary_search(&ranked) {
            near.insert(at, ranked);
            near.truncate(MAX_NEAR);
        }
    }
    near.into_iter().map(|(_, service)| service).collect()
}

/// How far one is from what was wanted; `None`: it is another, or the very one.
fn rank(service: &ServiceName, wanted: &ServiceName) -> Option<u8> {
    let named = service.name == wanted.name;
    match (named, service.namespace == wanted.namespace, service.cluster == wanted.cluster) {
        (true, true, true) => None,
        (true, false, true) => Some(0),
        (true, true, false) => Some(1),
        (true, false, false) => Some(3),
        (false, same, cluster) => {
            let near = is_near(wanted.name.as_str(), service.name.as_str()) && cluster;
            near.then_some(if same { 2 } else { 4 })
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs a moment to start from")]
mod tests {
    use std::num::NonZeroU16;

    use super::*;
    use crate::mesh::table::Endpoint;
    use crate::name::{Protocol, RouterId};

    fn port(service: &str) -> ServicePort {
        let mut parts = service.splitn(3, '.');
        let mut next = || parts.next().unwrap();
        let service = ServiceName {
            name: next().parse().unwrap(),
            namespace: next().parse().unwrap(),
            cluster: next().parse().unwrap(),
        };
        ServicePort { service, port: NonZeroU16::MIN, protocol: Protocol::Tcp }
    }

    #[test]
    fn what_was_meant_is_named_where_it_may_be_used() {
        let mut table = Table::new("a.local".parse().unwrap());
        let only = |cluster: &str| Some(vec![cluster.parse().unwrap()]);
        for (id, service, allow) in [
            (1, "web.default.a.local", None),
            (2, "wbe.prod.a.local", None),
            (3, "web.secret.a.local", only("c.local")),
            (4, "data.prod.a.local", None),
            (5, "web-v2.prod.a.local", None),
        ] {
            let port = port(service);
            let target = NonZeroU16::MIN;
            table.add(id, Endpoint { port, target, allow });
        }
        let from = |cluster: &str| RouterId { cluster: cluster.parse().unwrap(), node: "n".parse().unwrap() };
        for (link, service) in [(1, "web.prod.b.local"), (3, "web.x.b.local")] {
            let port = port(service);
            let from = from(port.service.cluster.as_str());
            table.offer(&from, link, port).unwrap();
        }
        let near = |service: &str| {
            let a = "a.local".parse().unwrap();
            let consumer = Consumer { cluster: &a, namespace: None };
            let wanted = port(service);
            let near = nearest(table.like(&wanted, consumer), &wanted);
            near.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(near("web.prod.a.local"), ["web.default.a.local", "web.prod.b.local", "wbe.prod.a.local"]);
        assert_eq!(near("web2.prod.a.local"), ["web-v2.prod.a.local", "web.default.a.local"]);
        assert_eq!(near("nothing.prod.a.local"), [] as [&str; 0]);
        assert_eq!(near("data.prod.b.local"), ["data.prod.a.local"]);
    }
}
