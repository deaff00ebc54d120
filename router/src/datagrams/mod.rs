//! UDP sessions: datagrams between a pod's import and an endpoint, with their boundaries, up to 65,507 bytes.
//!
//! A session is an import and a client's address. It sticks to its endpoint while that lives and ends after
//! [`SESSION_IDLE`] without a datagram either way. To another router the sessions share one connection.

pub(crate) mod import;
pub(crate) mod link;
pub(crate) mod outlet;
pub(crate) mod pod;
pub(crate) mod serve;

use std::fmt::Display;
use std::io;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use servicekeel_runtime::net::{Datagrams, Net};
use servicekeel_runtime::throttle::Throttle;
use tokio::io::ReadBuf;
use tokio::task::coop::consume_budget;
use tracing::warn;

use crate::node::Node;
use crate::rooms::{Account, Lease};
use crate::tls::BufferPool;
use outlet::Outlet;

/// How long a session lives without a datagram.
pub(crate) const SESSION_IDLE: Duration = Duration::from_secs(120);
/// Where a pod or a peer has as many sessions as it may, one that was idle for so long gives way to a new one of its own.
/// A flood of new ones waits for that, and costs their endpoint no socket.
pub(crate) const GIVES_WAY: Duration = Duration::from_secs(5);
/// The most sessions of one import, and of one connection between two routers.
pub(crate) const MAX_SESSIONS: usize = 4096;
/// Datagrams that wait for a slow receiver; further ones are dropped, as a network would.
pub(crate) const QUEUE: usize = 128;
/// What waits for a connection between two routers: all its sessions may begin at once, each with a datagram.
pub(crate) const LINK_QUEUE: usize = 2 * MAX_SESSIONS;
/// What a datagram that waits counts for beside its bytes.
const OVERHEAD: usize = 256;

/// A datagram that waits, and counts against whoever sent it.
pub(crate) struct Queued {
    pub(crate) bytes: Vec<u8>,
    _room: Lease,
}

impl Queued {
    /// A copy to wait; `None` where its owner has as many bytes waiting as it may.
    pub(crate) fn new(bytes: &[u8], owner: &Arc<Account>) -> Option<Self> {
        let room = owner.lease((bytes.len() + OVERHEAD) as u64)?;
        Some(Self { bytes: bytes.into(), _room: room })
    }
}

/// The socket of an import, by which its pod's clients are answered; a clone is the same.
pub(crate) struct ImportSocket<N: Net> {
    pub(crate) socket: Arc<N::UdpSocket>,
    pub(crate) outlet: Outlet<N>,
}

impl<N: Net> Clone for ImportSocket<N> {
    fn clone(&self) -> Self {
        Self { socket: self.socket.clone(), outlet: self.outlet.clone() }
    }
}

impl<N: Net> ImportSocket<N> {
    /// Answers a client, in the name of whoever answers; false where there is no room for it.
    pub(crate) fn send(&self, datagram: &[u8], owner: &Arc<Account>, client: SocketAddr) -> bool {
        let queued = Queued::new(datagram, owner);
        queued.is_some_and(|queued| self.outlet.try_send(&self.socket, queued, client))
    }
}

/// How often it is told that sessions make room.
const TELL: Duration = Duration::from_secs(10);

/// For the log: a table of sessions is at its bound. In a flood it is so again and again.
pub(crate) struct Crowd(Throttle);

impl Crowd {
    pub(crate) fn new() -> Self {
        Self(Throttle::new(1, TELL))
    }

    /// Says that a session makes room for another.
    pub(crate) fn tell(&self, of: &dyn Display) {
        if let Some(suppressed) = self.0.permit() {
            warn!(%of, limit = MAX_SESSIONS, suppressed, "too many UDP sessions; evicting the idlest");
        }
    }
}

/// A datagram, in a buffer that goes back to the pool.
pub(crate) struct Received {
    buffers: Arc<BufferPool>,
    buffer: Box<[u8]>,
    len: usize,
}

impl Deref for Received {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        self.buffers.give(std::mem::take(&mut self.buffer));
    }
}

/// Receives one datagram, however large. No buffer is held while none comes.
pub(crate) async fn receive<D: Datagrams>(
    socket: &D,
    buffers: &Arc<BufferPool>,
) -> io::Result<(Received, SocketAddr)> {
    loop {
        // A flood is always ready, and other tasks have their turn all the same.
        consume_budget().await;
        match try_receive(socket, buffers) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.readable().await?,
            received => return received,
        }
    }
}

fn try_receive<D: Datagrams>(socket: &D, buffers: &Arc<BufferPool>) -> io::Result<(Received, SocketAddr)> {
    let mut received = Received { buffers: buffers.clone(), buffer: buffers.take(), len: 0 };
    let mut buf = ReadBuf::new(&mut received.buffer);
    let from = socket.try_recv_from(&mut buf)?;
    received.len = buf.filled().len();
    Ok((received, from))
}

/// What the two ends of a session tell one another beside datagrams; a clone is the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Signs(Arc<Flags>);

#[derive(Debug, Default)]
struct Flags {
    over: AtomicBool,
    answered: AtomicBool,
    heard: AtomicBool,
}

impl Signs {
    /// The far end is gone: the next datagram opens another session.
    pub(crate) fn end(&self) {
        self.0.over.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.0.over.load(Ordering::Relaxed)
    }

    /// An answer came; whether it is the session's first.
    pub(crate) fn answer(&self) -> bool {
        self.0.answered.store(true, Ordering::Relaxed);
        !self.0.heard.load(Ordering::Relaxed) && !self.0.heard.swap(true, Ordering::Relaxed)
    }

    /// Whether an answer came since this was asked last.
    pub(crate) fn take_answered(&self) -> bool {
        self.0.answered.swap(false, Ordering::Relaxed)
    }
}

/// Keeps the count of a table's sessions right, also where the table ends.
pub(crate) struct Counted<N: Net>(Arc<Node<N>>, i64);

impl<N: Net> Counted<N> {
    pub(crate) fn new(node: Arc<Node<N>>) -> Self {
        Self(node, 0)
    }

    pub(crate) fn set(&mut self, sessions: usize) {
        let sessions = sessions as i64;
        if sessions != self.1 {
            self.0.counters.sessions_active.inc_by(sessions - self.1);
            self.1 = sessions;
        }
    }
}

impl<N: Net> Drop for Counted<N> {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests;
