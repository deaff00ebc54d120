//! Imports: the listening sockets of pods, on which the router accepts.

use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::name::ServicePort;
use servicekeel_runtime::net::{Listener, Net};
use tokio::time::sleep;
use tracing::warn;

use crate::node::Node;
use crate::outbound;

/// Accepts on one import for ever. At the bound of flows it does not accept: connections wait in the backlog.
pub(crate) async fn serve<N: Net>(node: Arc<Node<N>>, listener: N::TcpListener, wanted: ServicePort) {
    let wanted = Arc::new(wanted);
    let mut draining = node.draining.subscribe();
    loop {
        let Ok(permit) = node.flows.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            biased;
            // What comes from now on waits in the backlog for the next router.
            _ = draining.wait_for(|draining| *draining) => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((app, _)) => {
                let flow = outbound::flow(node.clone(), app, wanted.clone());
                node.tasks.spawn(async move {
                    flow.await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Such as EMFILE: what waits stays in the backlog meanwhile.
                warn!(%wanted, %error, "a connection can't be accepted; trying again");
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
}
