//! What the sidecar counts, for `/metrics`.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use servicekeel_core::sidecar::{RouterStatus, Sidecar};
use tokio::time::Instant;

/// The counters; a clone counts into the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics {
    imports: Gauge,
    sockets: Gauge,
    sockets_failed: Gauge,
    exports: Gauge,
    refused: Gauge,
    router_connected: Gauge,
    pub(crate) router_conversations: Counter,
    pub(crate) sockets_made: Counter,
    pub(crate) socket_failures: Counter,
    pub(crate) sockets_stocked: Counter,
    pub(crate) state_failures: Counter,
}

impl Metrics {
    /// Registers all under `servicekeel_sidecar_`.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("servicekeel_sidecar");
        registry.register("imports", "Imported Services with an address", self.imports.clone());
        registry.register("sockets", "Sockets held for imported ports", self.sockets.clone());
        registry.register(
            "sockets_failed",
            "Sockets for imported ports that cannot be created now",
            self.sockets_failed.clone(),
        );
        registry.register("exports", "Exported ports", self.exports.clone());
        registry.register(
            "refused",
            "Annotation entries and whole annotations that are not served, and ports rejected by the router",
            self.refused.clone(),
        );
        registry.register(
            "router_connected",
            "Whether the sidecar is connected to a router that answers",
            self.router_connected.clone(),
        );
        registry.register(
            "router_conversations",
            "Connections to the router",
            self.router_conversations.clone(),
        );
        registry.register("sockets_made", "Sockets created for imported ports", self.sockets_made.clone());
        registry.register(
            "socket_failures",
            "Failures to create a socket, for an imported port or for the router's stock",
            self.socket_failures.clone(),
        );
        registry.register(
            "sockets_stocked",
            "Unconnected sockets handed to the router",
            self.sockets_stocked.clone(),
        );
        registry.register(
            "state_failures",
            "Failures to write the state directory",
            self.state_failures.clone(),
        );
    }

    /// Takes over what the machine counts itself.
    pub(crate) fn observe(&self, sidecar: &Sidecar) {
        let counts = sidecar.counts();
        self.imports.set(counts.imports as i64);
        self.sockets.set(counts.sockets as i64);
        self.sockets_failed.set(counts.failed as i64);
        self.exports.set(counts.exports as i64);
        self.refused.set(counts.refused as i64);
        let up = matches!(sidecar.router(Instant::now().into_std()), RouterStatus::Up { .. });
        self.router_connected.set(up.into());
    }
}
