//! The stock of one pod: unconnected sockets of its network namespace, asked for before they run out.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use servicekeel_core::handoff::{DescriptorKind, MAX_DESCRIPTORS};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// Sockets kept for a pod that is hardly used.
const FIRST_TARGET: usize = 8;
/// The most sockets kept for a pod, of each kind.
const LAST_TARGET: usize = 512;
/// How long a flow waits for a socket that the sidecar was asked for.
const PATIENCE: Duration = Duration::from_secs(2);

struct Shelf<D> {
    held: Vec<D>,
    target: usize,
    asked: usize,
}

impl<D> Shelf<D> {
    fn new(target: usize) -> Self {
        Self { held: Vec::new(), target, asked: 0 }
    }

    fn missing(&self) -> usize {
        self.target.saturating_sub(self.held.len() + self.asked)
    }
}

struct Shelves<D> {
    tcp: Shelf<D>,
    udp: Shelf<D>,
    closed: bool,
}

/// The stock. `D` is the network's descriptor.
pub(crate) struct Stock<D> {
    shelves: Mutex<Shelves<D>>,
    /// Sockets came, or none will come any more.
    arrived: Notify,
    /// The session should ask for more.
    low: Notify,
}

impl<D> Stock<D> {
    pub(crate) fn new() -> Self {
        let shelves = Shelves { tcp: Shelf::new(FIRST_TARGET), udp: Shelf::new(2), closed: false };
        Self { shelves: Mutex::new(shelves), arrived: Notify::new(), low: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Shelves<D>> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a socket, waiting for the sidecar where there is none.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotConnected`] where the sidecar is gone, [`io::ErrorKind::TimedOut`] where it does not answer.
    pub(crate) async fn take(&self, kind: DescriptorKind) -> io::Result<D> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut arrived = std::pin::pin!(self.arrived.notified());
            arrived.as_mut().enable();
            {
                let mut shelves = self.lock();
                let closed = shelves.closed;
                let shelf = match kind {
                    DescriptorKind::UdpBound | DescriptorKind::UdpUnconnected => &mut shelves.udp,
                    DescriptorKind::TcpListener | DescriptorKind::TcpUnconnected => &mut shelves.tcp,
                };
                let taken = shelf.held.pop();
                if taken.is_none() {
                    shelf.target = (shelf.target * 2).min(LAST_TARGET);
                }
                if shelf.missing() * 2 >= shelf.target {
                    self.low.notify_one();
                }
                match taken {
                    Some(socket) => return Ok(socket),
                    None if closed => {
                        return Err(io::Error::new(io::ErrorKind::NotConnected, "the pod's sidecar is gone"));
                    }
                    None => {}
                }
            }
            if timeout_at(deadline, arrived).await.is_err() {
                let text = "the pod's sidecar does not hand over sockets";
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
        }
    }

    /// Waits until the sidecar should be asked, then says for how many TCP and UDP sockets.
    pub(crate) async fn poll_ask(&self) -> (u16, u16) {
        loop {
            let (tcp, udp) = {
                let mut shelves = self.lock();
                let tcp = shelves.tcp.missing().min(MAX_DESCRIPTORS);
                let udp = shelves.udp.missing().min(MAX_DESCRIPTORS - tcp);
                shelves.tcp.asked += tcp;
                shelves.udp.asked += udp;
                (tcp as u16, udp as u16)
            };
            if tcp + udp > 0 {
                return (tcp, udp);
            }
            self.low.notified().await;
        }
    }

    /// Sockets came from the sidecar. What is beyond the target was not asked for and is closed.
    pub(crate) fn put(&self, tcp: Vec<D>, udp: Vec<D>) {
        let mut shelves = self.lock();
        for (shelf, sockets) in [(0, tcp), (1, udp)] {
            let shelf = if shelf == 0 { &mut shelves.tcp } else { &mut shelves.udp };
            shelf.asked = shelf.asked.saturating_sub(sockets.len());
            let room = LAST_TARGET.saturating_sub(shelf.held.len());
            shelf.held.extend(sockets.into_iter().take(room));
        }
        if shelves.tcp.missing() + shelves.udp.missing() > 0 {
            self.low.notify_one();
        }
        drop(shelves);
        self.arrived.notify_waiters();
    }

    /// No more will come: what is held can still be taken.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_waiters();
    }

    /// How many TCP and UDP sockets are held.
    pub(crate) fn held(&self) -> (usize, usize) {
        let shelves = self.lock();
        (shelves.tcp.held.len(), shelves.udp.held.len())
    }
}
