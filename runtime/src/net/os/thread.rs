//! The thread of one sidecar, where all that its pod can hold up is called.
//!
//! A socket that came from a pod is still the pod's: a duplicate shares its flags, its timeouts and its lock. So an
//! `accept`, a `connect` or a `splice` may block however it was asked (the pod clears O_NONBLOCK), a `close` may wait
//! for unsent bytes (SO_LINGER, socket(7)) or for a file system of the pod's, and any call for a lock that the pod
//! holds. What blocks here holds up nothing but the same pod.

use std::any::Any;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::while_doing;
use crate::net::PodThread;

/// What it needs is little: calls and the tasks of flows, whose state is on the heap.
const STACK: usize = 256 << 10;

/// A handle of the thread, or of none: what is a program's own is called where it is. The thread ends when no handle is
/// left and its last call has returned; nothing waits for that.
#[derive(Debug, Clone, Default)]
pub struct OsPodThread(Option<Arc<Running>>);

#[derive(Debug)]
struct Running {
    runtime: Handle,
    id: ThreadId,
    guests: Guests,
    /// The thread ends when this is dropped.
    _alive: oneshot::Sender<Infallible>,
}

type Guests = Arc<Mutex<Vec<Box<dyn Any + Send>>>>;

impl OsPodThread {
    pub(super) fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(while_doing("no event loop for a sidecar's thread"))?;
        let (handle, guests) = (runtime.handle().clone(), Guests::default());
        let (alive, over) = oneshot::channel();
        let held = guests.clone();
        let thread = thread::Builder::new()
            .name("pod".into())
            .stack_size(STACK)
            .spawn(move || {
                let _ = runtime.block_on(over);
                drop(runtime);
                held.lock().unwrap_or_else(PoisonError::into_inner).clear();
            })
            .map_err(while_doing("no thread for a sidecar"))?;
        let running = Running { runtime: handle, id: thread.thread().id(), guests, _alive: alive };
        Ok(Self(Some(Arc::new(running))))
    }

    /// This one, or the other where this is none.
    pub(super) fn or(self, other: Self) -> Self {
        Self(self.0.or(other.0))
    }

    /// The thread, where the caller is not on it.
    fn elsewhere(&self) -> Option<&Running> {
        self.0.as_deref().filter(|running| running.id != thread::current().id())
    }

    /// Calls something there, now or soon.
    pub(super) fn call(&self, call: impl FnOnce() + Send + 'static) {
        match self.elsewhere() {
            Some(running) => drop(running.runtime.spawn(async move { call() })),
            None => call(),
        }
    }
}

impl PodThread for OsPodThread {
    async fn run<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> Option<T> {
        match self.elsewhere() {
            Some(running) => (&mut AbortOnDrop(running.runtime.spawn(task)).0).await.ok(),
            None => Some(task.await),
        }
    }

    fn hold(&self, guest: impl Send + 'static) {
        if let Some(running) = &self.0 {
            running.guests.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(guest));
        }
    }
}

/// Ends the task when dropped: at its next turn, on its own thread.
struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What came from a pod, or was made of it. Dropped, it is closed on the pod's thread, and never before `drop` returns:
/// the caller may hold a lock.
#[derive(Debug)]
pub(super) struct OfPod<T: Send + 'static> {
    held: Option<T>,
    thread: OsPodThread,
}

impl<T: Send + 'static> OfPod<T> {
    pub(super) fn new(held: T, thread: OsPodThread) -> Self {
        Self { held: Some(held), thread }
    }

    pub(super) fn thread(&self) -> &OsPodThread {
        &self.thread
    }

    /// What is held, for whoever is on the thread, or hands it on.
    pub(super) fn into_parts(mut self) -> (T, OsPodThread) {
        (self.held.take().expect("held until it is dropped"), self.thread.clone())
    }

    pub(super) fn get_mut(&mut self) -> &mut T {
        self.held.as_mut().expect("held until it is dropped")
    }
}

impl<T: Send + 'static> Deref for OfPod<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.held.as_ref().expect("held until it is dropped")
    }
}

impl<T: Send + 'static> Drop for OfPod<T> {
    fn drop(&mut self) {
        if let (Some(held), Some(running)) = (self.held.take(), &self.thread.0) {
            running.runtime.spawn(async move { drop(held) });
        }
    }
}
