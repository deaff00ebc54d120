//! From the API's objects to the plan's inputs, and what of an object is kept in memory.

use k8s_openapi::api::core::v1::{Container, Namespace, Pod, PodSpec, PodStatus, Service, ServiceSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{FieldsV1, ManagedFieldsEntry, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use serde_json::json;
use servicekeel_core::plan::{self, ALLOW, EXPORT, EXPORTED_SERVICES, Role, SIDECAR, Target};

use crate::{FIELD_MANAGER, SIDECAR_CONTAINER};

/// A Service as the plan wants it.
pub fn service(service: &Service) -> plan::Service {
    let spec = service.spec.clone().unwrap_or_default();
    let ports = spec.ports.unwrap_or_default().into_iter().map(|port| plan::ServicePort {
        port: port.port,
        protocol: port.protocol.unwrap_or_else(tcp),
        name: port.name,
        target: port.target_port.map(|target| match target {
            IntOrString::Int(number) => Target::Number(number),
            IntOrString::String(name) => Target::Name(name),
        }),
    });
    plan::Service {
        name: service.name_any(),
        external_name: spec.type_.as_deref() == Some("ExternalName"),
        selector: spec.selector.unwrap_or_default(),
        ports: ports.collect(),
        export: service.annotations().get(EXPORT).cloned(),
        allow: service.annotations().get(ALLOW).cloned(),
    }
}

/// A pod as the plan wants it.
pub fn pod(pod: &Pod) -> plan::Pod {
    let containers = pod.spec.iter().flat_map(|spec| {
        let init = spec.init_containers.iter().flatten().map(|container| {
            let beside = container.restart_policy.as_deref() == Some("Always");
            (if beside { Role::Sidecar } else { Role::Init }, container)
        });
        spec.containers.iter().map(|container| (Role::Application, container)).chain(init)
    });
    plan::Pod { labels: pod.labels().clone(), containers: containers.map(container).collect() }
}

fn container((role, container): (Role, &Container)) -> plan::Container {
    let ports = container.ports.iter().flatten().map(|port| plan::ContainerPort {
        name: port.name.clone(),
        number: port.container_port,
        protocol: port.protocol.clone().unwrap_or_else(tcp),
    });
    plan::Container { role, ports: ports.collect() }
}

/// What the API itself takes where a manifest is silent.
fn tcp() -> String {
    "TCP".to_owned()
}

/// Whether the pod says so, or has a container of the sidecar's name.
pub fn runs_sidecar(pod: &Pod) -> bool {
    let containers =
        pod.spec.iter().flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
    pod.annotations().get(SIDECAR).is_some_and(|value| value == "true")
        || containers.into_iter().any(|container| container.name == SIDECAR_CONTAINER)
}

/// Whose a pod's annotation of exports is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// It is not there.
    Nobody,
    /// This controller's, alone.
    Us,
    /// This field manager's, perhaps with others.
    Other(String),
}

/// Reads the owner from `metadata.managedFields`. An annotation that no manager claims is not ours.
pub fn owner(pod: &Pod) -> Owner {
    if !pod.annotations().contains_key(EXPORTED_SERVICES) {
        return Owner::Nobody;
    }
    let mut ours = false;
    for entry in pod.managed_fields().iter().filter(|entry| owns_exports(entry)) {
        let manager = entry.manager.as_deref().unwrap_or_default();
        if manager != FIELD_MANAGER || entry.operation.as_deref() != Some("Apply") {
            return Owner::Other(manager.to_owned());
        }
        ours = true;
    }
    if ours { Owner::Us } else { Owner::Other("unknown".to_owned()) }
}

fn owns_exports(entry: &ManagedFieldsEntry) -> bool {
    entry.fields_v1.as_ref().is_some_and(|fields| {
        fields.0["f:metadata"]["f:annotations"].get(format!("f:{EXPORTED_SERVICES}")).is_some()
    })
}

/// Drops what is not read of a pod. False: the pod is of no concern, since it runs no sidecar and has nothing of ours,
/// or since it has ended or is ending.
pub(crate) fn trim_pod(pod: &mut Pod) -> bool {
    let phase = pod.status.take().and_then(|status| status.phase);
    let ended = matches!(phase.as_deref(), Some("Succeeded" | "Failed"));
    if ended || pod.metadata.deletion_timestamp.is_some() || !(runs_sidecar(pod) || owner(pod) == Owner::Us) {
        return false;
    }
    let mut fields = std::mem::take(pod.managed_fields_mut());
    fields.retain(owns_exports);
    for entry in &mut fields {
        let (field, time) = (format!("f:{EXPORTED_SERVICES}"), None);
        let fields_v1 = Some(FieldsV1(json!({ "f:metadata": { "f:annotations": { field: {} } } })));
        *entry = ManagedFieldsEntry { fields_v1, time, ..std::mem::take(entry) };
    }
    let labels = pod.metadata.labels.take();
    trim_meta(&mut pod.metadata, &[EXPORTED_SERVICES, SIDECAR]);
    pod.metadata.labels = labels;
    pod.metadata.managed_fields = Some(fields);
    let spec = pod.spec.take().unwrap_or_default();
    let trim = |containers: Vec<Container>| {
        let kept = |c: Container| Container {
            name: c.name,
            ports: c.ports,
            restart_policy: c.restart_policy,
            ..Container::default()
        };
        containers.into_iter().map(kept).collect()
    };
    pod.spec = Some(PodSpec {
        containers: trim(spec.containers),
        init_containers: spec.init_containers.map(trim),
        ..PodSpec::default()
    });
    pod.status = phase.map(|phase| PodStatus { phase: Some(phase), ..PodStatus::default() });
    true
}

/// Drops what is not read of a Service.
pub(crate) fn trim_service(service: &mut Service) -> bool {
    trim_meta(&mut service.metadata, &[EXPORT, ALLOW]);
    let spec = service.spec.take().unwrap_or_default();
    let (ports, selector, type_) = (spec.ports, spec.selector, spec.type_);
    service.spec = Some(ServiceSpec { ports, selector, type_, ..ServiceSpec::default() });
    service.status = None;
    true
}

/// Drops what is not read of a namespace.
pub(crate) fn trim_namespace(namespace: &mut Namespace) -> bool {
    trim_meta(&mut namespace.metadata, &[EXPORT]);
    (namespace.spec, namespace.status) = (None, None);
    true
}

fn trim_meta(meta: &mut ObjectMeta, read: &[&str]) {
    let ObjectMeta { name, namespace, uid, resource_version, annotations, .. } = std::mem::take(meta);
    let annotations =
        annotations.unwrap_or_default().into_iter().filter(|(key, _)| read.contains(&key.as_str()));
    let annotations = Some(annotations.collect());
    *meta = ObjectMeta { name, namespace, uid, resource_version, annotations, ..ObjectMeta::default() };
}
