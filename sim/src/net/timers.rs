//! What the kernel of one end does with a connection between nodes as time passes: retransmission (RFC 6298), probes of a
//! closed window (RFC 9293 §3.8.6.1), keepalive probes (§3.8.4), and the limit that TCP_USER_TIMEOUT sets to all three
//! (RFC 5482), as Linux has them (tcp(7)).
//!
//! Where the path lives, all is acknowledged at once and each probe is answered.

use std::time::Duration;

use servicekeel_runtime::net::tcp::{TcpInfo, TcpOptions};

/// The first retransmission of a segment, and the first probe of a closed window (TCP_RTO_MIN).
const RTO: Duration = Duration::from_millis(200);
/// How long the kernel sends a segment, or a probe of a closed window, again and again (net.ipv4.tcp_retries2 of 15).
const RETRIES: Duration = Duration::from_millis(924_600);

/// The timers of one end.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Timers {
    /// When the other side was heard last.
    heard: Duration,
    /// Since when something is sent that finds no acknowledgement.
    unacked: Option<Duration>,
    /// Since when the other side's window is closed to bytes that wait.
    closed: Option<Duration>,
}

impl Timers {
    /// Of a connection that comes into being.
    pub(super) fn new(now: Duration) -> Self {
        Self { heard: now, ..Self::default() }
    }

    /// Something is sent.
    pub(super) fn handle_sent(&mut self, now: Duration) {
        self.unacked.get_or_insert(now);
    }

    /// Something waits that the other side has no room for.
    pub(super) fn handle_closed_window(&mut self, now: Duration) {
        self.closed.get_or_insert(now);
    }

    /// The other side has room again.
    pub(super) fn handle_open_window(&mut self) {
        self.closed = None;
    }

    /// How long the other side has had no room for what waits.
    pub(super) fn closed_for(&self, now: Duration) -> Duration {
        self.closed.map_or(Duration::ZERO, |since| now - since)
    }

    /// Time has passed, on a path that is `silent` or not. Whether the kernel gives up.
    pub(super) fn handle_timeout(&mut self, now: Duration, silent: bool, options: &TcpOptions) -> bool {
        let user = options.user_timeout;
        let since = |since: Option<Duration>, limit| since.is_some_and(|since| since + limit <= now);
        if !silent {
            (self.heard, self.unacked) = (now, None);
            // Each probe is answered, and that the window stays closed counts all the same.
            return user.is_some_and(|limit| since(self.closed, limit));
        }
        match (self.unacked, self.closed) {
            (Some(_), _) => since(self.unacked, user.unwrap_or(RETRIES)),
            (None, Some(_)) => match user {
                Some(limit) => since(self.closed, limit),
                None => since(Some(self.heard), RETRIES),
            },
            // Linux has no keepalive while anything is unacknowledged or waits.
            (None, None) => {
                let first = options.keepalive_idle + options.keepalive_interval;
                let all = options.keepalive_idle + options.keepalive_interval * options.keepalive_probes;
                since(Some(self.heard), user.map_or(all, |limit| limit.max(first)))
            }
        }
    }

    /// What the kernel says of it.
    pub(super) fn info(&self, now: Duration) -> TcpInfo {
        // A count is of no matter but for being one, as is a state that is not closed.
        let due = |since: Option<Duration>| u8::from(since.is_some_and(|since| since + RTO <= now));
        let last_ack = now - self.heard;
        let mut rto = RTO;
        while self.unacked.is_some_and(|since| since + rto * 2 - RTO <= now) {
            rto *= 2;
        }
        TcpInfo {
            state: 1,
            retransmits: due(self.unacked),
            // One that was answered is none.
            probes: if self.unacked.is_none() && last_ack >= RTO { due(self.closed) } else { 0 },
            unacked: self.unacked.is_some().into(),
            rto,
            last_ack,
            not_sent: self.closed.is_some().into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use servicekeel_runtime::net::tcp::BETWEEN_ROUTERS;

    use super::*;

    const MINUTE: TcpOptions = TcpOptions { user_timeout: Some(s(60)), ..BETWEEN_ROUTERS };

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// After how many seconds it is given up, within an hour, and when the routers hold it for dead.
    fn ends(mut timers: Timers, silent: bool, options: &TcpOptions) -> (Option<u64>, Option<u64>) {
        let mut dead = None;
        for second in 1..3600 {
            let over = timers.handle_timeout(s(second), silent, options);
            if timers.info(s(second)).is_dead() {
                dead = dead.or(Some(second));
            }
            if over {
                return (Some(second), dead);
            }
        }
        (None, dead)
    }

    #[test]
    fn each_end_is_given_up_as_its_kernel_does() {
        let idle = Timers::new(s(0));
        let mut sent = idle;
        sent.handle_sent(s(0));
        let mut closed = idle;
        closed.handle_closed_window(s(0));
        for timers in [idle, sent, closed] {
            assert_eq!(ends(timers, false, &BETWEEN_ROUTERS), (None, None), "{timers:?}");
        }
        assert_eq!(ends(idle, true, &BETWEEN_ROUTERS), (Some(75), None));
        assert_eq!(ends(sent, true, &BETWEEN_ROUTERS), (Some(925), Some(104)));
        assert_eq!(ends(closed, true, &BETWEEN_ROUTERS), (Some(925), Some(300)));
        // A limit to silence is one to a closed window too.
        assert_eq!(ends(closed, false, &MINUTE), (Some(60), None));
        assert_eq!(ends(sent, false, &MINUTE), (None, None));
        assert_eq!(ends(sent, true, &MINUTE).0, Some(60));
        assert_eq!(ends(closed, true, &MINUTE).0, Some(60));
        assert_eq!(ends(idle, true, &MINUTE).0, Some(60));
        assert_eq!(closed.closed_for(s(7)), s(7));
        closed.handle_open_window();
        assert_eq!(ends(closed, false, &MINUTE), (None, None));
    }
}
