//! UDP inside a node.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use servicekeel_runtime::net::Datagrams;
use tokio::io::ReadBuf;

use super::kernel::Counted;
use super::namespace::{Namespace, choose, error_at};

/// Bytes that wait for a receiver (net.core.rmem_default); what comes beyond them is dropped.
const QUEUE: usize = 212_992;
/// What each datagram costs beside its bytes.
const OVERHEAD: usize = 512;
/// The most bytes of a datagram over IPv4.
const MAX_DATAGRAM: usize = 65_507;

/// A UDP socket of a pod.
pub(super) struct Udp {
    namespace: Arc<Namespace>,
    state: Mutex<State>,
    _open: Counted,
}

#[derive(Default)]
struct State {
    local: Option<SocketAddr>,
    peer: Option<SocketAddr>,
    queue: VecDeque<(Vec<u8>, SocketAddr)>,
    queued: usize,
    refused: bool,
    /// Who waits for a datagram.
    receiver: Option<Waker>,
}

impl State {
    fn wake(&mut self) {
        if let Some(receiver) = self.receiver.take() {
            receiver.wake();
        }
    }
}

impl Udp {
    pub(super) fn unbound(namespace: &Arc<Namespace>) -> Arc<Self> {
        Arc::new(Self {
            namespace: namespace.clone(),
            state: Mutex::default(),
            _open: namespace.kernel.count("UDP socket"),
        })
    }

    pub(super) fn bound(
        namespace: &Arc<Namespace>,
        addr: SocketAddr,
        shared_by: Option<u32>,
    ) -> io::Result<Arc<Self>> {
        let socket = Self::unbound(namespace);
        let addr = namespace.complete(addr)?;
        namespace.udp().bind(addr, &socket, shared_by)?;
        socket.lock().local = Some(addr);
        Ok(socket)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    pub(super) fn local(&self) -> Option<SocketAddr> {
        self.lock().local
    }

    pub(super) fn peer(&self) -> Option<SocketAddr> {
        self.lock().peer
    }

    /// Binds it to a port that is free, where it has none.
    fn autobind(self: &Arc<Self>) -> io::Result<SocketAddr> {
        if let Some(local) = self.local() {
            return Ok(local);
        }
        let addr = self.namespace.complete((Ipv4Addr::UNSPECIFIED, 0).into())?;
        self.namespace.udp().bind(addr, self, None)?;
        self.lock().local = Some(addr);
        Ok(addr)
    }

    fn take_refusal(&self) -> io::Result<()> {
        match std::mem::take(&mut self.lock().refused) {
            true => Err(io::ErrorKind::ConnectionRefused.into()),
            false => Ok(()),
        }
    }

    fn send(self: &Arc<Self>, bytes: &[u8], to: SocketAddr) -> io::Result<()> {
        self.take_refusal()?;
        if bytes.len() > MAX_DATAGRAM {
            return Err(error_at(io::ErrorKind::InvalidInput, to, "a datagram of more than 65,507 bytes"));
        }
        let source = self.namespace.source(to.ip())?;
        let mut from = self.autobind()?;
        if from.ip().is_unspecified() {
            from.set_ip(source);
        }
        let takes = |socket: &Arc<Self>| socket.peer().is_none_or(|peer| peer == from);
        let mut receivers: Vec<_> = self.namespace.udp().at(to).into_iter().filter(takes).collect();
        // A socket that is connected to the sender is preferred.
        if let Some(i) = receivers.iter().position(|socket| socket.peer() == Some(from)) {
            receivers = vec![receivers.swap_remove(i)];
        }
        match choose(receivers, from) {
            Some(receiver) => receiver.deliver(bytes, from),
            None if self.peer() == Some(to) => {
                let mut state = self.lock();
                state.refused = true;
                state.wake();
            }
            None => {}
        }
        Ok(())
    }

    fn deliver(&self, bytes: &[u8], from: SocketAddr) {
        let mut state = self.lock();
        let size = bytes.len() + OVERHEAD;
        if state.queued + size <= QUEUE {
            state.queued += size;
            state.queue.push_back((bytes.into(), from));
            state.wake();
        }
    }
}

impl Drop for Udp {
    fn drop(&mut self) {
        if let Some(local) = self.local() {
            self.namespace.udp().unbind(local, self);
        }
    }
}

/// A UDP socket of a pod, adopted.
pub struct SimDatagrams(pub(super) Arc<Udp>);

impl Datagrams for SimDatagrams {
    fn try_recv_from(&self, buf: &mut ReadBuf<'_>) -> io::Result<SocketAddr> {
        self.0.take_refusal()?;
        let mut state = self.0.lock();
        let (bytes, from) = state.queue.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        state.queued -= bytes.len() + OVERHEAD;
        buf.put_slice(&bytes[..bytes.len().min(buf.remaining())]);
        Ok(from)
    }

    async fn readable(&self) -> io::Result<()> {
        poll_fn(|cx| {
            let mut state = self.0.lock();
            if state.refused || !state.queue.is_empty() {
                return Poll::Ready(Ok(()));
            }
            state.receiver = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    async fn send_to(&self, buf: &[u8], to: SocketAddr) -> io::Result<()> {
        self.0.send(buf, to)
    }

    async fn connect(&self, to: SocketAddr) -> io::Result<()> {
        let source = self.0.namespace.source(to.ip())?;
        let mut local = self.0.autobind()?;
        if local.ip().is_unspecified() {
            // The source address is chosen now, for good.
            let mut table = self.0.namespace.udp();
            table.unbind(local, &self.0);
            local.set_ip(source);
            table.bind(local, &self.0, None)?;
        }
        let mut state = self.0.lock();
        (state.local, state.peer, state.refused) = (Some(local), Some(to), false);
        Ok(())
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.0.local().unwrap_or((Ipv4Addr::UNSPECIFIED, 0).into()))
    }
}
