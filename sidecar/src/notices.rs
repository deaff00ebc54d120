//! What changed, as lines of the log.

use servicekeel_core::sidecar::{Annotation, ClusterSource, Notice, Sidecar};
use servicekeel_runtime::throttle::Throttle;
use tokio::time::Instant;
use tracing::{info, warn};

/// Writes one change down. `unserved` says how many lines of single ports there may be.
pub(crate) fn log(notice: Notice, sidecar: &Sidecar, unserved: &Throttle) {
    match notice {
        Notice::Absent if sidecar.is_applied() => {
            warn!("no annotations; keeping the last good state");
        }
        Notice::Absent => info!("no annotations yet; nothing is imported or exported"),
        Notice::Applied(annotation) => applied(annotation, sidecar),
        Notice::Unusable(annotation) => {
            if let Some(finding) = sidecar.findings(annotation).error {
                warn!(%annotation, "invalid annotation; keeping the last good one: {finding}");
            }
        }
        Notice::Unserved(annotation) if sidecar.findings(annotation).unserved.is_empty() => {
            info!(%annotation, "all pending entries are now served");
        }
        Notice::Unserved(annotation) => entries(annotation, sidecar),
        Notice::Cluster(cluster, source) => {
            let from = match source {
                ClusterSource::Configured => "SIDECAR_CLUSTER",
                ClusterSource::Router => "the router",
                ClusterSource::Saved => "the router, in an earlier run",
                ClusterSource::Fallback => {
                    "the default, since neither SIDECAR_CLUSTER nor a router has named it"
                }
            };
            info!(%cluster, from, "the pod's cluster");
        }
        Notice::OtherCluster { router } => {
            let own = sidecar.cluster().map(|(cluster, _)| cluster.to_string()).unwrap_or_default();
            warn!(
                %router,
                own,
                "the router serves another cluster than SIDECAR_CLUSTER: it will reject exports; unset SIDECAR_CLUSTER"
            );
        }
        Notice::MakeFailed { port, addr, reason, retry } => {
            if let Some(suppressed) = unserved.permit() {
                warn!(%port, %addr, ?retry, suppressed, "cannot create the import's socket; retrying: {reason}");
            }
        }
        Notice::Made { port } => info!(%port, "import's socket created after retrying"),
        Notice::RouterUp(router) => info!(%router, "connected to the router"),
        Notice::RouterDown(reason) => {
            warn!("router unreachable; retrying: {reason}");
        }
        Notice::RouterSilent { router, lasts } => {
            warn!(
                %router,
                "router not responding for {} s, though connected; until it does, new connections to imports wait and \
                 exports are unreachable",
                lasts.as_secs()
            );
        }
        Notice::RouterAnswers { silent } => info!("router responding again after {} s", silent.as_secs()),
        Notice::Refused { port, reason } => {
            if let Some(suppressed) = unserved.permit() {
                warn!(%port, suppressed, "rejected by the router; retrying: {reason}");
            }
        }
        Notice::Accepted { port } => info!(%port, "accepted by the router after retrying"),
        Notice::LeasesDropped { count, first } => {
            warn!(leases = count, "dropped leases from an earlier run: {}", first.join("; "));
        }
    }
}

fn applied(annotation: Annotation, sidecar: &Sidecar) {
    let services = match annotation {
        Annotation::Exports => sidecar.exports().count(),
        Annotation::Imports => sidecar.imports().count(),
    };
    let findings = sidecar.findings(annotation);
    let rejected = findings.refused.len() + findings.unserved.len() + sidecar.rejected(annotation).count();
    info!(%annotation, services, rejected, "in service");
    for finding in findings.refused {
        warn!(%annotation, "rejected: {finding}");
    }
    for finding in findings.warnings {
        warn!(%annotation, "{finding}");
    }
    entries(annotation, sidecar);
}

/// One line for all: where a range is full, most of an annotation may be unserved.
fn entries(annotation: Annotation, sidecar: &Sidecar) {
    match sidecar.findings(annotation).unserved {
        [] => {}
        [(service, reason), more @ ..] => {
            let reason = reason.at(Instant::now().into_std());
            match more.len() {
                0 => warn!(%annotation, %service, "not served: {reason}"),
                more => {
                    warn!(%annotation, %service, more, "not served: {reason}; see /status for the others")
                }
            }
        }
    }
}
