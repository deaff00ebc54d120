//! What owners hold of something that is bounded, counted by owner.
//!
//! The owner of what a pod does is its network namespace, which the kernel attests; the owner of what a peer does is its
//! name. One authority can make many names: those of another cluster have a bound together, too. And a peer opens flows
//! for many pods, which it tells apart by numbers of its own. So an owner is counted at up to three levels, and a level
//! further in has half the part of the one around it: one that takes all it can there leaves a part to the others that
//! share the level around it.

use std::collections::BTreeMap;

use super::Shares;
use crate::name::{ClusterName, RouterId};

/// Who holds something.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// The pods of one network namespace, by the kernel's number of it.
    Namespace(u64),
    /// A process of this node, where the kernel does not say its namespace.
    Process(i32),
    /// One conversation with a sidecar, where the kernel says neither.
    Conversation(u64),
    /// A router of this router's own cluster, or one of its consumers.
    Peer(RouterId, Option<u64>),
    /// A router of another cluster, or one of its consumers.
    Foreign(RouterId, Option<u64>),
}

impl Owner {
    /// The owner of what a router does, as one of `home` sees it.
    pub fn peer(id: &RouterId, home: &ClusterName) -> Self {
        if id.cluster == *home { Self::Peer(id.clone(), None) } else { Self::Foreign(id.clone(), None) }
    }

    /// The owner of what a router does for one of its consumers, by the router's own number of it.
    #[must_use]
    pub fn for_consumer(&self, number: Option<u64>) -> Self {
        match self {
            Self::Peer(id, _) => Self::Peer(id.clone(), number),
            Self::Foreign(id, _) => Self::Foreign(id.clone(), number),
            other => other.clone(),
        }
    }

    /// The outermost of those whose part it has: another cluster for each of its routers.
    pub fn of_whom(&self) -> String {
        match self {
            Self::Foreign(id, _) => id.cluster.to_string(),
            Self::Peer(id, _) => id.to_string(),
            Self::Namespace(number) => format!("network namespace {number}"),
            Self::Process(pid) => format!("process {pid}"),
            Self::Conversation(number) => format!("conversation {number}"),
        }
    }

    /// The number by which other routers tell what is a pod's of this node from what is another's.
    pub fn number(&self) -> Option<u64> {
        match self {
            Self::Namespace(number) | Self::Conversation(number) => Some(*number),
            Self::Process(pid) => Some(u64::from(pid.unsigned_abs())),
            Self::Peer(..) | Self::Foreign(..) => None,
        }
    }

    /// Where it is counted: at the outermost level first.
    fn levels(&self) -> impl Iterator<Item = Level> {
        let (cluster, router, consumer) = match self {
            Self::Peer(id, consumer) => (None, Some(Self::Peer(id.clone(), None)), *consumer),
            Self::Foreign(id, consumer) => {
                (Some(id.cluster.clone()), Some(Self::Foreign(id.clone(), None)), *consumer)
            }
            _ => (None, None, None),
        };
        let own = (router.is_none() || consumer.is_some()).then(|| self.clone());
        cluster.map(Level::Cluster).into_iter().chain(router.map(Level::Owner)).chain(own.map(Level::Owner))
    }
}

/// Where something is counted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    /// All routers of another cluster.
    Cluster(ClusterName),
    /// One owner; a router, with all its consumers.
    Owner(Owner),
}

impl Level {
    const fn is_outermost(&self) -> bool {
        matches!(
            self,
            Self::Cluster(_)
                | Self::Owner(
                    Owner::Namespace(_) | Owner::Process(_) | Owner::Conversation(_) | Owner::Peer(_, None)
                )
        )
    }
}

/// Whose bound it is that keeps an owner from taking more, and how much is held there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Full {
    /// All owners together.
    All(u64),
    /// All routers of another cluster.
    Cluster(ClusterName, u64),
    /// The owner alone; of a router, with all its consumers.
    Owner(u64),
    /// None: there is room, if not for each of its consumers.
    None,
}

/// Who holds how much. What holds nothing takes no room here.
#[derive(Debug)]
pub struct Ledger {
    shares: Shares,
    held: BTreeMap<Level, u64>,
    total: u64,
    beyond: u64,
    most: u64,
    /// Owners that hold one and are sure of another; `None` where nobody is.
    singles: Option<u64>,
}

impl Ledger {
    /// Nobody holds anything.
    pub const fn new(shares: Shares) -> Self {
        Self::with_most(shares, u64::MAX)
    }

    /// All owners together hold no more than `most`, be it the least of each: where owners can be made at will, their
    /// leasts have no bound. Whoever holds something keeps it.
    pub const fn with_most(shares: Shares, most: u64) -> Self {
        Self { shares, held: BTreeMap::new(), total: 0, beyond: 0, most, singles: None }
    }

    /// As [`Ledger::with_most`], where whoever holds one is sure of a second beside it, so that what takes its place need
    /// not wait until it is given back. That is within `most`, of which one place is kept for each who holds one.
    pub fn with_successors(shares: Shares, most: u64) -> Self {
        Self { singles: Some(0), ..Self::with_most(shares, most) }
    }

    /// Whether an owner may hold so much more.
    pub fn allows(&self, owner: &Owner, more: u64) -> bool {
        self.has_place(owner, more) && self.full_level(owner, more).is_none()
    }

    /// Whether all together may hold so much more, for this owner.
    fn has_place(&self, owner: &Owner, more: u64) -> bool {
        let held = self.held(owner);
        let kept = self.singles_after(held, held.saturating_add(more)).unwrap_or(0);
        self.total.saturating_add(more).saturating_add(kept) <= self.most
    }

    /// How many hold one where one of them, that held `before`, holds `after`.
    fn singles_after(&self, before: u64, after: u64) -> Option<u64> {
        Some(self.singles? + u64::from(after == 1) - u64::from(before == 1))
    }

    /// The outermost level at which an owner may not hold so much more.
    fn full_level(&self, owner: &Owner, more: u64) -> Option<Level> {
        let (mut beyond, mut shares) = (None, self.shares);
        owner.levels().find(|level| {
            let before = self.counted(level);
            let rises = || self.beyond + shares.beyond(before + more) - shares.beyond(before);
            let allowed = shares.allows(before + more, *beyond.get_or_insert_with(rises));
            shares.part *= 2;
            !allowed
        })
    }

    /// Why an owner may take no more.
    pub fn full(&self, owner: &Owner) -> Full {
        if !self.has_place(owner, 1) {
            return Full::All(self.total);
        }
        let Some(level) = self.full_level(owner, 1) else { return Full::None };
        let held = self.counted(&level);
        match level {
            Level::Cluster(cluster) => Full::Cluster(cluster, held),
            Level::Owner(_) => Full::Owner(held),
        }
    }

    /// Takes so much, where the owner may hold it.
    pub fn take(&mut self, owner: &Owner, more: u64) -> bool {
        let allowed = self.allows(owner, more);
        if allowed {
            self.owe(owner, more);
        }
        allowed
    }

    /// Counts so much, be it more than the owner may hold: for what it holds in any case. It gets no more until it holds
    /// less again.
    pub fn owe(&mut self, owner: &Owner, more: u64) {
        if more == 0 {
            return;
        }
        let held = self.held(owner);
        self.singles = self.singles_after(held, held + more);
        self.total += more;
        for (number, level) in owner.levels().enumerate() {
            let held = self.held.entry(level).or_default();
            if number == 0 {
                self.beyond += self.shares.beyond(*held + more) - self.shares.beyond(*held);
            }
            *held += more;
        }
    }

    /// Gives back what was taken, or a part of it.
    pub fn give(&mut self, owner: &Owner, n: u64) {
        let held = self.held(owner);
        let n = n.min(held);
        if n > 0 {
            self.singles = self.singles_after(held, held - n);
        }
        self.total -= n;
        for (number, level) in owner.levels().enumerate() {
            let Some(held) = self.held.get_mut(&level) else { continue };
            if number == 0 {
                self.beyond -= self.shares.beyond(*held) - self.shares.beyond(*held - n);
            }
            *held -= n;
            if *held == 0 {
                self.held.remove(&level);
            }
        }
    }

    /// How much of `most` an owner may take now.
    pub fn room(&self, owner: &Owner, most: u64) -> u64 {
        let (mut room, mut over) = (0, most + 1);
        while over - room > 1 {
            let middle = room + (over - room) / 2;
            *(if self.allows(owner, middle) { &mut room } else { &mut over }) = middle;
        }
        room
    }

    /// What an owner holds; a router, with all its consumers.
    pub fn held(&self, owner: &Owner) -> u64 {
        owner.levels().last().map_or(0, |level| self.counted(&level))
    }

    /// Whether an owner holds no more than its least.
    pub fn is_modest(&self, owner: &Owner) -> bool {
        self.held(owner) <= self.shares.least
    }

    /// What an owner holds with all who share the outermost part with it.
    pub fn held_with(&self, owner: &Owner) -> u64 {
        owner.levels().next().map_or(0, |level| self.counted(&level))
    }

    /// What all hold.
    pub const fn total(&self) -> u64 {
        self.total
    }

    /// Whether an owner is to wait before any other where there is less than was thought: nobody holds more, or it has
    /// what each may have in any case.
    pub fn gives_way(&self, owner: &Owner) -> bool {
        let held = self.held(owner);
        let others = self.held.iter().filter(|(level, _)| matches!(level, Level::Owner(_)));
        held >= self.shares.least || others.into_iter().all(|(_, other)| *other <= held)
    }

    /// Whether an owner is the first to give back where there is less than was thought: it holds more than each may have in
    /// any case, and nobody holds more. All routers of another cluster count as one, and so do all consumers of a router.
    pub fn gives_back(&self, owner: &Owner) -> bool {
        let held = self.held_with(owner);
        let others = self.held.iter().filter(|(level, _)| level.is_outermost());
        held > self.shares.least && others.into_iter().all(|(_, other)| *other <= held)
    }

    fn counted(&self, level: &Level) -> u64 {
        self.held.get(level).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
