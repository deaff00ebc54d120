//! When a sidecar's message is handled: those of one owner come one after the other, at the pace of one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use servicekeel_core::pace::{self, Bucket, Pace};
use tokio::time::{Instant, sleep};

use crate::bounds::Owner;

/// The pace of one owner.
type Line = Arc<Mutex<Pace>>;

/// The paces of all owners.
#[derive(Debug)]
pub(crate) struct Paces {
    shared: Mutex<Bucket>,
    /// Of owners that have a conversation, or had one and would come back with more than it left with.
    owners: Mutex<BTreeMap<Owner, Line>>,
}

/// That of one conversation.
#[derive(Debug)]
pub(crate) struct OfOwner(Line);

impl Paces {
    pub(crate) fn new() -> Self {
        Self { shared: Mutex::new(Bucket::shared(now())), owners: Mutex::default() }
    }

    /// Those of a conversation of this owner.
    pub(crate) fn of(&self, owner: &Owner) -> OfOwner {
        let mut owners = lock(&self.owners);
        let now = now();
        if !owners.contains_key(owner) {
            owners.retain(|_, line| Arc::strong_count(line) > 1 || !lock(line).is_rested(now));
        }
        let new = || Line::new(Mutex::new(Pace::new(now)));
        OfOwner(owners.entry(owner.clone()).or_insert_with(new).clone())
    }

    /// Waits until a message of so many bytes may be handled. What comes behind it waits too, with the kernel; nothing is
    /// locked meanwhile, since the thread of whoever waits may be blocked.
    pub(crate) async fn wait(&self, of: &OfOwner, bytes: usize) {
        let wait = lock(&of.0).handle_message(&mut lock(&self.shared), pace::cost(bytes), now());
        if !wait.is_zero() {
            sleep(wait).await;
        }
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::task::JoinSet;
    use tokio::time::timeout;

    use super::*;

    /// How many messages of so many conversations have their turn within a time.
    async fn handled(paces: &Arc<Paces>, owner: u64, conversations: u32, time: Duration) -> u32 {
        let mut tasks = JoinSet::new();
        for _ in 0..conversations {
            let (paces, of) = (paces.clone(), paces.of(&Owner::Namespace(owner)));
            tasks.spawn(async move {
                let mut handled = 0;
                let all = async {
                    loop {
                        paces.wait(&of, 1).await;
                        handled += 1;
                        tokio::task::yield_now().await;
                    }
                };
                let _: Result<(), _> = timeout(time, all).await;
                handled
            });
        }
        tasks.join_all().await.into_iter().sum()
    }

    #[tokio::test(start_paused = true)]
    async fn an_owner_with_many_conversations_has_the_pace_of_one() {
        let (paces, time) = (Arc::new(Paces::new()), Duration::from_secs(10));
        let many = handled(&paces, 1, 100, time).await;
        assert!((pace::BURST..=pace::BURST + 11 * pace::RATE).contains(&many), "{many}");
        // Nor does it begin anew with others that come behind them.
        let next = handled(&paces, 1, 100, time).await;
        assert!(next <= 11 * pace::RATE, "{next}");
        let other = handled(&paces, 2, 1, time).await;
        assert!(other > pace::BURST, "{other}");
        tokio::time::advance(Duration::from_secs(1) * (2 * pace::BURST / pace::SURE_RATE)).await;
        let _third = paces.of(&Owner::Namespace(3));
        assert_eq!(paces.owners.lock().unwrap().len(), 1, "who is gone is forgotten once it has rested");
    }
}
