//! The DNS server of a pod: [`Dns`] answers packets, and a [`Serve`] brings them.
//!
//! - Names that imports give are answered from the [`Zone`], which decides in `core::dns`; nothing waits for that.
//! - All other names go to the upstreams and are kept within limits ([`foreign`], [`upstream`]).
//! - Both ways in, [`Dns::answer`] for bare packets and hickory-server's handler, run the same code and write
//!   their answers by the same encoder.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hickory_proto::op::{Header, LowerQuery, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::{DNSClass, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};
use hickory_server::net::xfer::Protocol;
use hickory_server::server::Request;
use prometheus_client::registry::Registry;
use serde::Serialize;
use servicekeel_core::dns::{Name, Zone, cache};

mod exchange;
mod foreign;
mod hickory;
mod metrics;
mod own;
mod question;
mod reply;
mod serve;
mod socket;
mod stream;
mod upstream;

pub use hickory::{Hickory, HickoryBound};
pub use serve::{Bound, Serve};
pub use stream::serve_stream;

use foreign::Foreign;
use metrics::{Metrics, Outcome};
use question::Question;
use reply::Reply;
use upstream::Upstreams;

/// The most bytes of a query, and of an answer over UDP whatever the client offers: queries come over the pod's
/// loopback, where nothing is fragmented.
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

impl From<Transport> for Protocol {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Udp => Self::Udp,
            Transport::Tcp => Self::Tcp,
        }
    }
}

/// The bounds of what [`Dns`] keeps and waits for.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Of the answers that are kept.
    pub cache: cache::Limits,
    /// The most questions that are asked of the upstreams at a time. Clients that ask the same share one.
    pub under_way: usize,
    /// The most clients that wait for the upstreams at a time. Others hear SERVFAIL.
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
        let header = Header::read(&mut BinDecoder::new(packet)).ok()?;
        if header.metadata.message_type == MessageType::Response {
            return None;
        }
        match Request::from_bytes(packet.to_vec(), from, transport.into()) {
            Ok(request) => Some(self.reply(&request).await.encode(&request)),
            Err(_) => {
                self.metrics.count(Outcome::Refused);
                Some(Reply::malformed(&header.metadata))
            }
        }
    }

    fn zone(&self) -> Option<Arc<Zone>> {
        self.zone.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The reply to a request, of any size.
    async fn reply(&self, request: &Request) -> Reply {
        let mut reply = Reply::new(request);
        let outcome = self.fill(request, &mut reply).await;
        self.metrics.count(outcome);
        reply
    }

    async fn fill(&self, request: &Request, reply: &mut Reply) -> Outcome {
        if request.metadata.op_code != OpCode::Query {
            return reply.refuse(ResponseCode::NotImp);
        }
        if request.version() != 0 {
            return reply.refuse(ResponseCode::BADVERS);
        }
        let [query] = request.queries.queries() else {
            return reply.refuse_without_question();
        };
        if query.query_class() != DNSClass::IN || !is_data(query.query_type()) {
            return reply.refuse(ResponseCode::Refused);
        }
        let Some(zone) = self.zone() else {
            return reply.fail(explanation::NOT_READY, "the sidecar is starting");
        };
        let name = Name::from_labels(query.original().name().iter()).ok();
        if let Some(name) = &name
            && let Some(outcome) = own::answer(&zone, name, query, reply)
        {
            return outcome;
        }
        let above_ours = name.is_some_and(|name| zone.is_above_ours(&name));
        drop(zone);
        self.ask(query, request, above_ours, reply).await
    }

    async fn ask(
        &self,
        query: &LowerQuery,
        request: &Request,
        above_ours: bool,
        reply: &mut Reply,
    ) -> Outcome {
        let question = Question::new(query, request);
        let found = self.foreign.ask(&question).await;
        foreign::fill(found, &question, above_ours, reply)
    }
}

/// Whether a type asks for data. The others are about the transport (OPT, TKEY, TSIG) or ask for whole zones
/// (IXFR, AXFR): nobody gets those from a pod's resolver (RFC 6895 §3.1).
fn is_data(qtype: RecordType) -> bool {
    !matches!(u16::from(qtype), 41 | 249..=252)
}

#[cfg(test)]
mod tests;
