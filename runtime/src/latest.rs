//! The latest value, for many that wait for another: tokio's `watch`, but it wakes them in the order in which they
//! began to wait. tokio draws that order from a generator that nobody can seed, and a simulation with it would not
//! repeat itself.

use std::ops::Deref;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::Notify;

/// The version of a value whose sender is gone.
const CLOSED: u64 = u64::MAX;

struct Shared<T> {
    value: RwLock<T>,
    version: AtomicU64,
    changed: Notify,
}

/// Sets the value.
pub struct Sender<T>(Arc<Shared<T>>);

/// Waits for another value than the one that it has seen.
pub struct Receiver<T> {
    shared: Arc<Shared<T>>,
    seen: u64,
}

/// The sender is gone, and the value stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the sender is gone")]
pub struct Closed;

impl<T> Sender<T> {
    /// Starts with a value.
    pub fn new(value: T) -> Self {
        let shared = Shared { value: RwLock::new(value), version: AtomicU64::new(0), changed: Notify::new() };
        Self(Arc::new(shared))
    }

    /// A receiver that has seen the value of now.
    pub fn subscribe(&self) -> Receiver<T> {
        Receiver { shared: self.0.clone(), seen: self.0.version.load(Ordering::Acquire) }
    }

    /// The value, locked: not to be held across anything that sets it.
    pub fn borrow(&self) -> impl Deref<Target = T> + '_ {
        self.0.value.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets another value, and returns the one before it.
    pub fn send_replace(&self, value: T) -> T {
        let mut value = value;
        self.send_modify(|held| std::mem::swap(held, &mut value));
        value
    }

    /// Changes the value.
    pub fn send_modify(&self, change: impl FnOnce(&mut T)) {
        self.send_if_modified(|value| {
            change(value);
            true
        });
    }

    /// Changes the value or does not, as `change` says; returns what it said.
    pub fn send_if_modified(&self, change: impl FnOnce(&mut T) -> bool) -> bool {
        {
            let mut value = self.0.value.write().unwrap_or_else(PoisonError::into_inner);
            if !change(&mut value) {
                return false;
            }
            self.0.version.fetch_add(1, Ordering::Release);
        }
        self.0.changed.notify_waiters();
        true
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.version.store(CLOSED, Ordering::Release);
        self.0.changed.notify_waiters();
    }
}

impl<T> Receiver<T> {
    /// The value, locked: not to be held across anything that sets it.
    pub fn borrow(&self) -> impl Deref<Target = T> + '_ {
        self.shared.value.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value, which counts as seen.
    pub fn borrow_and_update(&mut self) -> impl Deref<Target = T> + '_ {
        let value = self.shared.value.read().unwrap_or_else(PoisonError::into_inner);
        self.seen = self.shared.version.load(Ordering::Acquire);
        value
    }

    /// Takes the value of now as seen.
    pub fn mark_unchanged(&mut self) {
        self.seen = self.shared.version.load(Ordering::Acquire);
    }

    /// Waits for a value that was not seen, which then counts as seen.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// [`Closed`] where there will be none.
    pub async fn changed(&mut self) -> Result<(), Closed> {
        loop {
            let mut changed = pin!(self.shared.changed.notified());
            changed.as_mut().enable();
            match self.shared.version.load(Ordering::Acquire) {
                CLOSED => return Err(Closed),
                version if version != self.seen => {
                    self.seen = version;
                    return Ok(());
                }
                _ => changed.await,
            }
        }
    }

    /// Waits for a value that fits; the one of now may.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// [`Closed`] where none will.
    pub async fn wait_for(&mut self, mut fits: impl FnMut(&T) -> bool) -> Result<(), Closed> {
        loop {
            if fits(&self.borrow_and_update()) {
                return Ok(());
            }
            self.changed().await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use tokio::task::{JoinSet, yield_now};
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn those_that_wait_are_woken_in_their_order() {
        let sender = Sender::new(0);
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut waiting = JoinSet::new();
        for number in 0..40 {
            let (mut receiver, order) = (sender.subscribe(), order.clone());
            waiting.spawn(async move {
                receiver.changed().await.unwrap();
                order.lock().unwrap().push(number);
            });
        }
        yield_now().await;
        sender.send_replace(1);
        waiting.join_all().await;
        assert_eq!(*order.lock().unwrap(), Vec::from_iter(0..40));
    }

    #[tokio::test]
    async fn a_value_is_new_once_for_each_receiver() {
        let sender = Sender::new(0);
        let (mut one, mut other) = (sender.subscribe(), sender.subscribe());
        assert_eq!(sender.send_replace(1), 0);
        sender.send_modify(|value| *value += 1);
        assert!(!sender.send_if_modified(|_| false));
        one.changed().await.unwrap();
        assert_eq!((*one.borrow(), *sender.borrow()), (2, 2));
        assert!(timeout(Duration::from_millis(10), one.changed()).await.is_err());
        assert_eq!(*other.borrow_and_update(), 2);
        assert!(timeout(Duration::from_millis(10), other.changed()).await.is_err());
        sender.send_replace(3);
        other.mark_unchanged();
        assert!(timeout(Duration::from_millis(10), other.changed()).await.is_err());
        one.changed().await.unwrap();
        assert!(timeout(Duration::from_millis(10), sender.subscribe().changed()).await.is_err());
    }

    #[tokio::test]
    async fn a_change_between_the_look_and_the_wait_is_not_lost() {
        let sender = Arc::new(Sender::new(0));
        let mut receiver = sender.subscribe();
        let setter = sender.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn_blocking(move || {
            for value in 1..=20_000 {
                setter.send_replace(value);
            }
        });
        timeout(Duration::from_secs(20), receiver.wait_for(|value| *value == 20_000)).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn what_nobody_sets_any_more_is_said() {
        let sender = Sender::new(1);
        let mut receiver = sender.subscribe();
        receiver.wait_for(|value| *value == 1).await.unwrap();
        let (closed, ()) = tokio::join!(receiver.wait_for(|value| *value == 2), async { drop(sender) });
        assert_eq!((closed, *receiver.borrow()), (Err(Closed), 1));
        assert_eq!(receiver.changed().await, Err(Closed));
    }
}
