//! A connection that waits until another one is made for it, on the thread of another pod: that thread takes it along
//! and goes on with it, so that no further thread has to wake. One that is blocked never has it: whoever waits keeps it
//! until the other connection is there.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use crate::bounds::Held;

/// What waits, for attempts on any thread. Dropped, it takes it away from them.
pub(crate) struct Guest<T>(Arc<Place<T>>);

struct Place<T>(Mutex<Waiting<T>>);

struct Waiting<T> {
    held: Option<T>,
    /// Attempts of an earlier round come too late.
    round: u64,
    /// For the wait alone.
    patient: Option<Held>,
}

/// The attempts of one round: the first that is ready takes the guest.
pub(crate) struct Round<T> {
    place: Arc<Place<T>>,
    number: u64,
}

impl<T> Clone for Round<T> {
    fn clone(&self) -> Self {
        Self { place: self.place.clone(), number: self.number }
    }
}

impl<T> Place<T> {
    fn lock(&self) -> MutexGuard<'_, Waiting<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_taken(&self) -> bool {
        self.lock().held.is_none()
    }
}

impl<T> Drop for Guest<T> {
    fn drop(&mut self) {
        self.take();
    }
}

impl<T> Guest<T> {
    pub(crate) fn new(held: T) -> Self {
        Self(Arc::new(Place(Mutex::new(Waiting { held: Some(held), round: 0, patient: None }))))
    }

    /// Begins a round of attempts, with what is held for the time that they take. Those of earlier rounds come too late.
    pub(crate) fn begin(&self, patient: Option<Held>) -> Round<T> {
        let mut waiting = self.0.lock();
        waiting.round += 1;
        waiting.patient = patient;
        Round { place: self.0.clone(), number: waiting.round }
    }

    /// What waits, for whoever has waited with it. `None`: an attempt has it.
    pub(crate) fn take(&self) -> Option<T> {
        let mut waiting = self.0.lock();
        waiting.round += 1;
        waiting.patient = None;
        waiting.held.take()
    }

    pub(crate) fn is_taken(&self) -> bool {
        self.0.is_taken()
    }

    /// What `look` sees of what waits; `None` where nothing does any more.
    pub(crate) fn look<R>(&self, look: impl FnOnce(&T) -> R) -> Option<R> {
        self.0.lock().held.as_ref().map(look)
    }

    /// Watches what waits for as long as it does. `watch` is polled with it, and may be no other time.
    pub(crate) async fn watch(&self, mut watch: impl FnMut(&mut T, &mut Context<'_>) -> Poll<()>) {
        poll_fn(|cx| self.0.lock().held.as_mut().map_or(Poll::Pending, |held| watch(held, cx))).await
    }
}

impl<T> Round<T> {
    /// What waits, unless another attempt has it or the round is over.
    pub(crate) fn take(&self) -> Option<T> {
        let mut waiting = self.place.lock();
        if waiting.round != self.number {
            return None;
        }
        waiting.patient = None;
        waiting.held.take()
    }

    /// Ends the round: no attempt of it takes the guest from now on. False where one has.
    pub(crate) fn end(&self) -> bool {
        let mut waiting = self.place.lock();
        if waiting.held.is_none() {
            return false;
        }
        waiting.round += 1;
        waiting.patient = None;
        true
    }

    pub(crate) fn is_taken(&self) -> bool {
        self.place.is_taken()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bounds::{Bound, Owner};

    #[test]
    fn one_attempt_of_the_round_takes_it() {
        let guest = Guest::new(7);
        let early = guest.begin(None);
        assert!(early.end());
        let (one, other) = (guest.begin(None), guest.begin(None));
        assert_eq!((early.take(), one.take(), guest.is_taken()), (None, None, false));
        assert_eq!((other.take(), other.clone().take(), other.end()), (Some(7), None, false));
        assert_eq!(guest.take(), None);
    }

    /// On a thread that is blocked, attempts last longer than the wait.
    #[test]
    fn what_is_held_for_the_wait_ends_with_it() {
        let bound = Bound::of_patience();
        let owner = Owner::Namespace(1);
        let guest = Guest::new(7);
        let round = guest.begin(bound.take(&owner));
        assert_eq!(bound.held(&owner), 1);
        drop(guest);
        assert_eq!((bound.held(&owner), round.take()), (0, None));
    }

    #[tokio::test]
    async fn it_is_watched_until_it_is_taken() {
        let guest = Guest::new(7);
        assert_eq!(guest.look(|held| held + 1), Some(8));
        guest.watch(|held, _| if *held == 7 { Poll::Ready(()) } else { Poll::Pending }).await;
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert_eq!(guest.begin(None).take(), Some(7));
        let watched = guest.watch(|_, _| Poll::Ready(()));
        assert!(std::pin::pin!(watched).poll(&mut cx).is_pending());
    }
}
