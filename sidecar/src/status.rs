//! What `/status` shows.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use servicekeel_core::annotation::Finding;
use servicekeel_core::handoff::Pod;
use servicekeel_core::name::{Label, Protocol};
use servicekeel_core::sidecar::{
    Annotation, ClusterSource, ExportStatus, ImportStatus, PortState, PortStatus, RouterStatus, Sidecar,
};
use tokio::time::Instant;

use crate::dns::{Dns, DnsStatus};

/// What the status is read from.
pub(crate) struct Shared {
    sidecar: Mutex<Sidecar>,
    /// Why the state directory can't be written, since the last try.
    pub(crate) disk: Mutex<Option<String>>,
    pub(crate) pod: Pod,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) router: PathBuf,
    pub(crate) dns: Dns,
}

impl Shared {
    pub(crate) fn new(sidecar: Sidecar, pod: Pod, addresses: Vec<IpAddr>, router: PathBuf, dns: Dns) -> Self {
        Self { sidecar: Mutex::new(sidecar), disk: Mutex::default(), pod, addresses, router, dns }
    }

    /// The machine. Nobody waits while holding it.
    pub(crate) fn sidecar(&self) -> MutexGuard<'_, Sidecar> {
        self.sidecar.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The status as JSON.
    pub(crate) fn json(&self) -> String {
        let sidecar = self.sidecar();
        let status = self.status(&sidecar);
        serde_json::to_string(&status).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
    }

    fn status<'a>(&'a self, sidecar: &'a Sidecar) -> Status<'a> {
        let now = Instant::now().into_std();
        let state = sidecar.router(now);
        let up = match state {
            RouterStatus::Up { router, .. } | RouterStatus::Silent { router, .. } => Some(router),
            RouterStatus::Down { .. } => None,
        };
        let path = self.router.display().to_string();
        let router = RouterJson::of(path, state);
        let cluster = sidecar.cluster();
        let mut warnings = Vec::new();
        if let RouterStatus::Silent { lasts, .. } = state {
            warnings.push(format!(
                "the router at {} has not responded for {} s: it hangs or is stopped; until it responds, new \
                 connections to imports wait and exports are unreachable",
                self.router.display(),
                lasts.as_secs()
            ));
        }
        if let RouterStatus::Down { reason, lasts } = state {
            warnings.push(format!(
                "not connected to the router at {} for {} s, retrying: {}; until it is connected, connections to \
                 imports wait and exports are unreachable",
                self.router.display(),
                lasts.as_secs(),
                reason.unwrap_or("no answer yet")
            ));
        }
        if sidecar.is_absent() {
            warnings.push("no annotations; keeping the last good state".to_owned());
        }
        if let (Some((own, ClusterSource::Configured)), Some(router)) = (cluster, up)
            && *own != router.cluster
        {
            warnings.push(format!(
                "SIDECAR_CLUSTER is {own}, but the router serves {}: it will reject exports",
                router.cluster
            ));
        }
        warnings.extend(ipv6_only(&self.addresses));
        warnings.extend(self.disk.lock().unwrap_or_else(PoisonError::into_inner).clone());
        let mut refused = Vec::new();
        for annotation in [Annotation::Exports, Annotation::Imports] {
            let findings = sidecar.findings(annotation);
            let whole = findings.error.into_iter().chain(findings.refused);
            refused.extend(whole.map(|finding| Refused::at(annotation, finding)));
            refused.extend(findings.unserved.iter().map(|(service, reason)| Refused {
                annotation: annotation.to_string(),
                path: None,
                line: None,
                message: format!("{service}: {}", reason.at(now)),
            }));
            warnings.extend(findings.warnings.iter().map(|finding| format!("{annotation}: {finding}")));
            let rejected = sidecar.rejected(annotation);
            warnings.extend(
                rejected
                    .map(|(port, reason)| format!("{annotation}: {port}: rejected by the router: {reason}")),
            );
        }
        Status {
            pod: PodJson {
                name: &self.pod.name,
                namespace: &self.pod.namespace,
                uid: &self.pod.uid,
                addresses: &self.addresses,
            },
            cluster: cluster.map(|(name, _)| name.to_string()),
            cluster_from: cluster.map(|(_, source)| match source {
                ClusterSource::Configured => "settings",
                ClusterSource::Router => "router",
                ClusterSource::Saved => "state",
                ClusterSource::Fallback => "default",
            }),
            router,
            imports: sidecar.imports().map(Import::of).collect(),
            exports: sidecar.exports().map(Export::of).collect(),
            refused,
            warnings,
            dns: self.dns.status(),
        }
    }
}

/// What to say of a pod that has IPv6 addresses alone: the sockets in stock, by which it is dialled, are IPv4's.
pub(crate) fn ipv6_only(addresses: &[IpAddr]) -> Option<String> {
    let address = addresses.first().filter(|_| addresses.iter().all(IpAddr::is_ipv6))?;
    Some(format!(
        "the pod has no IPv4 address, and exports are not dialled over IPv6 ({address}): they are dialled at 127.0.0.1 \
         alone, where the application must listen"
    ))
}

#[derive(Serialize)]
struct Status<'a> {
    pod: PodJson<'a>,
    /// Absent while the router's word is waited for.
    cluster: Option<String>,
    /// `settings`, `router`, `state` (the router's word of an earlier run) or `default`.
    cluster_from: Option<&'static str>,
    router: RouterJson<'a>,
    imports: Vec<Import<'a>>,
    exports: Vec<Export<'a>>,
    /// What of the annotations is not served.
    refused: Vec<Refused>,
    warnings: Vec<String>,
    dns: DnsStatus,
}

#[derive(Serialize)]
struct PodJson<'a> {
    name: &'a str,
    namespace: &'a Label,
    uid: &'a str,
    addresses: &'a [IpAddr],
}

#[derive(Serialize)]
struct RouterJson<'a> {
    path: String,
    /// To a router that answers.
    connected: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<String>,
    /// How long it has been connected.
    #[serde(skip_serializing_if = "Option::is_none")]
    since_seconds: Option<u64>,
    /// How long there has been no connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    down_seconds: Option<u64>,
    /// There is a connection, and for so long the router has said nothing by it, though it was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    silent_seconds: Option<u64>,
    retrying: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
}

impl<'a> RouterJson<'a> {
    fn of(path: String, state: RouterStatus<'a>) -> Self {
        let mut json = Self {
            path,
            connected: false,
            cluster: None,
            node: None,
            since_seconds: None,
            down_seconds: None,
            silent_seconds: None,
            retrying: false,
            error: None,
        };
        match state {
            RouterStatus::Up { lasts, .. } => {
                (json.connected, json.since_seconds) = (true, Some(lasts.as_secs()));
            }
            RouterStatus::Silent { lasts, .. } => {
                (json.silent_seconds, json.error) =
                    (Some(lasts.as_secs()), Some("the router is not responding"));
            }
            RouterStatus::Down { reason, lasts } => {
                (json.down_seconds, json.retrying, json.error) = (Some(lasts.as_secs()), true, reason);
            }
        }
        if let RouterStatus::Up { router, .. } | RouterStatus::Silent { router, .. } = state {
            (json.cluster, json.node) = (Some(router.cluster.to_string()), Some(router.node.to_string()));
        }
        json
    }
}

#[derive(Serialize)]
struct Import<'a> {
    service: String,
    address: Ipv4Addr,
    ports: Vec<Port<'a>>,
}

#[derive(Serialize)]
struct Export<'a> {
    service: String,
    ports: Vec<Port<'a>>,
    /// Absent: every member of the mesh.
    #[serde(skip_serializing_if = "Option::is_none")]
    allow: Option<Vec<String>>,
}

#[derive(Serialize)]
struct Port<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a Label>,
    port: u16,
    protocol: Protocol,
    #[serde(skip_serializing_if = "Option::is_none")]
    targetport: Option<u16>,
    /// `making`, `failed`, `held` (the router is away), `handed-over`, `refused` (by the router).
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
}

/// What is not served: an annotation as a whole, an entry, or a Service for which there is no address.
#[derive(Serialize)]
struct Refused {
    annotation: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u64>,
    message: String,
}

impl Refused {
    fn at(annotation: Annotation, finding: &Finding) -> Self {
        Self {
            annotation: annotation.to_string(),
            path: Some(finding.path.clone()),
            line: Some(finding.line),
            message: finding.to_string(),
        }
    }
}

impl<'a> Import<'a> {
    fn of(status: ImportStatus<'a>) -> Self {
        Self {
            service: status.service.to_string(),
            address: status.address,
            ports: status.ports.into_iter().map(|port| Port::of(port, false)).collect(),
        }
    }
}

impl<'a> Export<'a> {
    fn of(status: ExportStatus<'a>) -> Self {
        Self {
            service: status.export.service.to_string(),
            ports: status.ports.into_iter().map(|port| Port::of(port, true)).collect(),
            allow: status.export.allow.as_ref().map(|rules| rules.iter().map(ToString::to_string).collect()),
        }
    }
}

impl<'a> Port<'a> {
    fn of(PortStatus { port, state }: PortStatus<'a>, exported: bool) -> Self {
        let (state, reason) = match state {
            PortState::Making => ("making", None),
            PortState::Failed(reason) => ("failed", Some(reason)),
            PortState::Held => ("held", None),
            PortState::HandedOver => ("handed-over", None),
            PortState::Refused(reason) => ("refused", Some(reason)),
        };
        Self {
            name: port.name.as_ref(),
            port: port.port.get(),
            protocol: port.protocol,
            targetport: exported.then_some(port.target.get()),
            state,
            reason,
        }
    }
}
