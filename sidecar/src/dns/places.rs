//! So many at a time; one more ends the oldest, which is the one that has had most time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

/// See the module.
#[derive(Debug)]
pub(super) struct Places {
    most: usize,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    next: u64,
    by_age: BTreeMap<u64, oneshot::Sender<()>>,
}

/// A place, free again once this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    number: u64,
    taken: Arc<Mutex<Taken>>,
    lost: oneshot::Receiver<()>,
}

impl Places {
    pub(super) fn new(most: usize) -> Self {
        Self { most, taken: Arc::default() }
    }

    /// Takes one, from the oldest where all are taken; `None` where there are none at all.
    pub(super) fn take(&self) -> Option<Place> {
        if self.most == 0 {
            return None;
        }
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        while taken.by_age.len() >= self.most {
            // Its holder hears of it by the sender's end.
            taken.by_age.pop_first();
        }
        let (sender, lost) = oneshot::channel();
        let number = taken.next;
        taken.next += 1;
        taken.by_age.insert(number, sender);
        Some(Place { number, taken: self.taken.clone(), lost })
    }
}

impl Place {
    /// Resolves where another has taken it.
    pub(super) async fn lost(&mut self) {
        // Nobody sends: the sender's end is what counts.
        let _ = (&mut self.lost).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).by_age.remove(&self.number);
    }
}
