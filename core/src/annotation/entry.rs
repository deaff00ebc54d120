//! From the tree to entries: the rules of the contract.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;
use std::str::FromStr;

use super::fields::{Findings, fields, finding, join, quoted};
use super::tree::{Node, Value};
use super::{Defaults, Finding, MAX_ALLOW, MAX_ENTRIES, MAX_PORTS, Port, stranger, unknown};
use crate::name::{AllowRule, ClusterName, Label, NameError, Protocol, ServiceName};
use crate::near::nearest;

/// The key of the list.
const SERVICES: &str = "services";
/// Of a field of exports that stands in an import.
const EXPORTS_ONLY: &str = "applies to exports only; ignored";

/// Which annotation is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Import,
    Export,
}

/// An entry of either annotation.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) service: ServiceName,
    pub(super) ports: Vec<Port>,
    pub(super) allow: Option<Vec<AllowRule>>,
}

/// Reads every entry of a document that can be served.
///
/// # Errors
/// Where the document's top level is not the contract's.
pub(super) fn entries(
    root: &Node,
    direction: Direction,
    (defaults, mesh): (&Defaults, Option<&BTreeSet<ClusterName>>),
    findings: &mut Findings,
) -> Result<Vec<Entry>, Finding> {
    let Value::Map(pairs) = &root.value else {
        return match root.value {
            Value::Null => Ok(Vec::new()),
            _ => Err(finding(
                root,
                "",
                format!("the annotation is {}; expected a `services:` list", root.value.kind()),
            )),
        };
    };
    meant(pairs)?;
    let mut lists =
        pairs.iter().filter(|(key, _)| matches!(&key.value, Value::Text(name) if name == SERVICES));
    let (first, second) = (lists.next(), lists.next());
    if let Some((key, _)) = second {
        return Err(finding(key, "services", "is given twice; merge the two lists".into()));
    }
    fields(root, "", ["services"], findings);
    let list = match first.map(|(_, list)| (list, &list.value)) {
        None => return Ok(Vec::new()),
        Some((node, Value::Null)) => {
            let reason = "is empty: nothing is served, and what was served before is withdrawn; write `services: []` if that is intended";
            findings.warn(node, "services", reason);
            return Ok(Vec::new());
        }
        Some((_, Value::List(list))) => list,
        Some((node, other)) => {
            return Err(finding(
                node,
                "services",
                format!("is {}; expected a list, each entry starting with `-`", other.kind()),
            ));
        }
    };

    let mut served: BTreeMap<ServiceName, u64> = BTreeMap::new();
    let mut entries = Vec::new();
    for (i, node) in list.iter().enumerate() {
        let path = format!("services[{i}]");
        if i == MAX_ENTRIES {
            let reason = format!(
                "{} entries; the limit is {MAX_ENTRIES}, so this entry and those after it are not served",
                list.len()
            );
            findings.refuse(node, &path, reason);
            break;
        }
        let Some(entry) = (Reader { direction, defaults, mesh, findings }).entry(node, &path) else {
            continue;
        };
        if let Some(line) = served.get(&entry.service) {
            let reason = format!(
                "{} is already defined at line {line}, which is the one served; merge the ports into one entry",
                entry.service
            );
            findings.refuse(node, &path, reason);
            continue;
        }
        served.insert(entry.service.clone(), node.line);
        entries.push(entry);
    }
    Ok(entries)
}

/// Whether a document has a list of services, or says nothing at all. One with other keys only was meant to say
/// something: to take it for an empty list would withdraw all that is in service.
fn meant(pairs: &[(Node, Node)]) -> Result<(), Finding> {
    let text = |key: &Node| match &key.value {
        Value::Text(text) => Some(text.clone()),
        _ => None,
    };
    if pairs.is_empty() || pairs.iter().any(|(key, _)| text(key).is_some_and(|text| text == SERVICES)) {
        return Ok(());
    }
    let near =
        pairs.iter().find(|(key, _)| text(key).is_some_and(|text| nearest(&text, [SERVICES]).is_some()));
    let (key, question) = match near {
        Some((key, _)) => (key, format!("did you mean `{SERVICES}`?")),
        None => (&pairs[0].0, format!("the list belongs under `{SERVICES}:`.")),
    };
    let reason = format!(
        "there is {} but no `{SERVICES}` key, so the annotation is ignored: {question} To withdraw everything, write `{SERVICES}: []`",
        key.value.shown()
    );
    Err(finding(key, "", reason))
}

struct Reader<'r> {
    direction: Direction,
    defaults: &'r Defaults,
    /// The clusters that rules and imports may name, where they are known.
    mesh: Option<&'r BTreeSet<ClusterName>>,
    findings: &'r mut Findings,
}

impl Reader<'_> {
    /// One entry; `None`, after at least one refusal, where it can't be served. All that is wrong in it is said at once.
    fn entry(&mut self, node: &Node, path: &str) -> Option<Entry> {
        const KNOWN: [&str; 5] = ["name", "namespace", "cluster", "ports", "allow"];
        let [name, namespace, cluster, ports, allow] = fields(node, path, KNOWN, self.findings)?;
        let name = match present(name) {
            Some(name) => self.parse::<Label>(name, &join(path, "name")),
            None => {
                self.findings.refuse(node, &join(path, "name"), "is missing; name the Service");
                None
            }
        };
        let namespace = match present(namespace) {
            Some(namespace) => self.parse(namespace, &join(path, "namespace")),
            None => Some(self.defaults.namespace.clone()),
        };
        let cluster = match present(cluster) {
            Some(cluster) => self.cluster(cluster, &join(path, "cluster")),
            None => Some(self.defaults.cluster.clone()),
        };
        let ports = self.ports(node, present(ports), &join(path, "ports"));
        let allow = self.allow(allow, &join(path, "allow"));
        Some(Entry {
            service: ServiceName { name: name?, namespace: namespace?, cluster: cluster? },
            ports: ports?,
            allow: allow?,
        })
    }

    fn ports(&mut self, entry: &Node, node: Option<&Node>, path: &str) -> Option<Vec<Port>> {
        let Some(node) = node else {
            self.findings.refuse(entry, path, "is missing; at least one port is required");
            return None;
        };
        let Value::List(list) = &node.value else {
            let reason = format!("is {}; a list belongs here, such as `[{{port: 8080}}]`", node.value.kind());
            self.findings.refuse(node, path, reason);
            return None;
        };
        if list.is_empty() {
            self.findings.refuse(node, path, "is empty; at least one port is required");
            return None;
        }
        if list.len() > MAX_PORTS {
            let reason = format!("{} ports; the limit is {MAX_PORTS} in one entry", list.len());
            self.findings.refuse(node, path, reason);
            return None;
        }
        let mut ports: Vec<Port> = Vec::with_capacity(list.len());
        let mut whole = true;
        let mut keys: BTreeMap<(NonZeroU16, Protocol), u64> = BTreeMap::new();
        let mut names = BTreeSet::new();
        for (i, node) in list.iter().enumerate() {
            let path = format!("{path}[{i}]");
            let Some(port) = self.port(node, &path, list.len() > 1) else {
                whole = false;
                continue;
            };
            if let Some(line) = keys.insert((port.port, port.protocol), node.line) {
                let reason = format!(
                    "{}/{} is already defined at line {line}; remove one of them",
                    port.port, port.protocol
                );
                self.findings.refuse(node, &path, reason);
                whole = false;
            }
            if let Some(name) = &port.name
                && !names.insert((name.clone(), port.protocol))
            {
                let reason = format!("another {} port of this entry has the name {name}, too", port.protocol);
                self.findings.warn(node, &join(&path, "name"), reason);
            }
            ports.push(port);
        }
        whole.then_some(ports)
    }

    fn port(&mut self, node: &Node, path: &str, several: bool) -> Option<Port> {
        const KNOWN: [&str; 4] = ["name", "port", "protocol", "targetport|targetPort"];
        let [name, port, protocol, target] = fields(node, path, KNOWN, self.findings)?;
        let name = match present(name) {
            Some(name) => self.parse(name, &join(path, "name")).map(Some),
            None if several => {
                self.findings.refuse(
                    node,
                    &join(path, "name"),
                    "is missing; required when there is more than one port",
                );
                None
            }
            None => Some(None),
        };
        let port = match present(port) {
            Some(port) => self.number(port, &join(path, "port")),
            None => {
                self.findings.refuse(
                    node,
                    &join(path, "port"),
                    "is missing; set the port that clients connect to",
                );
                None
            }
        };
        let protocol = match present(protocol) {
            Some(protocol) => self.protocol(protocol, &join(path, "protocol")),
            None => Some(Protocol::default()),
        };
        let target = match present(target) {
            Some(target) if self.direction == Direction::Import => {
                self.findings.warn(target, &join(path, "targetport"), EXPORTS_ONLY);
                port
            }
            Some(target) => self.number(target, &join(path, "targetport")),
            None => port,
        };
        Some(Port { name: name?, port: port?, protocol: protocol?, target: target? })
    }

    fn number(&mut self, node: &Node, path: &str) -> Option<NonZeroU16> {
        let text = match &node.value {
            Value::Text(text) => text,
            Value::Converted(converted) => {
                let reason =
                    format!("is {converted}; write a plain decimal number from 1 to 65535, such as 8080");
                self.findings.refuse(node, path, reason);
                return None;
            }
            other => {
                self.findings.refuse(node, path, format!("is {}; expected a port number", other.kind()));
                return None;
            }
        };
        // The text must be the number's own: YAML 1.1 reads 010 as 8, YAML 1.2 as 10.
        let number = text.parse().ok().filter(|number: &NonZeroU16| number.to_string() == *text);
        if number.is_none() {
            let reason = format!("{} is not a port; a port is a number from 1 to 65535", quoted(text));
            self.findings.refuse(node, path, reason);
        }
        number
    }

    fn protocol(&mut self, node: &Node, path: &str) -> Option<Protocol> {
        match &node.value {
            Value::Text(text) if text.eq_ignore_ascii_case("TCP") => Some(Protocol::Tcp),
            Value::Text(text) if text.eq_ignore_ascii_case("UDP") => Some(Protocol::Udp),
            other => {
                let reason = format!("{} is not supported; the protocol is TCP or UDP", other.shown());
                self.findings.refuse(node, path, reason);
                None
            }
        }
    }

    /// The rules of an export. `None`, after a refusal, where one of them is not understood: serving the entry
    /// without it would let in whom the author meant to keep out.
    fn allow(&mut self, node: Option<&Node>, path: &str) -> Option<Option<Vec<AllowRule>>> {
        let Some(node) = node else { return Some(None) };
        if self.direction == Direction::Import {
            self.findings.warn(node, path, EXPORTS_ONLY);
            return Some(None);
        }
        let Value::List(list) = &node.value else {
            let reason = format!(
                "is {}; expected a list such as `[cluster-b.local, cluster-c.local/prod]`; without this field every member of the mesh may use the export",
                node.value.kind()
            );
            self.findings.refuse(node, path, reason);
            return None;
        };
        if list.len() > MAX_ALLOW {
            self.findings.refuse(node, path, format!("{} rules; the limit is {MAX_ALLOW}", list.len()));
            return None;
        }
        if list.is_empty() {
            self.findings.warn(node, path, "an empty list allows nobody");
        }
        let mut rules = Vec::new();
        for (i, rule) in list.iter().enumerate() {
            let path = format!("{path}[{i}]");
            let parsed: Option<AllowRule> = self.parse(rule, &path);
            if parsed.as_ref().is_some_and(|rule| rule.namespace.is_some()) {
                let reason = "lets nobody in yet, since nothing attests a consumer's namespace; name the whole cluster";
                self.findings.warn(rule, &path, reason);
            }
            if let Some(stranger) =
                parsed.as_ref().zip(self.mesh).and_then(|(rule, mesh)| stranger(&rule.cluster, mesh))
            {
                self.findings.warn(rule, &path, stranger);
            }
            rules.push(parsed);
        }
        rules.into_iter().collect::<Option<_>>().map(Some)
    }

    fn cluster(&mut self, node: &Node, path: &str) -> Option<ClusterName> {
        let cluster = self.parse(node, path)?;
        // An export is of the own cluster, or refused.
        let mesh = self.mesh.filter(|_| self.direction == Direction::Import);
        if let Some(stranger) = mesh.and_then(|mesh| unknown(&cluster, mesh, "nothing of it is reached")) {
            self.findings.warn(node, path, stranger);
        }
        Some(cluster)
    }

    fn parse<T: FromStr<Err = NameError>>(&mut self, node: &Node, path: &str) -> Option<T> {
        let reason = match &node.value {
            Value::Text(text) => match text.parse() {
                Ok(parsed) => return Some(parsed),
                Err(NameError::Empty) => "is empty".to_owned(),
                Err(error) => format!("{} {error}", quoted(text)),
            },
            Value::Converted(converted) => {
                format!("is {converted}; to use the name as written, quote it: {:?}", converted.written)
            }
            other => format!("is {}; expected a name", other.kind()),
        };
        self.findings.refuse(node, path, reason);
        None
    }
}

/// A field without a value is a field that is not there.
fn present(node: Option<&Node>) -> Option<&Node> {
    node.filter(|node| !matches!(node.value, Value::Null))
}
