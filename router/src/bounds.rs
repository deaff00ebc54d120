//! What this router has a bounded number of, each by its owner: whoever holds too much is refused, or waits, alone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use servicekeel_core::handoff::MAX_DESCRIPTORS;
use servicekeel_core::name::ServicePort;
use servicekeel_core::shares::Shares;
use servicekeel_core::shares::ledger::Ledger;
pub(crate) use servicekeel_core::shares::ledger::{Full, Owner};
use servicekeel_runtime::throttle::Throttle;
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::warn;

use crate::rooms::{Account, Rooms};
use crate::stock::LAST_TARGET;

/// How often one owner's bound is told.
pub(crate) const TELL: Duration = Duration::from_secs(10);

/// The most flows and sessions that a router is meant to carry at once.
const MAX_FLOWS: u64 = 65_536;
/// The most conversations with sidecars, those included that are gone and whose sockets are kept.
const MAX_SIDECARS: u64 = 4096;
/// The most connections of peers that carry no flow, beyond the least of each.
const MAX_CONNECTIONS: u64 = 8192;
/// Where there is no limit of open files, it is as if it were this.
const MANY_FILES: u64 = 1 << 20;
/// Where there is no limit of threads, it is as if it were this: more than any other bound leaves room for.
const MANY_THREADS: u64 = 1 << 20;
/// Other routers that are known at once: those of one other cluster share a part.
const NAMES: Shares = Shares { budget: 4096, least: 64, part: 1 };
/// All of them together, those of the own cluster too.
const MOST_NAMES: u64 = 12_288;
/// Descriptors that a flow takes: two sockets, and a pipe while one side of a flow on this node is slow.
const PER_FLOW: u64 = 4;
/// UDP sessions at one peer beyond the least of each pod: with those of 64 pods they are what one connection carries.
const SESSIONS: Shares = Shares { budget: 3072, least: 16, part: 1 };
/// Exports beyond the least of each pod, which one sidecar may have as many of as its annotation holds ...
const EXPORTS: Shares = Shares { budget: 8192, least: 64, part: 1 };
/// ... and all of them together: as many as another router takes on a link, however long their names.
const MOST_EXPORTS: u64 = 13_000;
/// Flows that wait for one endpoint as long as TCP would.
const PATIENT: Shares = Shares { budget: 256, least: 4, part: 1 };

/// How many of each there may be where so many files may be open, and so many threads be there. All that one pod takes of
/// them together is less than either limit, where that is 256 or more.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Flows, and UDP sessions with pods of this node.
    pub(crate) flows: Shares,
    /// Conversations with sidecars, each with a thread: four descriptors.
    pub(crate) sidecars: Shares,
    /// Of them all together, the least of each owner included: a process that may make network namespaces is as many
    /// owners as it likes, and those who are there before it keep what they have.
    pub(crate) most_sidecars: u64,
    /// Threads of pods that carry many flows, beside the one of each conversation: up to four descriptors.
    pub(crate) threads: Shares,
    /// Connections of peers that carry no flow: links, those for UDP sessions, and those that wait for a flow.
    pub(crate) connections: Shares,
    /// Sockets that sidecars handed over and no flow has.
    pub(crate) sockets: Shares,
    /// As [`Limits::most_sidecars`].
    pub(crate) most_sockets: u64,
    /// The most sockets that a sidecar is asked for at once.
    pub(crate) asked: usize,
    /// The most in stock for one sidecar of TCP, and of UDP: those that a burst of the one brings leave the owner's share
    /// room for the other.
    pub(crate) stock: usize,
}

impl Limits {
    /// A quarter of the threads is for what this router does itself.
    pub(crate) fn new(open_files: Option<u64>, threads: Option<u64>) -> Self {
        let threads = threads.unwrap_or(MANY_THREADS).min(MANY_THREADS);
        let files = open_files.unwrap_or(MANY_FILES).min(MANY_FILES);
        let flows = (files / 4 * 3 / PER_FLOW).clamp(1, MAX_FLOWS);
        Self {
            flows: Shares { budget: flows, least: (flows / 256).max(4), part: 1 },
            sidecars: Shares {
                budget: (files / 8).min(threads / 4).clamp(8, MAX_SIDECARS),
                least: 4,
                part: 1,
            },
            most_sidecars: (files / 8).min(threads / 2).clamp(8, 2 * MAX_SIDECARS),
            threads: Shares { budget: (files / 64).min(threads / 4), least: 0, part: 1 },
            connections: Shares {
                budget: (files / 8).clamp(8, MAX_CONNECTIONS),
                least: (files / 256).clamp(8, 64),
                part: 1,
            },
            most_sockets: (files / 16 * 5).max(16),
            sockets: Shares { budget: files / 4, least: (files / 512).max(16), part: 1 },
            stock: (files / 64).clamp(8, LAST_TARGET as u64) as usize,
            asked: (files / 16).clamp(1, MAX_DESCRIPTORS as u64) as usize,
        }
    }
}

/// In whose name a pod's imports hold what they hold, and what they bring about is told.
#[derive(Debug)]
pub(crate) struct Party {
    pub(crate) owner: Owner,
    /// Its datagrams that wait.
    pub(crate) datagrams: Arc<Account>,
    /// For the log: what its imports and exports bring about.
    pub(crate) log: Arc<Throttle>,
    full: Throttle,
    /// A UDP session of its imports found no room.
    no_session: Lately,
    /// A flow to its exports found no local port.
    no_port: Lately,
}

/// When something happened last, for the status.
#[derive(Debug, Default)]
struct Lately(Mutex<Option<Instant>>);

impl Lately {
    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self) {
        *self.lock() = Some(Instant::now());
    }

    fn is_within(&self, time: Duration) -> bool {
        self.lock().is_some_and(|last| last.elapsed() < time)
    }
}

impl Party {
    pub(crate) fn new(owner: Owner, rooms: &Rooms, log: Arc<Throttle>) -> Arc<Self> {
        let (datagrams, full) = (rooms.datagrams.account_of_pod(&owner), Throttle::new(1, TELL).under(&log));
        let (no_session, no_port) = Default::default();
        Arc::new(Self { owner, datagrams, log, full, no_session, no_port })
    }

    /// Notes for the status that a UDP session found no room.
    pub(crate) fn note_no_session(&self) {
        self.no_session.note();
    }

    /// Whether one found none lately.
    pub(crate) fn lacks_sessions(&self) -> bool {
        self.no_session.is_within(TELL)
    }

    /// Notes for the status that the pod had no local port for a flow to one of its exports.
    pub(crate) fn note_no_port(&self) {
        self.no_port.note();
    }

    /// Whether it had none within the last minute.
    pub(crate) fn lacks_ports(&self) -> bool {
        self.no_port.is_within(Duration::from_secs(60))
    }

    /// Says that it holds as much as it may.
    pub(crate) fn tell_full(&self, bound: &Bound, wanted: &ServicePort, what: &str) {
        if let Some(suppressed) = self.full.permit() {
            let held = bound.held(&self.owner);
            warn!(%wanted, held, suppressed, "the pod's network namespace holds as many flows and UDP sessions as it may beside others: {what}");
        }
    }
}

/// One bound.
#[derive(Debug)]
pub(crate) struct Bound(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    ledger: Ledger,
    /// How many of them are UDP sessions.
    sessions: BTreeMap<Owner, u64>,
    /// Owners that wait for room.
    waiting: BTreeMap<Owner, Arc<Notify>>,
}

impl Bound {
    pub(crate) fn new(shares: Shares) -> Arc<Self> {
        Self::with_most(shares, u64::MAX)
    }

    /// Of conversations with sidecars.
    pub(crate) fn of_sidecars(limits: &Limits) -> Arc<Self> {
        Self::of(Ledger::with_successors(limits.sidecars, limits.most_sidecars))
    }

    /// Of sockets that sidecars handed over.
    pub(crate) fn of_sockets(limits: &Limits) -> Arc<Self> {
        Self::with_most(limits.sockets, limits.most_sockets)
    }

    /// See [`Ledger::with_most`].
    pub(crate) fn with_most(shares: Shares, most: u64) -> Arc<Self> {
        Self::of(Ledger::with_most(shares, most))
    }

    fn of(ledger: Ledger) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Inner { ledger, sessions: BTreeMap::new(), waiting: BTreeMap::new() })))
    }

    /// Of the routers that are known.
    pub(crate) fn of_names() -> Arc<Self> {
        Self::with_most(NAMES, MOST_NAMES)
    }

    /// Of the UDP sessions at one peer.
    pub(crate) fn of_sessions() -> Arc<Self> {
        Self::new(SESSIONS)
    }

    /// Of what pods of this node export.
    pub(crate) fn of_exports() -> Arc<Self> {
        Self::with_most(EXPORTS, MOST_EXPORTS)
    }

    /// Of the flows that wait for one endpoint.
    pub(crate) fn of_patience() -> Arc<Self> {
        Self::new(PATIENT)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one until what is returned is dropped; `None` where the owner holds as many as it may.
    pub(crate) fn take(self: &Arc<Self>, owner: &Owner) -> Option<Held> {
        let taken = self.lock().ledger.take(owner, 1);
        taken.then(|| self.held_by(owner, false))
    }

    fn held_by(self: &Arc<Self>, owner: &Owner, is_session: bool) -> Held {
        Held { bound: self.clone(), owner: owner.clone(), is_session }
    }

    /// Takes one for a UDP session, which lasts long after its last datagram: those of an owner, and those of a router with
    /// all its consumers, have no more than three quarters of what it may hold, so that its flows find room beside them.
    pub(crate) fn take_session(self: &Arc<Self>, owner: &Owner) -> Option<Held> {
        let inner = &mut *self.lock();
        let allowed = of_sessions(owner).all(|level| {
            let sessions = inner.sessions.get(&level).map_or(1, |sessions| sessions + 1);
            let more = (sessions * 4).div_ceil(3).saturating_sub(inner.ledger.held(&level)).max(1);
            inner.ledger.allows(&level, more)
        });
        if !(allowed && inner.ledger.take(owner, 1)) {
            return None;
        }
        of_sessions(owner).for_each(|level| *inner.sessions.entry(level).or_default() += 1);
        Some(self.held_by(owner, true))
    }

    /// Takes as many of `most` as the owner may hold beside others.
    pub(crate) fn take_up_to(self: &Arc<Self>, owner: &Owner, most: usize) -> Vec<Held> {
        let one = || self.take(owner);
        std::iter::repeat_with(one).take(most).map_while(|held| held).collect()
    }

    /// Counts one that the owner holds in any case, be it one too many.
    pub(crate) fn owe(self: &Arc<Self>, owner: &Owner) -> Held {
        self.lock().ledger.owe(owner, 1);
        self.held_by(owner, false)
    }

    /// Takes one, where the owner could take as many again as it holds: for what is worth less than what is to come.
    pub(crate) fn take_sparing(self: &Arc<Self>, owner: &Owner) -> Option<Held> {
        let mut inner = self.lock();
        let held = inner.ledger.held(owner);
        let taken = inner.ledger.allows(owner, held + 1) && inner.ledger.take(owner, 1);
        taken.then(|| self.held_by(owner, false))
    }

    /// Waits until the owner may take one. Others may take it first.
    pub(crate) async fn room(&self, owner: &Owner) {
        loop {
            let notify = {
                let mut inner = self.lock();
                if inner.ledger.allows(owner, 1) {
                    return;
                }
                inner.waiting.entry(owner.clone()).or_default().clone()
            };
            // What is given back from here on, or was since, is seen by the second look.
            let mut news = std::pin::pin!(notify.notified());
            news.as_mut().enable();
            let again = {
                let inner = self.lock();
                inner.waiting.get(owner).is_none_or(|now| !Arc::ptr_eq(now, &notify))
            };
            if !again {
                news.await;
            }
        }
    }

    /// Waits until one is taken.
    pub(crate) async fn taken(self: &Arc<Self>, owner: &Owner) -> Held {
        loop {
            if let Some(held) = self.take(owner) {
                return held;
            }
            self.room(owner).await;
        }
    }

    /// Whether the owner may take one now.
    pub(crate) fn has_room(&self, owner: &Owner) -> bool {
        self.lock().ledger.allows(owner, 1)
    }

    /// How many of `most` the owner may take now.
    pub(crate) fn left(&self, owner: &Owner, most: u64) -> u64 {
        self.lock().ledger.room(owner, most)
    }

    /// Whether the owner holds no more than it may whatever others do.
    pub(crate) fn is_modest(&self, owner: &Owner) -> bool {
        self.lock().ledger.is_modest(owner)
    }

    /// How many an owner holds.
    pub(crate) fn held(&self, owner: &Owner) -> u64 {
        self.lock().ledger.held(owner)
    }

    /// See [`Ledger::held_with`].
    pub(crate) fn held_with(&self, owner: &Owner) -> u64 {
        self.lock().ledger.held_with(owner)
    }

    /// See [`Ledger::full`].
    pub(crate) fn full(&self, owner: &Owner) -> Full {
        self.lock().ledger.full(owner)
    }

    /// How many all hold.
    pub(crate) fn total(&self) -> u64 {
        self.lock().ledger.total()
    }

    /// See [`Ledger::gives_way`].
    pub(crate) fn gives_way(&self, owner: &Owner) -> bool {
        self.lock().ledger.gives_way(owner)
    }

    /// See [`Ledger::gives_back`].
    pub(crate) fn gives_back(&self, owner: &Owner) -> bool {
        self.lock().ledger.gives_back(owner)
    }

    /// Whether something of the owner's waits.
    pub(crate) fn waits(&self, owner: &Owner) -> bool {
        self.lock().waiting.contains_key(owner)
    }
}

/// In whose names the sessions of an owner are counted: its own, and of a consumer its router's.
fn of_sessions(owner: &Owner) -> impl Iterator<Item = Owner> + use<> {
    let router = owner.for_consumer(None);
    let own = (*owner != router).then(|| owner.clone());
    std::iter::once(router).chain(own)
}

/// One of what is bounded. Dropped, it is given back.
#[derive(Debug)]
pub(crate) struct Held {
    bound: Arc<Bound>,
    owner: Owner,
    is_session: bool,
}

impl Held {
    pub(crate) fn owner(&self) -> &Owner {
        &self.owner
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let inner = &mut *self.bound.lock();
        inner.ledger.give(&self.owner, 1);
        for level in of_sessions(&self.owner).filter(|_| self.is_session) {
            if let Some(sessions) = inner.sessions.get_mut(&level) {
                *sessions -= 1;
                if *sessions == 0 {
                    inner.sessions.remove(&level);
                }
            }
        }
        let ledger = &inner.ledger;
        inner.waiting.retain(|owner, notify| {
            let room = ledger.allows(owner, 1);
            if room {
                notify.notify_waiters();
            }
            !room
        });
    }
}

#[cfg(test)]
mod tests;
