//! Where descriptors run short: flows wait, and what nobody uses is closed, so that links, sidecars and the admin
//! endpoint go on.

use std::time::Duration;

use servicekeel_core::handoff::MAX_DESCRIPTORS;
use servicekeel_runtime::net::Net;
use tokio::time::sleep;
use tracing::warn;

use crate::node::{MAX_FLOWS, Node};

/// Descriptors that a flow takes: two sockets, and a pipe while one side of a flow on this node is slow.
const PER_FLOW: u64 = 4;
/// Fewer flows at once than this are told at the start.
const FEW_FLOWS: usize = 1024;
/// How often it is looked whether there is room again.
pub(crate) const PAUSE: Duration = Duration::from_millis(200);

/// The most flows at once where there may be so many descriptors: a quarter is left for all else.
pub(crate) fn most_flows(descriptors: Option<u64>) -> usize {
    let flows = descriptors.map_or(u64::MAX, |limit| limit / 4 * 3 / PER_FLOW);
    flows.clamp(1, MAX_FLOWS as u64) as usize
}

/// The most sockets that a sidecar is asked for at once.
fn most_asked(descriptors: Option<u64>) -> usize {
    descriptors.map_or(MAX_DESCRIPTORS, |limit| (limit / 16).clamp(1, MAX_DESCRIPTORS as u64) as usize)
}

impl<N: Net> Node<N> {
    /// Says, at the start, that the limit of open files is so low that flows will wait for one another.
    pub(crate) fn tell_limit(&self) {
        if self.most_flows < FEW_FLOWS {
            let limit = self.net.most_descriptors();
            warn!(
                limit,
                flows = self.most_flows,
                "the open file limit allows few concurrent flows; raise it"
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

    /// Whether what would be kept for long has to wait. Where nothing is carried it has not: nothing would end that wait.
    pub(crate) fn is_crowded(&self) -> bool {
        let carries =
            self.flows.available_permits() < self.most_flows || self.counters.sessions_active.get() > 0;
        self.relieve() && carries
    }

    /// Waits until one more flow may begin.
    pub(crate) async fn room_for_flow(&self) {
        loop {
            // A permit is not held while nothing comes: there may be more imports than flows.
            drop(self.flows.acquire().await);
            if !self.is_crowded() {
                return;
            }
            sleep(PAUSE).await;
        }
    }

    /// Waits until there is room for sockets of a sidecar, and says how many it may be asked for at once.
    pub(crate) async fn room_for_sockets(&self) -> usize {
        while self.is_crowded() {
            sleep(PAUSE).await;
        }
        most_asked(self.net.most_descriptors())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_low_limit_lets_fewer_flows_in() {
        for (limit, flows, asked) in [
            (None, MAX_FLOWS, MAX_DESCRIPTORS),
            (Some(1 << 20), MAX_FLOWS, MAX_DESCRIPTORS),
            (Some(1024), 192, MAX_DESCRIPTORS),
            (Some(80), 15, 5),
            (Some(3), 1, 1),
        ] {
            assert_eq!((most_flows(limit), most_asked(limit)), (flows, asked), "{limit:?}");
        }
    }
}
