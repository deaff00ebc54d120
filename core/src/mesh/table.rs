//! The table of endpoints: what this node's pods export and what neighbours offer, and in which order a flow
//! tries them.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use crate::mesh::exports::Exports;
use crate::mesh::outcome::{Health, Outcome};
use crate::name::{AllowRule, ClusterName, Label, Protocol, RouterId, ServiceName, ServicePort, allows};

mod near;
mod offers;

pub use near::{MAX_NEAR, nearest};
use offers::Offers;
pub use offers::{LinkOffers, MAX_LINK_BYTES, MAX_OFFERS, MAX_PEER_BYTES};

/// How many offers of a link that is down are forgotten at once, at the most.
const MAX_FORGOTTEN: usize = 256;
/// The most ports of a Service that are named.
const MAX_PORTS: usize = 8;
/// How long an endpoint that failed once is tried last.
pub const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// The longest that an endpoint which fails again and again is tried last.
pub const LAST_BACKOFF: Duration = Duration::from_secs(30);

/// Names an exported port of a pod of this node; chosen by the router.
pub type EndpointId = u64;
/// Names a link to a neighbour; chosen by the router, rising.
pub type LinkId = u64;

/// A port of a pod of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// What it serves.
    pub port: ServicePort,
    /// The container's port.
    pub target: NonZeroU16,
    /// Who may use it; `None`: every member of the mesh.
    pub allow: Option<Vec<AllowRule>>,
}

/// Where a flow can go.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Candidate {
    /// A pod of this node.
    Local(EndpointId),
    /// A neighbour, which picks among its pods.
    Remote(RouterId),
}

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub struct Consumer<'a> {
    /// Its cluster, as proven.
    pub cluster: &'a ClusterName,
    /// Its namespace, where attested.
    pub namespace: Option<&'a Label>,
}

/// Why an offer is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// A router speaks for its own cluster only.
    #[error("{0} offers {1}, which belongs to another cluster")]
    Foreign(RouterId, ServicePort),
    /// The bound of one link is reached.
    #[error("{0} offers more than {MAX_OFFERS} ports")]
    TooMany(RouterId),
    /// What is held for one link, or for one neighbour, is at its bound.
    #[error("{0} offers more than {MAX_LINK_BYTES} bytes on a link, or {MAX_PEER_BYTES} on all of them")]
    TooLarge(RouterId),
    /// What is held for all routers of another cluster is at its bound.
    #[error("{0} offers as much as it may beside other clusters, over all of its routers")]
    ClusterFull(ClusterName),
    /// What is held for this router's own cluster is at its bound, and the neighbour has its part of it.
    #[error("{0} offers as much as it may beside others of its cluster")]
    Full(RouterId),
}

/// The most bytes of a failure's reason that are kept.
const MAX_REASON: usize = 256;

/// How a candidate fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failing {
    /// How often in a row; 0 where it only was of no use for a reason of another's.
    pub times: u32,
    /// Until when it is tried last.
    pub until: Instant,
    /// When it failed last.
    pub last: Instant,
    /// What the last failure was, for status and log.
    pub reason: String,
}

/// What a report changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// It failed for the first time.
    Fails,
    /// It works after so many failures.
    Recovers(u32),
    /// Nothing new.
    None,
}

/// What can be reached from here.
#[derive(Debug)]
pub struct Table {
    endpoints: BTreeMap<EndpointId, Endpoint>,
    by_port: BTreeMap<ServicePort, Vec<EndpointId>>,
    /// Of neighbours, what this router's cluster may use.
    offers: Offers,
    exports: Exports,
    failing: BTreeMap<(ServicePort, Candidate), Failing>,
}

impl Table {
    /// Of a router of this cluster. Nothing can be reached yet.
    pub fn new(home: ClusterName) -> Self {
        Self {
            endpoints: BTreeMap::new(),
            by_port: BTreeMap::new(),
            offers: Offers::new(home),
            exports: Exports::default(),
            failing: BTreeMap::new(),
        }
    }

    /// Adds an endpoint of this node, or replaces the one of the same number.
    pub fn add(&mut self, id: EndpointId, endpoint: Endpoint) {
        self.remove(id);
        self.by_port.entry(endpoint.port.clone()).or_default().push(id);
        self.exports.note(&endpoint.port, true);
        self.endpoints.insert(id, endpoint);
    }

    /// Takes an endpoint of this node away.
    pub fn remove(&mut self, id: EndpointId) {
        let Some(endpoint) = self.endpoints.remove(&id) else { return };
        if let Some(ids) = self.by_port.get_mut(&endpoint.port) {
            ids.retain(|other| *other != id);
            let exported = !ids.is_empty();
            if !exported {
                self.by_port.remove(&endpoint.port);
            }
            self.exports.note(&endpoint.port, exported);
        }
        self.failing.remove(&(endpoint.port, Candidate::Local(id)));
    }

    /// An endpoint of this node.
    pub fn endpoint(&self, id: EndpointId) -> Option<&Endpoint> {
        self.endpoints.get(&id)
    }

    /// How often this node's exports have changed.
    pub fn exports_revision(&self) -> u64 {
        self.exports.revision()
    }

    /// The ports of this node's exports that have changed since a revision, those that are gone among them; `None` where
    /// that is too long ago to tell: all that is exported, and all that is known of it, may have changed then.
    pub fn changed_since(&self, revision: u64) -> Option<impl Iterator<Item = &ServicePort>> {
        self.exports.since(revision)
    }

    /// The ports that this node exports.
    pub fn exported(&self) -> impl Iterator<Item = &ServicePort> {
        self.by_port.keys()
    }

    /// Whether this node exports a port to a cluster. A namespace is attested by nobody.
    pub fn is_open_to(&self, port: &ServicePort, cluster: &ClusterName) -> bool {
        self.permits(port, Consumer { cluster, namespace: None }) == Some(true)
    }

    /// Takes an offer that a neighbour made on a link: of a port that this router's cluster may use.
    ///
    /// # Errors
    /// [`OfferError`] where it speaks for another cluster or a bound of the link or of the neighbour is reached.
    pub fn offer(&mut self, from: &RouterId, link: LinkId, port: ServicePort) -> Result<(), OfferError> {
        if port.service.cluster != from.cluster {
            return Err(OfferError::Foreign(from.clone(), port));
        }
        self.failing.remove(&(port.clone(), Candidate::Remote(from.clone())));
        self.offers.offer(from, link, port)
    }

    /// An estimate of the bytes that are held for a neighbour's offers.
    pub fn held_bytes(&self, router: &RouterId) -> usize {
        self.offers.held_bytes(router)
    }

    /// Takes an offer back.
    pub fn withdraw(&mut self, from: &RouterId, link: LinkId, port: &ServicePort) {
        if self.offers.withdraw(link, port) {
            self.forget_failure(from, port);
        }
    }

    /// Nothing that was offered on a link is used any more: it is down. Forgets some of it, and says whether there is
    /// more, for which this is to be called again: what it costs is done in steps, with room for others between them.
    pub fn link_down(&mut self, link: LinkId) -> bool {
        let Some(from) = self.offers.close(link) else { return false };
        let ports: Vec<_> = self.offers.on(link, MAX_FORGOTTEN).cloned().collect();
        for port in &ports {
            self.withdraw(&from, link, port);
        }
        ports.len() == MAX_FORGOTTEN
    }

    /// How an attempt at a neighbour failed is of no use where it offers the port no more.
    fn forget_failure(&mut self, router: &RouterId, port: &ServicePort) {
        if self.failing.is_empty() {
            return;
        }
        let candidate = (port.clone(), Candidate::Remote(router.clone()));
        if self.failing.contains_key(&candidate) && !self.offers.is_offered_by(port, router) {
            self.failing.remove(&candidate);
        }
    }

    /// What is offered on each link, for the status.
    pub fn links(&self) -> impl Iterator<Item = LinkOffers> {
        self.offers.links()
    }

    /// At most so many of the ports that are offered on a link, in order.
    pub fn offered_on(&self, link: LinkId, most: usize) -> impl Iterator<Item = &ServicePort> {
        self.offers.on(link, most)
    }

    /// The endpoints of this node, for the status.
    pub fn local(&self) -> impl Iterator<Item = (EndpointId, &Endpoint)> {
        self.endpoints.iter().map(|(id, endpoint)| (*id, endpoint))
    }

    /// Whether `consumer` may use any endpoint of this node that serves the port; `None` where none does.
    pub fn permits(&self, wanted: &ServicePort, consumer: Consumer<'_>) -> Option<bool> {
        let ids = self.by_port.get(wanted)?;
        Some(
            ids.iter().filter_map(|id| self.endpoints.get(id)).any(|e| permits(e.allow.as_deref(), consumer)),
        )
    }

    /// Whether a pod of this node exports the port, to whomever, or a neighbour offers it.
    pub fn is_offered(&self, wanted: &ServicePort) -> bool {
        self.by_port.get(wanted).is_some_and(|ids| !ids.is_empty()) || self.offers.is_offered(wanted)
    }

    /// The ports of a Service that anybody offers, in order, [`MAX_PORTS`] at most.
    pub fn ports_of(&self, service: &ServiceName) -> Vec<ServicePort> {
        let first = ServicePort { service: service.clone(), port: NonZeroU16::MIN, protocol: Protocol::Tcp };
        let of = |port: &&ServicePort| port.service == *service;
        let local = self.by_port.range(&first..).map(|(port, _)| port).take_while(of);
        let remote = self.offers.ports_from(&first).take_while(of);
        let all: BTreeSet<_> = local.take(MAX_PORTS).chain(remote.take(MAX_PORTS)).cloned().collect();
        all.into_iter().take(MAX_PORTS).collect()
    }

    /// The endpoints of this node for a flow, in the order in which to try them: the better of two drawn by `seed`
    /// first (the one with less `load`), those that fail last.
    pub fn local_candidates(
        &self,
        wanted: &ServicePort,
        consumer: Consumer<'_>,
        now: Instant,
        seed: u64,
        load: impl Fn(&Candidate) -> usize,
    ) -> Vec<Candidate> {
        let candidates = self
            .by_port
            .get(wanted)
            .into_iter()
            .flatten()
            .filter(|id| {
                self.endpoints.get(id).is_some_and(|endpoint| permits(endpoint.allow.as_deref(), consumer))
            })
            .map(|id| Candidate::Local(*id))
            .collect();
        self.ordered(wanted, candidates, now, seed, load)
    }

    /// All that a flow can take, in the order in which to try it: this node's endpoints first, then neighbours.
    pub fn candidates(
        &self,
        wanted: &ServicePort,
        consumer: Consumer<'_>,
        now: Instant,
        seed: u64,
        load: impl Fn(&Candidate) -> usize,
    ) -> Vec<Candidate> {
        let mut all = self.local_candidates(wanted, consumer, now, seed, &load);
        let remote = self.offers.routers(wanted, seed);
        let remote = remote.into_iter().cloned().map(Candidate::Remote).collect();
        let remote = self.ordered(wanted, remote, now, seed, &load);
        // A local endpoint that fails comes behind a neighbour that does not.
        let healthy = |c: &Candidate| !self.is_failing(wanted, c, now);
        let split = all.iter().position(|c| !healthy(c)).unwrap_or(all.len());
        let failing_local = all.split_off(split);
        let split = remote.iter().position(|c| !healthy(c)).unwrap_or(remote.len());
        all.extend_from_slice(&remote[..split]);
        all.extend(failing_local);
        all.extend_from_slice(&remote[split..]);
        all
    }

    fn ordered(
        &self,
        wanted: &ServicePort,
        mut candidates: Vec<Candidate>,
        now: Instant,
        seed: u64,
        load: impl Fn(&Candidate) -> usize,
    ) -> Vec<Candidate> {
        let n = candidates.len();
        if n > 1 {
            candidates.rotate_left((seed % n as u64) as usize);
            let other = 1 + ((seed >> 32) % (n as u64 - 1)) as usize;
            if load(&candidates[other]) < load(&candidates[0]) {
                candidates.swap(0, other);
            }
            candidates.sort_by_key(|c| self.is_failing(wanted, c, now));
        }
        candidates
    }

    /// Whether a candidate is tried last now.
    pub fn is_failing(&self, wanted: &ServicePort, candidate: &Candidate, now: Instant) -> bool {
        // The key is cloned for the look-up only where something fails at all.
        !self.failing.is_empty()
            && self
                .failing
                .get(&(wanted.clone(), candidate.clone()))
                .is_some_and(|failing| failing.until > now)
    }

    /// Takes down how an attempt at a candidate ended, with the reason where it failed. One that failed is tried last for
    /// a while, doubled each time.
    pub fn report(
        &mut self,
        wanted: &ServicePort,
        candidate: &Candidate,
        outcome: Outcome,
        reason: &str,
        now: Instant,
    ) -> Turn {
        let health = outcome.health();
        if health == Health::Alive {
            if self.failing.is_empty() {
                return Turn::None;
            }
            let failed = self.failing.remove(&(wanted.clone(), candidate.clone()));
            return failed.filter(|f| f.times > 0).map_or(Turn::None, |f| Turn::Recovers(f.times));
        }
        let known = match candidate {
            Candidate::Local(id) => self.endpoints.contains_key(id),
            Candidate::Remote(router) => self.offers.is_offered_by(wanted, router),
        };
        if !known {
            return Turn::None;
        }
        let failing = self.failing.entry((wanted.clone(), candidate.clone())).or_insert(Failing {
            times: 0,
            until: now,
            last: now,
            reason: String::new(),
        });
        if health == Health::Unknown {
            failing.until = failing.until.max(now + FIRST_BACKOFF);
            return Turn::None;
        }
        let backoff = FIRST_BACKOFF.saturating_mul(1 << failing.times.min(8)).min(LAST_BACKOFF);
        failing.times = failing.times.saturating_add(1);
        (failing.until, failing.last) = (now + backoff, now);
        let end = (0..=MAX_REASON.min(reason.len())).rev().find(|end| reason.is_char_boundary(*end));
        reason[..end.unwrap_or(0)].clone_into(&mut failing.reason);
        if failing.times == 1 { Turn::Fails } else { Turn::None }
    }

    /// How a candidate fails, where its last attempts did.
    pub fn failure(&self, wanted: &ServicePort, candidate: &Candidate) -> Option<&Failing> {
        if self.failing.is_empty() {
            return None;
        }
        self.failing.get(&(wanted.clone(), candidate.clone())).filter(|failing| failing.times > 0)
    }
}

fn permits(allow: Option<&[AllowRule]>, consumer: Consumer<'_>) -> bool {
    allows(allow, consumer.cluster, consumer.namespace)
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs a moment to start from")]
mod tests;
