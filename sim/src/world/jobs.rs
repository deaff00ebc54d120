//! What is done on the nodes beside the programs: by applications of pods, and on nodes that run no router.

use std::future::Future;
use std::sync::Arc;

use servicekeel_router::identity::Identity;
use tokio::sync::oneshot;

use super::{World, lock};
use crate::host::{self, Host, Programs};
use crate::net::wire::{WINDOWS, Wires};
use crate::net::{Kernel, SimNet};
use crate::network::Network;

/// A node that runs no router.
pub(super) struct Stranger {
    programs: Programs,
    net: SimNet,
    identity: Arc<Identity>,
}

impl Stranger {
    pub(super) fn new(identity: &Arc<Identity>, network: &Network) -> (Self, Host) {
        let kernel = Kernel::new(1 << 16);
        let (programs, host) = host::host();
        let net = SimNet::node(&kernel, Wires::new(network.wires(), &kernel, WINDOWS[0]));
        (Self { programs, net, identity: identity.clone() }, host)
    }
}

impl World {
    /// Does something as an application of a pod, on the pod's node.
    pub async fn within<T: Send + 'static>(
        &self,
        pod: &str,
        job: impl Future<Output = T> + Send + 'static,
    ) -> T {
        self.run_on(&self.node_of(pod).programs, job).await
    }

    /// The network and the identity of a node that runs no router.
    pub(crate) fn stranger(&self, node: &str) -> (SimNet, Arc<Identity>) {
        let stranger = self.strangers.get(node).expect("a hostile node of the stage");
        (stranger.net.clone(), stranger.identity.clone())
    }

    /// Does something on a node that runs no router.
    pub(crate) async fn within_node<T: Send + 'static>(
        &self,
        node: &str,
        job: impl Future<Output = T> + Send + 'static,
    ) -> T {
        let stranger = self.strangers.get(node).expect("a hostile node of the stage");
        self.run_on(&stranger.programs, job).await
    }

    async fn run_on<T: Send + 'static>(
        &self,
        programs: &Programs,
        job: impl Future<Output = T> + Send + 'static,
    ) -> T {
        let number = {
            let mut jobs = lock(&self.jobs);
            *jobs += 1;
            *jobs
        };
        let (done, result) = oneshot::channel();
        let program = async move {
            let _ = done.send(job.await);
        };
        let name = format!("job {number}");
        programs.start(&name, program).await;
        let result = result.await.expect("an application's job is not killed");
        programs.kill(&name).await;
        result
    }
}
