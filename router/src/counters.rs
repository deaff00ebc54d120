//! What the router counts, for `/metrics` and the status.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

macro_rules! counters {
    ($($(#[doc = $help:literal])+ $field:ident: $kind:ty = $name:literal $(, $unit:expr)?;)+) => {
        /// The router's counters; a clone counts into the same.
        #[derive(Clone, Debug, Default)]
        pub(crate) struct Counters {
            $($(#[doc = $help])+ pub(crate) $field: $kind,)+
        }

        impl Counters {
            /// Registers all under `servicekeel_router_`.
            pub(crate) fn register(&self, registry: &mut Registry) {
                let registry = registry.sub_registry_with_prefix("servicekeel_router");
                $(counters!(@register registry, self.$field, $name, concat!($($help),+) $(, $unit)?);)+
            }
        }
    };
    (@register $registry:ident, $metric:expr, $name:literal, $help:expr) => {
        $registry.register($name, $help.trim().trim_end_matches('.'), $metric.clone());
    };
    (@register $registry:ident, $metric:expr, $name:literal, $help:expr, $unit:expr) => {
        $registry.register_with_unit($name, $help.trim().trim_end_matches('.'), $unit, $metric.clone());
    };
}

counters! {
    /// Flows between two pods of this node.
    flows_local: Counter = "flows_local";
    /// Flows from a pod of this node to another router.
    flows_outbound: Counter = "flows_outbound";
    /// Flows from another router to a pod of this node.
    flows_inbound: Counter = "flows_inbound";
    /// Flows that found no endpoint and were reset.
    flows_failed: Counter = "flows_failed";
    /// Flows that lost their path and were reset.
    flows_lost: Counter = "flows_lost";
    /// Flows now.
    flows_active: Gauge = "flows_active";
    /// Attempts at a pod of this node that it refused or did not answer.
    endpoint_failures: Counter = "endpoint_failures";
    /// Bytes of TCP flows from clients to services.
    bytes_sent: Counter = "sent", Unit::Bytes;
    /// Bytes of TCP flows from services to clients.
    bytes_received: Counter = "received", Unit::Bytes;
    /// UDP sessions now.
    sessions_active: Gauge = "sessions_active";
    /// Datagrams carried, both ways.
    datagrams: Counter = "datagrams";
    /// Datagrams dropped: no endpoint, or a bound reached.
    datagrams_dropped: Counter = "datagrams_dropped";
    /// Links to neighbours now that new flows can be made by.
    links_active: Gauge = "links_active";
    /// Links that stay up and make no new flows: this router's certificate has expired, or the neighbour's.
    links_expired: Gauge = "links_expired";
    /// Connections of peers that were refused: handshake, identity or protocol.
    peers_refused: Counter = "peers_refused";
    /// Connections dialled to peers for flows.
    pool_dialled: Counter = "pool_dialled";
    /// Flows that took a connection from the pool.
    pool_reused: Counter = "pool_reused";
    /// When the router's own certificate expires, in Unix time; 0 where it has none.
    certificate_ends: Gauge = "certificate_end_timestamp", Unit::Seconds;
    /// Until the router's own certificate expires, negative since it has; 0 where it is not valid yet, NaN where there is none.
    certificate_expires: Gauge<f64, AtomicU64> = "certificate_expires", Unit::Seconds;
    /// 1 while the config as it is now, or a file that it names, is refused and the one before is in use; else 0.
    config_refused: Gauge = "config_refused";
    /// Sidecars connected now.
    sidecars_active: Gauge = "sidecars_active";
    /// Conversations with sidecars that were refused or broken off for a violation.
    sidecars_refused: Counter = "sidecars_refused";
}

impl Counters {
    /// Bytes of a TCP flow went from its client to its service, and back.
    pub(crate) fn count_bytes(&self, sent: u64, received: u64) {
        for (counter, bytes) in [(&self.bytes_sent, sent), (&self.bytes_received, received)] {
            if bytes > 0 {
                counter.inc_by(bytes);
            }
        }
    }
}
