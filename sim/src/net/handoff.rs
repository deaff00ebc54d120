//! The conversation between sidecar and router inside a node: what a Unix socket of type SEQPACKET does (unix(7)).

use std::any::Any;
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use servicekeel_core::handoff::{MAX_DESCRIPTORS, MAX_MESSAGE};
use servicekeel_runtime::net::{Handoff, HandoffListener, PeerCredentials, Places, PodThread};
use tokio::sync::Notify;

use super::descriptor::SimDescriptor;
use super::kernel::{Counted, Kernel};

/// Conversations that wait for an accept.
const BACKLOG: usize = 512;
/// Bytes that wait for a receiver (net.core.wmem_default), each message counted with what the kernel spends on it.
const QUEUE: usize = 212_992;
const OVERHEAD: usize = 768;

type Message = (Vec<u8>, Vec<SimDescriptor>);

#[derive(Default)]
struct Queue {
    messages: VecDeque<Message>,
    bytes: usize,
}

/// Both directions of a conversation.
struct Conversation {
    queues: Mutex<([Queue; 2], [bool; 2])>,
    /// Something came for this side, or the other one has closed.
    readable: [Notify; 2],
    /// The other side has taken something.
    writable: [Notify; 2],
}

/// One end of a conversation.
pub struct SimHandoff {
    shared: Arc<Conversation>,
    own: usize,
    thread: SimPodThread,
    _open: Counted,
}

/// Where a sidecar's conversation is served: here, where nothing blocks, with all else.
#[derive(Clone, Default)]
pub struct SimPodThread(Arc<Mutex<Vec<Box<dyn Any + Send>>>>);

impl PodThread for SimPodThread {
    async fn run<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> Option<T> {
        Some(task.await)
    }

    fn hold(&self, guest: impl Send + 'static) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(guest));
    }
}

impl SimHandoff {
    fn pair(kernel: &Kernel) -> (Self, Self) {
        let shared = Arc::new(Conversation {
            queues: Mutex::default(),
            readable: Default::default(),
            writable: Default::default(),
        });
        let thread = SimPodThread::default;
        let end =
            |own| Self { shared: shared.clone(), own, thread: thread(), _open: kernel.count("conversation") };
        (end(0), end(1))
    }

    pub(super) async fn connect(
        kernel: &Kernel,
        path: &Path,
        credentials: PeerCredentials,
    ) -> io::Result<Self> {
        loop {
            let waiting = kernel.listening_at(path).ok_or_else(|| {
                io::Error::new(io::ErrorKind::NotFound, format!("no router at {}", path.display()))
            })?;
            {
                let mut queue = waiting.lock();
                if queue.len() < BACKLOG {
                    let (near, far) = Self::pair(kernel);
                    queue.push_back((far, credentials));
                    waiting.arrived.notify_one();
                    return Ok(near);
                }
            }
            drop(waiting);
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, ([Queue; 2], [bool; 2])> {
        self.shared.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SimHandoff {
    fn drop(&mut self) {
        let unread = {
            let mut locked = self.lock();
            locked.1[self.own] = true;
            std::mem::take(&mut locked.0[self.own])
        };
        // What nobody will read closes its sockets, outside of the lock.
        drop(unread);
        self.shared.readable[1 - self.own].notify_one();
        self.shared.writable[1 - self.own].notify_one();
    }
}

impl Handoff for SimHandoff {
    type Descriptor = SimDescriptor;
    type Thread = SimPodThread;

    fn with_own_thread(self, _places: Places) -> Result<Self, (Self, io::Error)> {
        Ok(self)
    }

    fn with_shared_thread(self, _places: Places) -> Self {
        self
    }

    fn thread(&self) -> SimPodThread {
        self.thread.clone()
    }

    async fn send(&self, message: &[u8], descriptors: Vec<SimDescriptor>) -> io::Result<()> {
        if message.is_empty() || message.len() > MAX_MESSAGE || descriptors.len() > MAX_DESCRIPTORS {
            let (bytes, count) = (message.len(), descriptors.len());
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a message of {bytes} bytes with {count} descriptors"),
            ));
        }
        loop {
            {
                let mut locked = self.lock();
                if locked.1[1 - self.own] {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                let queue = &mut locked.0[1 - self.own];
                if queue.bytes + message.len() + OVERHEAD <= QUEUE {
                    queue.bytes += message.len() + OVERHEAD;
                    queue.messages.push_back((message.into(), descriptors));
                    self.shared.readable[1 - self.own].notify_one();
                    return Ok(());
                }
            }
            self.shared.writable[self.own].notified().await;
        }
    }

    async fn peek(&self) -> io::Result<Option<Vec<u8>>> {
        loop {
            {
                let locked = self.lock();
                if let Some((bytes, _)) = locked.0[self.own].messages.front() {
                    return Ok(Some(bytes.clone()));
                }
                if locked.1[1 - self.own] {
                    return Ok(None);
                }
            }
            self.shared.readable[self.own].notified().await;
        }
    }

    fn take(&self, most: usize) -> io::Result<(Vec<SimDescriptor>, bool)> {
        let (mut descriptors, left) = {
            let mut locked = self.lock();
            let queue = &mut locked.0[self.own];
            let Some((bytes, mut descriptors)) = queue.messages.pop_front() else {
                return Err(io::ErrorKind::WouldBlock.into());
            };
            queue.bytes -= bytes.len() + OVERHEAD;
            let left = descriptors.split_off(most.min(descriptors.len()));
            (descriptors, left)
        };
        self.shared.writable[1 - self.own].notify_one();
        descriptors.shrink_to_fit();
        // What is not taken closes outside of the lock.
        Ok((descriptors, !left.is_empty()))
    }
}

/// The conversations that wait at a path.
pub(super) struct Waiting {
    queue: Mutex<VecDeque<(SimHandoff, PeerCredentials)>>,
    arrived: Notify,
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, VecDeque<(SimHandoff, PeerCredentials)>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where sidecars come in.
pub struct SimHandoffListener {
    waiting: Arc<Waiting>,
    _open: Counted,
}

impl SimHandoffListener {
    pub(super) fn listen(kernel: &Kernel, path: &Path) -> io::Result<Self> {
        if kernel.listening_at(path).is_some() {
            let text = format!("{}: another router serves there", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        }
        let waiting = Arc::new(Waiting { queue: Mutex::default(), arrived: Notify::new() });
        kernel.listen_at(path, &waiting);
        Ok(Self { waiting, _open: kernel.count("handoff listener") })
    }
}

impl HandoffListener for SimHandoffListener {
    type Handoff = SimHandoff;

    async fn accept(&self) -> io::Result<(SimHandoff, PeerCredentials)> {
        loop {
            if let Some(accepted) = self.waiting.lock().pop_front() {
                return Ok(accepted);
            }
            self.waiting.arrived.notified().await;
        }
    }
}
