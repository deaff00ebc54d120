//! How many conversations with sidecars there may be: in all, and of one process.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The most sidecars at once, those included that are gone and whose sockets are kept.
const MAX_SIDECARS: usize = 4096;
/// The most of them that one process may have, so that none can keep all others out.
const MAX_OF_ONE: usize = MAX_SIDECARS / 4;

/// The seats that are taken.
#[derive(Debug, Default)]
pub(crate) struct Seats(Mutex<Taken>);

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_process: BTreeMap<i32, usize>,
}

/// Which bound is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Full {
    #[error("there are {MAX_SIDECARS} sidecars, as many as there may be")]
    All,
    #[error("the process has {MAX_OF_ONE} conversations, as many as one may have")]
    OfOne,
}

/// A seat, while it lasts.
#[derive(Debug)]
pub(crate) struct Seat {
    seats: Arc<Seats>,
    pid: i32,
}

impl Seats {
    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A seat for a conversation with a process. Those of other process namespaces have no number here and can't be
    /// told apart: they share all seats.
    pub(crate) fn take(self: &Arc<Self>, pid: i32) -> Result<Seat, Full> {
        let mut taken = self.lock();
        if taken.all >= MAX_SIDECARS {
            return Err(Full::All);
        }
        if pid != 0 && taken.by_process.get(&pid).is_some_and(|of_one| *of_one >= MAX_OF_ONE) {
            return Err(Full::OfOne);
        }
        taken.all += 1;
        *taken.by_process.entry(pid).or_default() += 1;
        Ok(Seat { seats: self.clone(), pid })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.seats.lock();
        taken.all -= 1;
        if let Some(of_one) = taken.by_process.get_mut(&self.pid) {
            *of_one -= 1;
            if *of_one == 0 {
                taken.by_process.remove(&self.pid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_leaves_room_for_others() {
        let seats = Arc::new(Seats::default());
        let greedy: Vec<_> = std::iter::from_fn(|| seats.take(7).ok()).take(MAX_SIDECARS).collect();
        assert_eq!((greedy.len(), seats.take(7).unwrap_err()), (MAX_OF_ONE, Full::OfOne));
        let others: Vec<_> = std::iter::from_fn(|| seats.take(0).ok()).collect();
        assert_eq!((others.len(), seats.take(8).unwrap_err()), (MAX_SIDECARS - MAX_OF_ONE, Full::All));
        drop((greedy, others));
        assert!(seats.take(7).is_ok());
        assert!(seats.lock().by_process.is_empty() && seats.lock().all == 0);
    }
}
