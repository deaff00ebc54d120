use proptest::prelude::*;

use super::*;

const SHARES: Shares = Shares { budget: 1000, least: 10, part: 1 };

fn router(cluster: &str, node: u8) -> RouterId {
    RouterId { cluster: cluster.parse().unwrap(), node: format!("n{node}").parse().unwrap() }
}

/// Of routers: those of a.local have a number below 10, and each has two consumers, the first of which it does not tell
/// apart from itself.
fn owner(number: u8) -> Owner {
    let home = "a.local".parse().unwrap();
    let of_router = |cluster| {
        let consumer = (number % 2 == 1).then_some(number.into());
        Owner::peer(&router(cluster, number / 2), &home).for_consumer(consumer)
    };
    match number {
        0 | 1 => Owner::Namespace(number.into()),
        2 => Owner::Process(7),
        3 => Owner::Conversation(7),
        4..8 => of_router("a.local"),
        8..12 => of_router("b.local"),
        _ => of_router("c.local"),
    }
}

/// As the ledger, by a look at everything each time.
#[derive(Default)]
struct Model(BTreeMap<u8, u64>);

impl Model {
    fn held(&self, number: u8) -> u64 {
        self.0.get(&number).copied().unwrap_or(0)
    }

    fn sum(&self, numbers: std::ops::Range<u8>) -> u64 {
        numbers.map(|number| self.held(number)).sum()
    }

    /// What counts with an owner, from its outermost level on.
    fn levels(&self, number: u8) -> Vec<u64> {
        let router = self.sum(number & !1..(number & !1) + 2);
        let consumer = (number % 2 == 1).then(|| self.held(number));
        match number {
            0..4 => vec![self.held(number)],
            4..8 => [Some(router), consumer].into_iter().flatten().collect(),
            8..12 => [Some(self.sum(8..12)), Some(router), consumer].into_iter().flatten().collect(),
            _ => [Some(self.sum(12..16)), Some(router), consumer].into_iter().flatten().collect(),
        }
    }

    fn beyond(&self) -> u64 {
        [0, 1, 2, 3, 4, 6, 8, 12].map(|first| self.levels(first)[0].saturating_sub(SHARES.least)).iter().sum()
    }

    fn take(&mut self, number: u8, n: u64) -> bool {
        let before = self.held(number);
        self.0.insert(number, before + n);
        let left = SHARES.budget.saturating_sub(self.beyond());
        let fits = |(depth, held): (usize, u64)| {
            held <= SHARES.least || held - SHARES.least <= left / (SHARES.part << depth)
        };
        let allowed = self.levels(number).into_iter().enumerate().all(fits);
        if !allowed {
            self.0.insert(number, before);
        }
        allowed
    }
}

proptest! {
    /// Whatever owners take and give back: it is as the model says, the budget holds, who has not its least gets it, and
    /// there is always something for one who comes new.
    #[test]
    fn nobody_takes_anothers_part(steps in prop::collection::vec((any::<bool>(), 0..16_u8, 1..400_u64), 0..200)) {
        let (mut ledger, mut model) = (Ledger::new(SHARES), Model::default());
        for (takes, number, n) in steps {
            let owner = owner(number);
            if takes {
                let room = ledger.room(&owner, 2000);
                let taken = ledger.take(&owner, n);
                prop_assert_eq!(taken, model.take(number, n));
                prop_assert_eq!(taken, n <= room);
                prop_assert!(taken || model.levels(number)[0] + n > SHARES.least);
            } else {
                let n = n.min(model.held(number));
                ledger.give(&owner, n);
                model.0.insert(number, model.held(number) - n);
            }
            prop_assert_eq!(ledger.held(&owner), *model.levels(number).last().unwrap());
            prop_assert_eq!((ledger.total(), ledger.beyond), (model.0.values().sum(), model.beyond()));
            prop_assert!(ledger.beyond < SHARES.budget);
            let left = SHARES.budget - ledger.beyond;
            prop_assert!(ledger.room(&Owner::Namespace(99), u64::MAX - 1) >= SHARES.least + left / 2);
        }
        for number in 0..16 {
            ledger.give(&owner(number), model.held(number));
        }
        prop_assert!(ledger.held.is_empty());
        prop_assert_eq!((ledger.total(), ledger.beyond), (0, 0));
    }
}

fn take_all(ledger: &mut Ledger, owner: &Owner) -> u64 {
    std::iter::repeat_with(|| ledger.take(owner, 1)).take_while(|taken| *taken).count() as u64
}

#[test]
fn who_takes_all_it_can_gets_half_and_the_next_half_of_the_rest() {
    let mut ledger = Ledger::new(SHARES);
    assert_eq!(take_all(&mut ledger, &owner(0)), 510);
    assert_eq!(take_all(&mut ledger, &owner(1)), 260);
    assert_eq!(take_all(&mut ledger, &owner(4)), 135);
    ledger.give(&owner(0), 510);
    assert_eq!(take_all(&mut ledger, &owner(2)), 10 + (1000 - 250 - 125) / 2);
}

#[test]
fn many_names_of_one_authority_take_no_more_than_one_owner() {
    let home = "a.local".parse().unwrap();
    let mut ledger = Ledger::new(SHARES);
    let names = (0..100).map(|node| Owner::peer(&router("b.local", node), &home));
    let taken: Vec<_> = names.map(|name| take_all(&mut ledger, &name)).collect();
    assert_eq!(taken.iter().sum::<u64>(), 510);
    // One that takes all it can leaves the next of its cluster something.
    assert!(taken[0] < 350 && taken[1] > 80, "{taken:?}");
    assert_eq!(take_all(&mut ledger, &owner(12)), 10 + 500 / 3);
    assert_eq!(take_all(&mut ledger, &owner(4)), 10 + (500 - 500 / 3) / 2);
}

#[test]
fn a_consumer_of_a_router_that_takes_all_it_can_leaves_its_other_consumers_something() {
    for (first, most) in [(5, 10 + 1000 / 3), (9, 10 + 1000 / 5)] {
        let mut ledger = Ledger::new(SHARES);
        let consumer = |number| owner(first).for_consumer(Some(number));
        assert_eq!(take_all(&mut ledger, &consumer(1)), most);
        assert!(take_all(&mut ledger, &consumer(2)) >= 100);
        assert!(take_all(&mut ledger, &owner(0)) > 250);
    }
}

#[test]
fn where_there_is_less_than_was_thought_the_largest_waits() {
    let mut ledger = Ledger::new(SHARES);
    let (many, few, none) = (owner(0), owner(1), owner(2));
    assert!(ledger.gives_way(&many), "alone it is the largest");
    assert!(ledger.take(&many, 300) && ledger.take(&few, 9));
    assert_eq!([&many, &few, &none].map(|owner| ledger.gives_way(owner)), [true, false, false]);
    assert!(ledger.take(&few, 1));
    assert!(ledger.gives_way(&few), "it has its least");
}

#[test]
fn whoever_holds_most_gives_back_first_whatever_it_calls_itself() {
    let mut ledger = Ledger::new(SHARES);
    let (own, pod) = (owner(4), owner(0));
    let names = [owner(12), owner(14)];
    assert!(ledger.take(&own, 20) && names.iter().all(|name| ledger.take(name, 15)));
    assert!(names.iter().all(|name| ledger.gives_back(name)) && !ledger.gives_back(&own));
    assert_eq!((ledger.held(&names[0]), ledger.held_with(&names[0])), (15, 30));
    // What each may have in any case it keeps.
    names.iter().for_each(|name| ledger.give(name, 15));
    assert!(ledger.gives_back(&own) && !ledger.gives_back(&pod));
    ledger.give(&own, 10);
    assert!(!ledger.gives_back(&own));
}

#[test]
fn it_is_said_whose_bound_is_reached() {
    let shares = Shares { budget: 90, least: 1, part: 1 };
    let (home, of_m): (ClusterName, ClusterName) = ("a.local".parse().unwrap(), "m.local".parse().unwrap());
    let peer = |node: &str| {
        let node = node.parse().unwrap();
        Owner::peer(&RouterId { cluster: of_m.clone(), node }, &home)
    };
    let mut ledger = Ledger::with_most(shares, 80);
    let (one, new) = (peer("m-1"), peer("new"));
    assert_eq!(ledger.full(&one), Full::None);
    while ledger.take(&one, 1) {}
    assert_eq!(ledger.full(&one), Full::Owner(ledger.held(&one)));
    assert_eq!(ledger.full(&new), Full::None);
    for node in 0..40 {
        ledger.take(&peer(&format!("n-{node}")), 1);
    }
    let held = ledger.total();
    assert_eq!((ledger.full(&new), ledger.held(&new)), (Full::Cluster(of_m.clone(), held), 0));
    while ledger.take(&Owner::Namespace(1), 1) {}
    (2..80).for_each(|pod| {
        ledger.take(&Owner::Namespace(pod), 1);
    });
    assert_eq!(ledger.full(&Owner::Namespace(99)), Full::All(80));
}

#[test]
fn as_many_as_somebody_likes_leave_a_second_to_whoever_holds_one() {
    let mut ledger = Ledger::with_successors(Shares { budget: 8, least: 4, part: 1 }, 20);
    let honest = Owner::Namespace(1000);
    assert!(ledger.take(&honest, 1));
    // Each has four where it can.
    let others: Vec<_> = (0..50).map(Owner::Namespace).collect();
    let taken = others.iter().map(|other| take_all(&mut ledger, other)).sum::<u64>();
    assert_eq!(taken, 18);
    assert_eq!((ledger.full(&Owner::Namespace(1001)), ledger.full(&honest)), (Full::All(19), Full::None));
    assert!(ledger.take(&honest, 1) && !ledger.take(&honest, 1));
    // The earlier one is gone, and the next restart is as sure.
    ledger.give(&honest, 1);
    assert!(others.iter().all(|other| take_all(&mut ledger, other) == 0));
    assert!(ledger.take(&honest, 1));
}

proptest! {
    #[test]
    fn whoever_holds_one_may_take_another(steps in prop::collection::vec((any::<bool>(), 0..24_u64), 0..200)) {
        let mut ledger = Ledger::with_successors(Shares { budget: 8, least: 4, part: 1 }, 20);
        for (takes, number) in steps {
            let owner = Owner::Namespace(number);
            if takes {
                ledger.take(&owner, 1);
            } else {
                ledger.give(&owner, 1);
            }
            let all = || (0..24).map(Owner::Namespace);
            let singles = all().filter(|owner| ledger.held(owner) == 1).count() as u64;
            prop_assert!(ledger.total() + singles <= 20);
            prop_assert!(all().all(|owner| ledger.held(&owner) != 1 || ledger.allows(&owner, 1)));
        }
    }
}
