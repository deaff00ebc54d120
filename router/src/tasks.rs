//! The tasks of one router: all end when the router's future is dropped.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use servicekeel_runtime::net::PodThread;
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};
use tokio::task::{AbortHandle, JoinSet};

/// Owns every task that the router starts. All but flows run on the router's own runtime, whichever thread starts them;
/// what else is to run on a pod's thread is run there by its task.
pub(crate) struct Tasks {
    home: Handle,
    set: Mutex<Set>,
    /// A vital task has panicked.
    fallen: Arc<Notify>,
}

#[derive(Default)]
struct Set {
    tasks: JoinSet<()>,
    ended: bool,
}

impl Default for Tasks {
    /// On the runtime of the caller.
    fn default() -> Self {
        Self { home: Handle::current(), set: Mutex::default(), fallen: Arc::default() }
    }
}

impl Tasks {
    /// Starts a task without which the router is none: where it panics, [`Self::fallen`] resolves.
    pub(crate) fn spawn_vital(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let watch = Watch(self.fallen.clone());
        self.spawn(async move {
            let _watch = watch;
            task.await;
        })
    }

    /// Resolves when a vital task has panicked.
    pub(crate) async fn fallen(&self) {
        self.fallen.notified().await;
    }

    /// Starts a task. A panic ends it alone.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        self.start(|set| set.spawn_on(task, &self.home))
    }

    /// Starts a task that runs on a pod's thread.
    pub(crate) fn spawn_on(
        &self,
        thread: &impl PodThread,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> AbortHandle {
        let thread = thread.clone();
        self.spawn(async move {
            let _ = thread.run(task).await;
        })
    }

    /// Starts a flow of a pod, on a thread of the pod: what that one holds up are the flows of the same pod. See
    /// [`PodThread::spawn_flow`].
    pub(crate) fn spawn_flow(
        &self,
        thread: &impl PodThread,
        carried: bool,
        flow: impl Future<Output = ()> + Send + 'static,
    ) -> AbortHandle {
        self.start(|set| thread.spawn_flow(set, &self.home, carried, flow))
    }

    /// Does on the router's own runtime, from a pod's thread, what others wait for too; `None` where it panicked. Ends
    /// it when dropped.
    pub(crate) async fn at_home<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        if Handle::current().id() == self.home.id() {
            return Some(task.await);
        }
        let (done, outcome) = oneshot::channel();
        let _task = AbortOnDrop(self.spawn(async move { drop(done.send(task.await)) }));
        outcome.await.ok()
    }

    fn start(&self, start: impl FnOnce(&mut JoinSet<()>) -> AbortHandle) -> AbortHandle {
        let mut set = self.set.lock().unwrap_or_else(PoisonError::into_inner);
        // Each start clears away what has ended, so the set holds what lives and a few more.
        while set.tasks.try_join_next().is_some() {}
        let handle = start(&mut set.tasks);
        if set.ended {
            handle.abort();
        }
        handle
    }

    /// Ends every task, and those that a running one still starts. What was started holds the node, which holds this:
    /// the circle is cut here.
    pub(crate) fn end(&self) {
        let mut set = self.set.lock().unwrap_or_else(PoisonError::into_inner);
        set.ended = true;
        set.tasks.abort_all();
    }
}

/// Sees a task panic: what it holds is dropped by the panic then.
struct Watch(Arc<Notify>);

impl Drop for Watch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.notify_one();
        }
    }
}

/// Ends a task when dropped.
pub(crate) struct AbortOnDrop(pub(crate) AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_vital_task_that_panics_is_noticed_and_an_ended_one_is_not() {
        let tasks = Tasks::default();
        tasks.spawn(async { panic!("of one flow") });
        tasks.spawn_vital(async {});
        tasks.spawn_vital(std::future::pending()).abort();
        assert!(timeout(Duration::from_secs(1), tasks.fallen()).await.is_err());
        tasks.spawn_vital(async { panic!("of all") });
        timeout(Duration::from_secs(1), tasks.fallen()).await.unwrap();
    }
}
