//! TCP inside a node: connections and listeners of pods.
//!
//! A connection is two directions with bounded buffers. What ends and breaks it follows tcp(7) and Linux: an end
//! (FIN) goes behind the bytes; closing with unread bytes, or writing to a side that has closed, resets; what came
//! before a reset can still be read, and what the sender's own system still had for want of room is lost with it; the
//! error is said once.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::ReadBuf;
use tokio::sync::Notify;
use tokio::time::sleep;

use super::kernel::Counted;
use super::namespace::{Namespace, choose, error_at};

/// Connections that wait for an accept.
const BACKLOG: usize = 1024;
/// How long a SYN that finds the backlog full waits first; doubled each time (tcp(7)).
const SYN_RETRY: Duration = Duration::from_secs(1);

/// One side of a connection.
#[derive(Default)]
struct Side {
    /// What came and is not read yet.
    received: VecDeque<u8>,
    /// The other side has ended.
    peer_ended: bool,
    /// This side has ended.
    ended: bool,
    /// Nobody holds this side any more.
    closed: bool,
    /// The connection is reset, as this side sees it.
    dead: bool,
    /// To be said to the next call.
    error: Option<io::ErrorKind>,
    reader: Option<Waker>,
    writer: Option<Waker>,
    watcher: Option<Waker>,
}

impl Side {
    fn wake_reader(&mut self) {
        self.reader.take().into_iter().for_each(Waker::wake);
    }

    fn wake_all(&mut self) {
        for waker in [self.reader.take(), self.writer.take(), self.watcher.take()].into_iter().flatten() {
            waker.wake();
        }
    }

    /// A reset comes.
    fn break_off(&mut self) {
        if !self.dead && !self.closed {
            self.dead = true;
            let kind =
                if self.peer_ended { io::ErrorKind::BrokenPipe } else { io::ErrorKind::ConnectionReset };
            self.error = Some(kind);
            self.wake_all();
        }
    }
}

type Sides = Arc<Mutex<[Side; 2]>>;

/// One end of a connection inside a node.
pub(super) struct Local {
    sides: Sides,
    own: usize,
    room: usize,
    peer: SocketAddr,
    /// Reset when dropped (SO_LINGER of 0).
    resets: bool,
    _open: Counted,
}

impl Local {
    fn pair(namespace: &Namespace, client: SocketAddr, server: SocketAddr) -> (Self, Self) {
        let sides = Sides::default();
        let room = namespace.kernel.buffer();
        let end = |own, peer| Self {
            sides: sides.clone(),
            own,
            room,
            peer,
            resets: false,
            _open: namespace.kernel.count("TCP stream"),
        };
        (end(0, server), end(1, client))
    }

    fn lock(&self) -> MutexGuard<'_, [Side; 2]> {
        self.sides.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn peer_addr(&self) -> SocketAddr {
        self.peer
    }

    pub(super) fn poll_read(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut sides = self.lock();
        let own = &mut sides[self.own];
        if !own.received.is_empty() {
            let n = own.received.len().min(buf.remaining());
            let (front, back) = own.received.as_slices();
            let first = front.len().min(n);
            buf.put_slice(&front[..first]);
            buf.put_slice(&back[..n - first]);
            own.received.drain(..n);
            sides[1 - self.own].writer.take().into_iter().for_each(Waker::wake);
            return Poll::Ready(Ok(()));
        }
        if let Some(error) = own.error.take() {
            return Poll::Ready(Err(error.into()));
        }
        if own.peer_ended || own.dead {
            return Poll::Ready(Ok(()));
        }
        own.reader = Some(cx.waker().clone());
        Poll::Pending
    }

    pub(super) fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut sides = self.lock();
        let own = &mut sides[self.own];
        if let Some(error) = own.error.take() {
            return Poll::Ready(Err(error.into()));
        }
        if own.dead || own.ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let peer = &mut sides[1 - self.own];
        if peer.closed {
            // The kernel takes the bytes, and the other one answers them with a reset.
            sides[self.own].break_off();
            return Poll::Ready(Ok(bytes.len()));
        }
        let n = bytes.len().min(self.room - peer.received.len());
        if n == 0 {
            sides[self.own].writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        peer.received.extend(&bytes[..n]);
        peer.wake_reader();
        Poll::Ready(Ok(n))
    }

    pub(super) fn shutdown(&self) -> io::Result<()> {
        let mut sides = self.lock();
        if sides[self.own].dead {
            return Err(io::ErrorKind::NotConnected.into());
        }
        sides[self.own].ended = true;
        sides[1 - self.own].peer_ended = true;
        sides[1 - self.own].wake_reader();
        Ok(())
    }

    /// Resolves when the connection has broken.
    pub(super) fn poll_broken(&self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let mut sides = self.lock();
        let own = &mut sides[self.own];
        if own.dead {
            let error = own.error.take().unwrap_or(io::ErrorKind::ConnectionReset);
            return Poll::Ready(error.into());
        }
        own.watcher = Some(cx.waker().clone());
        Poll::Pending
    }

    /// What of [`Self::room`] the receiver's system has; the rest is the sender's.
    fn window(&self) -> usize {
        self.room / 2
    }

    /// Whether the other side's system has all that was written.
    pub(super) fn is_taken(&self) -> bool {
        let sides = self.lock();
        sides[self.own].dead || sides[1 - self.own].received.len() <= self.window()
    }

    /// Whether it has broken, also where bytes that came before are unread.
    pub(super) fn is_broken(&self) -> bool {
        self.lock()[self.own].dead
    }

    /// From now on a drop resets it (SO_LINGER of 0).
    pub(super) fn reset_when_dropped(mut self) -> Self {
        self.resets = true;
        self
    }

    /// Breaks the connection off.
    pub(super) fn reset(mut self) {
        self.resets = true;
    }

    /// Closes it in good order.
    pub(super) fn close(mut self) {
        self.resets = false;
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        let window = self.window();
        let mut sides = self.lock();
        let own = &mut sides[self.own];
        own.closed = true;
        let unread = !std::mem::take(&mut own.received).is_empty();
        if own.dead {
            return;
        }
        let complete = own.ended && own.peer_ended;
        let peer = &mut sides[1 - self.own];
        if unread || (self.resets && !(complete && peer.received.is_empty())) {
            peer.received.truncate(window);
            peer.break_off();
        } else {
            peer.peer_ended = true;
            // A writer that waits for room finds out that there is nobody.
            peer.writer.take().into_iter().for_each(Waker::wake);
            peer.wake_reader();
        }
    }
}

/// A listening socket.
pub(super) struct Listening {
    namespace: Arc<Namespace>,
    addr: SocketAddr,
    backlog: Mutex<VecDeque<Local>>,
    arrived: Notify,
    _open: Counted,
}

impl Listening {
    pub(super) fn bind(
        namespace: &Arc<Namespace>,
        addr: SocketAddr,
        shared_by: Option<u32>,
    ) -> io::Result<Arc<Self>> {
        let addr = namespace.complete(addr)?;
        let listening = Arc::new(Self {
            namespace: namespace.clone(),
            addr,
            backlog: Mutex::default(),
            arrived: Notify::new(),
            _open: namespace.kernel.count("TCP listener"),
        });
        namespace.tcp().bind(addr, &listening, shared_by)?;
        Ok(listening)
    }

    pub(super) fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub(super) fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    pub(super) async fn accept(&self) -> Local {
        loop {
            if let Some(connection) = self.backlog().pop_front() {
                return connection;
            }
            self.arrived.notified().await;
        }
    }

    fn backlog(&self) -> MutexGuard<'_, VecDeque<Local>> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.namespace.tcp().unbind(self.addr, self);
        // Nobody will accept them.
        std::mem::take(&mut *self.backlog()).into_iter().for_each(Local::reset);
    }
}

/// Connects inside a namespace.
pub(super) async fn connect(namespace: &Namespace, to: SocketAddr) -> io::Result<Local> {
    let from = SocketAddr::new(namespace.source(to.ip())?, namespace.port());
    let mut pause = SYN_RETRY;
    loop {
        let listener = choose(namespace.tcp().at(to), from)
            .ok_or_else(|| error_at(io::ErrorKind::ConnectionRefused, to, "connection refused"))?;
        {
            let mut backlog = listener.backlog();
            if backlog.len() < BACKLOG {
                let (client, server) = Local::pair(namespace, from, to);
                backlog.push_back(server);
                listener.arrived.notify_one();
                return Ok(client);
            }
        }
        drop(listener);
        sleep(pause).await;
        pause *= 2;
    }
}
