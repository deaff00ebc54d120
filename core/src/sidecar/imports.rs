//! Imports: which are served, their addresses, and the socket of each of their ports.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use super::Unserved;
use crate::annotation::Import;
use crate::annotation::diff::{self, ImportChange};
use crate::handoff::{MAX_SOCKETS, SocketId};
use crate::lease::Leases;
use crate::name::{ServiceName, ServicePort};

/// How long after its first failure a socket is tried again; doubled from then on ...
const FIRST_RETRY: Duration = Duration::from_millis(250);
/// ... up to this.
const LAST_RETRY: Duration = Duration::from_secs(30);

/// What a new set of imports needs.
#[derive(Debug, Default)]
pub(super) struct Steps {
    /// Sockets to make.
    pub(super) make: Vec<SocketId>,
    /// Sockets that are over, and whether they exist.
    pub(super) over: Vec<(SocketId, bool)>,
    /// Names, ports or addresses are others than before.
    pub(super) zone: bool,
    /// The table of leases is another than before.
    pub(super) leases: bool,
    /// Other Services than before are not served.
    pub(super) unserved: bool,
}

#[derive(Debug)]
pub(super) struct Imports {
    leases: Leases,
    served: Vec<Import>,
    unserved: Vec<(ServiceName, Unserved)>,
    sockets: BTreeMap<ServicePort, Socket>,
    by_id: BTreeMap<SocketId, ServicePort>,
    retries: BTreeSet<(Instant, SocketId)>,
}

/// The socket of one imported port.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) id: SocketId,
    pub(super) addr: SocketAddrV4,
    pub(super) state: SocketState,
    /// How long the next failure waits.
    delay: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SocketState {
    /// Being made.
    Making,
    /// Made.
    Held,
    /// Could not be made; it is tried again at that time.
    Failed { reason: String, retry: Instant },
}

/// What came of a socket that was to be made.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Made {
    /// It is held now.
    Held {
        /// It had failed before.
        recovered: bool,
    },
    /// It failed, for another reason than before.
    Failed {
        /// When it is tried again, from now.
        retry: Duration,
    },
    /// It failed again.
    StillFailed,
    /// Nobody waits for it.
    NotWanted,
}

impl Imports {
    pub(super) fn new(leases: Leases) -> Self {
        Self {
            leases,
            served: Vec::new(),
            unserved: Vec::new(),
            sockets: BTreeMap::new(),
            by_id: BTreeMap::new(),
            retries: BTreeSet::new(),
        }
    }

    /// Serves these entries from now on, as far as addresses and sockets go round; the first declared get theirs.
    pub(super) fn apply(&mut self, entries: &[Import], next_id: &mut SocketId, now: Instant) -> Steps {
        let mut room = MAX_SOCKETS;
        let mut unserved = Vec::new();
        let mut fitting: Vec<&Import> = Vec::with_capacity(entries.len());
        for import in entries {
            match room.checked_sub(import.ports.len()) {
                Some(left) => {
                    room = left;
                    fitting.push(import);
                }
                None => unserved.push((import.service.clone(), Unserved::TooManyPorts)),
            }
        }
        let wanted: Vec<ServiceName> = fitting.iter().map(|import| import.service.clone()).collect();
        let leases = self.leases.snapshot();
        let refused = self.leases.assign(&wanted, now);
        unserved.extend(refused.into_iter().map(|(service, error)| (service, Unserved::NoAddress(error))));
        let served: Vec<Import> = (fitting.into_iter())
            .filter(|import| self.leases.get(&import.service).is_some())
            .cloned()
            .collect();

        let mut steps = Steps {
            zone: served != self.served,
            leases: leases != self.leases.snapshot(),
            unserved: unserved != self.unserved,
            ..Steps::default()
        };
        for change in diff::imports(&self.served, &served) {
            match change {
                ImportChange::Close(port) => steps.over.extend(self.remove(&port)),
                ImportChange::Open(port) => steps.make.extend(self.add(port, next_id)),
            }
        }
        self.served = served;
        self.unserved = unserved;
        steps
    }

    fn add(&mut self, port: ServicePort, next_id: &mut SocketId) -> Option<SocketId> {
        let addr = SocketAddrV4::new(self.leases.get(&port.service)?, port.port.get());
        let id = *next_id;
        *next_id += 1;
        self.by_id.insert(id, port.clone());
        self.sockets.insert(port, Socket { id, addr, state: SocketState::Making, delay: FIRST_RETRY });
        Some(id)
    }

    fn remove(&mut self, port: &ServicePort) -> Option<(SocketId, bool)> {
        let socket = self.sockets.remove(port)?;
        self.by_id.remove(&socket.id);
        if let SocketState::Failed { retry, .. } = socket.state {
            self.retries.remove(&(retry, socket.id));
        }
        Some((socket.id, socket.state == SocketState::Held))
    }

    /// A socket was made, or could not be.
    pub(super) fn handle_made(&mut self, id: SocketId, result: Result<(), String>, now: Instant) -> Made {
        let Some(socket) = self.by_id.get(&id).and_then(|port| self.sockets.get_mut(port)) else {
            return Made::NotWanted;
        };
        if socket.state != SocketState::Making {
            return Made::NotWanted;
        }
        let failed_before = socket.delay > FIRST_RETRY;
        match result {
            Ok(()) => {
                socket.state = SocketState::Held;
                socket.delay = FIRST_RETRY;
                Made::Held { recovered: failed_before }
            }
            Err(reason) => {
                let retry = socket.delay;
                socket.delay = (socket.delay * 2).min(LAST_RETRY);
                socket.state = SocketState::Failed { reason, retry: now + retry };
                self.retries.insert((now + retry, id));
                if failed_before { Made::StillFailed } else { Made::Failed { retry } }
            }
        }
    }

    /// Sockets that are to be tried again.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> Vec<SocketId> {
        let mut due = Vec::new();
        while let Some((at, id)) = self.retries.first().copied().filter(|(at, _)| *at <= now) {
            self.retries.remove(&(at, id));
            if let Some(socket) = self.by_id.get(&id).and_then(|port| self.sockets.get_mut(port)) {
                socket.state = SocketState::Making;
                due.push(id);
            }
        }
        due
    }

    /// When sockets are to be tried again.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.retries.first().map(|(at, _)| *at)
    }

    /// When an address will be free for a Service that got none.
    pub(super) fn next_address(&self) -> Option<Instant> {
        let short = self.unserved.iter().any(|(_, reason)| matches!(reason, Unserved::NoAddress(_)));
        if short { self.leases.next_rested() } else { None }
    }

    /// A port and its socket.
    pub(super) fn get(&self, id: SocketId) -> Option<(&ServicePort, &Socket)> {
        let port = self.by_id.get(&id)?;
        Some((port, self.sockets.get(port)?))
    }

    pub(super) fn socket(&self, port: &ServicePort) -> Option<&Socket> {
        self.sockets.get(port)
    }

    pub(super) fn sockets(&self) -> impl Iterator<Item = &Socket> {
        self.sockets.values()
    }

    /// The imports that are served, in their order, each with its address.
    pub(super) fn served(&self) -> impl Iterator<Item = (&Import, Ipv4Addr)> {
        self.served.iter().filter_map(|import| Some((import, self.leases.get(&import.service)?)))
    }

    pub(super) fn unserved(&self) -> &[(ServiceName, Unserved)] {
        &self.unserved
    }

    pub(super) fn leases(&self) -> &Leases {
        &self.leases
    }
}
