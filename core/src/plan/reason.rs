//! Why a Service, or a port of it, is not exported.

use std::fmt;

use super::{ALLOW, EXPORT};
use crate::annotation::{MAX_ALLOW, MAX_ENTRIES, MAX_PORTS};
use crate::name::NameError;

/// A Service, or a port of it, that is not exported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// The Service's name.
    pub service: String,
    /// The port's number and protocol; `None` where it is the whole Service.
    pub port: Option<(i32, String)>,
    /// Why.
    pub reason: Reason,
}

impl LeftOut {
    /// Whether somebody wanted it so: an opt-out is nothing to tell anybody.
    pub fn is_wanted(&self) -> bool {
        matches!(self.reason, Reason::OptedOut | Reason::NamespaceOptedOut)
    }
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.port {
            Some((port, protocol)) => write!(f, "{}:{port}/{protocol}: {}", self.service, self.reason),
            None => write!(f, "{}: {}", self.service, self.reason),
        }
    }
}

/// Why something is not exported, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The Service has `servicekeel.io/export: "false"`.
    #[error("{EXPORT} is \"false\"")]
    OptedOut,
    /// The namespace has `servicekeel.io/export: "false"`.
    #[error("{EXPORT} of the namespace is \"false\"")]
    NamespaceOptedOut,
    /// Another value than `"true"` and `"false"`, on the Service.
    #[error("{EXPORT} is {0:?}; use \"true\" or \"false\"")]
    Export(String),
    /// Another value than `"true"` and `"false"`, on the namespace.
    #[error("{EXPORT} of the namespace is {0:?}; use \"true\" or \"false\"")]
    NamespaceExport(String),
    /// An alias in the cluster's DNS, which has no pods.
    #[error("type ExternalName has no pods")]
    ExternalName,
    /// Its endpoints are made by hand, or by something else.
    #[error("no selector, so it selects no pods")]
    NoSelector,
    /// A headless Service may have none.
    #[error("no ports")]
    NoPorts,
    /// Each has a reason of its own.
    #[error("none of its ports can be exported")]
    NoPortLeft,
    /// The Service's name.
    #[error("its name {0}")]
    Name(NameError),
    /// A rule of `servicekeel.io/allow`.
    #[error(
        "{ALLOW}: the rule {0:?} {1}; use cluster or cluster/namespace, separated by commas, or \
         remove the annotation to allow every member of the mesh"
    )]
    Allow(String, NameError),
    /// More than an entry may have.
    #[error("{ALLOW} has {0} rules; the limit is {MAX_ALLOW}")]
    TooManyRules(usize),
    /// Neither TCP nor UDP.
    #[error("unsupported protocol; only TCP and UDP are supported")]
    Protocol,
    /// A port that is none.
    #[error("{0} is not a port; a port is a number from 1 to 65535")]
    Number(i32),
    /// The name of a port.
    #[error("its name {0:?} {1}")]
    PortName(String, NameError),
    /// One of several ports has no name.
    #[error("needs a name, since the Service has more than one port")]
    Unnamed,
    /// `targetPort` is a name.
    #[error("no container of the pod has a port named {0:?} with this protocol")]
    Unresolved(String),
    /// The same number and protocol, or the same name.
    #[error("duplicate; only the first is exported")]
    Twice,
    /// More than an entry may have.
    #[error("the Service has too many ports; only the first {MAX_PORTS} are exported")]
    TooManyPorts,
    /// More than an annotation may have.
    #[error("too many Services select the pod; only the first {MAX_ENTRIES} are exported")]
    TooManyServices,
}
