use proptest::prelude::*;

use super::*;

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn router(node: &str) -> RouterId {
    RouterId { cluster: "b.local".parse().unwrap(), node: node.parse().unwrap() }
}

#[test]
fn a_flood_makes_room_for_itself() {
    let mut admission = Admission::default();
    let honest = address("192.0.2.7");
    assert!(admission.enter(0, honest, false, 256).is_empty());
    for id in 1..5_000 {
        for (gone, from) in admission.enter(id, address("198.51.100.9"), false, 256) {
            assert_ne!(gone, 0, "the honest one is evicted by number {id}");
            assert_eq!((gone, from.to_string().as_str()), (id - 255, "198.51.100.0/24"));
        }
    }
    assert_eq!(admission.len(), 256);
}

#[test]
fn a_flood_from_a_whole_site_makes_room_for_itself() {
    let flood_v4: fn(u64) -> IpAddr = |n| Ipv4Addr::from_bits(0xc633_0000 | n as u32 & 0xffff).into();
    let flood_v6: fn(u64) -> IpAddr =
        |n| Ipv6Addr::from_bits(0x2001_0db8_0002 << 80 | u128::from(n & 0xffff) << 64).into();
    for (honest, flood) in [("192.0.2.7", flood_v4), ("2001:db8:1::7", flood_v6)] {
        let mut admission = Admission::default();
        admission.enter(0, address(honest), false, 256);
        for id in 1..3_000 {
            let gone = admission.enter(id, flood(id), false, 256);
            assert!(gone.iter().all(|(gone, _)| *gone != 0), "by number {id}");
        }
    }
}

#[test]
fn one_that_is_known_has_room_beside_a_flood_from_its_own_network() {
    let mut admission = Admission::default();
    for id in 0..64 {
        admission.enter(id, address("192.0.2.7"), true, 256);
    }
    for id in 64..3_000 {
        let gone = admission.enter(id, address("192.0.2.8"), false, 256);
        assert!(gone.iter().all(|(gone, _)| *gone >= 64), "by number {id}");
    }
    // A flood of those who are known keeps to their half while strangers want the other.
    for id in 3_000..4_000 {
        admission.enter(id, address("192.0.2.7"), true, 256);
    }
    for id in 4_000..4_500 {
        admission.enter(id, address("203.0.113.1"), false, 256);
    }
    let known = admission.guests.values().filter(|guest| guest.known).count();
    assert_eq!((known, admission.len()), (128, 256));
}

#[test]
fn an_ipv4_address_of_an_ipv6_socket_is_one() {
    let mut admission = Admission::default();
    admission.enter(0, address("::ffff:192.0.2.7"), false, 2);
    assert_eq!(admission.enter(1, address("192.0.2.8"), false, 2), []);
    let [(0, network)] = admission.enter(2, address("192.0.2.9"), false, 2)[..] else { panic!() };
    assert_eq!(network.to_string(), "192.0.2.0/24");
    assert_eq!(Network::of(address("2001:db8:1:2:3::4"), 24, 64).to_string(), "2001:db8:1:2::/64");
    assert_eq!(Network::of(address("192.0.2.7"), 32, 128).to_string(), "192.0.2.7/32");
    assert_eq!(Network::of(address("192.0.2.7"), 0, 0).to_string(), "0.0.0.0/0");
}

#[test]
fn addresses_are_known_for_a_while_and_bounded_by_peer() {
    let (mut known, start) = (Known::default(), Instant::now());
    let at = |n: u8| IpAddr::from([192, 0, 2, n]);
    for n in 0..100 {
        known.handle_proven(&router("roams"), at(n), start);
    }
    known.handle_proven(&router("stays"), at(200), start);
    let which: Vec<_> = (0..=255).filter(|n| known.contains(at(*n), start)).collect();
    assert_eq!(which, [92, 93, 94, 95, 96, 97, 98, 99, 200]);
    // Seen again, it is known for longer.
    known.handle_proven(&router("stays"), at(200), start + MEMORY / 2);
    assert!(known.contains(at(200), start + MEMORY) && !known.contains(at(99), start + MEMORY));
    known.handle_timeout(start + MEMORY);
    assert_eq!((known.addresses.len(), known.of.len()), (1, 1));
    // Two behind one address.
    known.handle_proven(&router("other"), at(200), start + MEMORY);
    known.handle_timeout(start + MEMORY * 2);
    assert_eq!((known.addresses.len(), known.of.len()), (0, 0));
}

#[derive(Debug, Clone)]
enum Step {
    Enter(u8, bool),
    Leave(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..16_u8, any::<bool>()).prop_map(|(from, known)| Step::Enter(from, known)),
        1 => any::<u8>().prop_map(Step::Leave),
    ]
}

proptest! {
    /// Against a plain list: who goes is of the kind that has more than its half, of the network there that holds most, and
    /// nobody of it came before him.
    #[test]
    fn who_goes_is_of_those_who_hold_most(steps in prop::collection::vec(step(), 0..60), most in 2..12_usize) {
        let (mut admission, mut list) = (Admission::default(), Vec::<(GuestId, u8, bool)>::new());
        let mut next = 0;
        for step in steps {
            match step {
                Step::Leave(n) => {
                    if !list.is_empty() {
                        let (id, ..) = list.remove(usize::from(n) % list.len());
                        admission.leave(id);
                    }
                }
                Step::Enter(from, known) => {
                    next += 1;
                    list.push((next, from, known));
                    // 4 wide networks of 4 narrow ones each.
                    let address = IpAddr::from([10, from / 4, from % 4, 1]);
                    for (gone, _) in admission.enter(next, address, known, most) {
                        let at = list.iter().position(|(id, ..)| *id == gone).unwrap();
                        let (_, from, known) = list[at];
                        let of_kind: Vec<_> = list.iter().filter(|g| g.2 == known).collect();
                        prop_assert!(of_kind.len() > most / 2);
                        // Known ones count by their address alone.
                        let wide = |f: u8| if known { f } else { f / 4 };
                        let held = |w: u8| of_kind.iter().filter(|g| wide(g.1) == w).count();
                        let narrow = |f: u8| of_kind.iter().filter(|g| g.1 == f).count();
                        prop_assert!((0..16).all(|f| held(wide(f)) <= held(wide(from))));
                        let beside = (0..16).filter(|f| wide(*f) == wide(from));
                        prop_assert!(beside.map(narrow).all(|n| n <= narrow(from)));
                        prop_assert!(of_kind.iter().all(|g| g.1 != from || g.0 >= gone));
                        list.remove(at);
                    }
                    prop_assert!(list.len() <= most);
                    prop_assert_eq!(admission.len(), list.len());
                }
            }
        }
    }
}
