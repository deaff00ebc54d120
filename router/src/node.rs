//! What the tasks of one router share.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::pki_types::UnixTime;
use servicekeel_core::admission::Known;
use servicekeel_core::mesh::outcome::{Health, Outcome};
use servicekeel_core::mesh::table::{Candidate, Consumer, EndpointId, LinkId, Table, Turn};
use servicekeel_core::name::{RouterId, ServicePort};
use servicekeel_runtime::latest;
use servicekeel_runtime::net::Net;
use servicekeel_runtime::throttle::Throttle;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::bounds::{Bound, Limits, Owner};
use crate::counters::Counters;
use crate::identity::{Date, PeerError};
use crate::links::Dial;
use crate::missing::Missing;
use crate::paces::Paces;
use crate::peers::Peer;
use crate::pods::Pod;
use crate::rejected::Rejected;
use crate::rooms::Rooms;
use crate::settings::Settings;
use crate::shortage;
use crate::tasks::Tasks;
use crate::tls::BufferPool;

/// How long a flow without a route waits for one: a blip, not an outage.
pub(crate) const ROUTE_PATIENCE: Duration = Duration::from_secs(1);
/// How often unused connections and the dates of certificates are looked through, at the least.
pub(crate) const SWEEP: Duration = Duration::from_secs(10);
/// How long flows to a peer outlive the last link to it.
pub(crate) const FLOW_TIMEOUT: Duration = Duration::from_secs(60);

/// Endpoints and neighbours, and how many flows each carries.
pub(crate) struct Routes {
    pub(crate) table: Table,
    load: BTreeMap<Candidate, usize>,
}

/// One router.
pub(crate) struct Node<N: Net> {
    pub(crate) net: N,
    pub(crate) id: RouterId,
    /// Drawn at the start; peers tell an earlier run's connections by it.
    pub(crate) boot: u64,
    pub(crate) settings: watch::Receiver<Arc<Settings>>,
    pub(crate) tasks: Tasks,
    /// Where connections on which peers open flows wait.
    pub(crate) own_threads: N::Thread,
    pub(crate) counters: Counters,
    pub(crate) buffers: Arc<BufferPool>,
    pub(crate) rooms: Rooms,
    pub(crate) limits: Limits,
    /// Flows, and UDP sessions with pods of this node, by whoever opens them.
    pub(crate) flows: Arc<Bound>,
    /// Other routers that are known, by cluster.
    pub(crate) names: Arc<Bound>,
    /// Connections of peers that carry no flow.
    pub(crate) connections: Arc<Bound>,
    /// Conversations with sidecars.
    pub(crate) sidecars: Arc<Bound>,
    /// Threads of pods beside the one of each conversation.
    pub(crate) threads: Arc<Bound>,
    /// Sockets that sidecars handed over and no flow has.
    pub(crate) sockets: Arc<Bound>,
    /// What pods export, by the pod.
    pub(crate) exported: Arc<Bound>,
    /// For the log: peers and sidecars that are refused.
    pub(crate) refusals: Throttle,
    /// For the status: the last of them, where it was of nobody who is known.
    pub(crate) rejected: Rejected,
    /// For the log: handshakes that make room.
    pub(crate) crowds: Throttle,
    /// For the log: what the imports and exports of all pods bring about; each pod has its own under it.
    pub(crate) pods_log: Arc<Throttle>,
    /// Pods that went without a word.
    pub(crate) missing: Missing,
    /// For the log: this process has no descriptors for something.
    pub(crate) shortage: Throttle,
    /// How often unused connections are closed for it.
    pub(crate) relief: Throttle,
    /// Counts those times.
    pub(crate) relieved: latest::Sender<u64>,
    /// For the log: sidecars that come. All of a node may at once, where the router restarts.
    pub(crate) arrivals: Throttle,
    /// Of the messages of sidecars.
    pub(crate) paces: Paces,
    /// True from the moment in which the router ends.
    pub(crate) draining: latest::Sender<bool>,
    pub(crate) pods: Mutex<BTreeMap<u64, Arc<Pod<N>>>>,
    pub(crate) endpoints: Mutex<BTreeMap<EndpointId, Arc<crate::endpoint::PodPort<N>>>>,
    routes: Mutex<Routes>,
    /// Counts the changes of the table.
    pub(crate) changed: latest::Sender<u64>,
    /// Counts those that neighbours are told: this node's own exports.
    pub(crate) exports: latest::Sender<u64>,
    peers: Mutex<BTreeMap<RouterId, Arc<Peer<N>>>>,
    /// From where peers have proven themselves.
    known: Mutex<Known>,
    /// The addresses that are dialled, and how it stands with each.
    dials: Mutex<BTreeMap<String, Dial>>,
    /// A peer showed a certificate that ends before the next look at the dates.
    pub(crate) ends_soon: Notify,
    ids: AtomicU64,
    seeds: AtomicU64,
}

impl<N: Net> Node<N> {
    pub(crate) fn new(
        net: N,
        id: RouterId,
        seed: u64,
        settings: watch::Receiver<Arc<Settings>>,
    ) -> Arc<Self> {
        let limits = Limits::new(net.most_descriptors(), net.most_threads());
        let table = Table::new(id.cluster.clone());
        let mut node = Self {
            own_threads: net.own_threads(),
            net,
            id,
            boot: 0,
            settings,
            tasks: Tasks::default(),
            counters: Counters::default(),
            buffers: BufferPool::new(),
            rooms: Rooms::default(),
            limits,
            flows: Bound::new(limits.flows),
            names: Bound::of_names(),
            connections: Bound::new(limits.connections),
            sidecars: Bound::of_sidecars(&limits),
            threads: Bound::new(limits.threads),
            sockets: Bound::of_sockets(&limits),
            exported: Bound::of_exports(),
            refusals: Throttle::new(10, Duration::from_secs(1)),
            rejected: Rejected::default(),
            crowds: Throttle::new(1, Duration::from_secs(10)),
            pods_log: Arc::new(Throttle::new(512, Duration::from_millis(100))),
            missing: Missing::default(),
            shortage: Throttle::new(1, Duration::from_secs(10)),
            relief: Throttle::new(1, shortage::PAUSE),
            relieved: latest::Sender::new(0),
            arrivals: Throttle::new(512, Duration::from_millis(500)),
            paces: Paces::new(),
            draining: latest::Sender::new(false),
            pods: Mutex::default(),
            endpoints: Mutex::default(),
            routes: Mutex::new(Routes { table, load: BTreeMap::new() }),
            changed: latest::Sender::new(0),
            exports: latest::Sender::new(0),
            peers: Mutex::default(),
            known: Mutex::default(),
            dials: Mutex::default(),
            ends_soon: Notify::new(),
            ids: AtomicU64::new(1),
            seeds: AtomicU64::new(seed),
        };
        node.boot = node.seed();
        Arc::new(node)
    }

    /// The next number for a link, an endpoint or a session of this run.
    pub(crate) fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    /// The next of the numbers that the seed gives (SplitMix64, Steele et al. 2014).
    pub(crate) fn seed(&self) -> u64 {
        let mut z = self.seeds.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn settings(&self) -> Arc<Settings> {
        self.settings.borrow().clone()
    }

    /// The time, by the clock of this router's identity.
    pub(crate) fn time(&self) -> UnixTime {
        self.settings().identity.as_ref().map_or_else(UnixTime::now, |identity| identity.now())
    }

    /// A peer showed certificates that end then.
    pub(crate) fn note_end(&self, expires: UnixTime) {
        if expires.as_secs() <= self.time().as_secs() + SWEEP.as_secs() {
            self.ends_soon.notify_one();
        }
    }

    /// When the next certificate ends by which this router or a peer that is linked proves itself, of those that have not.
    pub(crate) fn next_end(&self, now: UnixTime) -> Option<UnixTime> {
        let own = self.settings().identity.as_ref().map(|identity| identity.expires());
        let peers = self.all_peers().into_iter().filter_map(|peer| peer.expires());
        peers.chain(own).filter(|expires| *expires >= now).min()
    }

    /// A connection was refused for the certificate that it showed, for the status. What that says of a router is not
    /// proven.
    pub(crate) fn note_refused(&self, from: IpAddr, error: &PeerError) {
        if let Some(peer) = error.claims().and_then(|id| self.known_peer(id)) {
            peer.note_refused(from, error);
            if peer.note_rejected_from(from, &error.to_string()) {
                self.count_links();
            }
        } else {
            self.rejected.note(from, error.to_string());
        }
    }

    /// A peer and this router do not accept each other on a new connection.
    pub(crate) fn note_rejected(&self, id: &RouterId, reason: String) {
        if self.known_peer(id).is_some_and(|peer| peer.note_rejected(reason)) {
            self.count_links();
        }
    }

    /// Whoever dialled from there does not accept this router: it may be any peer that is linked from there.
    pub(crate) fn note_alert(&self, from: IpAddr, reason: &str) {
        let news = self.all_peers().iter().filter(|peer| peer.note_rejected_from(from, reason)).count();
        if news > 0 {
            self.count_links();
        } else {
            self.rejected.note(from, reason.to_owned());
        }
    }

    /// Why no new connection to or from a peer comes up, where a certificate has expired: this router's, or the one that
    /// the peer showed last.
    pub(crate) fn lapsed(&self, peer: &Peer<N>) -> Option<String> {
        self.settings().untimely().map(|untimely| untimely.to_string()).or_else(|| self.expired(peer))
    }

    /// Why there is no link to a peer, as far as that is known.
    pub(crate) fn trouble(&self, peer: &Peer<N>) -> Option<String> {
        let dials = self.dials();
        let dial = dials.iter().find(|(_, dial)| dial.is_of(&peer.id) && dial.failure().is_some());
        peer.trouble(dial.and_then(|(_, dial)| dial.failure()))
    }

    /// Why a peer that is linked takes no new connections, where it is its certificate.
    pub(crate) fn expired(&self, peer: &Peer<N>) -> Option<String> {
        let expired = Date(peer.expired(self.time())?);
        Some(format!(
            "the certificate of {} expired on {expired}: renew it there; new flows to it fail",
            peer.id
        ))
    }

    pub(crate) fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the table and wakes whoever waits for a route.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Table) -> T) -> T {
        let result = change(&mut self.routes().table);
        self.changed.send_modify(|version| *version += 1);
        result
    }

    /// Forgets what was offered on a link, in steps between which others have the table.
    pub(crate) fn link_down(&self, link: LinkId) {
        while self.change(|table| table.link_down(link)) {}
    }

    /// Changes what this node exports, and wakes the links that tell it too.
    pub(crate) fn change_exports<T>(&self, change: impl FnOnce(&mut Table) -> T) -> T {
        let result = self.change(change);
        self.exports.send_modify(|version| *version += 1);
        result
    }

    /// Where a flow of a pod of this node goes, best first.
    pub(crate) fn candidates(&self, wanted: &ServicePort) -> Vec<Candidate> {
        // The consumer's namespace is not attested: rules by namespace refuse it.
        let consumer = Consumer { cluster: &self.id.cluster, namespace: None };
        let routes = self.routes();
        let load = |c: &Candidate| routes.load.get(c).copied().unwrap_or(0);
        routes.table.candidates(wanted, consumer, Instant::now().into_std(), self.seed(), load)
    }

    /// Where a flow that came from another router goes, or whether its consumer is kept out.
    pub(crate) fn local_candidates(
        &self,
        wanted: &ServicePort,
        consumer: Consumer<'_>,
    ) -> (Option<bool>, Vec<Candidate>) {
        let routes = self.routes();
        let load = |c: &Candidate| routes.load.get(c).copied().unwrap_or(0);
        let now = Instant::now().into_std();
        let candidates = routes.table.local_candidates(wanted, consumer, now, self.seed(), load);
        (routes.table.permits(wanted, consumer), candidates)
    }

    /// Takes down how an attempt at a candidate ended, with the reason where it failed. That a pod of this node begins
    /// to fail, or works again, is told here: whoever asked may be elsewhere.
    pub(crate) fn report(
        &self,
        wanted: &ServicePort,
        candidate: &Candidate,
        outcome: Outcome,
        reason: impl Display,
    ) {
        let reason = if outcome == Outcome::Taken { String::new() } else { reason.to_string() };
        let now = Instant::now().into_std();
        let turn = self.routes().table.report(wanted, candidate, outcome, &reason, now);
        let Candidate::Local(id) = candidate else { return };
        if outcome.health() == Health::Dead {
            self.counters.endpoint_failures.inc();
        }
        if turn == Turn::None {
            return;
        }
        // One that is gone is no news any more.
        let Some(endpoint) = self.endpoints().get(id).cloned() else { return };
        let pod = &endpoint.pod.claim.name;
        if let Turn::Recovers(failures) = turn {
            // Told where its beginning was.
            if endpoint.failure_told.swap(false, Ordering::Relaxed) {
                info!(service = %wanted, %pod, failures, "exported endpoint recovered");
            }
        } else if let Some(suppressed) = endpoint.pod.party.log.permit() {
            endpoint.failure_told.store(true, Ordering::Relaxed);
            warn!(service = %wanted, %pod, reason, suppressed, "exported endpoint is failing");
        }
    }

    /// Counts a flow to a candidate until the guard is dropped.
    pub(crate) fn carrying(self: &Arc<Self>, candidate: Candidate) -> Carrying<N> {
        *self.routes().load.entry(candidate.clone()).or_default() += 1;
        self.counters.flows_active.inc();
        Carrying { node: self.clone(), candidate }
    }

    /// The peer of a name, made where it is new; `None` at the bound.
    pub(crate) fn peer(&self, id: &RouterId) -> Option<Arc<Peer<N>>> {
        let mut peers = self.lock_peers();
        if let Some(peer) = peers.get(id) {
            return Some(peer.clone());
        }
        let holder = self.owner(id);
        let place = self.names.take(&holder).or_else(|| {
            // The one of its cluster that has been without a link for longest makes room, where nothing of it is here.
            let unused =
                peers.values().filter(|peer| peer.id.cluster == id.cluster && Arc::strong_count(peer) == 1);
            let gone = unused.filter_map(|peer| Some((peer.down()?, peer.id.clone()))).min()?.1;
            peers.remove(&gone);
            self.names.take(&holder)
        })?;
        let mut peer = Peer::new(id.clone(), holder, &self.rooms);
        peer.place = Some(place);
        let peer = Arc::new(peer);
        peers.insert(id.clone(), peer.clone());
        Some(peer)
    }

    /// In whose name a peer's flows are.
    pub(crate) fn owner(&self, peer: &RouterId) -> Owner {
        Owner::peer(peer, &self.id.cluster)
    }

    /// Closes what was not used for long, and forgets whom it is of no use to remember.
    pub(crate) fn sweep(&self) {
        // Whoever gets hold of a peer does so under this lock, or by one that holds it.
        let time = self.time();
        self.peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|_, peer| !(peer.sweep(time) && Arc::strong_count(peer) == 1));
        self.pods().values().for_each(|pod| pod.stock.sweep());
        let mut known = self.known();
        let now = Instant::now().into_std();
        for peer in self.all_peers() {
            peer.linked_from().into_iter().for_each(|from| known.handle_proven(&peer.id, from, now));
        }
        known.handle_timeout(now);
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A peer has proven itself on a connection to or from an address.
    pub(crate) fn proven(&self, peer: &RouterId, at: IpAddr) {
        self.known().handle_proven(peer, at, Instant::now().into_std());
    }

    /// Whether a peer has proven itself at an address lately.
    pub(crate) fn knows(&self, at: IpAddr) -> bool {
        self.known().contains(at, Instant::now().into_std())
    }

    /// Counts the links for the metrics: those that can make no new flows by themselves.
    pub(crate) fn count_links(&self) {
        let settings = self.settings();
        let (mut active, mut expired) = (0, 0);
        for peer in self.all_peers() {
            let links = peer.links() as i64;
            let lapsed = settings.untimely().is_some()
                || peer.rejection().is_some()
                || settings.identity.as_ref().is_some_and(|identity| peer.expired(identity.now()).is_some());
            *(if lapsed { &mut expired } else { &mut active }) += links;
        }
        self.counters.links_active.set(active);
        self.counters.links_expired.set(expired);
    }

    fn lock_peers(&self) -> MutexGuard<'_, BTreeMap<RouterId, Arc<Peer<N>>>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known_peer(&self, id: &RouterId) -> Option<Arc<Peer<N>>> {
        self.lock_peers().get(id).cloned()
    }

    /// Every peer that was met.
    pub(crate) fn all_peers(&self) -> Vec<Arc<Peer<N>>> {
        self.lock_peers().values().cloned().collect()
    }

    pub(crate) fn dials(&self) -> MutexGuard<'_, BTreeMap<String, Dial>> {
        self.dials.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn pods(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Pod<N>>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn endpoints(&self) -> MutexGuard<'_, BTreeMap<EndpointId, Arc<crate::endpoint::PodPort<N>>>> {
        self.endpoints.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A flow to a candidate, while it lasts.
pub(crate) struct Carrying<N: Net> {
    node: Arc<Node<N>>,
    candidate: Candidate,
}

impl<N: Net> Drop for Carrying<N> {
    fn drop(&mut self) {
        let mut routes = self.node.routes();
        if let Some(load) = routes.load.get_mut(&self.candidate) {
            *load -= 1;
            if *load == 0 {
                routes.load.remove(&self.candidate);
            }
        }
        self.node.counters.flows_active.dec();
    }
}

/// Whether an address can be dialled from a socket of a pod: the sockets in stock are IPv4's, which every
/// pod has, and a sidecar does not say which family a socket is of.
pub(crate) fn dialable(addr: &IpAddr) -> bool {
    let IpAddr::V4(addr) = addr else { return false };
    // 127.255.255.255 is a broadcast address, too: each socket there has a copy of what is sent to it.
    let everybody = addr.is_broadcast() || *addr == Ipv4Addr::new(127, 255, 255, 255);
    !addr.is_unspecified() && !addr.is_multicast() && !everybody
}
