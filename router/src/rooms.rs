//! What the bytes that this router holds for others count against: each by its owner, so that who holds too much is
//! refused alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use servicekeel_core::flow::machine::WINDOW;
use servicekeel_core::shares::Shares;

/// Bytes that flows have on their way unacknowledged, by peer, beside what each flow has of its own: the other
/// router holds them where its application does not read.
const ON_WAY: Shares = Shares { budget: 256 << 20, least: 4 * WINDOW, part: 2 };
/// Bytes that came for applications which take nothing, by the peer that sent them. One flow of each has its window.
const HELD: Shares = Shares { budget: 64 << 20, least: WINDOW + (1 << 20), part: 2 };
/// Datagrams that wait, by the pod or the peer that sent them. The largest always finds room.
const DATAGRAMS: Shares = Shares { budget: 64 << 20, least: 256 << 10, part: 8 };

/// The rooms of one router.
#[derive(Debug)]
pub(crate) struct Rooms {
    pub(crate) on_way: Arc<Room>,
    pub(crate) held: Arc<Room>,
    pub(crate) datagrams: Arc<Room>,
}

impl Default for Rooms {
    fn default() -> Self {
        Self { on_way: Room::new(ON_WAY), held: Room::new(HELD), datagrams: Room::new(DATAGRAMS) }
    }
}

/// A bound that accounts share.
#[derive(Debug)]
pub(crate) struct Room {
    shares: Shares,
    beyond: AtomicU64,
}

impl Room {
    pub(crate) fn new(shares: Shares) -> Arc<Self> {
        Arc::new(Self { shares, beyond: AtomicU64::new(0) })
    }

    /// The account of one more owner.
    pub(crate) fn account(self: &Arc<Self>) -> Arc<Account> {
        Arc::new(Account { room: self.clone(), held: AtomicU64::new(0) })
    }
}

/// What one owner holds.
#[derive(Debug)]
pub(crate) struct Account {
    room: Arc<Room>,
    held: AtomicU64,
}

impl Account {
    /// Takes so many bytes, where the owner may hold them.
    pub(crate) fn take(&self, n: u64) -> bool {
        let shares = &self.room.shares;
        // Each step sees a state of its own, so the sum of what is added and taken away is what is held.
        let held = self.held.fetch_add(n, Relaxed) + n;
        let more = shares.beyond(held) - shares.beyond(held - n);
        let beyond = self.room.beyond.fetch_add(more, Relaxed) + more;
        let allowed = shares.allows(held, beyond);
        if !allowed {
            self.give(n);
        }
        allowed
    }

    pub(crate) fn give(&self, n: u64) {
        let shares = &self.room.shares;
        let held = self.held.fetch_sub(n, Relaxed);
        self.room.beyond.fetch_sub(shares.beyond(held) - shares.beyond(held - n), Relaxed);
    }

    /// Takes so many bytes until what is returned is dropped.
    pub(crate) fn lease(self: &Arc<Self>, n: u64) -> Option<Lease> {
        self.take(n).then(|| Lease { account: self.clone(), n })
    }

    /// Bytes that are held now.
    pub(crate) fn held(&self) -> u64 {
        self.held.load(Relaxed)
    }

    /// How many more bytes the owner could take now.
    pub(crate) fn left(&self) -> u64 {
        let shares = &self.room.shares;
        let left = shares.budget.saturating_sub(self.room.beyond.load(Relaxed)) / shares.part;
        (shares.least + left).saturating_sub(self.held())
    }
}

/// Bytes of an account. Dropped, they are given back.
#[derive(Debug)]
pub(crate) struct Lease {
    account: Arc<Account>,
    n: u64,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.account.give(self.n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_by_many_threads_is_given_back() {
        let room = Room::new(Shares { budget: 100_000, least: 1000, part: 2 });
        std::thread::scope(|scope| {
            for owner in 0..8_u64 {
                let account = room.account();
                scope.spawn(move || {
                    for i in 0..20_000 {
                        let leases: Vec<_> =
                            (0..4).map(|k| account.lease(owner * 100 + i % 700 + k)).collect();
                        drop(leases);
                    }
                    assert_eq!(account.held(), 0);
                });
            }
        });
        assert_eq!(room.beyond.load(Relaxed), 0);
    }

    #[test]
    fn an_owner_that_holds_all_it_may_leaves_room_for_the_next() {
        let room = Room::new(DATAGRAMS);
        let (hog, other) = (room.account(), room.account());
        while hog.take(65_000) {}
        assert!(hog.held() <= DATAGRAMS.least + DATAGRAMS.equal_part(1) + 65_000);
        assert!((0..50).all(|_| other.take(65_000)), "another is refused");
    }
}
