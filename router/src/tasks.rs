//! The tasks of one router: all end when the router's future is dropped.

use std::future::Future;
use std::sync::{Mutex, PoisonError};

use tokio::task::{AbortHandle, JoinSet};

/// Owns every task that the router starts.
#[derive(Default)]
pub(crate) struct Tasks(Mutex<Set>);

#[derive(Default)]
struct Set {
    tasks: JoinSet<()>,
    ended: bool,
}

impl Tasks {
    /// Starts a task.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let mut set = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Each start clears away what has ended, so the set holds what lives and a few more.
        while set.tasks.try_join_next().is_some() {}
        let handle = set.tasks.spawn(task);
        if set.ended {
            handle.abort();
        }
        handle
    }

    /// Ends every task, and those that a running one still starts. What was started holds the node, which holds this:
    /// the circle is cut here.
    pub(crate) fn end(&self) {
        let mut set = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        set.ended = true;
        set.tasks.abort_all();
    }
}

/// Ends a task when dropped.
pub(crate) struct AbortOnDrop(pub(crate) AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
