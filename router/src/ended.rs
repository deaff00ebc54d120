//! Clients of an import that have ended and wait for an endpoint. They may want an answer, or have gone: both look the same
//! (a connection that was closed both ways answers until its kernel has forgotten it). So they wait as others do, and make
//! room for those.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use servicekeel_runtime::net::Stream;
use tokio::sync::oneshot;
use tokio::time::{interval, sleep};

use crate::bounds::Held;
use crate::guest::Guest;

/// For how long it is not asked whether the client is still there: most have an endpoint long before.
const ASK_CLIENT: Duration = Duration::from_millis(500);
/// ... and how often then: what a client has sent hides that it is gone from all but a question.
const ASK_CLIENT_AGAIN: Duration = Duration::from_secs(1);

/// Those of one import, in the order in which they were found to have ended. Each counts as a flow of its pod.
#[derive(Default)]
pub(crate) struct Ended(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    clients: BTreeMap<u64, oneshot::Sender<()>>,
    next: u64,
}

/// One of them. Dropped, it waits no more.
pub(crate) struct Place<'a> {
    ended: &'a Ended,
    number: u64,
    told: oneshot::Receiver<()>,
}

impl Ended {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more has ended.
    pub(crate) fn enter(&self) -> Place<'_> {
        let (sender, told) = oneshot::channel();
        let mut waiting = self.lock();
        let number = waiting.next;
        waiting.next += 1;
        waiting.clients.insert(number, sender);
        Place { ended: self, number, told }
    }

    /// Tells the first of them to give up; false where there is none.
    pub(crate) fn make_room(&self) -> bool {
        let first = self.lock().clients.pop_first();
        first.is_some_and(|(_, client)| client.send(()).is_ok())
    }
}

impl Place<'_> {
    /// Resolves when it is to give up.
    pub(crate) async fn is_wanted(&mut self) {
        // Its sender is dropped by what it tells alone.
        let _ = (&mut self.told).await;
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.ended.lock().clients.remove(&self.number);
    }
}

/// Why a client waits no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// It is gone, or its flow is taken.
    GaveUp,
    /// It has ended, and is to make room.
    MadeRoom,
}

/// Resolves when a client that waits for an endpoint is gone, or has ended and is to make room, or waits no more.
pub(crate) async fn gone<S: Stream>(client: &Guest<(S, Held)>, ended: &Ended) -> End {
    sleep(ASK_CLIENT).await;
    let mut again = interval(ASK_CLIENT_AGAIN);
    let mut place = None;
    while !client.is_taken() {
        if place.is_none() && has_ended(client) {
            place = Some(ended.enter());
        }
        let is_wanted = async {
            match &mut place {
                Some(place) => place.is_wanted().await,
                None => std::future::pending().await,
            }
        };
        let asked = client.watch(|(client, _), cx| client.poll_gone(cx));
        tokio::select! {
            biased;
            () = asked => return End::GaveUp,
            () = is_wanted => return End::MadeRoom,
            _ = again.tick() => {}
        }
    }
    End::GaveUp
}

/// Whether a client that waits has ended.
pub(crate) fn has_ended<S: Stream>(client: &Guest<(S, Held)>) -> bool {
    client.look(|(client, _)| client.has_ended()).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use servicekeel_core::shares::Shares;
    use tokio::time::{Instant, timeout_at};

    use super::*;
    use crate::bounds::{Bound, Owner};

    #[test]
    fn the_one_that_ended_first_makes_room() {
        let ended = Ended::default();
        assert!(!ended.make_room());
        let [gone, mut first, mut second] = [(); 3].map(|()| ended.enter());
        drop(gone);
        assert!(ended.make_room());
        assert!(first.is_wanted().now_or_never().is_some() && second.is_wanted().now_or_never().is_none());
        drop((first, second));
        assert!(!ended.make_room() && ended.lock().clients.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_an_endpoint_ends_where_another_thread_has_the_flow() {
        let (client, _server) = tokio::io::duplex(1);
        let held = Bound::new(Shares { budget: 1, least: 1, part: 1 }).take(&Owner::Namespace(1)).unwrap();
        let guest = Guest::new((client, held));
        let ended = Ended::default();
        let (mut gone, begun) = (std::pin::pin!(gone(&guest, &ended)), Instant::now());
        assert!(timeout_at(begun + 2 * ASK_CLIENT, gone.as_mut()).await.is_err());
        assert!(guest.begin(None).take().is_some());
        gone.await;
        assert!(begun.elapsed() <= 2 * ASK_CLIENT + ASK_CLIENT_AGAIN);
    }
}
