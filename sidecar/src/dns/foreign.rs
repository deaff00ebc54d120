//! Names of other servers: what is kept, what is being asked, and what a client hears of it.
//!
//! - A fresh answer is served from the cache. A stale one is asked for again, and served where the upstreams fail
//!   or take longer than a client's patience; the question goes on then, so that the next client hears the new
//!   answer (RFC 8767 §5).
//! - Clients that ask the same at the same time share one question. What fails is not asked again for a moment
//!   (RFC 9520 §3.2).
//! - Questions under way and waiting clients are bounded; beyond that the oldest ends, with a stale answer or SERVFAIL.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use servicekeel_core::dns::cache::{self, Cache, MAX_STALE, State};
use servicekeel_core::dns::upstream::Failure;
use servicekeel_core::dns::wire::{Age, Outgoing, Response};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::metrics::{Metrics, Outcome};
use super::places::{Place, Places};
use super::upstream::Upstreams;
use super::{DnsStatus, Limits};

/// How long a failure is remembered (RFC 9520 §3.2 asks for a second at least).
const FAILURE_TTL: Duration = Duration::from_secs(1);
/// The failures that are remembered, apart from the answers: when the uplink goes, they must not push those out.
const FAILURES: cache::Limits = cache::Limits { entries: 128, bytes: 1 << 16 };
/// What a kept answer takes beside its packet and its key, in bytes: its place in the cache's two tables.
const ENTRY_OVERHEAD: usize = 256;

/// By what a question is known.
type Key = Arc<[u8]>;

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
    /// It.
    pub(super) response: Response,
    /// For how long it was kept.
    pub(super) age: Age,
    /// How it was found.
    pub(super) outcome: Outcome,
}

/// See the module.
pub(super) struct Foreign {
    shared: Arc<Shared>,
    waiting: Places,
    under_way: Places,
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
    answers: Cache<Key, Response>,
    failures: Cache<Key, Failure>,
    under_way: BTreeMap<Key, watch::Receiver<Option<Found>>>,
}

/// What to do about a question.
enum Step {
    Serve(Found),
    Wait {
        stale: Option<Kept>,
        found: watch::Receiver<Option<Found>>,
        start: Option<(Place, watch::Sender<Option<Found>>)>,
    },
}

/// What is found at once, or waited for.
pub(super) enum Begun {
    Found(Found),
    Waits(Wait),
}

/// A client that waits for the upstreams.
pub(super) struct Wait {
    place: Place,
    stale: Option<Kept>,
    found: watch::Receiver<Option<Found>>,
    /// How long it waits at the most.
    patience: Option<Duration>,
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
            waiting: Places::new(limits.waiting),
            under_way: Places::new(limits.under_way),
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

    /// What is known of a question, or else it is asked. A client that has something else to go by, `or_else`, waits
    /// no longer than one with a stale answer.
    pub(super) fn begin(&self, question: Outgoing, or_else: bool) -> Begun {
        let key: Key = question.key().into();
        let (stale, found, start) = match self.shared.step(&key, &self.under_way, now()) {
            Step::Serve(found) => return Begun::Found(found),
            Step::Wait { stale, found, start } => (stale, found, start),
        };
        if let Some((place, sender)) = start {
            self.start(key, question, place, sender);
        }
        match self.waiting.take() {
            Some(place) => {
                let patience = (or_else || stale.is_some()).then_some(self.shared.limits.patience);
                Begun::Waits(Wait { place, stale, found, patience })
            }
            None => Begun::Found(stale.map_or(Found::Failed(Failure::Busy), Found::Answer)),
        }
    }

    fn start(&self, key: Key, question: Outgoing, mut place: Place, sender: watch::Sender<Option<Found>>) {
        // Made first: it gives the key free again however the task ends.
        let slot = Slot { shared: self.shared.clone(), key };
        let mut asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        while asking.try_join_next().is_some() {}
        asking.spawn(async move {
            let found = tokio::select! {
                biased;
                () = place.lost() => Found::Failed(Failure::Busy),
                found = slot.shared.fetch(&slot.key, question) => found,
            };
            // Nobody new waits for this one any more.
            drop(slot);
            sender.send_replace(Some(found));
        });
    }
}

impl Wait {
    /// What is found in the end.
    pub(super) async fn found(mut self) -> Found {
        let answer = async {
            // The sender is gone without a word where the whole server is ending.
            let found = self.found.wait_for(Option::is_some).await.ok().and_then(|found| found.clone());
            found.unwrap_or(Found::Failed(Failure::Unreachable))
        };
        let patience = async {
            match self.patience {
                Some(patience) => tokio::time::sleep(patience).await,
                None => std::future::pending().await,
            }
        };
        let found = tokio::select! {
            biased;
            found = answer => found,
            () = self.place.lost() => Found::Failed(Failure::Busy),
            () = patience => Found::Failed(Failure::Unreachable),
        };
        match (found, self.stale) {
            (Found::Failed(_), Some(stale)) => Found::Answer(stale),
            (found, _) => found,
        }
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

    fn step(&self, key: &Key, places: &Places, now: Instant) -> Step {
        let mut memory = self.lock();
        let mut stale = None;
        if let Some(hit) = memory.answers.get(key, now) {
            let age = Age::Seconds(u32::try_from(hit.age.as_secs()).unwrap_or(u32::MAX));
            let kept = |age, outcome| Kept { response: hit.value.clone(), age, outcome };
            match hit.state {
                State::Fresh => return Step::Serve(Found::Answer(kept(age, Outcome::Cached))),
                State::StaleUnasked => return Step::Serve(Found::Answer(kept(Age::Stale, Outcome::Stale))),
                State::Stale => stale = Some(kept(Age::Stale, Outcome::Stale)),
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
        let Some(place) = places.take() else { return at_once(stale, Failure::Busy) };
        let (sender, found) = watch::channel(None);
        memory.under_way.insert(key.clone(), found.clone());
        Step::Wait { stale, found, start: Some((place, sender)) }
    }

    /// Asks the upstreams, and keeps what they say.
    async fn fetch(&self, key: &Key, question: Outgoing) -> Found {
        let question = Arc::new(question);
        let said = self.upstreams.ask(&question).await;
        let now = now();
        let mut memory = self.lock();
        match said {
            Ok(response) => {
                let ttl = response.lifetime(question.qtype());
                let stale = if ttl.is_zero() { Duration::ZERO } else { MAX_STALE };
                let bytes = response.len() + key.len() + ENTRY_OVERHEAD;
                memory.answers.insert(key.clone(), response.clone(), bytes, ttl, stale, now);
                self.metrics.cache_entries.set(memory.answers.len() as i64);
                Found::Answer(Kept { response, age: Age::Seconds(0), outcome: Outcome::Forwarded })
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

/// Tokio's clock, which a simulation steps.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
