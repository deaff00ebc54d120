//! How fast the messages of one owner are handled: at once as many as its start may need, then as many a second as a pod
//! has a use for. Who sends more waits, and nobody with it.

use std::time::{Duration, Instant};

/// The cost of messages that one owner may send at once; what a pod may need at its start, twice ...
pub const BURST: u32 = 16_384;
/// ... and in each second from then on.
pub const RATE: u32 = 128;
/// So much of it, at once and in each second, whatever others do; what is beyond comes out of what all share.
pub const SURE_BURST: u32 = 512;
/// As [`SURE_BURST`], in each second.
pub const SURE_RATE: u32 = 64;
/// What all owners share: at once ...
pub const SHARED_BURST: u32 = 131_072;
/// ... and in each second from then on.
pub const SHARED_RATE: u32 = 4096;
/// Bytes of a message that cost as much as a message.
const UNIT: usize = 256;

/// What a message of so many bytes costs.
pub fn cost(bytes: usize) -> u32 {
    u32::try_from(1 + bytes / UNIT).unwrap_or(u32::MAX)
}

/// A token bucket: the generic cell rate algorithm (ITU-T I.371).
#[derive(Debug, Clone)]
pub struct Bucket {
    burst: Duration,
    interval: Duration,
    /// When it is as full as it can be.
    full: Instant,
}

impl Bucket {
    /// A full one, of so much at once and so much, at least 1, in each second from then on.
    pub fn new(burst: u32, rate: u32, now: Instant) -> Self {
        let interval = Duration::from_secs(1) / rate.max(1);
        Self { burst: interval * burst, interval, full: now }
    }

    /// What all owners share.
    pub fn shared(now: Instant) -> Self {
        Self::new(SHARED_BURST, SHARED_RATE, now)
    }

    /// How long until there is so much; more than it can hold is not asked for.
    fn wait(&self, cost: u32, now: Instant) -> Duration {
        (self.full.saturating_duration_since(now) + self.interval * cost).saturating_sub(self.burst)
    }

    fn take(&mut self, cost: u32, now: Instant) {
        self.full = self.full.max(now) + self.interval * cost;
    }
}

/// The pace of one owner.
#[derive(Debug, Clone)]
pub struct Pace {
    whole: Bucket,
    sure: Bucket,
}

impl Pace {
    /// Of one that begins.
    pub fn new(now: Instant) -> Self {
        Self { whole: Bucket::new(BURST, RATE, now), sure: Bucket::new(SURE_BURST, SURE_RATE, now) }
    }

    /// Whether it may send as much as at its beginning.
    pub fn is_rested(&self, now: Instant) -> bool {
        self.whole.full.max(self.sure.full) <= now
    }

    /// A message of this cost is there: how long to wait until it may be handled. It is counted as if it were, and those
    /// that come behind it wait for longer.
    pub fn handle_message(&mut self, shared: &mut Bucket, cost: u32, now: Instant) -> Duration {
        let cost = cost.min(SURE_BURST);
        let (sure, out_of_shared) = (self.sure.wait(cost, now), shared.wait(cost, now));
        let wait = self.whole.wait(cost, now).max(sure.min(out_of_shared));
        self.whole.take(cost, now);
        if sure <= out_of_shared {
            self.sure.take(cost, now)
        } else {
            shared.take(cost, now)
        }
        wait
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs a moment to start from")]
mod tests {
    use super::*;

    /// The cost that is handled within a time, by one who always has a message.
    fn handled(pace: &mut Pace, shared: &mut Bucket, from: Instant, time: Duration, cost: u32) -> u32 {
        let (mut now, mut sum) = (from, 0);
        while now < from + time {
            now += pace.handle_message(shared, cost, now);
            sum += cost;
        }
        sum
    }

    #[test]
    fn a_start_is_not_slowed_and_a_loop_is() {
        let start = Instant::now();
        let (mut pace, mut shared) = (Pace::new(start), Bucket::shared(start));
        for _ in 0..BURST {
            assert_eq!(pace.handle_message(&mut shared, 1, start), Duration::ZERO);
        }
        let sum = handled(&mut pace, &mut shared, start, Duration::from_secs(100), 1);
        assert!((RATE * 99..=RATE * 101).contains(&sum), "{sum}");
        let later = start + Duration::from_secs(100);
        let sum = handled(&mut pace, &mut shared, later, Duration::from_secs(100), cost(16_384));
        assert!((RATE * 99..=RATE * 102).contains(&sum), "{sum}");
        // After a rest it may begin anew.
        let rested = later + Duration::from_secs(101) + Duration::from_secs(1) * BURST / RATE;
        for _ in 0..BURST {
            assert_eq!(pace.handle_message(&mut shared, 1, rested), Duration::ZERO);
        }
    }

    #[test]
    fn those_who_take_all_that_is_shared_leave_each_other_what_is_its_own() {
        let start = Instant::now();
        let mut shared = Bucket::shared(start);
        // One conversation after the other, each as much as it may.
        let mut sum = 0;
        for _ in 0..100 {
            sum += handled(&mut Pace::new(start), &mut shared, start, Duration::from_millis(1), 1);
        }
        assert!((SHARED_BURST..SHARED_BURST + 101 * SURE_BURST).contains(&sum), "{sum}");
        let mut honest = Pace::new(start);
        for _ in 0..SURE_BURST {
            assert_eq!(honest.handle_message(&mut shared, 1, start), Duration::ZERO);
        }
        let sum = handled(&mut honest, &mut shared, start, Duration::from_secs(1), 1);
        assert!(sum >= SURE_RATE, "{sum}");
    }
}
