//! Whether the neighbour at the other end of a link still lives.

use std::time::{Duration, Instant};

/// How often a silent link is asked while nothing depends on it: often enough for a NAT's table.
pub const IDLE_INTERVAL: Duration = Duration::from_secs(5);
/// How often a silent link is asked while flows use it or wait for it.
pub const BUSY_INTERVAL: Duration = Duration::from_secs(1);
/// So many intervals without a word and the link is dead.
pub const MISSES: u32 = 3;

/// The machine of one link: what to send, and when to give up.
#[derive(Debug)]
pub struct Keepalive {
    heard: Instant,
    asked: Option<Instant>,
    busy: bool,
}

impl Keepalive {
    /// A link that came up at `now`.
    pub fn new(now: Instant) -> Self {
        Self { heard: now, asked: None, busy: false }
    }

    /// Something came from the neighbour.
    pub fn handle_received(&mut self, now: Instant) {
        self.heard = now;
        self.asked = None;
    }

    /// Whether flows use the neighbour now. A link that turns busy and was silent for longer than a busy link may
    /// be is asked at once, and has the time of a busy link to answer.
    pub fn handle_busy(&mut self, busy: bool, now: Instant) {
        if busy && !self.busy && now.saturating_duration_since(self.heard) > BUSY_INTERVAL {
            self.heard = now - BUSY_INTERVAL;
            self.asked = None;
        }
        self.busy = busy;
    }

    /// When to call [`Self::poll_ping`] and [`Self::is_dead`] next.
    pub fn poll_timeout(&self) -> Instant {
        match self.asked {
            None => self.heard + self.interval(),
            Some(asked) => (asked + self.interval()).min(self.dead_at()),
        }
    }

    /// Whether a Ping is due; it counts as sent.
    pub fn poll_ping(&mut self, now: Instant) -> bool {
        let due = self.asked.unwrap_or(self.heard) + self.interval();
        let ask = now >= due && !self.is_dead(now);
        if ask {
            self.asked = Some(now);
        }
        ask
    }

    /// Whether the link is to be given up.
    pub fn is_dead(&self, now: Instant) -> bool {
        self.asked.is_some() && now >= self.dead_at()
    }

    fn interval(&self) -> Duration {
        if self.busy { BUSY_INTERVAL } else { IDLE_INTERVAL }
    }

    fn dead_at(&self) -> Instant {
        self.heard + self.interval() * MISSES
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs a moment to start from")]
mod tests {
    use super::*;

    /// Steps to each timeout; says when pings went out and when the link died, as offsets from `start`.
    fn run(mut link: Keepalive, start: Instant, until: Duration, answers: bool) -> (u32, Option<Duration>) {
        let mut pings = 0;
        loop {
            let now = link.poll_timeout();
            if now > start + until {
                return (pings, None);
            }
            if link.is_dead(now) {
                return (pings, Some(now - start));
            }
            if link.poll_ping(now) {
                pings += 1;
                if answers {
                    link.handle_received(now);
                }
            }
        }
    }

    #[test]
    fn a_link_that_answers_lives_and_one_that_does_not_dies() {
        let start = Instant::now();
        assert_eq!(run(Keepalive::new(start), start, Duration::from_secs(60), true), (12, None));
        assert_eq!(
            run(Keepalive::new(start), start, Duration::from_secs(60), false).1,
            Some(IDLE_INTERVAL * MISSES)
        );
        let mut busy = Keepalive::new(start);
        busy.handle_busy(true, start);
        assert_eq!(run(busy, start, Duration::from_secs(60), false).1, Some(BUSY_INTERVAL * MISSES));
    }

    #[test]
    fn a_silent_link_that_turns_busy_is_found_dead_within_three_seconds() {
        let start = Instant::now();
        let mut link = Keepalive::new(start);
        let now = start + Duration::from_millis(4_900);
        link.handle_busy(true, now);
        let (pings, died) = run(link, now, Duration::from_secs(60), false);
        assert!(pings >= 1);
        assert!(died.unwrap() <= Duration::from_secs(3), "{died:?}");
    }
}
