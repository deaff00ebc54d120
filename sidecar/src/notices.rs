//! What changed, as lines of the log.

use servicekeel_core::sidecar::{Annotation, ClusterSource, Notice, Sidecar};
use servicekeel_runtime::throttle::Throttle;
use tokio::time::Instant;
use tracing::{info, warn};

/// Writes one change down. `unserved` says how many lines of single ports there may be.
pub(crate) fn log(notice: Notice, sidecar: &Sidecar, unserved: &Throttle) {
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
        Notice::Unserved(annotation) if sidecar.findings(annotation).unserved.is_empty() => {
            info!(%annotation, "all entries that waited are served now");
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
                "the router serves another cluster than SIDECAR_CLUSTER says: it will refuse exports; unset it"
            );
        }
        Notice::MakeFailed { port, addr, reason, retry } => {
            if let Some(untold) = unserved.permit() {
                warn!(%port, %addr, ?retry, untold, "an import has no socket: {reason}");
            }
        }
        Notice::Made { port } => info!(%port, "an import has its socket after all"),
        Notice::RouterUp(router) => info!(%router, "connected to the router"),
        Notice::RouterDown(reason) => {
            warn!("the router is away: {reason}; connections wait, and it is dialled again");
        }
        Notice::Refused { port, reason } => {
            if let Some(untold) = unserved.permit() {
                warn!(%port, untold, "the router does not serve this: {reason}");
            }
        }
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
                more => warn!(%annotation, %service, more, "not served: {reason}; the others are at /status"),
            }
        }
    }
}
