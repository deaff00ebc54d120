//! What the controller writes: the exports of a pod, from the Services that select it.
//!
//! [`plan`] is a plain function of what Kubernetes says of one namespace and one pod. The inputs are as the API gives
//! them, so that what can't be exported is told with a reason here and nowhere else.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;

use crate::annotation::{Defaults, Export, MAX_ALLOW, MAX_ENTRIES, MAX_PORTS, Port, render};
use crate::name::{AllowRule, Label, Protocol, ServiceName};

mod reason;
#[cfg(test)]
mod tests;

pub use reason::{LeftOut, Reason};

/// The annotation that the plan becomes, on the pod.
pub const EXPORTED_SERVICES: &str = "servicekeel.io/exported-services";
/// The annotation of what a pod imports. The plan has no part in it.
pub const IMPORTED_SERVICES: &str = "servicekeel.io/imported-services";
/// The annotation by which a pod whose sidecar has another container's name says that it runs one: `"true"`.
pub const SIDECAR: &str = "servicekeel.io/sidecar";
/// The annotation of a Service or a namespace that opts out: `"false"`.
pub const EXPORT: &str = "servicekeel.io/export";
/// The annotation of a Service that says who may use it: rules of `allow`, separated by commas.
pub const ALLOW: &str = "servicekeel.io/allow";

/// The namespace of the pod, and of the Services.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// Its name, and the cluster.
    pub defaults: Defaults,
    /// Its annotation [`EXPORT`].
    pub export: Option<String>,
}

/// A Service, as far as the plan wants to know it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Service {
    /// `metadata.name`.
    pub name: String,
    /// Whether `spec.type` is `ExternalName`.
    pub external_name: bool,
    /// `spec.selector`.
    pub selector: BTreeMap<String, String>,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// Its annotation [`EXPORT`].
    pub export: Option<String>,
    /// Its annotation [`ALLOW`].
    pub allow: Option<String>,
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServicePort {
    /// `port`: what the client connects to.
    pub port: i32,
    /// `protocol`.
    pub protocol: String,
    /// `name`.
    pub name: Option<String>,
    /// `targetPort`; the same number as `port` where the API is silent.
    pub target: Option<Target>,
}

/// Where a Service's port leads to in a pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// The container port of this number, whether or not a container declares it.
    Number(i32),
    /// The container port of this name, which may be another number in each pod.
    Name(String),
}

/// A pod, as far as the plan wants to know it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// Containers and init containers.
    pub containers: Vec<Container>,
}

/// A container of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// When it runs.
    pub role: Role,
    /// Its declared ports.
    pub ports: Vec<ContainerPort>,
}

/// When a container runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// As one of the pod's `containers`.
    Application,
    /// Beside them: an init container with `restartPolicy: Always`.
    Sidecar,
    /// Before them, to its end. Nothing connects to it.
    Init,
}

/// A declared port of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerPort {
    /// `name`.
    pub name: Option<String>,
    /// `containerPort`.
    pub number: i32,
    /// `protocol`.
    pub protocol: String,
}

/// What a pod exports, and what it does not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The exports, ordered by name, their ports by number.
    pub exports: Vec<Export>,
    /// The Services, or ports of them, that are not exported, in the same order.
    pub left_out: Vec<LeftOut>,
}

impl Plan {
    /// The text of [`EXPORTED_SERVICES`]; `None` where there is nothing to export. The same plan gives the same text.
    pub fn annotation(&self, defaults: &Defaults) -> Option<String> {
        (!self.exports.is_empty()).then(|| render::exports(&self.exports, defaults))
    }
}

/// The exports of `pod` from `services`, all of one namespace. The order of `services` and of their ports has no
/// influence.
///
/// A Service counts if its selector matches the pod's labels, as for Kubernetes itself. Headless ones count like any
/// other: the mesh maps a port to its target where kube-proxy would not. A Service that can select no pod at all
/// (`ExternalName`, no selector) is told as left out for every pod; any other only for the pods that it selects.
pub fn plan<'s>(namespace: &Namespace, services: impl IntoIterator<Item = &'s Service>, pod: &Pod) -> Plan {
    let mut services: Vec<&Service> = services.into_iter().collect();
    services.sort_unstable();
    let mut plan = Plan::default();
    let mut names = BTreeSet::new();
    for service in services {
        let selected = !service.selector.is_empty() && selects(&service.selector, &pod.labels);
        if !selected && !service.external_name && !service.selector.is_empty() {
            continue;
        }
        let mut ports_left_out = Vec::new();
        let export = export(namespace, service, pod, &mut ports_left_out).and_then(|export| {
            if plan.exports.len() == MAX_ENTRIES {
                return Err(Reason::TooManyServices);
            }
            if names.insert(export.service.name.clone()) { Ok(export) } else { Err(Reason::Twice) }
        });
        let left_out = |port, reason| LeftOut { service: service.name.clone(), port, reason };
        plan.left_out.extend(ports_left_out.into_iter().map(|(port, reason)| left_out(Some(port), reason)));
        match export {
            Ok(export) => plan.exports.push(export),
            Err(reason) => plan.left_out.push(left_out(None, reason)),
        }
    }
    plan
}

fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

type PortsLeftOut = Vec<((i32, String), Reason)>;

fn export(
    namespace: &Namespace,
    service: &Service,
    pod: &Pod,
    ports_left_out: &mut PortsLeftOut,
) -> Result<Export, Reason> {
    if service.external_name {
        return Err(Reason::ExternalName);
    }
    if service.selector.is_empty() {
        return Err(Reason::NoSelector);
    }
    match service.export.as_deref().map_or(Ok(false), opt_out) {
        Ok(false) => {}
        Ok(true) => return Err(Reason::OptedOut),
        Err(other) => return Err(Reason::Export(other.to_owned())),
    }
    match namespace.export.as_deref().map_or(Ok(false), opt_out) {
        Ok(false) => {}
        Ok(true) => return Err(Reason::NamespaceOptedOut),
        Err(other) => return Err(Reason::NamespaceExport(other.to_owned())),
    }
    let name = service.name.parse().map_err(Reason::Name)?;
    let allow = service.allow.as_deref().map(allow).transpose()?;
    let ports = ports(service, pod, ports_left_out)?;
    let Defaults { namespace, cluster } = namespace.defaults.clone();
    Ok(Export { service: ServiceName { name, namespace, cluster }, ports, allow })
}

/// Whether the value of [`EXPORT`] keeps something in.
///
/// # Errors
/// The value, where it is neither `"true"` nor `"false"`. It was meant to keep something in, more likely than not.
pub fn opt_out(value: &str) -> Result<bool, &str> {
    match value {
        "true" => Ok(false),
        "false" => Ok(true),
        other => Err(other),
    }
}

/// The rules in the value of [`ALLOW`].
///
/// # Errors
/// [`Reason`]: a rule that is not understood leaves the Service out, since without the rule it would be open to whom
/// the author meant to keep out.
pub fn allow(text: &str) -> Result<Vec<AllowRule>, Reason> {
    let rules: Vec<&str> = text.split(',').map(str::trim).collect();
    if rules.len() > MAX_ALLOW {
        return Err(Reason::TooManyRules(rules.len()));
    }
    rules
        .into_iter()
        .map(|rule| rule.parse().map_err(|error| Reason::Allow(rule.to_owned(), error)))
        .collect()
}

fn ports(service: &Service, pod: &Pod, left_out: &mut PortsLeftOut) -> Result<Vec<Port>, Reason> {
    if service.ports.is_empty() {
        return Err(Reason::NoPorts);
    }
    let mut declared: Vec<&ServicePort> = service.ports.iter().collect();
    declared.sort_unstable();
    let mut ports: Vec<Port> = Vec::new();
    for port in declared {
        let found = resolve(port, pod).and_then(|found| {
            let twice = |other: &Port| (other.port, other.protocol) == (found.port, found.protocol);
            if found.name.is_none() && service.ports.len() > 1 {
                Err(Reason::Unnamed)
            } else if ports.iter().any(twice) {
                Err(Reason::Twice)
            } else if ports.len() == MAX_PORTS {
                Err(Reason::TooManyPorts)
            } else {
                Ok(found)
            }
        });
        match found {
            Ok(found) => ports.push(found),
            Err(reason) => left_out.push(((port.port, port.protocol.clone()), reason)),
        }
    }
    if ports.is_empty() { Err(Reason::NoPortLeft) } else { Ok(ports) }
}

fn resolve(port: &ServicePort, pod: &Pod) -> Result<Port, Reason> {
    let protocol = match port.protocol.as_str() {
        "TCP" => Protocol::Tcp,
        "UDP" => Protocol::Udp,
        _ => return Err(Reason::Protocol),
    };
    let name = match port.name.as_deref().filter(|name| !name.is_empty()) {
        Some(name) => Some(name.parse::<Label>().map_err(|error| Reason::PortName(name.to_owned(), error))?),
        None => None,
    };
    let target = match &port.target {
        None => port.port,
        Some(Target::Number(number)) => *number,
        Some(Target::Name(name)) => {
            named(pod, name, &port.protocol).ok_or_else(|| Reason::Unresolved(name.clone()))?
        }
    };
    Ok(Port { name, port: number(port.port)?, protocol, target: number(target)? })
}

fn number(number: i32) -> Result<NonZeroU16, Reason> {
    u16::try_from(number).ok().and_then(NonZeroU16::new).ok_or(Reason::Number(number))
}

/// The container port of this name and protocol. Applications come first, sidecars after them, and of several the
/// first counts: so does Kubernetes when it makes the endpoints of a Service.
fn named(pod: &Pod, name: &str, protocol: &str) -> Option<i32> {
    [Role::Application, Role::Sidecar]
        .into_iter()
        .flat_map(|role| pod.containers.iter().filter(move |container| container.role == role))
        .flat_map(|container| &container.ports)
        .find(|port| port.name.as_deref() == Some(name) && port.protocol == protocol)
        .map(|port| port.number)
}
