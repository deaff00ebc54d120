use proptest::prelude::*;

use super::*;

const REST: Duration = Duration::from_secs(300);

fn service(n: usize) -> ServiceName {
    ServiceName {
        name: format!("s{n}").parse().unwrap(),
        namespace: "default".parse().unwrap(),
        cluster: "b.local".parse().unwrap(),
    }
}

fn services(numbers: impl IntoIterator<Item = usize>) -> Vec<ServiceName> {
    numbers.into_iter().map(service).collect()
}

fn net(text: &str) -> Ipv4Net {
    text.parse().unwrap()
}

fn ip(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

#[allow(clippy::disallowed_methods)]
fn start() -> Instant {
    Instant::now()
}

#[test]
fn ranges() {
    let new = |range: &str| Leases::new(net(range), REST, &[]).map(|leases| leases.range());
    assert_eq!(new("127.0.66.9/24"), Ok(net("127.0.66.0/24")));
    assert_eq!(new("127.0.0.0/8"), Ok(net("127.0.0.0/8")));
    assert_eq!(new("10.0.0.0/24"), Err(RangeError::NotLoopback(net("10.0.0.0/24"))));
    assert_eq!(new("0.0.0.0/0"), Err(RangeError::NotLoopback(net("0.0.0.0/0"))));
    assert_eq!(new("127.0.66.4/31"), Err(RangeError::NoAddress(net("127.0.66.4/31"))));
    assert_eq!(new("127.0.66.4/32"), Err(RangeError::NoAddress(net("127.0.66.4/32"))));
    let reserved = [ip("127.0.66.1"), ip("127.0.66.2")];
    assert!(Leases::new(net("127.0.66.0/30"), REST, &reserved).is_err());
}

#[test]
fn a_full_range_refuses_and_serves_the_rest() {
    let mut leases = Leases::new(net("127.0.66.0/24"), REST, &[]).unwrap();
    let refused = leases.assign(&services(0..1000), start());
    assert_eq!((leases.iter().count(), refused.len()), (254, 746));
    assert_eq!(refused[0].0, service(254));
    assert_eq!(
        refused[0].1.to_string(),
        "127.0.66.0/24 has no address left for it: 254 are in use, 0 rest and go to Services before it; \
         choose a wider range (SIDECAR_IP_RANGE) or import fewer Services"
    );
    assert_eq!(leases.get(&service(0)), Some(ip("127.0.66.1")));
    assert_eq!(leases.get(&service(253)), Some(ip("127.0.66.254")));
    assert_eq!(leases.service_at(ip("127.0.66.254")), Some(&service(253)));
    assert_eq!(leases.get(&service(254)), None);
}

#[test]
fn localhost_and_reserved_addresses_are_not_given() {
    let mut leases = Leases::new(net("127.0.0.0/8"), REST, &[ip("127.0.0.2"), ip("127.0.0.4")]).unwrap();
    assert_eq!(leases.assign(&services(0..2), start()), []);
    let given: Vec<_> = leases.iter().map(|(_, address)| address).collect();
    assert_eq!(given, [ip("127.0.0.3"), ip("127.0.0.5")]);
    // The widest range is used up to a bound, and each address up to it counts as one to give.
    let last = leases.usable().last().unwrap();
    assert_eq!(leases.usable().count(), MAX_ADDRESSES);
    assert!(leases.may_give(last));
    assert!(!leases.may_give(Ipv4Addr::from(u32::from(last) + 1)));
}

#[test]
fn a_freed_address_rests_but_not_for_its_own_service() {
    let t = start();
    let mut leases = Leases::new(net("127.0.66.0/30"), REST, &[]).unwrap();
    assert_eq!(leases.assign(&services([0, 1]), t), []);
    assert_eq!(leases.assign(&services([1]), t), []);
    assert_eq!(leases.service_at(ip("127.0.66.1")), None);

    let almost = t + REST - Duration::from_nanos(1);
    let (range, leased, resting) = (net("127.0.66.0/30"), 1, 1);
    let waits = LeaseError::Resting { range, leased, resting, until: t + REST };
    let full = LeaseError::Full { range, leased, resting };
    assert_eq!(leases.assign(&services([1, 2, 3]), almost), [(service(2), waits), (service(3), full)]);

    let mut back = leases.clone();
    assert_eq!(back.assign(&services([1, 0]), almost), []);
    assert_eq!(back.get(&service(0)), Some(ip("127.0.66.1")));

    assert_eq!(leases.assign(&services([1, 2]), t + REST), []);
    assert_eq!(leases.get(&service(2)), Some(ip("127.0.66.1")));
    assert_eq!(leases.get(&service(1)), Some(ip("127.0.66.2")));
}

#[test]
fn one_that_was_never_given_goes_before_one_that_has_rested() {
    let t = start();
    let mut leases = Leases::new(net("127.0.66.0/29"), REST, &[]).unwrap();
    leases.assign(&services([0]), t);
    leases.assign(&[], t);
    leases.assign(&services([1]), t + 2 * REST);
    assert_eq!(leases.get(&service(1)), Some(ip("127.0.66.2")));
}

#[test]
fn the_one_that_has_rested_longest_goes_first() {
    let t = start();
    let mut leases = Leases::new(net("127.0.66.0/29"), REST, &[]).unwrap();
    leases.assign(&services(0..6), t);
    leases.assign(&services(0..5), t + Duration::from_secs(1));
    leases.assign(&services(1..5), t + Duration::from_secs(2));
    let both = t + Duration::from_secs(2) + REST;
    leases.assign(&services([1, 2, 3, 4, 6]), both);
    assert_eq!(leases.get(&service(6)), Some(ip("127.0.66.6")));
    leases.assign(&services([1, 2, 3, 4, 6, 7]), both);
    assert_eq!(leases.get(&service(7)), Some(ip("127.0.66.1")));
}

#[test]
fn a_whole_annotation_that_is_renamed_is_served_again_when_its_addresses_have_rested() {
    let t = start();
    let mut leases = Leases::new(net("127.0.66.0/24"), REST, &[]).unwrap();
    leases.assign(&services(0..200), t);
    let wanted = services(1000..1200);
    let refused = leases.assign(&wanted, t);
    assert_eq!(refused.len(), 146);
    let waits = |error: &LeaseError| matches!(error, LeaseError::Resting { until, .. } if *until == t + REST);
    assert!(refused.iter().all(|(_, error)| waits(error)), "{refused:?}");
    assert_eq!(leases.assign(&wanted, leases.next_rested().unwrap()), []);
}

#[test]
fn restore_keeps_what_fits() {
    let t = start();
    let mut leases = Leases::new(net("127.0.66.0/24"), REST, &[]).unwrap();
    leases.assign(&services(0..8), t);
    leases.assign(&services(1..8), t);
    let mut snapshot = leases.snapshot();
    let entry = |n, address| SnapshotEntry { service: service(n), address: ip(address), freed: false };
    snapshot.leases.extend([entry(9, "127.0.66.3"), entry(1, "127.0.66.6")]);

    let later = t + 2 * REST;
    let (mut restored, dropped) =
        Leases::restore(net("127.0.66.0/29"), REST, &[ip("127.0.66.4")], &snapshot, later).unwrap();
    assert_eq!(
        dropped,
        [
            "the lease of s3.default.b.local is dropped: it was 127.0.66.4, which is reserved",
            "the lease of s6.default.b.local is dropped: it was 127.0.66.7, which is reserved",
            "the lease of s7.default.b.local is dropped: it was 127.0.66.8, which is outside of 127.0.66.0/29",
            "the lease of s9.default.b.local is dropped: it was 127.0.66.3, which s2.default.b.local has",
            "the lease of s1.default.b.local is dropped: it was 127.0.66.6, which s5.default.b.local has",
        ]
    );
    assert_eq!(restored.get(&service(1)), Some(ip("127.0.66.2")));
    assert_eq!(restored.get(&service(0)), None);
    // The freed one rests anew.
    let wanted = services([1, 2, 4, 5, 8]);
    assert_eq!(restored.assign(&wanted, later).len(), 1);
    assert_eq!(restored.assign(&wanted, later + REST), []);
    assert_eq!(restored.get(&service(8)), Some(ip("127.0.66.1")));
}

// The model: what a careful reader of the law would write down, with no regard to speed.

#[derive(Debug, Clone)]
enum Step {
    Want(Vec<usize>),
    Wait(u64),
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => prop::collection::vec(0usize..12, 0..10).prop_map(Step::Want),
        2 => (0u64..400).prop_map(Step::Wait),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 0..40)
}

/// Each address that was ever given: to whom last, and since when it is not wanted.
#[derive(Default)]
struct Model {
    given: BTreeMap<Ipv4Addr, (ServiceName, Option<Instant>)>,
}

impl Model {
    fn address(&self, service: &ServiceName) -> Option<Ipv4Addr> {
        self.given.iter().find(|(_, (owner, _))| owner == service).map(|(address, _)| *address)
    }

    fn free_for_anyone(&self, range: Ipv4Net, reserved: Ipv4Addr, now: Instant) -> Vec<Ipv4Addr> {
        let fresh = range.hosts().filter(|at| *at != reserved && !self.given.contains_key(at));
        fresh.chain(self.freed().filter(|(at, _)| now >= *at + REST).map(|(_, address)| address)).collect()
    }

    /// When each address was freed, the earliest first.
    fn freed(&self) -> impl Iterator<Item = (Instant, Ipv4Addr)> {
        let freed: BTreeSet<_> =
            (self.given.iter()).filter_map(|(address, (_, freed))| Some(((*freed)?, *address))).collect();
        freed.into_iter()
    }

    /// For how long each Service that got no address waits for one; `None`: for ever.
    fn waits(&self, now: Instant) -> impl Iterator<Item = Option<Instant>> {
        let until: Vec<_> = self.freed().map(|(at, _)| at + REST).filter(|until| *until > now).collect();
        until.into_iter().map(Some).chain(std::iter::repeat(None))
    }
}

proptest! {
    #[test]
    fn leases_keep_the_law(steps in steps()) {
        let range = net("127.0.66.0/29");
        let reserved = ip("127.0.66.3");
        let mut now = start();
        let mut leases = Leases::new(range, REST, &[reserved]).unwrap();
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Wait(seconds) => now += Duration::from_secs(seconds),
                Step::Restart => {
                    let text = serde_yaml::to_string(&leases.snapshot()).unwrap();
                    let snapshot: Snapshot = serde_yaml::from_str(&text).unwrap();
                    let (restored, dropped) = Leases::restore(range, REST, &[reserved], &snapshot, now).unwrap();
                    prop_assert_eq!(dropped, Vec::<String>::new());
                    leases = restored;
                    for (_, freed) in model.given.values_mut() {
                        *freed = freed.map(|_| now);
                    }
                }
                Step::Want(numbers) => {
                    let wanted = services(numbers);
                    let before = model.given.clone();
                    let refused: Vec<_> = leases.assign(&wanted, now).into_iter().map(|(service, error)| match error {
                        LeaseError::Resting { until, .. } => (service, Some(until)),
                        LeaseError::Full { .. } => (service, None),
                    }).collect();
                    for (service, address) in leases.iter() {
                        if let Some((owner, freed)) = before.get(&address).filter(|(owner, _)| owner != service) {
                            let rested = freed.is_some_and(|at| now >= at + REST);
                            prop_assert!(rested, "{address} of {owner} went to {service} too early");
                        }
                    }
                    for (service, freed) in model.given.values_mut() {
                        *freed = if wanted.contains(service) { None } else { freed.or(Some(now)) };
                    }
                    let mut short = Vec::new();
                    for service in &wanted {
                        if model.address(service).is_some() || short.contains(service) {
                            continue;
                        }
                        match model.free_for_anyone(range, reserved, now).first() {
                            Some(address) => { model.given.insert(*address, (service.clone(), None)); }
                            None => short.push(service.clone()),
                        }
                    }
                    let waits: Vec<_> = short.into_iter().zip(model.waits(now)).collect();
                    prop_assert_eq!(refused, waits);
                }
            }
            // No sharing, within bounds, both directions agree, and all as the model has it.
            let held: Vec<_> = leases.iter().map(|(s, a)| (s.clone(), a)).collect();
            let addresses: BTreeSet<_> = held.iter().map(|(_, a)| *a).collect();
            prop_assert_eq!(addresses.len(), held.len());
            for (service, address) in &held {
                prop_assert!(range.hosts().any(|host| host == *address) && *address != reserved);
                prop_assert_eq!(leases.service_at(*address), Some(service));
                prop_assert_eq!(leases.get(service), Some(*address));
            }
            let mut expected: Vec<_> = (model.given.iter())
                .filter(|(_, (_, freed))| freed.is_none())
                .map(|(address, (service, _))| (service.clone(), *address))
                .collect();
            expected.sort();
            prop_assert_eq!(held, expected);
        }
    }
}
