//! The DNS server of a pod: [`Dns`] answers packets, and a [`Serve`] brings them.
//!
//! - Names that imports give are answered from the [`Zone`], which decides in `core::dns`; nothing waits for that.
//! - All other names go to the upstreams and are kept within limits ([`foreign`], [`upstream`]).
//! - An alias of theirs that leads to a name of ours is followed ([`reply`]).

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::registry::Registry;
use serde::Serialize;
use servicekeel_core::dns::wire::{CLASS_IN, Outgoing, Query, UPSTREAM_UDP, code};
use servicekeel_core::dns::{Answer, Zone, cache};

mod datagrams;
mod exchange;
mod foreign;
mod metrics;
mod os;
mod places;
mod reply;
mod serve;
mod stream;
mod upstream;

pub use os::{OsDns, OsDnsBound};
pub use serve::{Bound, Serve};
pub use stream::serve_stream;

use foreign::{Foreign, Wait};
use metrics::{Metrics, Outcome};
use reply::{refusal, starting};
use upstream::Upstreams;

/// The most bytes of a query, and of an answer over UDP to a client on loopback whatever it offers: nothing is
/// fragmented there. Others get at most [`UPSTREAM_UDP`].
pub const MAX_UDP: u16 = 4096;

/// Extended DNS error codes (RFC 8914 §4).
mod explanation {
    pub(super) const OTHER: u16 = 0;
    pub(super) const STALE_ANSWER: u16 = 3;
    pub(super) const NOT_READY: u16 = 14;
    pub(super) const STALE_NXDOMAIN: u16 = 19;
    pub(super) const NO_REACHABLE_AUTHORITY: u16 = 22;
}

/// How a query came, which bounds its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A datagram: the answer fits what the client offers, or is truncated.
    Udp,
    /// A stream: up to 65,535 bytes.
    Tcp,
}

/// The bounds of what [`Dns`] keeps and waits for.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Of the answers that are kept.
    pub cache: cache::Limits,
    /// The most questions that are asked of the upstreams at a time. Clients that ask the same share one. One more
    /// ends the oldest.
    pub under_way: usize,
    /// The most clients that wait for the upstreams at a time. One more ends the oldest's waiting, with SERVFAIL.
    pub waiting: usize,
    /// How long one upstream may take, before the next one is asked as well.
    pub one_try: Duration,
    /// How long all tries may take together.
    pub all_tries: Duration,
    /// How long a client waits where a stale answer is at hand.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            cache: cache::Limits { entries: 1000, bytes: 1 << 20 },
            under_way: 256,
            waiting: 1024,
            one_try: Duration::from_secs(2),
            all_tries: Duration::from_secs(5),
            patience: cache::CLIENT_PATIENCE,
        }
    }
}

/// The answers of one pod's DNS server. Clones share everything; the last one dropped ends what is under way.
#[derive(Clone)]
pub struct Dns {
    zone: Arc<Mutex<Option<Arc<Zone>>>>,
    foreign: Arc<Foreign>,
    metrics: Metrics,
}

/// What a [`Dns`] is doing, for `/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DnsStatus {
    /// Whether there is a zone. Before that every query hears SERVFAIL.
    pub ready: bool,
    /// Where other names go, in the order of the settings.
    pub upstreams: Vec<UpstreamStatus>,
    /// Foreign answers that are kept.
    pub cache_entries: usize,
    /// The memory that they take, in bytes.
    pub cache_bytes: usize,
    /// Questions that are being asked of the upstreams.
    pub under_way: usize,
}

/// One upstream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UpstreamStatus {
    /// Its address.
    pub address: SocketAddr,
    /// How it is.
    pub state: UpstreamState,
}

/// How an upstream is, as the last query found it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpstreamState {
    /// It answered, or was never asked.
    Good,
    /// It did not answer. It is asked after the others for a while.
    Silent,
    /// It refused a moment ago: nobody listens there, or no way leads there.
    Refusing,
    /// It is our own address, and never asked.
    Ourselves,
}

impl Dns {
    /// A server without a zone. `upstreams` are asked in this order; without any, names that are not ours hear
    /// SERVFAIL.
    pub fn new(upstreams: Vec<SocketAddr>, limits: Limits) -> Self {
        let metrics = Metrics::default();
        let upstreams = Upstreams::new(upstreams, limits, metrics.clone());
        Self {
            zone: Arc::default(),
            foreign: Arc::new(Foreign::new(upstreams, limits, metrics.clone())),
            metrics,
        }
    }

    /// Answers from this zone from now on.
    pub fn set_zone(&self, zone: Zone) {
        *self.zone.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(zone));
    }

    /// Registers its metrics, under `servicekeel_sidecar_dns_`.
    pub fn register(&self, registry: &mut Registry) {
        self.metrics.register(registry);
    }

    /// What it is doing.
    pub fn status(&self) -> DnsStatus {
        self.foreign.status(self.zone().is_some())
    }

    /// Says where queries arrive. An upstream that leads there would ask itself for ever: it is refused, and the
    /// log says so.
    pub fn listens_at(&self, addr: SocketAddr) {
        self.foreign.upstreams().refuse(addr);
    }

    /// The answer to a packet: `None` for what is no query, which is noise shorter than a DNS header and answers
    /// of others. `from` is the client.
    pub async fn answer(&self, packet: &[u8], from: SocketAddr, transport: Transport) -> Option<Vec<u8>> {
        match self.begin(packet, from, transport) {
            Begun::Noise => None,
            Begun::Done(answer) => Some(answer),
            Begun::Waits(asked) => Some(self.finish(*asked).await),
        }
    }

    /// The answer to a packet where one can be given at once.
    fn begin(&self, packet: &[u8], from: SocketAddr, transport: Transport) -> Begun {
        let query = match Query::read(packet) {
            Ok(query) => query,
            Err(error) => {
                return error.reply().map_or(Begun::Noise, |reply| {
                    self.metrics.count(Outcome::Refused);
                    Begun::Done(reply)
                });
            }
        };
        let limit = limit(&query, from, transport);
        let done = |(reply, outcome): (Vec<u8>, Outcome)| {
            self.metrics.count(outcome);
            Begun::Done(reply)
        };
        if !query.is_question() {
            return done(refusal(&query, code::NOT_IMP, limit));
        }
        if query.edns().is_some_and(|edns| edns.version != 0) {
            return done(refusal(&query, code::BAD_VERS, limit));
        }
        let (qtype, qclass) = (query.question().qtype, query.question().qclass);
        if qclass != CLASS_IN || !is_data(qtype) {
            return done(refusal(&query, code::REFUSED, limit));
        }
        let Some(zone) = self.zone() else { return done(starting(&query, limit)) };
        let name = query.name().to_name();
        if let Some(name) = &name
            && let Some(own) = reply::own(&query, zone.answer(name, qtype), limit)
        {
            return done(own);
        }
        let or_else = name.is_some_and(|name| zone.fallback(&name, qtype) != Answer::NotOurs);
        match self.foreign.begin(Outgoing::new(&query), or_else) {
            foreign::Begun::Found(found) => done(reply::found(&query, &found, &zone, limit)),
            foreign::Begun::Waits(wait) => {
                Begun::Waits(Box::new(Asked { query: query.into_owned(), limit, wait }))
            }
        }
    }

    /// The answer to a query that waits for the upstreams.
    async fn finish(&self, asked: Asked) -> Vec<u8> {
        let found = asked.wait.found().await;
        // As it is by now.
        let (reply, outcome) = match self.zone() {
            Some(zone) => reply::found(&asked.query, &found, &zone, asked.limit),
            None => starting(&asked.query, asked.limit),
        };
        self.metrics.count(outcome);
        reply
    }

    fn zone(&self) -> Option<Arc<Zone>> {
        self.zone.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What becomes of a packet.
enum Begun {
    /// Nothing.
    Noise,
    /// This answer.
    Done(Vec<u8>),
    /// An answer by [`Dns::finish`].
    Waits(Box<Asked>),
}

/// A query that waits for the upstreams.
struct Asked {
    query: Query<'static>,
    limit: u16,
    wait: Wait,
}

/// The most bytes of an answer.
fn limit(query: &Query<'_>, from: SocketAddr, transport: Transport) -> u16 {
    match transport {
        Transport::Tcp => u16::MAX,
        Transport::Udp if from.ip().to_canonical().is_loopback() => query.payload().min(MAX_UDP),
        // What passes every network in one piece.
        Transport::Udp => query.payload().min(UPSTREAM_UDP),
    }
}

/// Whether a type asks for data. The others are about the transport (OPT, TKEY, TSIG) or ask for whole zones
/// (IXFR, AXFR): nobody gets those from a pod's resolver (RFC 6895 §3.1).
fn is_data(qtype: u16) -> bool {
    !matches!(qtype, 41 | 249..=252)
}

#[cfg(test)]
mod tests;
