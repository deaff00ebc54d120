//! UDP sessions: a bounded table of what is in use, where each entry ends when it was idle for a time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// How many of the sessions that were idle longest are looked at.
const FEW: usize = 64;

/// A table of sessions by key. At its bound the one that was idle longest makes room.
#[derive(Debug)]
pub struct Sessions<K, V> {
    idle: Duration,
    most: usize,
    entries: BTreeMap<K, (Instant, V)>,
    by_use: BTreeSet<(Instant, K)>,
}

impl<K: Ord + Clone, V> Sessions<K, V> {
    /// A table of at most `most` sessions, each of which ends after `idle` without use.
    pub fn new(most: usize, idle: Duration) -> Self {
        Self { idle, most, entries: BTreeMap::new(), by_use: BTreeSet::new() }
    }

    /// The session of a key, which counts as used.
    pub fn touch(&mut self, key: &K, now: Instant) -> Option<&mut V> {
        let (used, value) = self.entries.get_mut(key)?;
        // Within a 64th of the idle time the order is left as it is: a busy session costs one look-up.
        if now.saturating_duration_since(*used) > self.idle / 64 {
            self.by_use.remove(&(*used, key.clone()));
            self.by_use.insert((now, key.clone()));
            *used = now;
        }
        Some(value)
    }

    /// Adds a session; says which one made room for it.
    pub fn insert(&mut self, key: K, value: V, now: Instant) -> Option<(K, V)> {
        self.remove(&key);
        let evicted = if self.entries.len() >= self.most { self.pop_idle(Duration::ZERO, now) } else { None };
        self.by_use.insert((now, key.clone()));
        self.entries.insert(key, (now, value));
        evicted
    }

    /// Ends a session.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        let (used, value) = self.entries.remove(key)?;
        self.by_use.remove(&(used, key.clone()));
        Some(value)
    }

    /// The next session that was idle for too long, if any.
    pub fn poll_expired(&mut self, now: Instant) -> Option<(K, V)> {
        self.pop_idle(self.idle, now)
    }

    /// Ends the session that was idle longest, where that is so long at least.
    pub fn pop_idle(&mut self, idle: Duration, now: Instant) -> Option<(K, V)> {
        let (used, key) = self.by_use.first()?;
        if now.saturating_duration_since(*used) < idle {
            return None;
        }
        let key = key.clone();
        self.remove(&key).map(|value| (key, value))
    }

    /// The same, of those that are `own`: it is looked for among the few that were idle longest.
    pub fn pop_idle_of(&mut self, idle: Duration, now: Instant, own: impl Fn(&V) -> bool) -> Option<(K, V)> {
        let of_own = |key: &K| self.entries.get(key).is_some_and(|(_, value)| own(value));
        let waiting = self.by_use.iter().take_while(|(used, _)| now.saturating_duration_since(*used) >= idle);
        let key = waiting.take(FEW).find(|(_, key)| of_own(key)).map(|(_, key)| key.clone())?;
        self.remove(&key).map(|value| (key, value))
    }

    /// When the next session may have been idle for too long.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.by_use.first().map(|(used, _)| *used + self.idle)
    }

    /// How many sessions there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Every session.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.entries.iter().map(|(key, (_, value))| (key, value))
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs a moment to start from")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Never more than the bound, never one that was idle too long, and the one evicted is the least used.
        #[test]
        fn bounded_and_expiring(steps in prop::collection::vec((0..3_u8, 0..12_u8, 0..40_u64), 0..200)) {
            let (start, idle) = (Instant::now(), Duration::from_secs(64));
            let mut now = start;
            let mut table = Sessions::new(5, idle);
            let mut model: BTreeMap<u8, Instant> = BTreeMap::new();
            for (what, key, seconds) in steps {
                now += Duration::from_secs(seconds);
                while let Some((key, ())) = table.poll_expired(now) {
                    prop_assert!(model.remove(&key).is_some_and(|used| used + idle <= now));
                }
                prop_assert!(model.values().all(|used| *used + idle > now));
                match what {
                    0 => {
                        let evicted = table.insert(key, (), now).map(|(key, ())| key);
                        model.remove(&key);
                        if let Some(key) = evicted {
                            let used = model.remove(&key).unwrap();
                            prop_assert!(model.values().all(|other| *other >= used));
                        }
                        model.insert(key, now);
                    }
                    1 => {
                        prop_assert_eq!(table.touch(&key, now).is_some(), model.contains_key(&key));
                        if let Some(used) = model.get_mut(&key)
                            && now - *used > idle / 64 {
                            *used = now;
                        }
                    }
                    _ => prop_assert_eq!(table.remove(&key).is_some(), model.remove(&key).is_some()),
                }
                prop_assert_eq!(table.len(), model.len());
                prop_assert!(table.len() <= 5);
            }
        }
    }
}
