//! The threads of one sidecar, where all that its pod can hold up is called.
//!
//! A socket that came from a pod is still the pod's: a duplicate shares its flags, its timeouts and its lock. So an
//! `accept`, a `connect` or a `splice` may block however it was asked (the pod clears O_NONBLOCK), a `close` may wait
//! for unsent bytes (SO_LINGER, socket(7)) or for a file system of the pod's, and any call for a lock that the pod
//! holds. What blocks here holds up nothing but the same pod.

use std::any::Any;
use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{Notify, oneshot};
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio::time::sleep;

use super::while_doing;
use crate::limit;
use crate::net::{Place, Places, PodThread};

/// As much as tokio gives its own threads, since the same tasks run here. Memory is what of it was touched.
const STACK: usize = 2 << 20;
/// The most threads of one pod beside its first, where there are as many processors.
const MORE: usize = 3;
/// A pod gets another thread when each that it has carries so many flows.
const BUSY: usize = 2;
/// This program gets another when each of its own has so many: they only wait there, and where little work is spread over
/// more threads, a thread is woken for each bit of it.
const OWN_BUSY: usize = 64;
/// A process that may have fewer open files (RLIMIT_NOFILE) has one thread for each pod: a thread takes three or four.
const FEW_FILES: u64 = 4096;
/// See [`Pace`]: shorter than any timeout of a flow.
const BEAT: Duration = Duration::from_secs(1);

/// A handle of the threads, or of none: what is a program's own is called where it is. They end when no handle is left
/// and their last call has returned; nothing waits for that.
#[derive(Debug, Clone, Default)]
pub struct OsPodThread(Option<Arc<Running>>);

#[derive(Debug)]
struct Running {
    first: Thread,
    /// So many flows of each are a reason for another.
    busy: usize,
    /// Started one after the other as flows come, and kept for the next.
    more: [OnceLock<Thread>; MORE],
    guests: Guests,
    places: Taken,
}

/// Of threads beside the first, and of what waits to be closed.
struct Taken(Places);

impl fmt::Debug for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Taken")
    }
}

#[derive(Debug, Clone)]
struct Thread {
    runtime: Handle,
    id: ThreadId,
    /// How many flows it carries.
    flows: Arc<AtomicUsize>,
    pace: Arc<Pace>,
    /// The thread ends when the last of these is dropped.
    _alive: Arc<oneshot::Sender<Infallible>>,
}

/// A timer that runs while flows begin. An event loop is woken, by a system call, for each timer that is due before all
/// that it has; beside this one no timeout of a flow is.
#[derive(Debug, Default)]
struct Pace {
    /// Since the last beat.
    begun: AtomicBool,
    begins: Notify,
}

impl Pace {
    fn begin(&self) {
        if !self.begun.load(Ordering::Relaxed) && !self.begun.swap(true, Ordering::Relaxed) {
            self.begins.notify_one();
        }
    }

    async fn keep(&self) -> Infallible {
        loop {
            self.begins.notified().await;
            while self.begun.swap(false, Ordering::Relaxed) {
                sleep(BEAT).await;
            }
        }
    }
}

/// Dropped with the last thread.
type Guests = Arc<Mutex<Vec<Box<dyn Any + Send>>>>;

/// Where no thread can be had for it, it ends on that of the caller, which must not wait.
struct EventLoop(Option<Runtime>);

impl EventLoop {
    fn get(&self) -> &Runtime {
        self.0.as_ref().expect("there until it is dropped")
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.0.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

impl Thread {
    /// It keeps what it is given while it lasts.
    fn start(kept: impl Send + 'static) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(while_doing("cannot create the event loop of a sidecar's thread"))?;
        let runtime = EventLoop(Some(runtime));
        let handle = runtime.get().handle().clone();
        let (alive, over) = oneshot::channel::<Infallible>();
        let pace = Arc::new(Pace::default());
        let keep = pace.clone();
        let thread = thread::Builder::new()
            .name("pod".into())
            .stack_size(STACK)
            .spawn(move || {
                runtime.get().block_on(async {
                    tokio::select! {
                        _ = over => {}
                        never = keep.keep() => match never {},
                    }
                });
                drop(runtime);
                drop(kept);
            })
            .map_err(while_doing("cannot start a thread for a sidecar"))?;
        let id = thread.thread().id();
        Ok(Self { runtime: handle, id, flows: Arc::default(), pace, _alive: Arc::new(alive) })
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

    /// Closes something on one of them before long. It counts meanwhile: where one close blocks, others wait behind it.
    fn close_on(&self, thread: &Thread, close: impl FnOnce() + Send + 'static) {
        let place = (self.places.0)(Place::Closing);
        thread.runtime.spawn(async move {
            close();
            drop(place);
        });
    }

    /// The caller's own where it is not busy, else the one that carries the fewest flows, or another.
    fn least_busy(&self) -> &Thread {
        let flows = |thread: &&Thread| thread.flows.load(Ordering::Relaxed);
        if let Some(here) = self.here()
            && flows(&here) < self.busy
        {
            return here;
        }
        let least = self.all().min_by_key(flows).unwrap_or(&self.first);
        if flows(&least) < self.busy {
            return least;
        }
        let next = self.more.iter().take(more()).find(|thread| thread.get().is_none());
        let Some(next) = next.filter(|_| !limit::is_short()) else { return least };
        let Some(place) = (self.places.0)(Place::Thread) else { return least };
        // Whoever comes second takes what is there.
        match Thread::start((self.guests.clone(), place)) {
            Ok(thread) => next.get_or_init(|| thread),
            Err(_) => least,
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
    pub(super) fn start(places: Places) -> io::Result<Self> {
        Self::start_until(BUSY, places)
    }

    /// Of no pod: for what is this program's own.
    pub(super) fn own() -> io::Result<Self> {
        Self::start_until(OWN_BUSY, Arc::new(|_| Some(Box::new(()))))
    }

    fn start_until(busy: usize, places: Places) -> io::Result<Self> {
        let guests = Guests::default();
        let first = Thread::start(guests.clone())?;
        let (more, places) = (Default::default(), Taken(places));
        Ok(Self(Some(Arc::new(Running { first, busy, more, guests, places }))))
    }

    /// Threads of another pod, whose first is the first of these. What is held goes with the last handle, where a call may
    /// still be under way.
    pub(super) fn beside(&self, places: Places) -> Self {
        let running = |shared: &Arc<Running>| Running {
            first: shared.first.clone(),
            busy: shared.busy,
            more: Default::default(),
            guests: Guests::default(),
            places: Taken(places),
        };
        Self(self.0.as_ref().map(running).map(Arc::new))
    }

    /// This one, or the other where this is none.
    pub(super) fn or(self, other: Self) -> Self {
        Self(self.0.or(other.0))
    }

    /// Whether it is of no pod.
    pub(super) fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// The threads, where the caller is on none of them.
    fn elsewhere(&self) -> Option<&Running> {
        self.0.as_deref().filter(|running| running.here().is_none())
    }

    /// Calls what closes something there, now or soon.
    pub(super) fn call(&self, call: impl FnOnce() + Send + 'static) {
        match self.elsewhere() {
            Some(running) => running.close_on(&running.first, call),
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
        let Some(running) = self.elsewhere() else { return Some(task.await) };
        let thread = running.least_busy();
        thread.pace.begin();
        let counted = Counted::new(thread);
        let task = thread.runtime.spawn(Box::pin(async move {
            let outcome = task.await;
            drop(counted);
            outcome
        }));
        (&mut AbortOnDrop(task).0).await.ok()
    }

    fn spawn_flow(
        &self,
        set: &mut JoinSet<()>,
        home: &Handle,
        carried: bool,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> AbortHandle {
        let Some(running) = &self.0 else { return set.spawn_on(task, home) };
        let thread = match carried {
            true => running.least_busy(),
            false => running.here().unwrap_or(&running.first),
        };
        thread.pace.begin();
        let (counted, alive) = (carried.then(|| Counted::new(thread)), self.clone());
        // A task's room is moved as a whole more than once.
        let task = Box::pin(async move {
            task.await;
            drop((counted, alive));
        });
        set.spawn_on(task, &thread.runtime)
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
    fn new(thread: &Thread) -> Self {
        thread.flows.fetch_add(1, Ordering::Relaxed);
        Self(thread.flows.clone())
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
            running.close_on(running.here().unwrap_or(&running.first), move || drop(held));
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
        let places = Arc::new(Semaphore::new(MORE));
        let taken = places.clone();
        let place = move |_| Some(Box::new(taken.clone().try_acquire_owned().ok()?) as Box<dyn Any + Send>);
        let pod = OsPodThread::start(Arc::new(place)).unwrap();
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
        // Each has a place for as long as it is there.
        assert_eq!(places.available_permits(), MORE - more());
        drop(pod);
        timeout(Duration::from_secs(5), places.acquire_many(MORE as u32)).await.unwrap().unwrap().forget();
    }

    #[tokio::test]
    async fn flows_share_the_threads_that_are_there_where_there_is_no_place_for_another() {
        let pod = OsPodThread::start(Arc::new(|_| None)).unwrap();
        let mut flows = JoinSet::new();
        for number in 1..=8 {
            let thread = pod.clone();
            flows.spawn(async move { thread.run_flow(std::future::pending::<()>()).await });
            wait_for_flows(number, &pod).await;
        }
        assert_eq!(pod.0.as_ref().unwrap().all().count(), 1);
    }

    #[tokio::test]
    async fn what_waits_on_the_programs_own_threads_is_many_to_each() {
        let own = OsPodThread::own().unwrap();
        let mut flows = JoinSet::new();
        let threads = async |flows: &mut JoinSet<Option<()>>, number| {
            while flows.len() < number {
                let thread = own.clone();
                flows.spawn(async move { thread.run_flow(std::future::pending()).await });
                wait_for_flows(flows.len(), &own).await;
            }
            own.0.as_ref().unwrap().all().count()
        };
        assert_eq!(threads(&mut flows, OWN_BUSY).await, 1);
        assert_eq!(threads(&mut flows, OWN_BUSY + 1).await, 1 + more().min(1));
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

    #[tokio::test(start_paused = true)]
    async fn the_timer_of_a_thread_runs_only_while_flows_begin() {
        let pace = Pace::default();
        let beats = async || {
            let _ = timeout(10 * BEAT, pace.keep()).await;
            pace.begun.load(Ordering::Relaxed)
        };
        pace.begin();
        assert!(pace.begun.load(Ordering::Relaxed));
        assert!(!beats().await, "it stops where no flow begins");
        pace.begin();
        assert!(!beats().await, "it begins again");
    }

    #[tokio::test]
    async fn pods_that_share_a_thread_share_nothing_else() {
        let shared = OsPodThread::start(Arc::new(|_| None)).unwrap();
        let [one, other] = [(); 2].map(|()| shared.beside(Arc::new(|_| None)));
        assert!(one != other && one != shared);
        let id = |pod: OsPodThread| async move { pod.run(async { thread::current().id() }).await.unwrap() };
        assert_eq!(id(one.clone()).await, id(other.clone()).await);
        let [(of_one, one_gone), (of_other, mut other_gone)] =
            [(); 2].map(|()| oneshot::channel::<Infallible>());
        one.hold(of_one);
        other.hold(of_other);
        drop((shared, one));
        assert!(timeout(Duration::from_secs(5), one_gone).await.unwrap().is_err());
        assert!(other_gone.try_recv().is_err_and(|error| error == oneshot::error::TryRecvError::Empty));
        assert!(other.run(async { true }).await.unwrap(), "the thread goes on for the other");
    }

    #[tokio::test]
    async fn an_event_loop_that_gets_no_thread_ends_where_a_task_runs() {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        drop(EventLoop(Some(runtime)));
    }

    #[tokio::test]
    async fn what_is_held_goes_with_the_last_thread_and_not_before_a_call_has_returned() {
        let pod = OsPodThread::start(Arc::new(|_| None)).unwrap();
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
