//! The two annotations: what a pod exports and what it imports.
//!
//! [`parse_imports`] and [`parse_exports`] read the text, [`render`] writes it, and [`diff`] says what must change
//! from one state to the next. A wrong entry is refused with its place and the others are served; an unknown field is
//! a warning, since older sidecars meet newer annotations.

use std::collections::BTreeSet;
use std::fmt;
use std::num::NonZeroU16;

use crate::name::{AllowRule, ClusterName, Label, Protocol, ServiceName, ServicePort};
use crate::near::nearest_cluster;

pub mod diff;
mod entry;
mod fields;
pub mod render;
#[cfg(test)]
mod tests;
mod tree;

/// The most bytes in an annotation: what Kubernetes takes for all annotations of an object together
/// (`TotalAnnotationSizeLimitB` of k8s.io/apimachinery/pkg/api/validation).
pub const MAX_TEXT: usize = 256 << 10;
/// The most entries that are served.
pub const MAX_ENTRIES: usize = 4096;
/// The most ports in one entry.
pub const MAX_PORTS: usize = 64;
/// The most `allow` rules in one entry.
pub const MAX_ALLOW: usize = 256;
/// The most refusals, and the most warnings, that are told of one annotation.
pub const MAX_FINDINGS: usize = 256;

/// Reads `servicekeel.io/imported-services`. An empty text and an empty list have no entries.
///
/// # Errors
/// A [`Finding`] where the text as a whole can't be used: over [`MAX_TEXT`], not YAML, or not a mapping with a list
/// under `services`: one that has other keys only was meant to say something else than nothing.
/// The caller keeps the last good state.
pub fn parse_imports(text: &str, defaults: &Defaults) -> Result<Parsed<Import>, Finding> {
    parse_imports_of_mesh(text, defaults, None)
}

/// As [`parse_imports`], where the clusters of the mesh may be known: an import of another is warned of.
///
/// # Errors
/// As [`parse_imports`].
pub fn parse_imports_of_mesh(
    text: &str,
    defaults: &Defaults,
    mesh: Option<&BTreeSet<ClusterName>>,
) -> Result<Parsed<Import>, Finding> {
    parse(text, entry::Direction::Import, defaults, mesh, |entry| Import {
        service: entry.service,
        ports: entry.ports,
    })
}

/// Reads `servicekeel.io/exported-services`. An empty text and an empty list have no entries.
///
/// # Errors
/// As [`parse_imports`].
pub fn parse_exports(text: &str, defaults: &Defaults) -> Result<Parsed<Export>, Finding> {
    parse_exports_of_mesh(text, defaults, None)
}

/// As [`parse_exports`], where the clusters of the mesh may be known: a rule of `allow` that names another is warned of.
///
/// # Errors
/// As [`parse_imports`].
pub fn parse_exports_of_mesh(
    text: &str,
    defaults: &Defaults,
    mesh: Option<&BTreeSet<ClusterName>>,
) -> Result<Parsed<Export>, Finding> {
    parse(text, entry::Direction::Export, defaults, mesh, |entry| Export {
        service: entry.service,
        ports: entry.ports,
        allow: entry.allow,
    })
}

/// What to say of a rule of `allow` for a cluster that `mesh`, which is what a router trusts, does not have: it lets
/// nobody in, and is most likely a slip. `None` where the mesh has it.
pub fn stranger(cluster: &ClusterName, mesh: &BTreeSet<ClusterName>) -> Option<String> {
    unknown(cluster, mesh, "nobody of it gets in")
}

/// That `mesh` does not have a cluster, and what follows of that.
fn unknown(cluster: &ClusterName, mesh: &BTreeSet<ClusterName>, effect: &str) -> Option<String> {
    if mesh.contains(cluster) {
        return None;
    }
    let meant = nearest_cluster(cluster, mesh).map(|meant| format!("; did you mean {meant}?"));
    Some(format!(
        "{cluster} is not a cluster that the router's `trust` has, so {effect}{}",
        meant.unwrap_or_default()
    ))
}

fn parse<T>(
    text: &str,
    direction: entry::Direction,
    defaults: &Defaults,
    mesh: Option<&BTreeSet<ClusterName>>,
    make: impl Fn(entry::Entry) -> T,
) -> Result<Parsed<T>, Finding> {
    let root = tree::Node::read(text)?;
    let mut findings = fields::Findings::default();
    if matches!(root.value, tree::Value::Null) && text.lines().any(|line| line.trim_start().starts_with('#'))
    {
        let reason = "comments alone: nothing is served, and what was is withdrawn; `services: []` says that on purpose";
        findings.warn(&root, "", reason);
    }
    let entries = entry::entries(&root, direction, (defaults, mesh), &mut findings)?;
    let (refused, warnings) = findings.into_parts();
    Ok(Parsed { entries: entries.into_iter().map(make).collect(), refused, warnings })
}

/// The most values that the aliases of a text of so many bytes unfold to; a text that has more is refused.
pub fn most_unfolded(bytes: usize) -> usize {
    tree::unfolded(bytes)
}

/// What an entry means where it does not say: the pod's own namespace and cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defaults {
    /// The pod's namespace.
    pub namespace: Label,
    /// The pod's cluster.
    pub cluster: ClusterName,
}

/// One port of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Its name; may be absent where an entry has one port only.
    pub name: Option<Label>,
    /// What the client connects to.
    pub port: NonZeroU16,
    /// TCP where the annotation is silent.
    pub protocol: Protocol,
    /// The container's port; `port` where the annotation is silent.
    pub target: NonZeroU16,
}

impl Port {
    /// The key under which this port of `service` is routed.
    pub fn of(&self, service: &ServiceName) -> ServicePort {
        ServicePort { service: service.clone(), port: self.port, protocol: self.protocol }
    }
}

/// An entry of `servicekeel.io/imported-services`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Import {
    /// The Service wanted.
    pub service: ServiceName,
    /// At least one; no two with the same number and protocol.
    pub ports: Vec<Port>,
}

impl Import {
    /// The ports for which this import needs a socket.
    pub fn sockets(&self) -> impl Iterator<Item = ServicePort> {
        self.ports.iter().map(|port| port.of(&self.service))
    }
}

/// An entry of `servicekeel.io/exported-services`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// The Service offered.
    pub service: ServiceName,
    /// At least one; no two with the same number and protocol.
    pub ports: Vec<Port>,
    /// Who may use it; `None`: every member of the mesh.
    pub allow: Option<Vec<AllowRule>>,
}

/// What an annotation says, as far as it can be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parsed<T> {
    /// The entries that are served, in the order in which they stand.
    pub entries: Vec<T>,
    /// The entries (or ports) that are not, each with its place and reason.
    pub refused: Vec<Finding>,
    /// What is served but looks wrong, such as an unknown field.
    pub warnings: Vec<Finding>,
}

/// Something to tell the author of an annotation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Where it stands, such as `services[2].ports[0].protocol`.
    pub path: String,
    /// Line in the text, from 1.
    pub line: u64,
    /// Column in the line, from 1.
    pub column: u64,
    /// What is wrong and what to do.
    pub reason: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}: ", self.line, self.column)?;
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.reason)
    }
}
