//! Entries as the text of an annotation. [`super::parse_exports`] of the text gives the same entries.

use serde::Serialize;

use super::{Defaults, Export, Import, Port};
use crate::name::{ClusterName, Label, Protocol, ServiceName};

#[derive(Serialize)]
struct Document<'a> {
    services: Vec<Entry<'a>>,
}

#[derive(Serialize)]
struct Entry<'a> {
    name: &'a Label,
    namespace: &'a Label,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<&'a ClusterName>,
    ports: Vec<PortEntry<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    allow: Option<Vec<String>>,
}

#[derive(Serialize)]
struct PortEntry<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a Label>,
    port: u16,
    protocol: Protocol,
    /// Of exports only.
    #[serde(skip_serializing_if = "Option::is_none")]
    targetport: Option<u16>,
}

/// The text of `servicekeel.io/imported-services`. The cluster is left out where it is the default.
pub fn imports(entries: &[Import], defaults: &Defaults) -> String {
    render(entries.iter().map(|import| entry(&import.service, &import.ports, None, false, defaults)))
}

/// The text of `servicekeel.io/exported-services`. The cluster is left out where it is the default.
pub fn exports(entries: &[Export], defaults: &Defaults) -> String {
    render(entries.iter().map(|export| {
        let allow = export.allow.as_ref().map(|rules| rules.iter().map(ToString::to_string).collect());
        entry(&export.service, &export.ports, allow, true, defaults)
    }))
}

fn entry<'a>(
    service: &'a ServiceName,
    ports: &'a [Port],
    allow: Option<Vec<String>>,
    exported: bool,
    defaults: &Defaults,
) -> Entry<'a> {
    Entry {
        name: &service.name,
        namespace: &service.namespace,
        cluster: (service.cluster != defaults.cluster).then_some(&service.cluster),
        ports: ports
            .iter()
            .map(|port| PortEntry {
                name: port.name.as_ref(),
                port: port.port.get(),
                protocol: port.protocol,
                targetport: exported.then_some(port.target.get()),
            })
            .collect(),
        allow,
    }
}

fn render<'a>(entries: impl Iterator<Item = Entry<'a>>) -> String {
    serde_yaml::to_string(&Document { services: entries.collect() })
        .expect("a String takes every byte, and the document has only lists, fixed fields and strings")
}
