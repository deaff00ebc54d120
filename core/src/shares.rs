//! A bound on what owners share, bytes or things, such that nobody takes another's part. [`ledger`] counts by owner.
//!
//! Each owner may hold its least whatever the others hold. Beyond that it may hold a part of what all have left of the
//! budget, so that something is always left for the next, and so that of several who ask for ever more the one that
//! holds most is refused first (the dynamic threshold of Choudhury and Hahne, 1998).

pub mod ledger;

/// The bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    /// What all owners together may hold beyond the least of each.
    pub budget: u64,
    /// What each owner may hold at any time.
    pub least: u64,
    /// An owner may hold this part of what is left, beyond its least: 1 for all of it, 8 for an eighth.
    pub part: u64,
}

impl Shares {
    /// How much of what an owner holds counts against the budget.
    pub const fn beyond(&self, held: u64) -> u64 {
        held.saturating_sub(self.least)
    }

    /// Whether an owner may hold `held` where all owners, it with them, hold `beyond` of the budget then.
    pub const fn allows(&self, held: u64, beyond: u64) -> bool {
        held <= self.least || self.beyond(held) <= self.budget.saturating_sub(beyond) / self.part
    }

    /// What one of `owners` that all hold as much as they may gets beyond its least.
    pub const fn equal_part(&self, owners: u64) -> u64 {
        self.budget / (self.part + owners)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const SHARES: Shares = Shares { budget: 10_000, least: 100, part: 2 };

    #[derive(Default)]
    struct Ledger(BTreeMap<u8, u64>);

    impl Ledger {
        fn beyond(&self) -> u64 {
            self.0.values().map(|held| SHARES.beyond(*held)).sum()
        }

        fn take(&mut self, owner: u8, n: u64) -> bool {
            let before = self.0.get(&owner).copied().unwrap_or(0);
            self.0.insert(owner, before + n);
            let allowed = SHARES.allows(before + n, self.beyond());
            if !allowed {
                self.0.insert(owner, before);
            }
            allowed
        }
    }

    proptest! {
        /// Whatever owners take and give back in whatever order: the budget holds, nobody is refused its least, and
        /// there is always something for one who comes new.
        #[test]
        fn nobody_takes_anothers_part(steps in prop::collection::vec((any::<bool>(), 1..6_u8, 1..3000_u64), 0..200)) {
            let mut ledger = Ledger::default();
            for (takes, owner, n) in steps {
                if takes {
                    let before = ledger.0.get(&owner).copied().unwrap_or(0);
                    let taken = ledger.take(owner, n);
                    prop_assert!(taken || before + n > SHARES.least);
                } else if let Some(held) = ledger.0.get_mut(&owner) {
                    *held = held.saturating_sub(n);
                }
                prop_assert!(ledger.beyond() < SHARES.budget);
                let left = SHARES.budget - ledger.beyond();
                prop_assert!(Ledger(ledger.0.clone()).take(9, SHARES.least + left / (SHARES.part + 1)));
            }
        }

        /// Owners that ask for ever more, while what they hold drains as a queue does, come to equal parts: one who began
        /// first, or asks more often, has no more for it.
        #[test]
        fn the_largest_holder_is_refused_first(eager in 2..20_u64, early in 0..2000_u64) {
            let mut ledger = Ledger::default();
            for _ in 0..early {
                ledger.take(0, 10);
            }
            for round in 0..4000_u64 {
                for owner in 0..4_u8 {
                    let times = if owner == 0 { eager } else { 2 };
                    (0..times).for_each(|_| { ledger.take(owner, 10); });
                }
                // One datagram leaves each queue.
                for held in ledger.0.values_mut() {
                    *held = held.saturating_sub(10 * (1 + round % 2));
                }
            }
            let equal = SHARES.least + SHARES.equal_part(4);
            for (owner, held) in &ledger.0 {
                prop_assert!(held.abs_diff(equal) <= equal / 8, "{owner} holds {held}, and {equal} is its part");
            }
        }
    }
}
