//! What the router counts, for `/metrics` and the status.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::{Registry, Unit};
use tokio::sync::watch;

use crate::settings::Settings;

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
    /// Flows reset because no endpoint accepted them.
    flows_failed: Counter = "flows_failed";
    /// Flows reset because their path was lost.
    flows_lost: Counter = "flows_lost";
    /// Open flows.
    flows_active: Gauge = "flows_active";
    /// Failed attempts to connect to an exported port of a pod of this node.
    endpoint_failures: Counter = "endpoint_failures";
    /// Bytes of TCP flows from clients to services.
    bytes_sent: Counter = "sent", Unit::Bytes;
    /// Bytes of TCP flows from services to clients.
    bytes_received: Counter = "received", Unit::Bytes;
    /// Open UDP sessions.
    sessions_active: Gauge = "sessions_active";
    /// Datagrams carried in both directions.
    datagrams: Counter = "datagrams";
    /// Datagrams dropped for want of an endpoint or because a limit was reached.
    datagrams_dropped: Counter = "datagrams_dropped";
    /// Links to other routers that accept new flows.
    links_active: Gauge = "links_active";
    /// Links that are up but accept no new flows, since this router's certificate or the peer's has expired.
    links_expired: Gauge = "links_expired";
    /// Peer connections rejected because of the handshake, the identity or the protocol.
    peers_refused: Counter = "peers_refused";
    /// Offers of peers that were not taken, such as for want of room for their cluster.
    offers_rejected: Counter = "offers_rejected";
    /// Connections dialled to peers for flows.
    pool_dialled: Counter = "pool_dialled";
    /// Flows that reused a pooled connection.
    pool_reused: Counter = "pool_reused";
    /// When the router's certificate expires, in Unix time; 0 without one.
    certificate_ends: Gauge = "certificate_end_timestamp", Unit::Seconds;
    /// 1 while the current config, or a file that it names, is invalid and an earlier one is in use; else 0.
    config_refused: Gauge = "config_refused";
    /// Connected sidecars.
    sidecars_active: Gauge = "sidecars_active";
    /// Sidecar connections rejected, or closed for a protocol violation.
    sidecars_refused: Counter = "sidecars_refused";
    /// Sidecars that disconnected unexpectedly and did not reconnect in time: their sockets are closed.
    sidecars_lost: Counter = "sidecars_lost";
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

/// How long the router's certificate is valid still: as of the moment in which it is asked.
#[derive(Debug)]
pub(crate) struct Expiry(watch::Receiver<Arc<Settings>>);

impl Expiry {
    /// Registers it beside the counters.
    pub(crate) fn register(settings: watch::Receiver<Arc<Settings>>, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("servicekeel_router");
        registry.register_collector(Box::new(Self(settings)));
    }
}

impl Collector for Expiry {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let gauge = ConstGauge::new(self.0.borrow().seconds_left());
        let help = "Time until the router's certificate expires, negative once it has; 0 if it is not valid yet, NaN without one";
        let unit = Some(&Unit::Seconds);
        gauge.encode(encoder.encode_descriptor("certificate_expires", help, unit, gauge.metric_type())?)
    }
}
