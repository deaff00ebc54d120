//! The two annotations: what a pod exports and what it imports.

use std::num::NonZeroU16;

use crate::name::{AllowRule, ClusterName, Label, Protocol, ServiceName};

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

/// An entry of `servicekeel.io/imported-services`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Import {
    /// The Service wanted.
    pub service: ServiceName,
    /// At least one; no two with the same number and protocol.
    pub ports: Vec<Port>,
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
