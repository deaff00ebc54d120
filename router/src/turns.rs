//! Who waits for something of which there is little: owners have it in turns, however many wait in the name of one.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};

use tokio::sync::oneshot;

use crate::bounds::Owner;

/// Those who wait: first those who share the outermost part have their turns, such as all routers of another cluster, and
/// among these each owner. Each of an owner's has a number, in the order in which they came.
pub(crate) struct Turns<T> {
    waiting: Ring<String, Ring<Owner, BTreeMap<u64, oneshot::Sender<T>>>>,
    next: u64,
}

/// What has its turn one after the other.
struct Ring<K, V> {
    of: BTreeMap<K, V>,
    /// Which had it last.
    last: Option<K>,
}

impl<K, V> Default for Ring<K, V> {
    fn default() -> Self {
        Self { of: BTreeMap::new(), last: None }
    }
}

impl<K: Ord + Clone, V> Ring<K, V> {
    /// Whose turn it is: from now on it had it last.
    fn turn(&mut self) -> Option<&mut V> {
        let behind = self.last.as_ref().map_or(Unbounded, Excluded);
        let behind = self.of.range((behind, Unbounded)).next();
        self.last = behind.or_else(|| self.of.first_key_value()).map(|(key, _)| key.clone());
        self.last.as_ref().and_then(|key| self.of.get_mut(key))
    }

    /// Forgets one that is over.
    fn tidy(&mut self, key: &K, is_over: impl FnOnce(&V) -> bool) {
        if self.of.get(key).is_some_and(is_over) {
            self.of.remove(key);
        }
    }
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Self { waiting: Ring::default(), next: 0 }
    }
}

impl<T> Turns<T> {
    /// One more waits, until [`Turns::leave`] with the number that is returned.
    pub(crate) fn wait(&mut self, owner: &Owner) -> (u64, oneshot::Receiver<T>) {
        let (sender, receiver) = oneshot::channel();
        self.next += 1;
        let owners = self.waiting.of.entry(owner.of_whom()).or_default();
        owners.of.entry(owner.clone()).or_default().insert(self.next, sender);
        (self.next, receiver)
    }

    /// One waits no more, whether or not it was given something.
    pub(crate) fn leave(&mut self, owner: &Owner, number: u64) {
        let outer = owner.of_whom();
        if let Some(owners) = self.waiting.of.get_mut(&outer) {
            owners.of.get_mut(owner).and_then(|of_owner| of_owner.remove(&number));
            owners.tidy(owner, BTreeMap::is_empty);
        }
        self.waiting.tidy(&outer, |owners| owners.of.is_empty());
    }

    /// Gives something to the one whose turn it is.
    ///
    /// # Errors
    /// Nobody waits: it is given back.
    pub(crate) fn give(&mut self, mut thing: T) -> Result<(), T> {
        loop {
            let Some(owners) = self.waiting.turn() else { return Err(thing) };
            let first = owners.turn().and_then(BTreeMap::pop_first);
            if let Some(owner) = owners.last.clone() {
                owners.tidy(&owner, BTreeMap::is_empty);
            }
            if let Some(outer) = self.waiting.last.clone() {
                self.waiting.tidy(&outer, |owners| owners.of.is_empty());
            }
            let Some((_, sender)) = first else { continue };
            match sender.send(thing) {
                Ok(()) => return Ok(()),
                Err(back) => thing = back,
            }
        }
    }

    /// Nothing more will come: all who wait are told.
    pub(crate) fn end(&mut self) {
        self.waiting.of.clear();
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
        assert!(turns.waiting.of.is_empty());
        drop(turns.wait(&gone));
        let mut waiting = turns.wait(&one).1;
        assert_eq!((turns.give(7), waiting.try_recv()), (Ok(()), Ok(7)));
        assert_eq!((turns.give(8), turns.waiting.of.len()), (Err(8), 0));
        let mut waiting = turns.wait(&one).1;
        turns.end();
        assert_eq!(waiting.try_recv(), Err(oneshot::error::TryRecvError::Closed));
    }

    /// The number of a consumer is what its router says.
    #[test]
    fn a_peer_that_names_many_consumers_has_the_turns_of_one() {
        let mut turns = Turns::default();
        let peer = |n| Owner::Foreign(crate::peers::tests::id("b.local"), Some(n));
        let mut of_peer: Vec<_> = (0..100).map(|n| turns.wait(&peer(n)).1).collect();
        let mut of_pod = turns.wait(&Owner::Namespace(1)).1;
        turns.give(0).unwrap();
        turns.give(1).unwrap();
        assert!(of_pod.try_recv().is_ok());
        assert_eq!(of_peer.iter_mut().filter_map(|waiting| waiting.try_recv().ok()).count(), 1);
        // Its consumers have theirs among them.
        let mut second = turns.wait(&peer(0)).1;
        turns.give(2).unwrap();
        assert!(second.try_recv().is_err());
    }
}
