//! What goes out of the UDP sockets of a pod. A send may wait for the lock of its socket however it is asked, and the pod
//! holds that for as long as a blocking send of its own does (UDP_CORK, udp(7), and a neighbour that does not answer): so
//! all are sent on the pod's thread, and who has something to send waits for nothing but room in a queue.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use servicekeel_runtime::net::{Datagrams, Net};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;

use super::Queued;
use crate::node::Node;
use crate::tasks::AbortOnDrop;

/// Datagrams that wait for the pod's thread. Their bytes count against whoever sent them.
const WAITING: usize = 1024;

/// How long a socket may be full.
const FULL: Duration = Duration::from_secs(1);

/// The way to the sockets of one pod, or to one of them; a clone is the same.
pub(crate) struct Outlet<N: Net> {
    queue: mpsc::Sender<Leaving<N>>,
    _task: Arc<AbortOnDrop>,
}

impl<N: Net> Clone for Outlet<N> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), _task: self._task.clone() }
    }
}

struct Leaving<N: Net> {
    socket: Arc<N::UdpSocket>,
    datagram: Arc<Queued>,
    to: SocketAddr,
    faults: Option<Arc<Faults>>,
}

/// Why datagrams did not leave.
#[derive(Default)]
pub(crate) struct Faults {
    last: Mutex<Option<io::Error>>,
    news: Notify,
}

impl Faults {
    fn put(&self, error: io::Error) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        self.news.notify_one();
    }

    /// The next one.
    pub(crate) async fn next(&self) -> io::Error {
        loop {
            let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).take();
            match last {
                Some(error) => return error,
                None => self.news.notified().await,
            }
        }
    }
}

impl<N: Net> Outlet<N> {
    pub(crate) fn new(node: &Node<N>, thread: &N::Thread) -> Self {
        let (queue, leaving) = mpsc::channel(WAITING);
        let task = node.tasks.spawn_on(thread, send_all(leaving));
        Self { queue, _task: Arc::new(AbortOnDrop(task)) }
    }

    /// Sends a datagram, where there is room for it; false where it is dropped.
    pub(crate) fn try_send(&self, socket: &Arc<N::UdpSocket>, datagram: Queued, to: SocketAddr) -> bool {
        let leaving = Leaving { socket: socket.clone(), datagram: Arc::new(datagram), to, faults: None };
        self.queue.try_send(leaving).is_ok()
    }

    /// Sends a datagram once there is room for it: each that waits has its turn. What comes of it is told to `faults`.
    pub(crate) async fn send(
        &self,
        socket: &Arc<N::UdpSocket>,
        datagram: &Arc<Queued>,
        to: SocketAddr,
        faults: &Arc<Faults>,
    ) {
        let (socket, datagram, faults) = (socket.clone(), datagram.clone(), Some(faults.clone()));
        // Without its thread the pod is gone, and the session ends by that.
        let _ = self.queue.send(Leaving { socket, datagram, to, faults }).await;
    }
}

async fn send_all<N: Net>(mut leaving: mpsc::Receiver<Leaving<N>>) {
    while let Some(Leaving { socket, datagram, to, faults }) = leaving.recv().await {
        let sent = match socket.try_send_to(&datagram.bytes, to) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // It is new, or full. What it does not take for so long is lost, as on a network.
                timeout(FULL, socket.send_to(&datagram.bytes, to)).await.unwrap_or(Ok(()))
            }
            sent => sent,
        };
        if let (Err(error), Some(faults)) = (sent, faults) {
            faults.put(error);
        }
    }
}
