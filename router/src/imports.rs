//! Imports: the listening sockets of pods, on which the router accepts.

use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::name::ServicePort;
use servicekeel_runtime::net::{Listener, Net};
use servicekeel_runtime::throttle::Throttle;
use tokio::time::sleep;
use tracing::warn;

use crate::node::Node;
use crate::outbound;

/// How long to wait where the system can't give another descriptor.
const PAUSE: Duration = Duration::from_millis(50);

/// How often it is told that the flows of an import find no endpoint.
const TELL: Duration = Duration::from_secs(10);

/// One import.
pub(crate) struct Import {
    pub(crate) wanted: ServicePort,
    /// For the log: flows, or UDP sessions, that found no endpoint.
    pub(crate) failures: Throttle,
}

impl Import {
    pub(crate) fn new(wanted: ServicePort) -> Arc<Self> {
        Arc::new(Self { wanted, failures: Throttle::new(1, TELL) })
    }

    /// Says that a UDP session found no endpoint.
    pub(crate) fn tell_no_session(&self, reason: impl FnOnce() -> String) {
        if let Some(untold) = self.failures.permit() {
            warn!(wanted = %self.wanted, reason = reason(), untold, "no endpoint takes datagrams: dropped");
        }
    }
}

/// Accepts on one import for ever. At the bound of flows connections wait in the backlog.
pub(crate) async fn serve<N: Net>(node: Arc<Node<N>>, listener: N::TcpListener, wanted: ServicePort) {
    let import = Import::new(wanted);
    let wanted = &import.wanted;
    let mut draining = node.draining.subscribe();
    let mut failing = false;
    let accept = async {
        loop {
            node.room_for_flow().await;
            match listener.accept().await {
                Ok((app, _)) => {
                    failing = false;
                    let Ok(permit) = node.flows.clone().acquire_owned().await else { return };
                    let flow = outbound::flow(node.clone(), app, import.clone());
                    node.tasks.spawn(async move {
                        flow.await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    // Such as EMFILE: what waits stays in the backlog meanwhile.
                    node.relieve();
                    if !std::mem::replace(&mut failing, true) {
                        warn!(%wanted, %error, "connections can't be accepted; trying again");
                    }
                    sleep(PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        biased;
        // What comes from now on waits in the backlog for the next router.
        _ = draining.wait_for(|draining| *draining) => {}
        () = accept => {}
    }
}
