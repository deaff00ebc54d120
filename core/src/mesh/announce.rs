//! What one neighbour is told of this node's exports: the difference to what it knows, and nothing of what it may not use.
//!
//! What changes is told at once. What goes on changing is told ever less often, so that an export that comes and goes in a
//! loop costs neither this node nor its neighbours more than a message now and then.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::name::ServicePort;

/// So many changes of a port in a row are told at once, such as those of a pod that starts again ...
pub const FREE_CHANGES: u32 = 4;
/// ... and a further one after this time, doubled each time, ...
pub const FIRST_HOLD: Duration = Duration::from_secs(1);
/// ... up to this.
pub const LAST_HOLD: Duration = Duration::from_secs(30);
/// A port that has not changed for this long begins anew.
pub const CALM: Duration = Duration::from_secs(60);
/// Ports whose changes are counted before it is looked which of them are calm ...
const MAX_COUNTED: usize = 1024;
/// ... which is done once in this time at the most: it costs as much as there are.
const SWEEP: Duration = Duration::from_secs(CALM.as_secs() / 4);

/// What the neighbour is to be told of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It is offered.
    Offer(ServicePort),
    /// It is not offered any more.
    Withdraw(ServicePort),
}

#[derive(Debug, Clone, Copy)]
struct Changed {
    times: u32,
    last: Instant,
}

impl Changed {
    fn hold(self) -> Duration {
        match self.times.checked_sub(FREE_CHANGES) {
            None => Duration::ZERO,
            Some(more) => FIRST_HOLD.saturating_mul(1 << more.min(8)).min(LAST_HOLD),
        }
    }
}

/// Tells one neighbour.
#[derive(Debug, Default)]
pub struct Announcer {
    told: BTreeSet<ServicePort>,
    /// What of it is to be told once more.
    again: BTreeSet<ServicePort>,
    /// Ports that may have changed, and when they are to be looked at.
    due: BTreeMap<ServicePort, Instant>,
    by_time: BTreeSet<(Instant, ServicePort)>,
    counted: BTreeMap<ServicePort, Changed>,
    /// When it was last looked which of them are calm.
    swept: Option<Instant>,
    #[cfg(test)]
    looks: usize,
}

impl Announcer {
    /// A port may have changed: what serves it, or who may use it.
    pub fn handle_changed(&mut self, port: ServicePort, now: Instant) {
        // What is only to be told once more does not hold up what has changed.
        let waits = self.due.get(&port).copied().filter(|_| self.again.contains(&port));
        if waits.is_none() && self.due.contains_key(&port) {
            return;
        }
        if let Some(when) = waits {
            self.by_time.remove(&(when, port.clone()));
        }
        let held = self.counted.get(&port).map(|changed| changed.last + changed.hold());
        let when = held.map_or(now, |held| held.max(now));
        self.by_time.insert((when, port.clone()));
        self.due.insert(port, when);
    }

    /// The neighbour does not take all of it: what it was told is offered once more, from `when` on.
    pub fn handle_declined(&mut self, when: Instant) {
        for port in &self.told {
            if self.again.insert(port.clone()) && !self.due.contains_key(port) {
                self.by_time.insert((when, port.clone()));
                self.due.insert(port.clone(), when);
            }
        }
    }

    /// What the neighbour knows.
    pub fn told(&self) -> impl Iterator<Item = &ServicePort> {
        self.told.iter()
    }

    /// The next change to tell; `is_open` says whether the neighbour may use a port now.
    pub fn poll(&mut self, now: Instant, is_open: impl Fn(&ServicePort) -> bool) -> Option<Change> {
        while self.by_time.first().is_some_and(|(when, _)| *when <= now) {
            let (_, port) = self.by_time.pop_first()?;
            self.due.remove(&port);
            let (open, again) = (is_open(&port), self.again.remove(&port));
            if open == self.told.contains(&port) {
                if open && again {
                    return Some(Change::Offer(port));
                }
                continue;
            }
            self.count(&port, now);
            if open {
                self.told.insert(port.clone());
                return Some(Change::Offer(port));
            }
            self.told.remove(&port);
            return Some(Change::Withdraw(port));
        }
        None
    }

    /// When [`Announcer::poll`] has something again; `None`: after the next change.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.by_time.first().map(|(when, _)| *when)
    }

    fn count(&mut self, port: &ServicePort, now: Instant) {
        let calm = |changed: &Changed| now.saturating_duration_since(changed.last) >= CALM;
        if self.counted.len() >= MAX_COUNTED && !self.counted.contains_key(port) {
            if self.swept.is_none_or(|swept| now.saturating_duration_since(swept) >= SWEEP) {
                self.swept = Some(now);
                #[cfg(test)]
                {
                    self.looks += self.counted.len();
                }
                self.counted.retain(|_, changed| !calm(changed));
            }
            // Who exports so much that changes is counted from the start at the worst.
            if self.counted.len() >= MAX_COUNTED.max(2 * self.told.len()) {
                self.counted.clear();
            }
        }
        let changed = self.counted.entry(port.clone()).or_insert(Changed { times: 0, last: now });
        let times = if calm(changed) { 0 } else { changed.times };
        *changed = Changed { times: times.saturating_add(1), last: now };
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs a moment to start from")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::name::{Protocol, ServiceName};

    fn port(number: u16) -> ServicePort {
        let service = ServiceName {
            name: "web".parse().unwrap(),
            namespace: "default".parse().unwrap(),
            cluster: "a.local".parse().unwrap(),
        };
        ServicePort { service, port: number.try_into().unwrap(), protocol: Protocol::Tcp }
    }

    #[test]
    fn one_that_flips_in_a_loop_is_told_ever_less_often() {
        let (mut announcer, start) = (Announcer::default(), Instant::now());
        let (mut offered, mut told) = (false, 0);
        for step in 0..600_000_u64 {
            let now = start + Duration::from_millis(step);
            offered = !offered;
            announcer.handle_changed(port(1), now);
            while announcer.poll(now, |_| offered).is_some() {
                told += 1;
            }
        }
        // Ten minutes, half of the looks at a moment in which nothing has changed.
        assert!((10..50).contains(&told), "{told} messages");
        // What it comes to in the end is told in time.
        let end = start + Duration::from_secs(600);
        announcer.handle_changed(port(1), end);
        let when = announcer.poll_timeout().unwrap();
        assert!(when <= end + LAST_HOLD, "{:?}", when - end);
        let last = announcer.poll(when, |_| true);
        assert!(last.is_none_or(|last| last == Change::Offer(port(1))));
        assert!(announcer.told().eq([&port(1)]));
        // And calm, it begins anew.
        let later = when + CALM;
        for _ in 0..FREE_CHANGES / 2 {
            for open in [false, true] {
                announcer.handle_changed(port(1), later);
                assert!(announcer.poll(later, |_| open).is_some());
            }
        }
    }

    #[test]
    fn what_is_declined_is_offered_once_more_and_what_changes_meanwhile_is_told_at_once() {
        let (mut announcer, now) = (Announcer::default(), Instant::now());
        let later = now + CALM;
        let told = |announcer: &mut Announcer, now, open: &[u16]| -> Vec<Change> {
            std::iter::from_fn(|| announcer.poll(now, |port| open.contains(&port.port.get()))).collect()
        };
        (1..=3).for_each(|number| announcer.handle_changed(port(number), now));
        assert_eq!(told(&mut announcer, now, &[1, 2, 3]).len(), 3);
        announcer.handle_declined(later);
        announcer.handle_declined(later);
        assert_eq!(told(&mut announcer, now, &[1, 2, 3]), []);
        announcer.handle_changed(port(2), now);
        assert_eq!(told(&mut announcer, now, &[1, 3]), [Change::Withdraw(port(2))]);
        let again = [Change::Offer(port(1)), Change::Offer(port(3))];
        assert_eq!(announcer.poll_timeout(), Some(later));
        assert_eq!(told(&mut announcer, later, &[1, 3]), again);
        assert_eq!(told(&mut announcer, later + CALM, &[1, 3]), []);
    }

    #[test]
    fn a_pod_that_starts_again_is_told_at_once() {
        let (mut announcer, now) = (Announcer::default(), Instant::now());
        for open in [true, false, true, false] {
            announcer.handle_changed(port(1), now);
            assert!(announcer.poll(now, |_| open).is_some());
        }
        announcer.handle_changed(port(1), now);
        assert_eq!(announcer.poll(now, |_| true), None);
        // Others do not wait for it.
        announcer.handle_changed(port(2), now);
        assert_eq!(announcer.poll(now, |_| true), Some(Change::Offer(port(2))));
        assert_eq!(announcer.poll_timeout(), Some(now + FIRST_HOLD));
        assert_eq!(announcer.poll(now + FIRST_HOLD, |_| true), Some(Change::Offer(port(1))));
    }

    #[test]
    fn what_is_counted_is_bounded() {
        let (mut announcer, now) = (Announcer::default(), Instant::now());
        for number in 1..60_000 {
            announcer.handle_changed(port(number), now);
            assert!(announcer.poll(now, |_| true).is_some());
            announcer.handle_changed(port(number), now);
            assert!(announcer.poll(now, |_| false).is_some());
        }
        assert!(announcer.counted.len() <= MAX_COUNTED && announcer.due.is_empty());
    }

    #[test]
    fn what_many_ports_cost_grows_with_their_number() {
        let (mut announcer, start) = (Announcer::default(), Instant::now());
        // Told within four seconds.
        for number in 1..=50_000 {
            let now = start + Duration::from_micros(80 * u64::from(number));
            announcer.handle_changed(port(number), now);
            assert!(announcer.poll(now, |_| true).is_some());
        }
        assert!(announcer.looks <= 50_000, "looked at {} counts", announcer.looks);
        // And what is calm goes all the same.
        let later = start + 2 * CALM;
        announcer.handle_changed(port(60_000), later);
        assert!(announcer.poll(later, |_| true).is_some());
        assert_eq!(announcer.counted.len(), 1);
    }

    proptest! {
        /// However it comes and goes, a neighbour that applies what it is told knows, once all holds are over, what is open.
        #[test]
        fn in_the_end_it_knows_what_is_open(steps in prop::collection::vec((1..5_u16, any::<bool>(), 0..3_000_u64), 0..80)) {
            let (mut announcer, mut now) = (Announcer::default(), Instant::now());
            let (mut open, mut known) = (BTreeSet::new(), BTreeSet::new());
            let apply = |known: &mut BTreeSet<ServicePort>, change| match change {
                Change::Offer(port) => assert!(known.insert(port)),
                Change::Withdraw(port) => assert!(known.remove(&port)),
            };
            for (number, opens, pause) in steps {
                now += Duration::from_millis(pause);
                if opens { open.insert(port(number)); } else { open.remove(&port(number)); }
                announcer.handle_changed(port(number), now);
                while let Some(change) = announcer.poll(now, |port| open.contains(port)) {
                    apply(&mut known, change);
                }
            }
            while let Some(when) = announcer.poll_timeout() {
                prop_assert!(when <= now + LAST_HOLD);
                while let Some(change) = announcer.poll(when, |port| open.contains(port)) {
                    apply(&mut known, change);
                }
            }
            prop_assert_eq!(&known, &open);
            prop_assert!(announcer.told().eq(open.iter()));
            prop_assert_eq!(announcer.due.len(), announcer.by_time.len());
        }
    }
}
