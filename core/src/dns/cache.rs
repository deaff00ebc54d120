//! What is kept of other servers' answers, and for how long.
//!
//! - A fresh answer is served until its TTL is over (RFC 1035, RFC 2308 for negative ones).
//! - Then it is stale: asked for again, and served only while no upstream answers (RFC 8767), at most
//!   [`MAX_STALE`] long. After [`Cache::failed`] the upstreams are left alone for [`FAILURE_RECHECK`].
//! - The cache is bounded by entries and bytes; what was used longest ago goes first.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The longest time that a positive answer counts as fresh (RFC 8767 §4 asks for a bound).
pub const MAX_TTL: Duration = Duration::from_secs(24 * 3600);
/// The longest time that a negative answer counts as fresh (RFC 2308 §5 asks for one to three hours).
pub const MAX_NEGATIVE_TTL: Duration = Duration::from_secs(3600);
/// The TTL in a stale answer, in seconds (RFC 8767 §4).
pub const STALE_TTL_SECONDS: u32 = 30;
/// How long after its TTL an answer may be served stale (RFC 8767 §5: one to three days).
pub const MAX_STALE: Duration = Duration::from_secs(24 * 3600);
/// How long upstreams that failed for a name are not asked for it again while a stale answer is at hand
/// (RFC 8767 §5).
pub const FAILURE_RECHECK: Duration = Duration::from_secs(30);
/// How long a client waits for the upstreams before it gets a stale answer (RFC 8767 §5).
pub const CLIENT_PATIENCE: Duration = Duration::from_millis(1800);

/// How long an answer with these TTLs, in seconds, counts as fresh. A TTL with the highest bit set is zero
/// (RFC 2181 §8).
pub fn positive_ttl(ttls: impl IntoIterator<Item = u32>) -> Duration {
    let least = ttls.into_iter().map(|ttl| if ttl > i32::MAX as u32 { 0 } else { ttl }).min().unwrap_or(0);
    Duration::from_secs(least.into()).min(MAX_TTL)
}

/// How long a negative answer counts as fresh: the lesser of its SOA's TTL and MINIMUM, in seconds (RFC 2308 §5).
pub fn negative_ttl(soa_ttl: u32, soa_minimum: u32) -> Duration {
    positive_ttl([soa_ttl, soa_minimum]).min(MAX_NEGATIVE_TTL)
}

/// The bounds of a [`Cache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most answers.
    pub entries: usize,
    /// The most bytes of all answers together, as their owner counts them.
    pub bytes: usize,
}

/// Answers by question. `K` is the question; `V` the answer.
#[derive(Debug)]
pub struct Cache<K, V> {
    limits: Limits,
    entries: BTreeMap<K, Entry<V>>,
    /// Questions by the order of their last use.
    order: BTreeMap<u64, K>,
    clock: u64,
    bytes: usize,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    bytes: usize,
    stored: Instant,
    fresh_until: Instant,
    gone_at: Instant,
    ask_again_at: Instant,
    used: u64,
}

/// An answer that was kept.
#[derive(Debug, PartialEq, Eq)]
pub struct Hit<'c, V> {
    /// The answer.
    pub value: &'c V,
    /// How long it was kept: what its TTLs have lost.
    pub age: Duration,
    /// Whether it may be served as it is.
    pub state: State,
}

/// What may be done with a kept answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Serve it.
    Fresh,
    /// Ask the upstreams, and serve it if they fail.
    Stale,
    /// The upstreams failed a moment ago: serve it without asking them.
    StaleUnasked,
}

impl<K: Ord + Clone, V> Cache<K, V> {
    /// An empty cache.
    pub fn new(limits: Limits) -> Self {
        Self { limits, entries: BTreeMap::new(), order: BTreeMap::new(), clock: 0, bytes: 0 }
    }

    /// Keeps an answer of so many bytes: fresh for `ttl`, stale for `stale` after that. It replaces the answer
    /// that was kept for the question. An answer that alone takes over an eighth of all bytes is not kept.
    pub fn insert(&mut self, key: K, value: V, bytes: usize, ttl: Duration, stale: Duration, now: Instant) {
        self.remove(&key);
        if bytes > self.limits.bytes / 8 || self.limits.entries == 0 || (ttl + stale).is_zero() {
            return;
        }
        while self.entries.len() >= self.limits.entries || self.bytes + bytes > self.limits.bytes {
            let Some((_, oldest)) = self.order.first_key_value() else { break };
            let oldest = oldest.clone();
            self.remove(&oldest);
        }
        self.clock += 1;
        let fresh_until = now + ttl;
        let entry = Entry {
            value,
            bytes,
            stored: now,
            fresh_until,
            gone_at: fresh_until + stale,
            ask_again_at: fresh_until,
            used: self.clock,
        };
        self.order.insert(self.clock, key.clone());
        self.bytes += bytes;
        self.entries.insert(key, entry);
    }

    /// The answer to a question, if one is kept that may still be served in some way.
    pub fn get(&mut self, key: &K, now: Instant) -> Option<Hit<'_, V>> {
        if self.entries.get(key)?.gone_at <= now {
            self.remove(key);
            return None;
        }
        let entry = self.entries.get_mut(key)?;
        if let Some(key) = self.order.remove(&entry.used) {
            self.clock += 1;
            entry.used = self.clock;
            self.order.insert(self.clock, key);
        }
        let state = if now < entry.fresh_until {
            State::Fresh
        } else if now < entry.ask_again_at {
            State::StaleUnasked
        } else {
            State::Stale
        };
        Some(Hit { value: &entry.value, age: now.saturating_duration_since(entry.stored), state })
    }

    /// The upstreams failed for this question: a stale answer to it is served unasked for [`FAILURE_RECHECK`].
    /// Says whether an answer is kept.
    pub fn failed(&mut self, key: &K, now: Instant) -> bool {
        let Some(entry) = self.entries.get_mut(key).filter(|entry| entry.gone_at > now) else { return false };
        entry.ask_again_at = now + FAILURE_RECHECK;
        true
    }

    fn remove(&mut self, key: &K) {
        if let Some(entry) = self.entries.remove(key) {
            self.order.remove(&entry.used);
            self.bytes -= entry.bytes;
        }
    }

    /// How many answers are kept.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many bytes the kept answers take together.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn start() -> Instant {
        // The one clock reading: an Instant has no other origin.
        #[allow(clippy::disallowed_methods)]
        Instant::now()
    }

    #[test]
    fn ttls() {
        assert_eq!(positive_ttl([300, 60, 900]), Duration::from_secs(60));
        assert_eq!(positive_ttl([u32::MAX, 60]), Duration::ZERO);
        assert_eq!(positive_ttl([i32::MAX as u32]), MAX_TTL);
        assert_eq!(negative_ttl(900, 60), Duration::from_secs(60));
        assert_eq!(negative_ttl(60, 900), Duration::from_secs(60));
        assert_eq!(negative_ttl(86400, 86400), MAX_NEGATIVE_TTL);
    }

    #[test]
    fn fresh_then_stale_then_gone() {
        let now = start();
        let mut cache = Cache::new(Limits { entries: 4, bytes: 800 });
        cache.insert("a", 1, 10, HOUR, MAX_STALE, now);
        let mut state = |at: Duration| cache.get(&"a", now + at).map(|hit| (hit.state, hit.age));
        assert_eq!(state(Duration::ZERO), Some((State::Fresh, Duration::ZERO)));
        assert_eq!(state(HOUR - Duration::from_nanos(1)).map(|hit| hit.0), Some(State::Fresh));
        assert_eq!(state(HOUR), Some((State::Stale, HOUR)));
        assert_eq!(state(HOUR + MAX_STALE - Duration::from_nanos(1)).map(|hit| hit.0), Some(State::Stale));
        assert_eq!(state(HOUR + MAX_STALE), None);
        assert!(cache.is_empty() && cache.bytes() == 0);
    }

    #[test]
    fn failed_upstreams_rest() {
        let now = start();
        let mut cache = Cache::new(Limits { entries: 4, bytes: 800 });
        cache.insert("a", 1, 10, HOUR, MAX_STALE, now);
        assert!(!cache.failed(&"b", now));
        assert!(cache.failed(&"a", now + HOUR));
        assert_eq!(cache.get(&"a", now + HOUR).map(|hit| hit.state), Some(State::StaleUnasked));
        let later = now + HOUR + FAILURE_RECHECK;
        assert_eq!(cache.get(&"a", later).map(|hit| hit.state), Some(State::Stale));
        cache.insert("a", 2, 10, HOUR, MAX_STALE, later);
        assert_eq!(cache.get(&"a", later).map(|hit| (*hit.value, hit.state)), Some((2, State::Fresh)));
    }

    #[test]
    fn the_longest_unused_goes_first() {
        let now = start();
        let mut cache = Cache::new(Limits { entries: 2, bytes: 800 });
        cache.insert("a", 1, 10, HOUR, MAX_STALE, now);
        cache.insert("b", 2, 10, HOUR, MAX_STALE, now);
        assert!(cache.get(&"a", now).is_some());
        cache.insert("c", 3, 10, HOUR, MAX_STALE, now);
        assert!(cache.get(&"b", now).is_none());
        assert!(cache.get(&"a", now).is_some() && cache.get(&"c", now).is_some());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Insert { key: u8, bytes: usize, ttl: u64, stale: u64 },
        Get { key: u8 },
        Failed { key: u8 },
        Wait { seconds: u64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0..12u8, 0..60usize, 0..50u64, 0..50u64)
                .prop_map(|(key, bytes, ttl, stale)| Step::Insert { key, bytes, ttl, stale }),
            3 => (0..12u8).prop_map(|key| Step::Get { key }),
            1 => (0..12u8).prop_map(|key| Step::Failed { key }),
            2 => (0..40u64).prop_map(|seconds| Step::Wait { seconds }),
        ]
    }

    /// The cache as a list, the last used at the end.
    #[derive(Default)]
    struct Model(Vec<(u8, u32, usize, u64, u64, u64)>);

    proptest! {
        #[test]
        fn is_the_model(steps in prop::collection::vec(step(), 0..200)) {
            const LIMITS: Limits = Limits { entries: 6, bytes: 320 };
            let origin = start();
            let (mut cache, mut model) = (Cache::new(LIMITS), Model::default());
            let (mut seconds, mut serial) = (0u64, 0u32);
            for step in steps {
                let now = origin + Duration::from_secs(seconds);
                match step {
                    Step::Wait { seconds: more } => seconds += more,
                    Step::Insert { key, bytes, ttl, stale } => {
                        serial += 1;
                        let (fresh, kept) = (Duration::from_secs(ttl), Duration::from_secs(stale));
                        cache.insert(key, serial, bytes, fresh, kept, now);
                        model.0.retain(|entry| entry.0 != key);
                        if bytes <= 40 && ttl + stale > 0 {
                            while model.0.len() >= 6 || model.0.iter().map(|e| e.2).sum::<usize>() + bytes > 320 {
                                model.0.remove(0);
                            }
                            model.0.push((key, serial, bytes, seconds + ttl, seconds + ttl + stale, seconds + ttl));
                        }
                    }
                    Step::Failed { key } => {
                        let known = model.0.iter_mut().find(|entry| entry.0 == key && entry.4 > seconds);
                        prop_assert_eq!(cache.failed(&key, now), known.is_some());
                        if let Some(entry) = known {
                            entry.5 = seconds + 30;
                        }
                    }
                    Step::Get { key } => {
                        let expected = model.0.iter().position(|entry| entry.0 == key).and_then(|at| {
                            let entry = model.0.remove(at);
                            if entry.4 <= seconds {
                                return None;
                            }
                            model.0.push(entry);
                            let state = match () {
                                () if seconds < entry.3 => State::Fresh,
                                () if seconds < entry.5 => State::StaleUnasked,
                                () => State::Stale,
                            };
                            Some((entry.1, state))
                        });
                        prop_assert_eq!(cache.get(&key, now).map(|hit| (*hit.value, hit.state)), expected);
                    }
                }
                prop_assert!(cache.len() <= LIMITS.entries && cache.bytes() <= LIMITS.bytes);
                prop_assert_eq!(cache.len(), model.0.len());
                prop_assert_eq!(cache.bytes(), model.0.iter().map(|entry| entry.2).sum::<usize>());
                prop_assert_eq!(cache.order.len(), cache.len());
            }
        }
    }
}
