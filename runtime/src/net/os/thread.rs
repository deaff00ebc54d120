//! The threads of one sidecar, where all that its pod can hold up is called.
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
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, ThreadId};

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::while_doing;
use crate::limit;
use crate::net::PodThread;

/// What a thread needs is little: calls and the tasks of flows, whose state is on the heap.
const STACK: usize = 256 << 10;
/// The most threads of one pod beside its first, where there are as many processors.
const MORE: usize = 3;
/// A pod gets another thread when each that it has carries so many flows.
const BUSY: usize = 2;
/// A process that may have fewer open files (RLIMIT_NOFILE) has one thread for each pod: a thread takes three or four.
const FEW_FILES: u64 = 4096;

/// A handle of the threads, or of none: what is a program's own is called where it is. They end when no handle is left
/// and their last call has returned; nothing waits for that.
#[derive(Debug, Clone, Default)]
pub struct OsPodThread(Option<Arc<Running>>);

#[derive(Debug)]
struct Running {
    first: Thread,
    /// Started one after the other as flows come, and kept for the next.
    more: [OnceLock<Thread>; MORE],
    guests: Guests,
}

#[derive(Debug)]
struct Thread {
    runtime: Handle,
    id: ThreadId,
    /// How many flows it carries.
    flows: Arc<AtomicUsize>,
    /// The thread ends when this is dropped.
    _alive: oneshot::Sender<Infallible>,
}

/// Dropped with the last thread.
type Guests = Arc<Mutex<Vec<Box<dyn Any + Send>>>>;

impl Thread {
    fn start(guests: Guests) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(while_doing("no event loop for a sidecar's thread"))?;
        let handle = runtime.handle().clone();
        let (alive, over) = oneshot::channel();
        let thread = thread::Builder::new()
            .name("pod".into())
            .stack_size(STACK)
            .spawn(move || {
                let _ = runtime.block_on(over);
                drop(runtime);
                drop(guests);
            })
            .map_err(while_doing("no thread for a sidecar"))?;
        Ok(Self { runtime: handle, id: thread.thread().id(), flows: Arc::default(), _alive: alive })
    }
}

impl Running {
    fn all(&self) -> impl Iterator<Item = &Thread> {
        std::iter::once(&self.first).chain(self.more.iter().map_while(OnceLock::get))
    }

    /// The one that the caller is on.
    fn here(&self) -> Option<&Thread> {
        let id = thread::current().id();
        self.all().find(|thread| thread.id == id)
    }

    /// The one that carries the fewest flows, or another.
    fn least_busy(&self) -> &Thread {
        let flows = |thread: &&Thread| thread.flows.load(Ordering::Relaxed);
        let least = self.all().min_by_key(flows).unwrap_or(&self.first);
        if flows(&least) < BUSY {
            return least;
        }
        // Whoever comes second takes what is there.
        match self.more.iter().take(more()).find(|thread| thread.get().is_none()) {
            Some(next) if !limit::is_short() => match Thread::start(self.guests.clone()) {
                Ok(thread) => next.get_or_init(|| thread),
                Err(_) => least,
            },
            _ => least,
        }
    }
}

/// How many threads a pod may have beside its first.
fn more() -> usize {
    static MOST: OnceLock<usize> = OnceLock::new();
    *MOST.get_or_init(|| {
        if limit::open_files().is_some_and(|limit| limit < FEW_FILES) {
            return 0;
        }
        thread::available_parallelism().map_or(0, |cores| (cores.get() - 1).min(MORE))
    })
}

impl PartialEq for OsPodThread {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_ref().map(Arc::as_ptr) == other.0.as_ref().map(Arc::as_ptr)
    }
}

impl OsPodThread {
    pub(super) fn start() -> io::Result<Self> {
        let guests = Guests::default();
        let first = Thread::start(guests.clone())?;
        Ok(Self(Some(Arc::new(Running { first, more: Default::default(), guests }))))
    }

    /// This one, or the other where this is none.
    pub(super) fn or(self, other: Self) -> Self {
        Self(self.0.or(other.0))
    }

    /// The threads, where the caller is on none of them.
    fn elsewhere(&self) -> Option<&Running> {
        self.0.as_deref().filter(|running| running.here().is_none())
    }

    /// Calls something there, now or soon.
    pub(super) fn call(&self, call: impl FnOnce() + Send + 'static) {
        match self.elsewhere() {
            Some(running) => drop(running.first.runtime.spawn(async move { call() })),
            None => call(),
        }
    }
}

impl PodThread for OsPodThread {
    async fn run<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> Option<T> {
        match self.elsewhere() {
            Some(running) => (&mut AbortOnDrop(running.first.runtime.spawn(task)).0).await.ok(),
            None => Some(task.await),
        }
    }

    async fn run_flow<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> Option<T> {
        let Some(running) = &self.0 else { return Some(task.await) };
        let thread = running.least_busy();
        let counted = Counted::new(&thread.flows);
        let task = thread.runtime.spawn(async move {
            let outcome = task.await;
            drop(counted);
            outcome
        });
        (&mut AbortOnDrop(task).0).await.ok()
    }

    fn hold(&self, guest: impl Send + 'static) {
        if let Some(running) = &self.0 {
            running.guests.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(guest));
        }
    }
}

/// Counts a flow until it is dropped.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(flows: &Arc<AtomicUsize>) -> Self {
        flows.fetch_add(1, Ordering::Relaxed);
        Self(flows.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Ends the task when dropped: at its next turn, on its own thread.
struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What came from a pod, or was made of it. Dropped, it is closed on a thread of the pod, and never before `drop` returns:
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
            let thread = running.here().unwrap_or(&running.first);
            thread.runtime.spawn(async move { drop(held) });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use tokio::sync::Semaphore;
    use tokio::task::JoinSet;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_pod_with_many_flows_has_more_threads_and_shares_the_flows_out() {
        let pod = OsPodThread::start().unwrap();
        let end = Arc::new(Semaphore::new(0));
        let mut flows = JoinSet::new();
        for number in 1..=8 {
            let (thread, end) = (pod.clone(), end.clone());
            flows.spawn(async move {
                let flow = async move {
                    end.acquire().await.unwrap().forget();
                    thread::current().id()
                };
                thread.run_flow(flow).await
            });
            // One after the other.
            wait_for_flows(number, &pod).await;
        }
        let threads = 1 + more();
        let counts: Vec<_> = pod.0.as_ref().unwrap().all().map(|t| t.flows.load(Ordering::Relaxed)).collect();
        assert_eq!((counts.len(), counts.iter().sum::<usize>()), (threads, 8), "{counts:?}");
        assert!(counts.iter().all(|flows| flows.abs_diff(8 / threads) <= 1), "{counts:?}");
        end.add_permits(8);
        let mut by_thread = BTreeMap::<_, usize>::new();
        while let Some(flow) = flows.join_next().await {
            *by_thread.entry(format!("{:?}", flow.unwrap().unwrap())).or_default() += 1;
        }
        assert_eq!(by_thread.len(), threads);
        assert!(pod.0.as_ref().unwrap().all().all(|thread| thread.flows.load(Ordering::Relaxed) == 0));
    }

    async fn wait_for_flows(number: usize, pod: &OsPodThread) {
        let count = || pod.0.as_ref().unwrap().all().map(|t| t.flows.load(Ordering::Relaxed)).sum::<usize>();
        let reached = async {
            while count() < number {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(5), reached).await.unwrap();
    }

    #[tokio::test]
    async fn what_is_held_goes_with_the_last_thread_and_not_before_a_call_has_returned() {
        let pod = OsPodThread::start().unwrap();
        let (guest, mut gone) = oneshot::channel::<Infallible>();
        pod.hold(guest);
        let (release, blocked) = std::sync::mpsc::channel::<()>();
        let (began, begins) = oneshot::channel();
        // As a call that blocks.
        pod.call(move || {
            began.send(()).unwrap();
            let _ = blocked.recv();
        });
        begins.await.unwrap();
        drop(pod);
        assert!(timeout(Duration::from_millis(100), &mut gone).await.is_err(), "the thread is still there");
        drop(release);
        assert!(timeout(Duration::from_secs(5), gone).await.unwrap().is_err());
    }
}
