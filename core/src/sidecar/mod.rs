//! The decisions of one pod's sidecar: what it serves, which sockets that takes, what DNS answers, and what the router
//! is told.
//!
//! The caller makes sockets, speaks with the router and owns the clock. It drives a [`Sidecar`] so:
//!
//! - After anything that happened it calls the `handle_` method of it, and [`Sidecar::handle_timeout`] at
//!   [`Sidecar::poll_timeout`].
//! - Then it takes from [`Sidecar::poll_command`] until there is nothing left, and does each in that order: a name is
//!   answered once its sockets are there, and a socket closes once its name is gone.
//! - While there is a connection to the router, it takes from [`Sidecar::poll_message`] one at a time, the next when
//!   the last is sent. What is said is decided when it can be sent, so a slow router makes no queue grow.
//! - [`Sidecar::poll_notice`] is for the log.
//!
//! Within a conversation the router hears of each import and export once, and in a new conversation of each again: the
//! sockets stay the same ones, and so does what waits in their backlogs.

use std::collections::VecDeque;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::annotation::{self, Defaults, Export, Finding, Import};
use crate::dns::Zone;
use crate::handoff::{self, DescriptorKind, Pod, SocketId, ToRouter, ToSidecar};
use crate::lease::{LeaseError, Leases, RangeError, Snapshot};
use crate::name::{ClusterName, Protocol, RouterId, ServicePort};

mod conversation;
mod document;
mod exports;
mod imports;
#[cfg(test)]
mod model;
mod status;
#[cfg(test)]
mod tests;

pub use conversation::{FIRST_RETRY, LAST_RETRY, REFUSED_RETRY, WELCOME_TIMEOUT};
pub use status::{Counts, ExportStatus, Findings, ImportStatus, PortState, PortStatus, RouterStatus};

use conversation::{Conversation, Turn};
use document::{Document, Given};
use exports::Exports;
use imports::{Imports, Made};

/// How long a first start waits for the router to say the cluster, before it takes [`ClusterName::fallback`].
pub const CLUSTER_WAIT: Duration = Duration::from_secs(2);
/// How long a freed address rests before another Service gets it: far longer than [`crate::dns::TTL_SECONDS`], since
/// many clients keep an answer longer than they may.
pub const REST: Duration = Duration::from_secs(300);

/// What does not change while a sidecar runs.
#[derive(Debug, Clone)]
pub struct Config {
    /// The pod, as the router is told.
    pub pod: Pod,
    /// The pod's addresses, where its exports are dialled before its loopback.
    pub addresses: Vec<IpAddr>,
    /// Its cluster; `None`: what the router says.
    pub cluster: Option<ClusterName>,
    /// Addresses for imports, inside 127.0.0.0/8.
    pub range: Ipv4Net,
    /// Addresses that no import gets.
    pub reserved: Vec<Ipv4Addr>,
    /// The search domains of the pod's resolver.
    pub search: Vec<ClusterName>,
}

/// What the next start should know.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// The cluster, as the router said it.
    pub cluster: Option<ClusterName>,
    /// The addresses.
    pub leases: Snapshot,
    /// The last good text of the exports.
    pub exports: Option<String>,
    /// The last good text of the imports.
    pub imports: Option<String>,
}

/// One of the two annotations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Annotation {
    /// `servicekeel.io/exported-services`.
    Exports,
    /// `servicekeel.io/imported-services`.
    Imports,
}

impl fmt::Display for Annotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exports => "exported-services",
            Self::Imports => "imported-services",
        })
    }
}

/// Who says which cluster the pod counts itself to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterSource {
    /// The configuration.
    Configured,
    /// The router.
    Router,
    /// The router, in an earlier run.
    Saved,
    /// Nobody.
    Fallback,
}

/// Why a well-written entry is not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unserved {
    /// The range is full.
    #[error(transparent)]
    NoAddress(#[from] LeaseError),
    /// Too many sockets.
    #[error(
        "the entries before it have so many ports that its own do not fit; {} is the most in one annotation",
        handoff::MAX_SOCKETS
    )]
    TooManyPorts,
    /// Its rules do not fit into a message to the router.
    #[error(
        "its `allow` takes {bytes} bytes where {} is the most; write fewer rules, such as whole clusters",
        handoff::MAX_MESSAGE
    )]
    TooLong {
        /// With all its rules.
        bytes: usize,
    },
}

/// Something to do, at once and in the order in which it comes.
#[derive(Debug)]
pub enum Command {
    /// Make a socket, and say what came of it by [`Sidecar::handle_made`].
    Make {
        /// Its number from now on.
        id: SocketId,
        /// [`DescriptorKind::TcpListener`] or [`DescriptorKind::UdpBound`].
        kind: DescriptorKind,
        /// Where it is bound.
        addr: SocketAddrV4,
    },
    /// Close a socket.
    Close {
        /// Its number.
        id: SocketId,
    },
    /// Answer DNS from this zone from now on.
    SetZone(Zone),
    /// Keep this for the next start.
    Save(Saved),
    /// Dial the router; say what came of it by [`Sidecar::handle_connected`] or [`Sidecar::handle_disconnected`].
    Connect,
    /// Close the connection to the router.
    Disconnect,
}

/// Something to send to the router.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outgoing {
    /// A message.
    Plain(ToRouter),
    /// A message with the socket of this number.
    WithSocket(ToRouter, SocketId),
    /// So many unconnected sockets, to be made for it. What can't be made is said by [`Sidecar::handle_short`].
    Stock {
        /// TCP sockets.
        tcp: u16,
        /// UDP sockets.
        udp: u16,
    },
}

/// Something that changed, for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// There is no file of annotations. What was served still is.
    Absent,
    /// Another text of this annotation is in service, or the same one means something else. See [`Sidecar::findings`].
    Applied(Annotation),
    /// A new text of this annotation can't be used as a whole, and the last good one stays. See
    /// [`Sidecar::findings`].
    Unusable(Annotation),
    /// The same entries, and other Services of them than before are not served. See [`Sidecar::findings`].
    Unserved(Annotation),
    /// The pod counts itself to this cluster.
    Cluster(ClusterName, ClusterSource),
    /// The router serves another cluster than the one that is configured.
    OtherCluster {
        /// The router's.
        router: ClusterName,
    },
    /// The socket of an import can't be made.
    MakeFailed {
        /// The import.
        port: ServicePort,
        /// Where its socket should be.
        addr: SocketAddrV4,
        /// Why.
        reason: String,
        /// When it is tried again, from now.
        retry: Duration,
    },
    /// The socket of an import is there, after it could not be made.
    Made {
        /// The import.
        port: ServicePort,
    },
    /// There is a conversation with this router.
    RouterUp(RouterId),
    /// The conversation ended, or there was none at the start.
    RouterDown(String),
    /// The router does not serve an import or export.
    Refused {
        /// Which.
        port: ServicePort,
        /// Why.
        reason: String,
    },
    /// A lease of an earlier run is not kept.
    LeaseDropped(String),
}

/// The machine. See the module for how it is driven.
#[derive(Debug)]
pub struct Sidecar {
    config: Config,
    /// The pod's namespace and cluster; `None` while the cluster is waited for.
    defaults: Option<Defaults>,
    cluster_source: ClusterSource,
    /// Until when the cluster is waited for.
    cluster_wait: Option<Instant>,
    exports_text: Document<Export>,
    imports_text: Document<Import>,
    /// What came before the cluster was known.
    waiting: Vec<(Annotation, Given)>,
    absent: bool,
    exports: Exports,
    imports: Imports,
    conversation: Conversation,
    next_id: SocketId,
    zone_set: bool,
    unsaved: bool,
    commands: VecDeque<Command>,
    notices: VecDeque<Notice>,
}

impl Sidecar {
    /// A sidecar that starts at `now`, with what an earlier run saved.
    ///
    /// # Errors
    /// [`RangeError`] where the range of addresses can't be used.
    pub fn new(config: Config, saved: Saved, now: Instant) -> Result<Self, RangeError> {
        let (leases, dropped) = Leases::restore(config.range, REST, &config.reserved, &saved.leases, now)?;
        let mut sidecar = Self {
            defaults: None,
            cluster_source: ClusterSource::Fallback,
            cluster_wait: None,
            exports_text: Document::new(saved.exports),
            imports_text: Document::new(saved.imports),
            waiting: Vec::new(),
            absent: false,
            exports: Exports::default(),
            imports: Imports::new(leases),
            conversation: Conversation::new(now),
            next_id: 1,
            zone_set: false,
            unsaved: !dropped.is_empty(),
            commands: VecDeque::new(),
            notices: dropped.into_iter().map(Notice::LeaseDropped).collect(),
            config,
        };
        match (sidecar.config.cluster.clone(), saved.cluster) {
            (Some(cluster), _) => sidecar.set_cluster(cluster, ClusterSource::Configured, now),
            (None, Some(cluster)) => sidecar.set_cluster(cluster, ClusterSource::Saved, now),
            (None, None) => sidecar.cluster_wait = Some(now + CLUSTER_WAIT),
        }
        sidecar.connect(now);
        Ok(sidecar)
    }

    /// The text of an annotation, or why it can't be read: then the last good text stays in service.
    pub fn handle_text(&mut self, annotation: Annotation, text: Result<&str, Finding>, now: Instant) {
        self.absent = false;
        let given = match text {
            Ok(text) => Given::Text(text.to_owned()),
            Err(finding) => Given::Unusable(finding),
        };
        self.take(annotation, given, now);
    }

    /// There is no annotation, neither of exports nor of imports: what is known of them stays in service.
    pub fn handle_absent(&mut self, now: Instant) {
        if !std::mem::replace(&mut self.absent, true) {
            self.notices.push_back(Notice::Absent);
        }
        if self.exports_text.text().is_some() || self.imports_text.text().is_some() {
            self.take(Annotation::Exports, Given::Nothing, now);
            self.take(Annotation::Imports, Given::Nothing, now);
        }
        self.set_empty_zone();
    }

    /// The router was dialled.
    pub fn handle_connected(&mut self, now: Instant) {
        self.conversation.handle_connected(now);
    }

    /// The dial failed, or the connection ended.
    pub fn handle_disconnected(&mut self, reason: String, now: Instant) {
        self.down(reason, false, now);
    }

    /// The router said something.
    pub fn handle_message(&mut self, message: ToSidecar, now: Instant) {
        match message {
            ToSidecar::Welcome { cluster, node, .. } => {
                let router = RouterId { cluster: cluster.clone(), node };
                if !self.conversation.handle_welcome(router.clone(), now) {
                    self.commands.push_back(Command::Disconnect);
                    return self.down("it says Welcome where that does not belong".to_owned(), false, now);
                }
                self.notices.push_back(Notice::RouterUp(router));
                match &self.config.cluster {
                    None => self.set_cluster(cluster, ClusterSource::Router, now),
                    Some(own) if *own != cluster => {
                        self.notices.push_back(Notice::OtherCluster { router: cluster });
                    }
                    Some(_) => {}
                }
            }
            ToSidecar::Refused { id: None, reason } => {
                self.commands.push_back(Command::Disconnect);
                self.down(format!("it refuses this sidecar: {reason}"), true, now);
            }
            ToSidecar::Refused { id: Some(id), reason } => {
                // One that is over meanwhile is no news.
                if self.conversation.handle_refused(id, &reason)
                    && let Some(port) = self.port(id).cloned()
                {
                    self.notices.push_back(Notice::Refused { port, reason });
                }
            }
            ToSidecar::More { tcp, udp } => self.conversation.handle_more(tcp, udp),
        }
    }

    /// A socket was made, or could not be, for this reason.
    pub fn handle_made(&mut self, id: SocketId, result: Result<(), String>, now: Instant) {
        let made = result.is_ok();
        let outcome = self.imports.handle_made(id, result, now);
        let Some((port, socket)) = self.imports.get(id) else {
            if made {
                self.commands.push_back(Command::Close { id });
            }
            return;
        };
        match outcome {
            Made::Held { recovered } => {
                self.conversation.imports.tell(id);
                if recovered {
                    self.notices.push_back(Notice::Made { port: port.clone() });
                }
            }
            Made::Failed { retry } => {
                if let imports::SocketState::Failed { reason, .. } = &socket.state {
                    let (port, addr, reason) = (port.clone(), socket.addr, reason.clone());
                    self.notices.push_back(Notice::MakeFailed { port, addr, reason, retry });
                }
            }
            Made::StillFailed | Made::NotWanted => {}
        }
    }

    /// Of the sockets of an [`Outgoing::Stock`] so many could not be made. They are tried again.
    pub fn handle_short(&mut self, tcp: u16, udp: u16, now: Instant) {
        self.conversation.handle_short(tcp, udp, now);
    }

    /// An [`Outgoing::WithSocket`] was not sent since its socket could not be shared. It is tried again.
    pub fn handle_unsent(&mut self, id: SocketId, now: Instant) {
        self.conversation.handle_unsent(id, now);
    }

    /// The pod ends: [`Self::poll_message`] says Bye next, where the router is there, and nothing after it.
    pub fn handle_shutdown(&mut self) {
        self.conversation.handle_shutdown();
    }

    /// The time of [`Self::poll_timeout`] has come, or not yet.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.cluster_wait.is_some_and(|until| until <= now) {
            self.set_cluster(ClusterName::fallback(), ClusterSource::Fallback, now);
        }
        if self.imports.next_address().is_some_and(|at| at <= now) {
            self.apply_imports(false, now);
        }
        for id in self.imports.handle_timeout(now) {
            self.make(id);
        }
        if self.conversation.handle_timeout(now) {
            self.commands.push_back(Command::Disconnect);
            let reason = format!("it said no Welcome within {} s", WELCOME_TIMEOUT.as_secs());
            self.down(reason, false, now);
        }
        self.connect(now);
    }

    /// When [`Self::handle_timeout`] is to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let timers = [
            self.cluster_wait,
            self.imports.next_address(),
            self.imports.poll_timeout(),
            self.conversation.poll_timeout(),
        ];
        timers.into_iter().flatten().min()
    }

    /// The next thing to do.
    pub fn poll_command(&mut self) -> Option<Command> {
        let next = self.commands.pop_front();
        if next.is_none() && std::mem::take(&mut self.unsaved) {
            return Some(Command::Save(self.saved()));
        }
        next
    }

    /// The next thing to send. It counts as sent.
    pub fn poll_message(&mut self) -> Option<Outgoing> {
        loop {
            let message = match self.conversation.poll_turn()? {
                Turn::Hello => Some(ToRouter::Hello {
                    version: handoff::VERSION,
                    pod: self.config.pod.clone(),
                    addresses: self.config.addresses.clone(),
                }),
                Turn::Bye => Some(ToRouter::Bye),
                Turn::Stock { tcp, udp } => return Some(Outgoing::Stock { tcp, udp }),
                Turn::Unimport(id) => Some(ToRouter::Unimport { id }),
                Turn::Unexport(id) => Some(ToRouter::Unexport { id }),
                Turn::Import(id) => match self.imports.get(id) {
                    Some((port, _)) => {
                        return Some(Outgoing::WithSocket(ToRouter::Import { id, wanted: port.clone() }, id));
                    }
                    None => None,
                },
                Turn::Export(id) => self.exports.message(id),
            };
            if let Some(message) = message {
                return Some(Outgoing::Plain(message));
            }
        }
    }

    /// The next thing to log.
    pub fn poll_notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    fn take(&mut self, annotation: Annotation, given: Given, now: Instant) {
        let Some(defaults) = &self.defaults else { return self.wait(annotation, given) };
        let taken = match annotation {
            Annotation::Exports => {
                self.exports_text.take(given, |text| annotation::parse_exports(text, defaults))
            }
            Annotation::Imports => {
                self.imports_text.take(given, |text| annotation::parse_imports(text, defaults))
            }
        };
        self.unsaved |= taken.text;
        if taken.entries {
            self.apply(annotation, now);
        }
        let unusable = self.findings(annotation).error.is_some();
        if taken.error && unusable {
            self.notices.push_back(Notice::Unusable(annotation));
        } else if taken.entries || taken.error {
            self.notices.push_back(Notice::Applied(annotation));
        }
    }

    /// Keeps what came before the cluster is known: the last text that is good, and why a later one is not.
    fn wait(&mut self, annotation: Annotation, given: Given) {
        let given = match given {
            Given::Text(text) => match self.whole_error(annotation, &text) {
                Some(finding) => Given::Unusable(finding),
                None => Given::Text(text),
            },
            other => other,
        };
        let is_text = |given: &Given| matches!(given, Given::Text(_));
        let replaces = is_text(&given);
        self.waiting.retain(|(which, earlier)| *which != annotation || (is_text(earlier) && !replaces));
        self.waiting.push((annotation, given));
    }

    /// Why a text can't be used as a whole; that depends on no cluster.
    fn whole_error(&self, annotation: Annotation, text: &str) -> Option<Finding> {
        let any = Defaults { namespace: self.config.pod.namespace.clone(), cluster: ClusterName::fallback() };
        match annotation {
            Annotation::Exports => annotation::parse_exports(text, &any).err(),
            Annotation::Imports => annotation::parse_imports(text, &any).err(),
        }
    }

    fn apply(&mut self, annotation: Annotation, now: Instant) {
        match annotation {
            Annotation::Exports => self.apply_exports(),
            Annotation::Imports => self.apply_imports(true, now),
        }
    }

    fn apply_exports(&mut self) {
        let Some(parsed) = self.exports_text.parsed() else { return };
        let steps = self.exports.apply(&parsed.entries, &mut self.next_id);
        steps.over.into_iter().for_each(|id| self.conversation.exports.end(id));
        steps.tell.into_iter().for_each(|id| self.conversation.exports.tell(id));
    }

    /// `anew`: for a new text, which has a notice of its own.
    fn apply_imports(&mut self, anew: bool, now: Instant) {
        let (Some(defaults), Some(parsed)) = (&self.defaults, self.imports_text.parsed()) else { return };
        let steps = self.imports.apply(&parsed.entries, &mut self.next_id, now);
        self.unsaved |= steps.leases;
        if steps.unserved && !anew {
            self.notices.push_back(Notice::Unserved(Annotation::Imports));
        }
        let zone = (steps.zone || !self.zone_set).then(|| {
            let served: Vec<(Import, Ipv4Addr)> =
                self.imports.served().map(|(import, address)| (import.clone(), address)).collect();
            Zone::new(defaults, &self.config.search, self.imports.leases().range(), &served)
        });
        steps.make.into_iter().for_each(|id| self.make(id));
        if let Some(zone) = zone {
            self.commands.push_back(Command::SetZone(zone));
            self.zone_set = true;
        }
        for (id, held) in steps.over {
            self.conversation.imports.end(id);
            if held {
                self.commands.push_back(Command::Close { id });
            }
        }
    }

    /// While there has never been an annotation DNS answers for the names of others all the same.
    fn set_empty_zone(&mut self) {
        if let Some(defaults) = &self.defaults
            && self.absent
            && !self.zone_set
        {
            let zone = Zone::new(defaults, &self.config.search, self.imports.leases().range(), &[]);
            self.commands.push_back(Command::SetZone(zone));
            self.zone_set = true;
        }
    }

    fn make(&mut self, id: SocketId) {
        if let Some((port, socket)) = self.imports.get(id) {
            let kind = match port.protocol {
                Protocol::Tcp => DescriptorKind::TcpListener,
                Protocol::Udp => DescriptorKind::UdpBound,
            };
            self.commands.push_back(Command::Make { id, kind, addr: socket.addr });
        }
    }

    fn set_cluster(&mut self, cluster: ClusterName, source: ClusterSource, now: Instant) {
        self.cluster_wait = None;
        // The router's word is saved, also where it says what was assumed.
        self.unsaved |= source == ClusterSource::Router && self.cluster_source == ClusterSource::Fallback;
        let known = self.defaults.as_ref().map(|defaults| &defaults.cluster);
        let (first, other) = (known.is_none(), known != Some(&cluster));
        self.cluster_source = source;
        if !other {
            return;
        }
        self.notices.push_back(Notice::Cluster(cluster.clone(), source));
        let defaults = Defaults { namespace: self.config.pod.namespace.clone(), cluster };
        if first {
            self.defaults = Some(defaults);
            for (annotation, given) in std::mem::take(&mut self.waiting) {
                self.take(annotation, given, now);
            }
            return self.set_empty_zone();
        }
        // What the texts leave open means another cluster now.
        self.unsaved = true;
        self.zone_set = false;
        let exports = self.exports_text.parse_again(|text| annotation::parse_exports(text, &defaults));
        let imports = self.imports_text.parse_again(|text| annotation::parse_imports(text, &defaults));
        self.defaults = Some(defaults);
        for (annotation, read) in [(Annotation::Exports, exports), (Annotation::Imports, imports)] {
            if read {
                self.apply(annotation, now);
                self.notices.push_back(Notice::Applied(annotation));
            }
        }
    }

    fn down(&mut self, reason: String, refused: bool, now: Instant) {
        if self.conversation.handle_down(reason.clone(), refused, now) {
            self.notices.push_back(Notice::RouterDown(reason));
        }
    }

    fn connect(&mut self, now: Instant) {
        if self.conversation.poll_connect(now) {
            self.commands.push_back(Command::Connect);
        }
    }

    fn saved(&self) -> Saved {
        let cluster = self.defaults.as_ref().map(|defaults| defaults.cluster.clone());
        let said = matches!(self.cluster_source, ClusterSource::Router | ClusterSource::Saved);
        Saved {
            cluster: cluster.filter(|_| said),
            leases: self.imports.leases().snapshot(),
            exports: self.exports_text.text().map(str::to_owned),
            imports: self.imports_text.text().map(str::to_owned),
        }
    }
}
