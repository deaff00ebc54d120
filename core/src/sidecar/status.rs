//! How a sidecar stands: what its status page and its metrics show.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use super::conversation::{Phase, Side};
use super::imports::SocketState;
use super::{Annotation, ClusterSource, Sidecar, Unserved};
use crate::annotation::{Export, Finding, Port};
use crate::handoff::SocketId;
use crate::name::{ClusterName, RouterId, ServiceName, ServicePort};

/// How one port stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortState<'a> {
    /// Its socket is being made.
    Making,
    /// Its socket could not be made, for this reason; it is tried again.
    Failed(&'a str),
    /// It is there, and the router does not know it: connections wait.
    Held,
    /// The router has it.
    HandedOver,
    /// The router does not serve it, for this reason.
    Refused(&'a str),
}

/// A port of an import or export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortStatus<'a> {
    /// The port.
    pub port: &'a Port,
    /// How it stands.
    pub state: PortState<'a>,
}

/// An import that is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportStatus<'a> {
    /// Its Service.
    pub service: &'a ServiceName,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its ports.
    pub ports: Vec<PortStatus<'a>>,
}

/// An export that is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportStatus<'a> {
    /// The entry.
    pub export: &'a Export,
    /// Its ports.
    pub ports: Vec<PortStatus<'a>>,
}

/// What is wrong with an annotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Findings<'a> {
    /// Why its text as a whole is not used; what was served before still is.
    pub error: Option<&'a Finding>,
    /// Entries that are not served.
    pub refused: &'a [Finding],
    /// What is served and looks wrong.
    pub warnings: &'a [Finding],
    /// Services that are well written, and not served all the same.
    pub unserved: &'a [(ServiceName, Unserved)],
}

/// How the router stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouterStatus<'a> {
    /// There is a conversation.
    Up {
        /// With this router.
        router: &'a RouterId,
        /// For so long.
        lasts: Duration,
    },
    /// There is one, and the router does not answer: it hangs, or is stopped.
    Silent {
        /// Which.
        router: &'a RouterId,
        /// For so long it has said nothing.
        lasts: Duration,
    },
    /// There is none; the router is dialled again and again.
    Down {
        /// Why, where that is known.
        reason: Option<&'a str>,
        /// For so long.
        lasts: Duration,
    },
}

/// How many there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Imported Services that have an address.
    pub imports: usize,
    /// Sockets of imports that are held.
    pub sockets: usize,
    /// Sockets of imports that could not be made.
    pub failed: usize,
    /// Exported ports.
    pub exports: usize,
    /// Entries, and annotations as a whole, that are refused, and ports that the router refuses.
    pub refused: usize,
}

impl Sidecar {
    /// The cluster that the pod counts itself to, and who says so; `None` while that is waited for.
    pub fn cluster(&self) -> Option<(&ClusterName, ClusterSource)> {
        self.defaults.as_ref().map(|defaults| (&defaults.cluster, self.cluster_source))
    }

    /// Whether there is no annotation at all now; what is known from before stays in service.
    pub fn is_absent(&self) -> bool {
        self.absent
    }

    /// Whether a first state is in service: both annotations are read, or the last good state is taken, and the
    /// sockets of the imports have been made, as far as that goes.
    pub fn is_applied(&self) -> bool {
        self.exports_text.parsed().is_some()
            && self.imports_text.parsed().is_some()
            && self.imports.sockets().all(|socket| socket.state != SocketState::Making)
    }

    /// The router.
    pub fn router(&self, now: Instant) -> RouterStatus<'_> {
        match (self.conversation.phase(), self.conversation.silent_since()) {
            (Phase::Up { router, .. }, Some(since)) => {
                RouterStatus::Silent { router, lasts: now.saturating_duration_since(since) }
            }
            (Phase::Up { router, since }, None) => {
                RouterStatus::Up { router, lasts: now.saturating_duration_since(*since) }
            }
            _ => RouterStatus::Down {
                reason: self.conversation.down(),
                lasts: now.saturating_duration_since(self.conversation.down_since()),
            },
        }
    }

    /// The imports that are served, in the order of their declaration.
    pub fn imports(&self) -> impl Iterator<Item = ImportStatus<'_>> {
        self.imports.served().map(|(import, address)| {
            let state = |port: &Port| match self.imports.socket(&port.of(&import.service)) {
                None => PortState::Making,
                Some(socket) => match &socket.state {
                    SocketState::Making => PortState::Making,
                    SocketState::Failed { reason, .. } => PortState::Failed(reason),
                    SocketState::Held => told(&self.conversation.imports, socket.id),
                },
            };
            let ports = import.ports.iter().map(|port| PortStatus { port, state: state(port) }).collect();
            ImportStatus { service: &import.service, address, ports }
        })
    }

    /// The exports that are served, in the order of their declaration.
    pub fn exports(&self) -> impl Iterator<Item = ExportStatus<'_>> {
        self.exports.served().iter().map(|export| {
            let state = |port: &Port| {
                let id = self.exports.id(&port.of(&export.service));
                id.map_or(PortState::Making, |id| told(&self.conversation.exports, id))
            };
            let ports = export.ports.iter().map(|port| PortStatus { port, state: state(port) }).collect();
            ExportStatus { export, ports }
        })
    }

    /// What is wrong with an annotation.
    pub fn findings(&self, annotation: Annotation) -> Findings<'_> {
        let (error, lists, unserved) = match annotation {
            Annotation::Exports => (
                self.exports_text.error(),
                self.exports_text.parsed().map(|parsed| (&parsed.refused, &parsed.warnings)),
                self.exports.unserved(),
            ),
            Annotation::Imports => (
                self.imports_text.error(),
                self.imports_text.parsed().map(|parsed| (&parsed.refused, &parsed.warnings)),
                self.imports.unserved(),
            ),
        };
        let (refused, warnings): (&[Finding], &[Finding]) =
            lists.map_or((&[], &[]), |(refused, warnings)| (refused, warnings));
        Findings { error, refused, warnings, unserved }
    }

    /// The ports of an annotation that the router refuses, and why.
    pub fn rejected(&self, annotation: Annotation) -> impl Iterator<Item = (&ServicePort, &str)> {
        let side = match annotation {
            Annotation::Exports => &self.conversation.exports,
            Annotation::Imports => &self.conversation.imports,
        };
        side.refusals().filter_map(|(id, reason)| Some((self.port(id)?, reason)))
    }

    /// How many there are of what the metrics count.
    pub fn counts(&self) -> Counts {
        let refused = |annotation| {
            let found = self.findings(annotation);
            let rejected = self.rejected(annotation).count();
            usize::from(found.error.is_some()) + found.refused.len() + found.unserved.len() + rejected
        };
        let states = || self.imports.sockets().map(|socket| &socket.state);
        Counts {
            imports: self.imports.served().count(),
            sockets: states().filter(|state| **state == SocketState::Held).count(),
            failed: states().filter(|state| matches!(state, SocketState::Failed { .. })).count(),
            exports: self.exports.len(),
            refused: refused(Annotation::Exports) + refused(Annotation::Imports),
        }
    }

    /// The port of an import or export.
    pub fn port(&self, id: SocketId) -> Option<&ServicePort> {
        self.imports.get(id).map(|(port, _)| port).or_else(|| self.exports.port(id))
    }
}

fn told(side: &Side, id: SocketId) -> PortState<'_> {
    match side.refusal(id) {
        Some(reason) => PortState::Refused(reason),
        None if side.is_told(id) => PortState::HandedOver,
        None => PortState::Held,
    }
}
