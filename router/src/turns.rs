//! Who waits for something of which there is little: owners have it in turns, however many wait in the name of one.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};

use tokio::sync::oneshot;

use crate::bounds::Owner;

/// Those who wait. Each of an owner's has a number, in the order in which they came.
pub(crate) struct Turns<T> {
    waiting: BTreeMap<Owner, BTreeMap<u64, oneshot::Sender<T>>>,
    next: u64,
    /// Who had something last.
    last: Option<Owner>,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Self { waiting: BTreeMap::new(), next: 0, last: None }
    }
}

impl<T> Turns<T> {
    /// One more waits, until [`Turns::leave`] with the number that is returned.
    pub(crate) fn wait(&mut self, owner: &Owner) -> (u64, oneshot::Receiver<T>) {
        let (sender, receiver) = oneshot::channel();
        self.next += 1;
        self.waiting.entry(owner.clone()).or_default().insert(self.next, sender);
        (self.next, receiver)
    }

    /// One waits no more, whether or not it was given something.
    pub(crate) fn leave(&mut self, owner: &Owner, number: u64) {
        if let Some(of_owner) = self.waiting.get_mut(owner) {
            of_owner.remove(&number);
            self.tidy(owner);
        }
    }

    fn tidy(&mut self, owner: &Owner) {
        if self.waiting.get(owner).is_some_and(BTreeMap::is_empty) {
            self.waiting.remove(owner);
        }
    }

    /// Gives something to the one whose turn it is.
    ///
    /// # Errors
    /// Nobody waits: it is given back.
    pub(crate) fn give(&mut self, mut thing: T) -> Result<(), T> {
        loop {
            let behind = self.last.as_ref().map_or(Unbounded, Excluded);
            let behind = self.waiting.range((behind, Unbounded)).next();
            let next = behind.or_else(|| self.waiting.first_key_value()).map(|(owner, _)| owner.clone());
            let of_next = next.as_ref().and_then(|owner| self.waiting.get_mut(owner));
            let first = of_next.and_then(BTreeMap::pop_first);
            next.iter().for_each(|owner| self.tidy(owner));
            self.last = next;
            let Some((_, sender)) = first else { return Err(thing) };
            match sender.send(thing) {
                Ok(()) => return Ok(()),
                Err(back) => thing = back,
            }
        }
    }

    /// Nothing more will come: all who wait are told.
    pub(crate) fn end(&mut self) {
        self.waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_owner_has_its_turn_however_many_wait_in_the_name_of_one() {
        let mut turns = Turns::default();
        let [hog, one, two] = [1, 2, 3].map(Owner::Namespace);
        let mut of_hog: Vec<_> = (0..100).map(|_| turns.wait(&hog).1).collect();
        let (mut of_one, mut of_two) = (turns.wait(&one).1, turns.wait(&two).1);
        for socket in 0..4 {
            turns.give(socket).unwrap();
        }
        assert_eq!((of_one.try_recv(), of_two.try_recv()), (Ok(1), Ok(2)));
        let of_hog: Vec<_> = of_hog.iter_mut().filter_map(|waiting| waiting.try_recv().ok()).collect();
        assert_eq!(of_hog, [0, 3]);
    }

    #[test]
    fn who_waits_no_more_has_no_turn_and_takes_no_room() {
        let mut turns = Turns::default();
        let [gone, one] = [1, 2].map(Owner::Namespace);
        for _ in 0..10 {
            let (number, _) = turns.wait(&gone);
            turns.leave(&gone, number);
        }
        assert!(turns.waiting.is_empty());
        drop(turns.wait(&gone));
        let mut waiting = turns.wait(&one).1;
        assert_eq!((turns.give(7), waiting.try_recv()), (Ok(()), Ok(7)));
        assert_eq!((turns.give(8), turns.waiting.len()), (Err(8), 0));
        let mut waiting = turns.wait(&one).1;
        turns.end();
        assert_eq!(waiting.try_recv(), Err(oneshot::error::TryRecvError::Closed));
    }
}
