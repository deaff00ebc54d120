//! Where descriptors run short: the flows of whoever has most of them wait, and what nobody uses is closed, so that links,
//! sidecars and the admin endpoint go on.

use std::time::Duration;

use servicekeel_runtime::net::Net;
use tokio::time::sleep;
use tracing::warn;

use crate::bounds::Owner;
use crate::node::Node;

/// Fewer flows at once than this are told at the start.
const FEW_FLOWS: u64 = 1024;
/// Fewer sidecars than this, which are twice as many as Kubernetes has pods on a node by default.
const FEW_SIDECARS: u64 = 220;
/// How often it is looked whether there is room again.
pub(crate) const PAUSE: Duration = Duration::from_millis(200);

impl<N: Net> Node<N> {
    /// Says, at the start, that the limit of open files is so low that flows will wait for one another, or the limits of
    /// threads so low that some sidecars may find no place.
    pub(crate) fn tell_limit(&self) {
        let flows = self.limits.flows.budget;
        if flows < FEW_FLOWS {
            let limit = self.net.most_descriptors();
            warn!(limit, flows, "the open file limit allows few concurrent flows; raise it");
        }
        let sidecars = self.limits.most_sidecars;
        if let Some(threads) = self.net.most_threads().filter(|threads| threads / 2 < FEW_SIDECARS) {
            warn!(
                threads,
                sidecars,
                "the limits of threads (ulimit -u, pids.max, TasksMax) allow few sidecars; raise them"
            );
        }
    }

    /// Closes what nobody uses where descriptors are short; says whether they are.
    pub(crate) fn relieve(&self) -> bool {
        let short = self.net.is_short();
        if short && self.relief.permit().is_some() {
            if let Some(suppressed) = self.shortage.permit() {
                warn!(
                    suppressed,
                    "low on file descriptors: new flows wait, idle connections are closed; raise the open file limit"
                );
            }
            self.all_peers().iter().for_each(|peer| peer.close_idle());
            self.pods().values().for_each(|pod| pod.stock.settle());
            self.relieved.send_modify(|times| *times += 1);
        }
        short
    }

    /// Whether what would be kept for long has to wait in this owner's name: whoever carries most waits first, and whoever
    /// carries nothing does not, since nothing would end that wait.
    pub(crate) fn holds_back(&self, owner: &Owner) -> bool {
        self.relieve() && self.flows.held(owner) > 0 && self.flows.gives_way(owner)
    }

    /// Waits until an owner may begin one more flow. It is not taken while nothing comes: there may be more imports than
    /// flows.
    pub(crate) async fn room_for_flow(&self, owner: &Owner) {
        loop {
            self.flows.room(owner).await;
            if !self.holds_back(owner) {
                return;
            }
            sleep(PAUSE).await;
        }
    }

    /// Waits until there is room for sockets of a sidecar, and says how many it may be asked for at once.
    pub(crate) async fn room_for_sockets(&self, owner: &Owner) -> usize {
        loop {
            self.sockets.room(owner).await;
            let short = self.relieve() && self.flows.total() > 0;
            if !(short && self.sockets.gives_way(owner)) {
                break;
            }
            sleep(PAUSE).await;
        }
        self.sockets.left(owner, self.limits.asked as u64).max(1) as usize
    }
}
