//! What changed, as lines of the log.

use std::time::Duration;

use servicekeel_core::sidecar::{Annotation, ClusterSource, Notice, Sidecar};
use tokio::time::Instant;
use tracing::{info, warn};

/// Between two lines of one [`Seldom`].
const SELDOM: Duration = Duration::from_secs(60);

/// A warning about what is tried again and again: not each try is told.
#[derive(Debug, Default)]
pub(crate) struct Seldom {
    told: Option<Instant>,
}

impl Seldom {
    /// Whether it is to be told now.
    pub(crate) fn is_due(&mut self) -> bool {
        let due = self.told.is_none_or(|told| told.elapsed() >= SELDOM);
        if due {
            self.told = Some(Instant::now());
        }
        due
    }
}

/// Writes one change down.
pub(crate) fn log(notice: Notice, sidecar: &Sidecar) {
    match notice {
        Notice::Absent if sidecar.is_applied() => {
            warn!("there are no annotations; the last good state stays in service");
        }
        Notice::Absent => info!("there are no annotations yet; nothing is imported or exported until then"),
        Notice::Applied(annotation) => applied(annotation, sidecar),
        Notice::Unusable(annotation) => {
            if let Some(finding) = sidecar.findings(annotation).error {
                warn!(%annotation, "the new text is not used, the last good one stays in service: {finding}");
            }
        }
        Notice::Unserved(annotation) => unserved(annotation, sidecar),
        Notice::Cluster(cluster, source) => {
            let from = match source {
                ClusterSource::Configured => "SIDECAR_CLUSTER",
                ClusterSource::Router => "the router",
                ClusterSource::Saved => "the router, in an earlier run",
                ClusterSource::Fallback => "nobody; the default is taken",
            };
            info!(%cluster, from, "the pod's cluster");
        }
        Notice::OtherCluster { router } => {
            let own = sidecar.cluster().map(|(cluster, _)| cluster.to_string()).unwrap_or_default();
            warn!(
                %router,
                own,
                "the router serves another cluster than SIDECAR_CLUSTER says: it will refuse exports; unset it"
            );
        }
        Notice::MakeFailed { port, addr, reason, retry } => {
            warn!(%port, %addr, ?retry, "an import has no socket: {reason}");
        }
        Notice::Made { port } => info!(%port, "an import has its socket after all"),
        Notice::RouterUp(router) => info!(%router, "connected to the router"),
        Notice::RouterDown(reason) => {
            warn!("the router is away: {reason}; connections wait, and it is dialled again");
        }
        Notice::Refused { port, reason } => warn!(%port, "the router does not serve this: {reason}"),
        Notice::LeasesDropped { count, first } => {
            warn!(leases = count, "leases of an earlier run are not kept: {}", first.join("; "));
        }
    }
}

fn applied(annotation: Annotation, sidecar: &Sidecar) {
    let services = match annotation {
        Annotation::Exports => sidecar.exports().count(),
        Annotation::Imports => sidecar.imports().count(),
    };
    let findings = sidecar.findings(annotation);
    let refused = findings.refused.len() + findings.unserved.len();
    info!(%annotation, services, refused, "in service");
    for finding in findings.refused {
        warn!(%annotation, "refused: {finding}");
    }
    for finding in findings.warnings {
        warn!(%annotation, "{finding}");
    }
    unserved(annotation, sidecar);
}

/// One line for all: where a range is full, most of an annotation may be unserved.
fn unserved(annotation: Annotation, sidecar: &Sidecar) {
    let list = sidecar.findings(annotation).unserved;
    match list {
        [] => {}
        [(service, reason)] => warn!(%annotation, %service, "not served: {reason}"),
        [(service, reason), more @ ..] => {
            warn!(%annotation, %service, more = more.len(), "not served: {reason}; the others are at /status");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_happens_each_second_is_told_each_minute() {
        let mut warning = Seldom::default();
        let mut told = 0;
        for _ in 0..150 {
            told += usize::from(warning.is_due());
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert_eq!(told, 3);
    }
}
