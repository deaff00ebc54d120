//! Whether the neighbour at the other end of a link still lives.

use std::time::{Duration, Instant};

/// When a silent link is asked for the first time while nothing uses it: often enough for a NAT's table.
pub const IDLE_INTERVAL: Duration = Duration::from_secs(5);
/// The same for a link in use; and how long any link has for an answer until it is asked again.
pub const BUSY_INTERVAL: Duration = Duration::from_secs(1);
/// So many intervals without a word and the link is dead: 3 s in use, 7 s else.
pub const MISSES: u32 = 3;
/// How long a link counts as used after its last use: who used it now will again, and the side that can't dial waits
/// until the other one has found out.
pub const LINGER: Duration = Duration::from_secs(15);

/// The machine of one link: what to send, and when to give up.
#[derive(Debug)]
pub struct Keepalive {
    heard: Instant,
    asked: Option<Instant>,
    used_until: Instant,
}

impl Keepalive {
    /// A link that came up at `now`.
    pub fn new(now: Instant) -> Self {
        Self { heard: now, asked: None, used_until: now }
    }

    /// Something came from the neighbour.
    pub fn handle_received(&mut self, now: Instant) {
        self.heard = now;
        self.asked = None;
    }

    /// The neighbour is used now, by either side. A link that was not, and was silent for longer than a used one may
    /// be, is asked at once, and has the time of a used link to answer.
    pub fn handle_use(&mut self, now: Instant) {
        if !self.is_used(now) && now.saturating_duration_since(self.heard) > BUSY_INTERVAL {
            self.heard = now - BUSY_INTERVAL;
            self.asked = None;
        }
        self.used_until = now + LINGER;
    }

    /// Whether the link counts as used.
    pub fn is_used(&self, now: Instant) -> bool {
        now < self.used_until
    }

    /// When to call [`Self::poll_ping`] and [`Self::is_dead`] next.
    pub fn poll_timeout(&self) -> Instant {
        self.ask_at().min(self.dead_at())
    }

    /// Whether a Ping is due; it counts as sent.
    pub fn poll_ping(&mut self, now: Instant) -> bool {
        let ask = now >= self.ask_at() && !self.is_dead(now);
        if ask {
            self.asked = Some(now);
        }
        ask
    }

    /// Whether the link is to be given up.
    pub fn is_dead(&self, now: Instant) -> bool {
        self.asked.is_some() && now >= self.dead_at()
    }

    /// How long after the neighbour's last word it is asked.
    fn silence(&self) -> Duration {
        if self.is_used(self.heard) { BUSY_INTERVAL } else { IDLE_INTERVAL }
    }

    fn ask_at(&self) -> Instant {
        self.asked.map_or(self.heard + self.silence(), |asked| asked + BUSY_INTERVAL)
    }

    fn dead_at(&self) -> Instant {
        self.heard + self.silence() + BUSY_INTERVAL * (MISSES - 1)
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
            Some(IDLE_INTERVAL + BUSY_INTERVAL * 2)
        );
        let mut used = Keepalive::new(start);
        used.handle_use(start);
        assert_eq!(run(used, start, Duration::from_secs(60), false).1, Some(BUSY_INTERVAL * MISSES));
    }

    #[test]
    fn a_used_link_is_watched_for_a_while_after_its_use() {
        let start = Instant::now();
        let mut link = Keepalive::new(start);
        link.handle_use(start);
        // Once a second for 15 s, once in 5 s for the 45 s that are left.
        assert_eq!(run(link, start, Duration::from_secs(60), true), (15 + 9, None));
    }

    #[test]
    fn a_silent_link_that_is_used_again_is_found_dead_within_three_seconds() {
        let start = Instant::now();
        let mut link = Keepalive::new(start);
        let now = start + Duration::from_millis(4_900);
        link.handle_use(now);
        let (pings, died) = run(link, now, Duration::from_secs(60), false);
        assert!(pings >= 1);
        assert!(died.unwrap() <= Duration::from_secs(3), "{died:?}");
    }
}
