//! TCP between routers: what is asked of the kernel for it, and what the kernel says of it (tcp(7), linux/tcp.h). The
//! simulation follows both.

use std::time::Duration;

/// Bytes of `struct tcp_info` up to and with `tcpi_notsent_bytes`, the last field that is read here (Linux 4.6).
pub(super) const INFO_LEN: usize = 148;
/// The state of a connection that is over, such as by a reset (TCP_CLOSE, linux/tcp_states.h).
const CLOSE: u8 = 7;
/// ... and of one that the other side has ended, and this one has not (TCP_CLOSE_WAIT).
const CLOSE_WAIT: u8 = 8;
/// A path is dead where a retransmission found no answer that was sent after so long a silence: each is sent as long after
/// the one before as that had taken to come (RFC 6298 §5.5), so that the first one behind a cut of nearly a minute comes
/// as late as two.
const SILENCE: Duration = Duration::from_secs(60);
/// How long an answer to it may take.
const ANSWER: Duration = Duration::from_secs(1);
/// Where the other side's window is closed, it is asked every 2 min at the latest (TCP_RTO_MAX), and each time it
/// answers: two of its answers are missing.
const CLOSED_SILENCE: Duration = Duration::from_secs(300);

/// When the kernel gives a connection up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpOptions {
    /// After so long without a word of the other side it is probed, where nothing is on its way (TCP_KEEPIDLE).
    pub keepalive_idle: Duration,
    /// The time between two probes (TCP_KEEPINTVL).
    pub keepalive_interval: Duration,
    /// After so many without an answer it is given up (TCP_KEEPCNT).
    pub keepalive_probes: u32,
    /// How long bytes may stay unacknowledged (TCP_USER_TIMEOUT, RFC 5482). `None`: as long as the kernel retransmits.
    pub user_timeout: Option<Duration>,
}

/// An idle path is probed after 15 s of silence, which keeps it in the tables of NATs, and is dead after twelve probes 5 s
/// apart: 75 s, more than the flows of a peer without a link have (60 s), and than it takes until the link is missed, since
/// of a flow that is under way one direction mostly is idle. A path whose reader pauses answers. There is no limit to how
/// long bytes may stay unacknowledged: Linux counts a closed window as such (tcp(7)), so it would end a flow whose
/// application takes nothing for a while. A peer that is gone is found by the link.
pub const BETWEEN_ROUTERS: TcpOptions = TcpOptions {
    keepalive_idle: Duration::from_secs(15),
    keepalive_interval: Duration::from_secs(5),
    keepalive_probes: 12,
    user_timeout: None,
};

/// A connection's state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TcpInfo {
    /// One of the kernel's TCP_ESTABLISHED (1) to TCP_NEW_SYN_RECV (12).
    pub state: u8,
    /// Times in a row that a retransmission found no answer.
    pub retransmits: u8,
    /// Probes of a closed window in a row that found no answer.
    pub probes: u8,
    /// Segments that are sent and not acknowledged.
    pub unacked: u32,
    /// How long after the last retransmission the next one is due: as long as all before it took, but for the first.
    pub rto: Duration,
    /// How long ago the last acknowledgement came.
    pub last_ack: Duration,
    /// Bytes that were written and never sent.
    pub not_sent: u32,
}

impl TcpInfo {
    pub(super) fn decode(bytes: &[u8; INFO_LEN]) -> Self {
        let number = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self {
            state: bytes[0],
            retransmits: bytes[2],
            probes: bytes[3],
            unacked: number(24),
            rto: Duration::from_micros(number(8).into()),
            last_ack: Duration::from_millis(number(56).into()),
            not_sent: number(144),
        }
    }

    /// Whether the other side's system has acknowledged all that was written.
    pub fn is_taken(&self) -> bool {
        self.unacked == 0 && self.not_sent == 0
    }

    /// Whether the connection is over: reset, or given up.
    pub fn is_closed(&self) -> bool {
        self.state == CLOSE
    }

    /// Whether the other side has ended and this one has not.
    pub fn has_ended(&self) -> bool {
        self.state == CLOSE_WAIT
    }

    /// Whether what was sent finds no answer, not even that there is no room for it.
    pub fn is_dead(&self) -> bool {
        match (self.retransmits, self.probes) {
            (0, 0) => false,
            (0, _) => self.last_ack >= CLOSED_SILENCE,
            _ => self.rto >= SILENCE && self.last_ack >= self.rto + ANSWER,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_answers_is_alive_however_long_its_window_is_closed() {
        let info = |rto, probes, seconds| TcpInfo {
            state: 1,
            retransmits: u8::from(rto > 0),
            probes,
            unacked: 1,
            rto: Duration::from_secs(rto),
            last_ack: Duration::from_secs(seconds),
            not_sent: 1,
        };
        assert!(!info(0, 0, 100_000).is_dead(), "nothing is asked");
        assert!(!info(38, 0, 76).is_dead(), "the next one is sent after 76 s");
        assert!(!info(76, 0, 76).is_dead() && info(76, 0, 77).is_dead());
        assert!(!info(0, 1, 125).is_dead() && info(0, 3, 300).is_dead());
    }
}
