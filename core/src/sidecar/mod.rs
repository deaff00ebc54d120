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
//! Within a conversation the router hears of each import and export once, or again after a while where it refused it, and
//! in a new conversation of each again: the sockets stay the same ones, and so does what waits in their backlogs.

use std::collections::VecDeque;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::annotation::{Defaults, Export, Finding, Import};
use crate::handoff::{self, DescriptorKind, Pod, SocketId, ToRouter, ToSidecar};
use crate::lease::{Leases, RangeError, Snapshot};
use crate::name::{ClusterName, Protocol, RouterId};

mod conversation;
mod decisions;
mod document;
mod exports;
mod imports;
#[cfg(test)]
mod model;
mod status;
#[cfg(test)]
mod tests;
mod texts;

pub use conversation::{
    FIRST_ASK, FIRST_RETRY, LAST_ASK, LAST_RETRY, PING_AFTER, PONG_WITHIN, REFUSED_RETRY, WELCOME_TIMEOUT,
};
pub use decisions::{Command, Notice, Outgoing, Unserved};
pub use status::{Counts, ExportStatus, Findings, ImportStatus, PortState, PortStatus, RouterStatus};

use conversation::{Conversation, Turn};
use document::{Document, Given};
use exports::Exports;
use imports::{Imports, Made};

/// How long a first start waits for the router to say the cluster, before it takes [`ClusterName::fallback`].
pub const CLUSTER_WAIT: Duration = Duration::from_secs(2);
/// How long a freed address rests at least before another Service gets it: several times [`crate::dns::TTL_SECONDS`],
/// and longer than the 30 s for which a JVM keeps an answer, whatever its TTL. Where others are free it rests longer.
pub const REST: Duration = Duration::from_secs(40);
/// Leases that are not kept and are told by name.
const DROPPED_TOLD: usize = 3;

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
            notices: VecDeque::new(),
            config,
        };
        if !dropped.is_empty() {
            let (count, first) = (dropped.len(), dropped.into_iter().take(DROPPED_TOLD).collect());
            sidecar.notices.push_back(Notice::LeasesDropped { count, first });
        }
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
        if let Some(silent) = self.conversation.handle_received(now) {
            self.notices.push_back(Notice::RouterAnswers { silent });
        }
        match message {
            ToSidecar::Welcome { version, cluster, node } => {
                let router = RouterId { cluster: cluster.clone(), node };
                if !self.conversation.handle_welcome(router.clone(), version, now) {
                    self.commands.push_back(Command::Disconnect);
                    return self.down("unexpected Welcome from the router".to_owned(), false, now);
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
                self.down(format!("the router rejected this sidecar: {reason}"), true, now);
            }
            ToSidecar::Refused { id: Some(id), reason } => {
                // One that is over meanwhile is no news.
                if self.conversation.handle_refused(id, &reason, now)
                    && let Some(port) = self.port(id).cloned()
                {
                    self.notices.push_back(Notice::Refused { port, reason });
                }
            }
            ToSidecar::More { tcp, udp } => self.conversation.handle_more(tcp, udp),
            ToSidecar::Pong => {}
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

    /// The sidecar is to end: [`Self::poll_message`] says Bye next, where the router is there, and nothing after it.
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
        for id in self.conversation.ask_again(now) {
            if let Some(port) = self.port(id).cloned() {
                self.notices.push_back(Notice::Accepted { port });
            }
        }
        if self.conversation.handle_timeout(now) {
            self.commands.push_back(Command::Disconnect);
            let reason = format!("it said no Welcome within {} s", WELCOME_TIMEOUT.as_secs());
            self.down(reason, false, now);
        }
        if self.conversation.handle_silence(now)
            && let RouterStatus::Silent { router, lasts } = self.router(now)
        {
            let notice = Notice::RouterSilent { router: router.clone(), lasts };
            self.notices.push_back(notice);
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
                    version: handoff::LEAST,
                    pod: self.config.pod.clone(),
                    addresses: self.config.addresses.clone(),
                }),
                Turn::Bye => Some(ToRouter::Bye),
                Turn::Ping => Some(ToRouter::Ping),
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

    fn make(&mut self, id: SocketId) {
        if let Some((port, socket)) = self.imports.get(id) {
            let kind = match port.protocol {
                Protocol::Tcp => DescriptorKind::TcpListener,
                Protocol::Udp => DescriptorKind::UdpBound,
            };
            self.commands.push_back(Command::Make { id, kind, addr: socket.addr, port: port.clone() });
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
