//! TCP between nodes: turmoil's streams, with what they lack.
//!
//! turmoil loses a segment for good where a kernel would send it again. So a cut holds segments
//! ([`Network`](crate::network::Network) says when they are sent again), and each end has its kernel's [`Timers`], which
//! give up a path that stays silent. A connection whose path forgot it (a NAT that restarted) is `lost`: both sides still
//! send, and nothing comes through. The window is bounded here, below turmoil's own bound.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use servicekeel_runtime::net::tcp::{TcpInfo, TcpOptions};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use turmoil::net::{TcpListener, TcpStream};

use super::kernel::{Counted, Kernel};
use super::timers::Timers;
use crate::oracle::now;

/// Bytes of a segment.
const SEGMENT: usize = 8 << 10;
/// Segments that a node sends at most before they are read: less than what a flow may have on its way, and more, as a
/// kernel's buffers are. turmoil needs a capacity above both.
pub(crate) const WINDOWS: [usize; 2] = [64, 1024];
/// turmoil's bound of segments, and of connections that wait for an accept.
pub(crate) const CAPACITY: usize = 4 * WINDOWS[1];
/// Bytes that a sender takes on a path that loses them all.
const SWALLOWED: usize = 64 << 10;

/// Client and server of a connection.
type Key = (SocketAddr, SocketAddr);

/// What both ends of a connection know of it.
struct Shared {
    key: Key,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    lanes: [Lane; 2],
    /// Nothing comes through any more.
    lost: bool,
}

/// What one end sends.
#[derive(Default)]
struct Lane {
    in_flight: VecDeque<usize>,
    swallowed: usize,
    timers: Timers,
    /// The connection has broken, as the sender's kernel sees it: it gave up, or the other one did, which answers with a
    /// reset then.
    broken: Option<io::ErrorKind>,
    /// It was broken off by its sender, not ended.
    reset: bool,
    /// Nobody holds this end any more ...
    closed: bool,
    /// ... and the other one knows by now.
    gone: bool,
    /// Its sender was told that it is broken.
    told: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
    watcher: Option<Waker>,
}

impl Lane {
    fn new() -> Self {
        Self { timers: Timers::new(now()), ..Self::default() }
    }

    fn break_with(&mut self, kind: io::ErrorKind) {
        self.broken = Some(kind);
        self.wake();
    }

    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take(), self.watcher.take()].into_iter().flatten() {
            waker.wake();
        }
    }

    /// The receiver has read this many bytes.
    fn consume(&mut self, mut n: usize) {
        self.timers.handle_open_window();
        while let Some(first) = self.in_flight.front_mut() {
            if n < *first {
                *first -= n;
                break;
            }
            n -= *first;
            self.in_flight.pop_front();
        }
        self.writer.take().into_iter().for_each(Waker::wake);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time has passed, on a path that is cut or not, or on which what an end has sent waits to be sent again. How long a
    /// window of it is closed.
    fn tick(&self, now: Duration, cut: bool, waits: [bool; 2], options: &TcpOptions) -> Duration {
        let mut state = self.lock();
        let cut = cut || state.lost;
        for (lane, waits) in state.lanes.iter_mut().zip(waits) {
            if !lane.closed && lane.broken.is_none() && lane.timers.handle_timeout(now, cut || waits, options)
            {
                lane.break_with(io::ErrorKind::TimedOut);
            }
        }
        for end in 0..2 {
            let given_up = state.lanes[1 - end].broken == Some(io::ErrorKind::TimedOut);
            if !cut && given_up && state.lanes[end].broken.is_none() {
                state.lanes[end].break_with(io::ErrorKind::ConnectionReset);
            }
        }
        state.lanes.iter().map(|lane| lane.timers.closed_for(now)).max().unwrap_or_default()
    }
}

/// Every connection between nodes.
#[derive(Clone, Default)]
pub(crate) struct WireTable(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    wires: BTreeMap<Key, Weak<Shared>>,
    /// Ends that were closed, and not yet told to the other one.
    closing: Vec<(Arc<Shared>, usize)>,
    /// The longest that a window was closed.
    closed: Duration,
}

impl WireTable {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shared(&self, key: Key) -> Arc<Shared> {
        let mut table = self.lock();
        if let Some(shared) = table.wires.get(&key).and_then(Weak::upgrade)
            && shared.lock().lanes.iter().all(|lane| !lane.closed)
        {
            return shared;
        }
        table.wires.retain(|_, wire| wire.strong_count() > 0);
        let state = State { lanes: [Lane::new(), Lane::new()], lost: false };
        let shared = Arc::new(Shared { key, state: Mutex::new(state) });
        table.wires.insert(key, Arc::downgrade(&shared));
        shared
    }

    fn between(&self, a: IpAddr, b: IpAddr) -> Vec<Arc<Shared>> {
        let of = |(client, server): &Key| [(a, b), (b, a)].contains(&(client.ip(), server.ip()));
        let table = self.lock();
        table.wires.iter().filter(|(key, _)| of(key)).filter_map(|(_, wire)| wire.upgrade()).collect()
    }

    /// The path forgets its connections.
    pub(crate) fn lose(&self, a: IpAddr, b: IpAddr) {
        self.between(a, b).iter().for_each(|wire| wire.lock().lost = true);
    }

    /// The longest that the window of a connection was closed to bytes that waited.
    pub(crate) fn closed_window(&self) -> Duration {
        self.lock().closed
    }

    /// Time has passed. `is_cut`: whether nothing comes through between two nodes; `waits`: whether what one end of a
    /// connection has sent to the other waits to be sent again. What was closed is known at the other end unless the
    /// path is cut.
    pub(crate) fn tick(
        &self,
        now: Duration,
        options: &TcpOptions,
        is_cut: impl Fn(IpAddr, IpAddr) -> bool,
        waits: impl Fn(SocketAddr, SocketAddr) -> bool,
    ) {
        let (wires, closing) = {
            let mut table = self.lock();
            let wires: Vec<_> = table.wires.values().filter_map(Weak::upgrade).collect();
            (wires, std::mem::take(&mut table.closing))
        };
        let closed = wires.iter().map(|wire| {
            let (client, server) = wire.key;
            let waits = [waits(client, server), waits(server, client)];
            wire.tick(now, is_cut(client.ip(), server.ip()), waits, options)
        });
        if let Some(closed) = closed.max() {
            let mut table = self.lock();
            table.closed = table.closed.max(closed);
        }
        for (wire, end) in closing {
            let (client, server) = wire.key;
            let mut state = wire.lock();
            if state.lost {
                continue;
            }
            if is_cut(client.ip(), server.ip()) {
                drop(state);
                self.lock().closing.push((wire, end));
                continue;
            }
            state.lanes[end].gone = true;
            state.lanes[1 - end].wake();
        }
    }
}

/// The network between nodes, as one node has it.
#[derive(Clone)]
pub(crate) struct Wires {
    table: WireTable,
    kernel: Kernel,
    window: usize,
    /// Dials: a program that gives one up must not leave a connection half made, so they are the node's.
    dials: Arc<Mutex<JoinSet<()>>>,
}

impl Wires {
    pub(crate) fn new(table: &WireTable, kernel: &Kernel, window: usize) -> Self {
        Self { table: table.clone(), kernel: kernel.clone(), window, dials: Arc::default() }
    }

    pub(super) async fn listen(&self, addr: SocketAddr) -> io::Result<WireListener> {
        let listener = TcpListener::bind(addr).await?;
        Ok(WireListener { listener, wires: self.clone(), _open: self.kernel.count("listener for nodes") })
    }

    /// Connects to `node:port` or `address:port`.
    pub(super) async fn connect(&self, address: &str) -> io::Result<Wire> {
        let parsed = address.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
        let Some((host, port)) = parsed else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{address} has no port")));
        };
        let host: (String, u16) = (host.into(), port);
        let (mut done, outcome) = oneshot::channel();
        {
            let mut dials = self.dials.lock().unwrap_or_else(PoisonError::into_inner);
            while dials.try_join_next().is_some() {}
            let open = self.kernel.count("dial");
            dials.spawn(async move {
                tokio::select! {
                    biased;
                    // Where nobody waits any more, the connection closes at once.
                    outcome = TcpStream::connect(host) => drop(done.send(outcome)),
                    () = done.closed() => {}
                }
                drop(open);
            });
        }
        let stream = outcome
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::Interrupted))?
            .map_err(|e| io::Error::new(e.kind(), format!("cannot connect to {address}: {e}")))?;
        let key = (stream.local_addr()?, stream.peer_addr()?);
        Ok(self.wire(stream, key, 0))
    }

    fn wire(&self, stream: TcpStream, key: Key, own: usize) -> Wire {
        Wire {
            peer: if own == 0 { key.1 } else { key.0 },
            shared: self.table.shared(key),
            table: self.table.clone(),
            stream: Mutex::new(stream),
            own,
            window: self.window,
            _open: self.kernel.count("stream between nodes"),
        }
    }
}

/// Listens for other nodes.
pub(super) struct WireListener {
    listener: TcpListener,
    wires: Wires,
    _open: Counted,
}

impl WireListener {
    pub(super) async fn accept(&self) -> io::Result<Wire> {
        let (stream, client) = self.listener.accept().await?;
        let key = (client, stream.local_addr()?);
        Ok(self.wires.wire(stream, key, 1))
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// One end of a connection between nodes.
pub(super) struct Wire {
    stream: Mutex<TcpStream>,
    shared: Arc<Shared>,
    table: WireTable,
    /// 0: the client's end.
    own: usize,
    window: usize,
    peer: SocketAddr,
    _open: Counted,
}

impl Wire {
    pub(super) fn peer_addr(&self) -> SocketAddr {
        self.peer
    }

    fn stream(&self) -> MutexGuard<'_, TcpStream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn poll_read(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        {
            let mut state = self.shared.lock();
            let lost = state.lost;
            let own = &mut state.lanes[self.own];
            if let Some(kind) = own.broken {
                let told = std::mem::replace(&mut own.told, true);
                return Poll::Ready(if told { Ok(()) } else { Err(kind.into()) });
            }
            own.reader = Some(cx.waker().clone());
            if lost {
                return Poll::Pending;
            }
        }
        let before = buf.filled().len();
        match Pin::new(&mut *self.stream()).poll_read(cx, buf) {
            Poll::Ready(Ok(())) => {
                let n = buf.filled().len() - before;
                let peer = &mut self.shared.lock().lanes[1 - self.own];
                if n == 0 && (peer.reset || peer.broken.is_some()) {
                    return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                }
                peer.consume(n);
                Poll::Ready(Ok(()))
            }
            other => other,
        }
    }

    pub(super) fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.shared.lock();
        let lost = state.lost;
        let gone = state.lanes[1 - self.own].gone;
        let own = &mut state.lanes[self.own];
        if let Some(kind) = own.broken {
            let told = std::mem::replace(&mut own.told, true);
            return Poll::Ready(Err(if told { io::ErrorKind::BrokenPipe } else { kind }.into()));
        }
        if lost {
            let n = bytes.len().min(SWALLOWED - own.swallowed);
            if n == 0 && !bytes.is_empty() {
                own.writer = Some(cx.waker().clone());
                return Poll::Pending;
            }
            own.swallowed += n;
            own.timers.handle_sent(now());
            return Poll::Ready(Ok(n));
        }
        if own.in_flight.len() >= self.window {
            if gone {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            own.timers.handle_closed_window(now());
            own.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let segment = &bytes[..bytes.len().min(SEGMENT)];
        let written = Pin::new(&mut *self.stream()).poll_write(cx, segment);
        if let Poll::Ready(Ok(n)) = &written
            && *n > 0
        {
            own.in_flight.push_back(*n);
            own.timers.handle_sent(now());
        }
        written
    }

    pub(super) fn shutdown(&self) -> io::Result<()> {
        let mut state = self.shared.lock();
        let lost = state.lost;
        let own = &mut state.lanes[self.own];
        if own.broken.is_some() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        own.timers.handle_sent(now());
        if lost {
            return Ok(());
        }
        drop(state);
        let mut cx = Context::from_waker(Waker::noop());
        match Pin::new(&mut *self.stream()).poll_shutdown(&mut cx) {
            Poll::Ready(outcome) => outcome,
            Poll::Pending => Ok(()),
        }
    }

    /// What the kernel says of it.
    pub(super) fn info(&self) -> TcpInfo {
        self.shared.lock().lanes[self.own].timers.info(now())
    }

    pub(super) fn poll_broken(&self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let own = &mut self.shared.lock().lanes[self.own];
        if let Some(kind) = own.broken {
            return Poll::Ready(kind.into());
        }
        own.watcher = Some(cx.waker().clone());
        Poll::Pending
    }

    pub(super) fn reset(self) {
        self.shared.lock().lanes[self.own].reset = true;
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.shared.lock().lanes[self.own].closed = true;
        self.table.lock().closing.push((self.shared.clone(), self.own));
    }
}
