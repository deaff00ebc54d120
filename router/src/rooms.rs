//! What the bytes that this router holds for others count against: each by its owner, so that who holds too much is
//! refused alone.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use servicekeel_core::flow::machine::WINDOW;
use servicekeel_core::name::{ClusterName, RouterId};
use servicekeel_core::shares::Shares;

use crate::bounds::Owner;

/// Bytes that flows have on their way unacknowledged, by peer, beside what each flow has of its own: the other
/// router holds them where its application does not read.
const ON_WAY: Shares = Shares { budget: 256 << 20, least: 4 * WINDOW, part: 2 };
/// Bytes that came for applications which take nothing, by the peer that sent them. One flow of each has its window.
const HELD: Shares = Shares { budget: 64 << 20, least: WINDOW + (1 << 20), part: 2 };
/// Frames that have begun and not ended, by the peer that sends them, on connections that wait for one.
const BEGUN: Shares = Shares { budget: 64 << 20, least: 1 << 20, part: 2 };
/// Datagrams that wait, by the pod or the peer that sent them. The largest always finds room.
const DATAGRAMS: Shares = Shares { budget: 64 << 20, least: 256 << 10, part: 8 };

/// The names and rules of imports and exports, by the pod whose they are.
const OFFERS: Shares = Shares { budget: 256 << 20, least: 64 << 10, part: 1 };

/// The rooms of one router.
#[derive(Debug)]
pub(crate) struct Rooms {
    pub(crate) on_way: Arc<Room>,
    pub(crate) held: Arc<Room>,
    pub(crate) begun: Arc<Room>,
    pub(crate) datagrams: Arc<Room>,
    pub(crate) offers: Arc<Room>,
}

impl Default for Rooms {
    fn default() -> Self {
        Self {
            on_way: Room::new(ON_WAY),
            held: Room::new(HELD),
            begun: Room::new(BEGUN),
            datagrams: Room::new(DATAGRAMS),
            offers: Room::new(OFFERS),
        }
    }
}

/// A bound that accounts share.
#[derive(Debug)]
pub(crate) struct Room {
    shares: Shares,
    beyond: AtomicU64,
    /// Those of pods: all conversations of one owner have one.
    pods: Mutex<BTreeMap<Owner, Weak<Account>>>,
    /// What all routers of another cluster hold.
    clusters: Mutex<BTreeMap<ClusterName, Weak<Account>>>,
}

impl Room {
    pub(crate) fn new(shares: Shares) -> Arc<Self> {
        Arc::new(Self {
            shares,
            beyond: AtomicU64::new(0),
            pods: Mutex::default(),
            clusters: Mutex::default(),
        })
    }

    /// The account of one more owner.
    pub(crate) fn account(self: &Arc<Self>) -> Arc<Account> {
        Arc::new(Account { room: self.clone(), held: AtomicU64::new(0), around: None })
    }

    /// The account of a pod.
    pub(crate) fn account_of_pod(self: &Arc<Self>, pod: &Owner) -> Arc<Account> {
        let mut accounts = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(account) = accounts.get(pod).and_then(Weak::upgrade) {
            return account;
        }
        accounts.retain(|_, account| account.strong_count() > 0);
        let account = self.account();
        accounts.insert(pod.clone(), Arc::downgrade(&account));
        account
    }

    /// The account of a router. All routers of one other cluster are within one, where each has half the part of that.
    pub(crate) fn account_of(self: &Arc<Self>, router: &Owner) -> Arc<Account> {
        let Owner::Foreign(RouterId { cluster, .. }, _) = router else { return self.account() };
        let mut clusters = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        let known = clusters.get(cluster).and_then(Weak::upgrade);
        let around = known.unwrap_or_else(|| {
            clusters.retain(|_, account| account.strong_count() > 0);
            let account = self.account();
            clusters.insert(cluster.clone(), Arc::downgrade(&account));
            account
        });
        Arc::new(Account { room: self.clone(), held: AtomicU64::new(0), around: Some(around) })
    }
}

/// What one owner holds.
#[derive(Debug)]
pub(crate) struct Account {
    room: Arc<Room>,
    held: AtomicU64,
    /// What it holds counts there.
    around: Option<Arc<Account>>,
}

impl Account {
    fn shares(&self) -> Shares {
        let shares = self.room.shares;
        if self.around.is_some() { Shares { part: 2 * shares.part, ..shares } } else { shares }
    }

    /// Takes so many bytes, where the owner may hold them.
    pub(crate) fn take(&self, n: u64) -> bool {
        let shares = self.shares();
        if let Some(around) = &self.around {
            if !around.take(n) {
                return false;
            }
            let held = self.held.fetch_add(n, Relaxed) + n;
            let allowed = shares.allows(held, self.room.beyond.load(Relaxed));
            if !allowed {
                self.give(n);
            }
            return allowed;
        }
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
        let held = self.held.fetch_sub(n, Relaxed);
        if let Some(around) = &self.around {
            return around.give(n);
        }
        let shares = &self.room.shares;
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
        let shares = self.shares();
        let left = shares.budget.saturating_sub(self.room.beyond.load(Relaxed)) / shares.part;
        let around = self.around.as_ref().map_or(u64::MAX, |around| around.left());
        (shares.least + left).saturating_sub(self.held()).min(around)
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
    fn the_conversations_of_one_pod_have_one_account() {
        let rooms = Rooms::default();
        let [first, second, other] =
            [1, 1, 2].map(|pod| rooms.datagrams.account_of_pod(&Owner::Namespace(pod)));
        while first.take(65_000) {}
        assert!(!second.take(65_000) && other.take(65_000));
        drop((first, second));
        assert_eq!(rooms.datagrams.account_of_pod(&Owner::Namespace(1)).held(), 0);
        assert_eq!(rooms.datagrams.pods.lock().unwrap().len(), 2);
    }

    #[test]
    fn many_names_of_another_cluster_hold_no_more_than_one_owner() {
        let home = "a.local".parse().unwrap();
        let router = |cluster: &str, n: usize| {
            let node = format!("n{n}").parse().unwrap();
            Owner::peer(&RouterId { cluster: cluster.parse().unwrap(), node }, &home)
        };
        for shares in [ON_WAY, HELD, BEGUN, DATAGRAMS] {
            let room = Room::new(shares);
            let names: Vec<_> = (0..200).map(|n| room.account_of(&router("m.local", n))).collect();
            let first = (0..).take_while(|_| names[0].take(16_384)).count();
            names[1..].iter().for_each(|name| while name.take(16_384) {});
            let held: u64 = names.iter().map(|name| name.held()).sum();
            assert!(held <= shares.least + shares.equal_part(1) + 16_384, "{held} of {shares:?}");
            assert!(held > first as u64 * 16_384, "one name has all that its cluster may have");
            assert!(names.iter().all(|name| name.left() < 2 * 16_384));
            // Routers of the own cluster and of others have theirs.
            for other in [router("a.local", 1), router("b.local", 1)] {
                let other = room.account_of(&other);
                while other.take(16_384) {}
                assert!(other.held() + 16_384 > shares.least, "{}", other.held());
            }
            drop(names);
            assert!(room.account_of(&router("m.local", 0)).left() >= shares.least);
            let again = room.account_of(&router("m.local", 1));
            assert_eq!(again.around.as_ref().unwrap().held(), 0);
        }
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
