use proptest::prelude::*;

use super::*;
use crate::flow::frame::Cause;
use crate::mesh::exports::MAX_GONE;
use crate::name::Protocol;

fn port(cluster: &str, number: u16) -> ServicePort {
    ServicePort {
        service: crate::name::ServiceName {
            name: "web".parse().unwrap(),
            namespace: "default".parse().unwrap(),
            cluster: cluster.parse().unwrap(),
        },
        port: NonZeroU16::new(number).unwrap(),
        protocol: Protocol::Tcp,
    }
}

fn router(cluster: &str, node: &str) -> RouterId {
    RouterId { cluster: cluster.parse().unwrap(), node: node.parse().unwrap() }
}

fn endpoint(port: ServicePort, allow: Option<&[&str]>) -> Endpoint {
    let allow = allow.map(|rules| rules.iter().map(|rule| rule.parse().unwrap()).collect());
    Endpoint { target: port.port, port, allow }
}

fn new() -> Table {
    Table::new("a.local".parse().unwrap())
}

/// To its end; in how many steps.
fn link_down(table: &mut Table, link: LinkId) -> usize {
    std::iter::repeat_with(|| table.link_down(link)).take_while(|more| *more).count() + 1
}

fn idle(_: &Candidate) -> usize {
    0
}

/// A port that this node offers, and another one of its cluster.
fn here_and_on_n2(port: &ServicePort) -> (Table, Candidate, Candidate) {
    let (n2, mut table) = (router("a.local", "n2"), new());
    table.offer(&n2, 1, port.clone()).unwrap();
    table.add(7, endpoint(port.clone(), None));
    (table, Candidate::Local(7), Candidate::Remote(n2))
}

#[test]
fn this_node_comes_first_and_a_failing_one_last() {
    let (a, now) = (port("a.local", 80), Instant::now());
    let cluster = "a.local".parse().unwrap();
    let consumer = Consumer { cluster: &cluster, namespace: None };
    let (mut table, local, remote) = here_and_on_n2(&a);
    assert_eq!(table.candidates(&a, consumer, now, 3, idle), [local.clone(), remote.clone()]);
    let fails = Outcome::Refused;
    assert_eq!(table.report(&a, &local, fails, "Connection refused", now), Turn::Fails);
    assert_eq!(table.candidates(&a, consumer, now, 3, idle), [remote.clone(), local.clone()]);
    let later = now + FIRST_BACKOFF;
    assert_eq!(table.candidates(&a, consumer, later, 3, idle), [local.clone(), remote.clone()]);
    assert_eq!(table.report(&a, &local, fails, &"é".repeat(200), now), Turn::None);
    let failure = table.failure(&a, &local).unwrap();
    assert_eq!((failure.times, failure.reason.len()), (2, 256));
    assert_eq!(table.candidates(&a, consumer, later, 3, idle), [remote.clone(), local.clone()]);
    assert_eq!(table.report(&a, &local, Outcome::Taken, "", now), Turn::Recovers(2));
    assert!(table.failure(&a, &local).is_none());
    assert_eq!(table.candidates(&a, consumer, now, 3, idle), [local, remote]);
}

#[test]
fn a_refusal_for_policy_or_for_want_of_room_is_no_failure_and_is_avoided_for_a_moment() {
    let (a, now) = (port("a.local", 80), Instant::now());
    let cluster = "a.local".parse().unwrap();
    let consumer = Consumer { cluster: &cluster, namespace: None };
    let (mut table, local, remote) = here_and_on_n2(&a);
    for _ in 0..20 {
        assert_eq!(table.report(&a, &local, Outcome::Rejected(Cause::Busy), "full", now), Turn::None);
    }
    assert!(table.failure(&a, &local).is_none());
    assert_eq!(table.candidates(&a, consumer, now, 3, idle), [remote.clone(), local.clone()]);
    assert_eq!(table.candidates(&a, consumer, now + FIRST_BACKOFF, 3, idle), [local.clone(), remote]);
    assert_eq!(table.report(&a, &local, Outcome::Taken, "", now), Turn::None);
}

#[test]
fn the_less_loaded_of_two_comes_first() {
    let (a, now) = (port("a.local", 80), Instant::now());
    let cluster = "a.local".parse().unwrap();
    let consumer = Consumer { cluster: &cluster, namespace: None };
    let mut table = new();
    table.add(1, endpoint(a.clone(), None));
    table.add(2, endpoint(a.clone(), None));
    for seed in 0..8 {
        let load = |c: &Candidate| usize::from(*c == Candidate::Local(1));
        assert_eq!(table.candidates(&a, consumer, now, seed, load)[0], Candidate::Local(2));
    }
}

#[test]
fn allow_rules_hide_an_endpoint() {
    let (a, now) = (port("a.local", 80), Instant::now());
    let mut table = new();
    table.add(1, endpoint(a.clone(), Some(&["b.local/prod"])));
    let (b, prod) = ("b.local".parse().unwrap(), "prod".parse().unwrap());
    let attested = Consumer { cluster: &b, namespace: Some(&prod) };
    let unknown = Consumer { cluster: &b, namespace: None };
    assert_eq!(table.permits(&a, attested), Some(true));
    assert_eq!(table.permits(&a, unknown), Some(false));
    assert_eq!(table.permits(&port("a.local", 81), unknown), None);
    assert_eq!(table.local_candidates(&a, unknown, now, 0, idle), []);
    assert_eq!(table.local_candidates(&a, attested, now, 0, idle), [Candidate::Local(1)]);
}

#[test]
fn a_router_speaks_for_its_own_cluster_and_within_bounds() {
    let mut table = new();
    let b = router("b.local", "n1");
    let foreign = table.offer(&b, 1, port("a.local", 80));
    assert!(matches!(foreign, Err(OfferError::Foreign(..))));
    for i in 1..=MAX_OFFERS {
        table.offer(&b, 1, port("b.local", i as u16)).unwrap();
    }
    let more = port("b.local", 60_000);
    assert!(matches!(table.offer(&b, 1, more), Err(OfferError::TooMany(_))));
    table.offer(&b, 1, port("b.local", 1)).unwrap();
    assert!(link_down(&mut table, 1) > 1);
    assert!(table.offers.is_empty());
}

#[derive(Debug, Clone)]
enum Step {
    Offer(usize, LinkId, u16),
    Withdraw(usize, LinkId, u16),
    Down(LinkId),
    Fail(usize, u16),
}

fn step() -> impl Strategy<Value = Step> {
    let (r, p) = (0..3_usize, 1..4_u16);
    prop_oneof![
        (r.clone(), 0..2_u64, p.clone()).prop_map(|(r, l, p)| Step::Offer(r, r as u64 * 2 + l, p)),
        (r.clone(), 0..2_u64, p.clone()).prop_map(|(r, l, p)| Step::Withdraw(r, r as u64 * 2 + l, p)),
        (0..6_u64).prop_map(Step::Down),
        (r, p).prop_map(|(r, p)| Step::Fail(r, p)),
    ]
}

proptest! {
    /// A neighbour is a candidate exactly while one of its links offers the port, and nothing of a link that is
    /// down is kept.
    #[test]
    fn candidates_are_what_live_links_offer(steps in prop::collection::vec(step(), 0..60)) {
        let routers: Vec<RouterId> = ["x", "y", "z"].iter().map(|n| router("b.local", n)).collect();
        let cluster = "a.local".parse().unwrap();
        let consumer = Consumer { cluster: &cluster, namespace: None };
        let (now, mut table) = (Instant::now(), new());
        let mut model = std::collections::BTreeSet::new();
        for step in steps {
            match step {
                Step::Offer(r, l, p) => {
                    table.offer(&routers[r], l, port("b.local", p)).unwrap();
                    model.insert((r, l, p));
                }
                Step::Withdraw(r, l, p) => {
                    table.withdraw(&routers[r], l, &port("b.local", p));
                    model.remove(&(r, l, p));
                }
                Step::Down(l) => {
                    link_down(&mut table, l);
                    model.retain(|(_, link, _)| *link != l);
                }
                Step::Fail(r, p) => {
                    let candidate = Candidate::Remote(routers[r].clone());
                    table.report(&port("b.local", p), &candidate, Outcome::Silent, "", now);
                }
            }
            for p in 1..4 {
                let mut got = table.candidates(&port("b.local", p), consumer, now, 5, idle);
                got.sort();
                let want: std::collections::BTreeSet<_> =
                    model.iter().filter(|(_, _, q)| *q == p).map(|(r, _, _)| *r).collect();
                let want: Vec<_> = want.into_iter().map(|r| Candidate::Remote(routers[r].clone())).collect();
                prop_assert_eq!(got, want);
            }
        }
        for l in 0..6 {
            link_down(&mut table, l);
        }
        prop_assert!(table.offers.is_empty() && table.failing.is_empty());
    }
}

#[test]
fn what_a_neighbour_holds_is_bounded_by_link_and_by_neighbour() {
    let mut table = new();
    let b = router("b.local", "n1");
    let long = |link: u64, n: usize| {
        let mut port = port("b.local", 1);
        let name = format!("{n:063}");
        port.service.name = name.parse().unwrap();
        port.service.namespace = format!("{link:063}").parse().unwrap();
        port
    };
    let mut refused = 0;
    for link in 0..6 {
        let before = table.held_bytes(&b);
        for n in 0..MAX_OFFERS {
            refused += usize::from(table.offer(&b, link, long(link, n)).is_err());
        }
        assert!(table.held_bytes(&b) - before <= MAX_LINK_BYTES);
    }
    assert!(refused > 0 && table.held_bytes(&b) <= MAX_PEER_BYTES, "{refused} {}", table.held_bytes(&b));
    // It pays alone.
    let c = router("b.local", "n2");
    assert!(table.offer(&c, 9, port("b.local", 1)).is_ok());
    table.withdraw(&b, 0, &long(0, 0));
    (0..6).for_each(|link| {
        link_down(&mut table, link);
    });
    assert_eq!(table.held_bytes(&b), 0);
    assert!(table.held_bytes(&c) > 0);
}

#[test]
fn changes_of_exports_are_known_by_difference() {
    let mut table = new();
    let since = |table: &Table, revision| -> Option<Vec<u16>> {
        table.changed_since(revision).map(|ports| ports.map(|port| port.port.get()).collect())
    };
    for number in 1..=4000 {
        table.add(number.into(), endpoint(port("a.local", number), None));
    }
    let seen = table.exports_revision();
    assert_eq!(since(&table, seen), Some(vec![]));
    table.remove(7);
    table.add(9, endpoint(port("a.local", 9), Some(&["c.local"])));
    assert_eq!(since(&table, seen), Some(vec![7, 9]));
    let (b, c) = ("b.local".parse().unwrap(), "c.local".parse().unwrap());
    let open = |table: &Table, number| {
        (table.is_open_to(&port("a.local", number), &b), table.is_open_to(&port("a.local", number), &c))
    };
    assert_eq!(
        (open(&table, 7), open(&table, 8), open(&table, 9)),
        ((false, false), (true, true), (false, true))
    );
    // One of several that serve a port.
    table.add(10_000, endpoint(port("a.local", 9), None));
    assert_eq!(open(&table, 9), (true, true));
    table.remove(10_000);
    assert_eq!(open(&table, 9), (false, true));
    // What is gone is forgotten in the end, and whoever has not looked since is told so.
    let seen = table.exports_revision();
    for number in 0..MAX_GONE as u64 + 10 {
        let mut gone = port("a.local", 1);
        gone.service.name = format!("gone-{number}").parse().unwrap();
        table.add(20_000, endpoint(gone, None));
        table.remove(20_000);
    }
    assert_eq!(since(&table, seen), None);
    assert_eq!(since(&table, table.exports_revision()), Some(vec![]));
    assert!(table.exports.is_bounded_by(4000));
}

fn named(cluster: &str, name: &str) -> ServicePort {
    let mut port = port(cluster, 80);
    port.service.name = name.parse().unwrap();
    port
}

#[test]
fn what_another_cluster_offers_is_bounded_over_all_its_routers() {
    let mut table = new();
    let mut links = 0..;
    // As many names of one authority as it likes, two links each.
    let mut held = 0;
    let mut refused = None;
    for node in 0..200 {
        let m = router("m.local", &format!("m-{node}"));
        for link in links.by_ref().take(2) {
            let offers = (0..1000).map(|n| named("m.local", &format!("of-{link}-{n}")));
            refused = offers.map(|port| table.offer(&m, link, port)).find_map(Result::err).or(refused);
        }
        held += table.held_bytes(&m);
    }
    assert!(held <= 18 << 20, "{held}");
    assert_eq!(refused, Some(OfferError::ClusterFull("m.local".parse().unwrap())));
    // It pays alone: other clusters have their part, and this router's own all of its.
    for (cluster, most) in [("b.local", 5000), ("a.local", 16_000)] {
        let peer = router(cluster, "n");
        let link = links.next().unwrap();
        (0..most)
            .for_each(|n| table.offer(&peer, link, named(cluster, &format!("web-{n}"))).expect("has room"));
    }
    let from: BTreeMap<_, _> = table.links().map(|of| (of.link, (of.from.cluster, of.ports))).collect();
    assert_eq!(from[&400], ("b.local".parse().unwrap(), 5000));
    (0..links.next().unwrap()).for_each(|link| {
        link_down(&mut table, link);
    });
    assert!(table.offers.is_empty());
}

#[test]
fn one_name_of_a_cluster_leaves_the_others_of_it_a_part() {
    let mut table = new();
    let (greedy, other) = (router("m.local", "m-1"), router("m.local", "m-2"));
    for link in 0..8 {
        for n in 0..MAX_OFFERS {
            let taken = table.offer(&greedy, link, named("m.local", &format!("of-{link}-{n}")));
            if taken.is_err() {
                break;
            }
        }
    }
    for n in 0..5000 {
        table.offer(&other, 9, named("m.local", &format!("web-{n}"))).expect("has room");
    }
}

/// Other links offer much, of the same names and of others, in a cluster of another.
fn crowded(links: u64) -> Table {
    let mut table = new();
    for link in 0..links {
        let m = router("m.local", &format!("m-{link}"));
        for n in 0..500 {
            let of = if n % 2 == 0 { 0 } else { link };
            table.offer(&m, 1000 + link, named("m.local", &format!("of-{of}-{n}"))).unwrap();
        }
    }
    table
}

fn looks(table: &Table) -> usize {
    table.offers.looks.take()
}

#[test]
fn the_end_of_a_link_costs_as_much_as_was_offered_on_it() {
    let mut costs = Vec::new();
    for links in [1, 80] {
        let mut table = crowded(links);
        let z = router("m.local", "z");
        for n in 0..600 {
            table.offer(&z, 7, named("m.local", &format!("z-{n}"))).unwrap();
        }
        let candidate = Candidate::Remote(z.clone());
        let now = Instant::now();
        table.report(&named("m.local", "z-599"), &candidate, Outcome::Silent, "", now);
        looks(&table);
        // In steps, each of which is brief; and nothing of it is used from the first on.
        let mut steps = Vec::new();
        loop {
            let more = table.link_down(7);
            steps.push(looks(&table));
            assert!(!table.is_offered(&named("m.local", "z-599")));
            looks(&table);
            if !more {
                break;
            }
        }
        assert!(steps.len() == 3 && steps.iter().all(|step| *step <= MAX_FORGOTTEN + 2), "{steps:?}");
        assert!(table.failing.is_empty());
        costs.push(steps);
    }
    assert_eq!(costs[0], costs[1], "it costs more where others offer more");
}

#[test]
fn what_a_flow_looks_at_does_not_grow_with_what_others_offer() {
    let a = "a.local".parse().unwrap();
    let consumer = Consumer { cluster: &a, namespace: None };
    let now = Instant::now();
    let work = |table: &Table, wanted: &ServicePort| {
        looks(table);
        let found = table.candidates(wanted, consumer, now, 12_345, idle);
        (found.len(), looks(table))
    };
    for links in [1, 80] {
        let mut table = crowded(links);
        let wanted = named("b.local", "web");
        for (link, node) in [(1, "n1"), (2, "n2"), (3, "n2")] {
            table.offer(&router("b.local", node), link, wanted.clone()).unwrap();
        }
        assert_eq!(work(&table, &wanted), (2, 3), "beside {links} links");
        // Of what very many offer, a flow looks at some.
        let (found, looked) = work(&table, &named("m.local", "of-0-0"));
        assert!(looked <= 64 && found == looked && found >= links.min(64) as usize, "{found} {looked}");
        // So is what was perhaps meant.
        looks(&table);
        table.like(&named("m.local", "of-0-1"), consumer);
        assert!(looks(&table) <= 4096);
        assert!(table.ports_of(&wanted.service).len() == 1);
    }
}
