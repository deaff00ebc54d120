//! What the kernel says of a TCP connection: TCP_INFO (tcp(7), linux/tcp.h).

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use super::getsockopt::getsockopt;

/// Bytes of `struct tcp_info` up to and with `tcpi_notsent_bytes`, the last field that is read here (Linux 4.6).
const LEN: usize = 148;
/// The state of a connection that is over, such as by a reset (TCP_CLOSE, linux/tcp_states.h).
const CLOSE: u8 = 7;
/// A path on which a retransmission (RFC 6298) is due and no acknowledgement came for so long is dead.
const SILENCE: Duration = Duration::from_secs(60);
/// Where the other side's window is closed, it is asked every 2 min at the latest (TCP_RTO_MAX), and each time it
/// answers: two of its answers are missing.
const CLOSED_SILENCE: Duration = Duration::from_secs(300);

/// A connection's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TcpInfo {
    /// One of the kernel's TCP_ESTABLISHED (1) to TCP_NEW_SYN_RECV (12).
    state: u8,
    /// Times in a row that a retransmission found no answer.
    retransmits: u8,
    /// Probes of a closed window in a row that found no answer.
    probes: u8,
    /// Segments that are sent and not acknowledged.
    unacked: u32,
    /// How long ago the last acknowledgement came.
    last_ack: Duration,
    /// Bytes that were written and never sent.
    not_sent: u32,
}

impl TcpInfo {
    /// # Errors
    /// Those of getsockopt(2), and [`io::ErrorKind::Unsupported`] on a kernel that says less.
    pub(super) fn read(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let (bytes, len) = getsockopt::<LEN>(socket, libc::IPPROTO_TCP, libc::TCP_INFO)?;
        if len < LEN {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self::decode(&bytes))
    }

    fn decode(bytes: &[u8; LEN]) -> Self {
        let number = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self {
            state: bytes[0],
            retransmits: bytes[2],
            probes: bytes[3],
            unacked: number(24),
            last_ack: Duration::from_millis(number(56).into()),
            not_sent: number(144),
        }
    }

    /// Whether the other side's system has acknowledged all that was written.
    pub(super) fn is_taken(&self) -> bool {
        self.unacked == 0 && self.not_sent == 0
    }

    /// Whether the connection is over: reset, or given up.
    pub(super) fn is_closed(&self) -> bool {
        self.state == CLOSE
    }

    /// Whether what was sent finds no answer, not even that there is no room for it.
    pub(super) fn is_dead(&self) -> bool {
        match (self.retransmits, self.probes) {
            (0, 0) => false,
            (0, _) => self.last_ack >= CLOSED_SILENCE,
            _ => self.last_ack >= SILENCE,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::thread;
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_kernel_tells_what_is_not_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut far = listener.accept().unwrap().0;
        near.set_nonblocking(true).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        // Until both buffers are full, and what is beyond them waits here.
        let full = loop {
            while near.write(&[0; 64 << 10]).is_ok() {}
            let info = TcpInfo::read(near.as_fd()).unwrap();
            if info.not_sent > 0 && info.last_ack > Duration::from_millis(100) {
                break info;
            }
            assert!(Instant::now() < deadline, "it is never full: {info:?}");
            thread::sleep(Duration::from_millis(10));
        };
        assert!(!full.is_taken() && !full.is_dead() && !full.is_closed(), "{full:?}");
        far.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let start = Instant::now();
        let empty = loop {
            while far.read(&mut [0; 64 << 10]).is_ok() {}
            let info = TcpInfo::read(near.as_fd()).unwrap();
            if info.is_taken() {
                break info;
            }
            assert!(Instant::now() < deadline, "it is never empty: {info:?}");
        };
        // The kernel's clock has ticks of up to 10 ms.
        assert!(empty.last_ack <= start.elapsed() + Duration::from_millis(20), "{empty:?}");
        assert!(!empty.is_dead() && !empty.is_closed(), "{empty:?}");
        near.write_all(b"unread").unwrap();
        drop(far);
        while !TcpInfo::read(near.as_fd()).unwrap().is_closed() {
            assert!(Instant::now() < deadline, "the reset is not seen");
        }
    }

    #[test]
    fn what_answers_is_alive_however_long_its_window_is_closed() {
        let info = |retransmits, probes, seconds| TcpInfo {
            state: 1,
            retransmits,
            probes,
            unacked: 1,
            last_ack: Duration::from_secs(seconds),
            not_sent: 1,
        };
        assert!(!info(0, 0, 100_000).is_dead(), "nothing is asked");
        assert!(!info(3, 0, 59).is_dead() && info(3, 0, 60).is_dead());
        assert!(!info(0, 1, 125).is_dead() && info(0, 3, 300).is_dead());
    }
}
