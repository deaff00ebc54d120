//! Names of other servers: what is kept, what is being asked, and what a client hears of it.
//!
//! - A fresh answer is served from the cache. A stale one is asked for again, and served where the upstreams fail
//!   or take longer than a client's patience; the question goes on then, so that the next client hears the new
//!   answer (RFC 8767 §5).
//! - Clients that ask the same at the same time share one question. What fails is not asked again for a moment
//!   (RFC 9520 §3.2).
//! - Questions under way and waiting clients are bounded; beyond that a stale answer or SERVFAIL, at once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{RData, Record, RecordType};
use servicekeel_core::dns::cache::{
    self, Cache, MAX_STALE, STALE_TTL_SECONDS, State, negative_ttl, positive_ttl,
};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::metrics::{Metrics, Outcome};
use super::question::{Key, Question};
use super::reply::Reply;
use super::upstream::{Failure, Upstreams};
use super::{DnsStatus, Limits, explanation};

/// How long a failure is remembered (RFC 9520 §3.2 asks for a second at least).
const FAILURE_TTL: Duration = Duration::from_secs(1);
/// The failures that are remembered, apart from the answers: when the uplink goes, they must not push those out.
const FAILURES: cache::Limits = cache::Limits { entries: 128, bytes: 1 << 16 };
/// What a kept answer takes beside its packet and its key, in bytes: its place in the cache's two tables.
const ENTRY_OVERHEAD: usize = 256;

/// What is known of a question.
#[derive(Debug, Clone)]
pub(super) enum Found {
    /// An answer, NOERROR or NXDOMAIN.
    Answer(Kept),
    /// No answer.
    Failed(Failure),
}

/// An answer of an upstream.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    packet: Arc<[u8]>,
    age: Duration,
    outcome: Outcome,
}

/// See the module.
pub(super) struct Foreign {
    shared: Arc<Shared>,
    waiting: Semaphore,
    /// The questions under way; they end with this.
    asking: Mutex<JoinSet<()>>,
}

struct Shared {
    memory: Mutex<Memory>,
    upstreams: Upstreams,
    limits: Limits,
    metrics: Metrics,
}

struct Memory {
    answers: Cache<Key, Arc<[u8]>>,
    failures: Cache<Key, Failure>,
    under_way: BTreeMap<Key, watch::Receiver<Option<Found>>>,
}

/// What to do about a question.
enum Step {
    Serve(Found),
    Wait {
        stale: Option<Kept>,
        found: watch::Receiver<Option<Found>>,
        start: Option<watch::Sender<Option<Found>>>,
    },
}

impl Foreign {
    pub(super) fn new(upstreams: Upstreams, limits: Limits, metrics: Metrics) -> Self {
        let memory = Memory {
            answers: Cache::new(limits.cache),
            failures: Cache::new(FAILURES),
            under_way: BTreeMap::new(),
        };
        Self {
            shared: Arc::new(Shared { memory: Mutex::new(memory), upstreams, limits, metrics }),
            waiting: Semaphore::new(limits.waiting),
            asking: Mutex::default(),
        }
    }

    pub(super) fn upstreams(&self) -> &Upstreams {
        &self.shared.upstreams
    }

    pub(super) fn status(&self, ready: bool) -> DnsStatus {
        let upstreams = self.shared.upstreams.status();
        let memory = self.shared.lock();
        DnsStatus {
            ready,
            upstreams,
            cache_entries: memory.answers.len(),
            cache_bytes: memory.answers.bytes(),
            under_way: memory.under_way.len(),
        }
    }

    /// What is known of a question, or what the upstreams say.
    pub(super) async fn ask(&self, question: &Question) -> Found {
        let key = question.key();
        let (stale, mut found, start) = match self.shared.step(&key, now()) {
            Step::Serve(found) => return found,
            Step::Wait { stale, found, start } => (stale, found, start),
        };
        if let Some(sender) = start {
            self.start(key, question.clone(), sender);
        }
        let known = match self.waiting.try_acquire() {
            Ok(_permit) => wait(&mut found, stale.as_ref().map(|_| self.shared.limits.patience)).await,
            Err(_) => Found::Failed(Failure::Busy),
        };
        match (known, stale) {
            (Found::Failed(_), Some(stale)) => Found::Answer(stale),
            (known, _) => known,
        }
    }

    fn start(&self, key: Key, question: Question, sender: watch::Sender<Option<Found>>) {
        // Made first: it gives the key free again however the task ends.
        let slot = Slot { shared: self.shared.clone(), key };
        let mut asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        while asking.try_join_next().is_some() {}
        asking.spawn(async move {
            let found = slot.shared.fetch(&slot.key, &question).await;
            sender.send_replace(Some(found));
        });
    }
}

/// The key of a question under way.
struct Slot {
    shared: Arc<Shared>,
    key: Key,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.lock().under_way.remove(&self.key);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn step(&self, key: &Key, now: Instant) -> Step {
        let mut memory = self.lock();
        let mut stale = None;
        if let Some(hit) = memory.answers.get(key, now) {
            let kept = |outcome| Kept { packet: hit.value.clone(), age: hit.age, outcome };
            match hit.state {
                State::Fresh => return Step::Serve(Found::Answer(kept(Outcome::Cached))),
                State::StaleUnasked => return Step::Serve(Found::Answer(kept(Outcome::Stale))),
                State::Stale => stale = Some(kept(Outcome::Stale)),
            }
        }
        // Without upstreams, or where too much is under way.
        let at_once =
            |stale: Option<Kept>, failure| Step::Serve(stale.map_or(Found::Failed(failure), Found::Answer));
        if self.upstreams.is_empty() {
            return at_once(stale, Failure::NoUpstream);
        }
        if let Some(hit) = memory.failures.get(key, now) {
            let failure = *hit.value;
            return at_once(stale, failure);
        }
        if let Some(found) = memory.under_way.get(key) {
            return Step::Wait { stale, found: found.clone(), start: None };
        }
        if memory.under_way.len() >= self.limits.under_way {
            return at_once(stale, Failure::Busy);
        }
        let (sender, found) = watch::channel(None);
        memory.under_way.insert(key.clone(), found.clone());
        Step::Wait { stale, found, start: Some(sender) }
    }

    /// Asks the upstreams, and keeps what they say.
    async fn fetch(&self, key: &Key, question: &Question) -> Found {
        let said = self.upstreams.ask(question).await;
        let now = now();
        let mut memory = self.lock();
        match said {
            Ok((message, packet)) => {
                let packet: Arc<[u8]> = packet.into();
                let ttl = lifetime(&message, question.qtype());
                let stale = if ttl.is_zero() { Duration::ZERO } else { MAX_STALE };
                let bytes = packet.len() + key.len() + ENTRY_OVERHEAD;
                memory.answers.insert(key.clone(), packet.clone(), bytes, ttl, stale, now);
                self.metrics.cache_entries.set(memory.answers.len() as i64);
                Found::Answer(Kept { packet, age: Duration::ZERO, outcome: Outcome::Forwarded })
            }
            Err(failure) => {
                if !memory.answers.failed(key, now) {
                    let bytes = key.len() + ENTRY_OVERHEAD;
                    memory.failures.insert(key.clone(), failure, bytes, FAILURE_TTL, Duration::ZERO, now);
                }
                Found::Failed(failure)
            }
        }
    }
}

/// Waits for what a question under way finds, at most so long.
async fn wait(found: &mut watch::Receiver<Option<Found>>, patience: Option<Duration>) -> Found {
    let answer = async {
        // The sender is gone without a word where the whole server is ending.
        found.wait_for(Option::is_some).await.ok().and_then(|found| found.clone())
    };
    let answer = match patience {
        Some(patience) => tokio::time::timeout(patience, answer).await.ok().flatten(),
        None => answer.await,
    };
    answer.unwrap_or(Found::Failed(Failure::Unreachable))
}

/// How long an answer counts as fresh.
fn lifetime(message: &Message, qtype: RecordType) -> Duration {
    let ttls = || message.answers.iter().map(|record| record.ttl);
    let asked = |record: &Record| qtype == RecordType::ANY || record.record_type() == qtype;
    if message.response_code == ResponseCode::NoError && message.answers.iter().any(asked) {
        return positive_ttl(ttls());
    }
    // A negative answer without a SOA is not kept (RFC 2308 §5). CNAMEs may lead to one that has one.
    let negative = message.authorities.iter().find_map(|record| match &record.data {
        RData::SOA(soa) => Some(negative_ttl(record.ttl, soa.minimum)),
        _ => None,
    });
    let negative = negative.unwrap_or_default();
    if message.answers.is_empty() { negative } else { negative.min(positive_ttl(ttls())) }
}

/// Fills `reply` with what was found.
pub(super) fn fill(found: Found, question: &Question, above_ours: bool, reply: &mut Reply) -> Outcome {
    let kept = match found {
        Found::Answer(kept) => kept,
        Found::Failed(failure) => return fail(failure, reply),
    };
    // It was read when it came.
    let Ok(message) = Message::from_vec(&kept.packet) else {
        return fail(Failure::Unreachable, reply);
    };
    let stale = kept.outcome == Outcome::Stale;
    let mut code = message.response_code;
    let mut validated = message.authentic_data;
    if code == ResponseCode::NXDomain && above_ours {
        // Names of ours lie below it, so it exists (RFC 8020).
        code = ResponseCode::NoError;
        validated = false;
    }
    reply.metadata.response_code = code;
    reply.metadata.authentic_data = validated && !stale && question.wants_validated;
    let age = u32::try_from(kept.age.as_secs()).unwrap_or(u32::MAX);
    let asked = question.query.name();
    let aged = |mut record: Record| {
        record.ttl = if stale {
            STALE_TTL_SECONDS
        } else {
            record.ttl.min(cache::MAX_TTL.as_secs() as u32).saturating_sub(age)
        };
        // Comparison of names knows no case; the client gets the case that it asked in.
        if record.name == *asked {
            record.name = asked.clone();
        }
        record
    };
    reply.answers = message.answers.into_iter().map(aged).collect();
    reply.authorities = message.authorities.into_iter().map(aged).collect();
    reply.additionals = message.additionals.into_iter().map(aged).collect();
    if stale {
        let explanation = match code {
            ResponseCode::NXDomain => explanation::STALE_NXDOMAIN,
            _ => explanation::STALE_ANSWER,
        };
        reply.explain(explanation, "no upstream answers");
    }
    kept.outcome
}

fn fail(failure: Failure, reply: &mut Reply) -> Outcome {
    match failure {
        Failure::NoUpstream => reply.fail(explanation::OTHER, "no upstream is configured"),
        Failure::Busy => reply.fail(explanation::OTHER, "too many queries are under way"),
        Failure::Unreachable => reply.fail(explanation::NO_REACHABLE_AUTHORITY, "no upstream answers"),
        Failure::Said(code) => {
            reply.metadata.response_code = code;
            Outcome::Failed
        }
    }
}

/// Tokio's clock, which a simulation steps.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
