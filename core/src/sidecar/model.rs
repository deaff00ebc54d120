//! A sidecar under any sequence of edits, failures and reconnects, beside a model of the kernel and of a router.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;
use std::num::NonZeroU16;

use proptest::prelude::*;

use super::*;
use crate::dns::{Answer, Name, Record, Zone, record_type};
use crate::name::{Label, ServiceName, ServicePort};

/// An entry: number of the Service, its cluster where it says one, its ports (even ones are UDP) and what to add to a
/// port for its target.
type Entry = (u8, Option<&'static str>, BTreeSet<u16>, u16);

#[derive(Debug, Clone)]
enum Step {
    Edit(Annotation, Vec<Entry>),
    /// A text that is no YAML.
    Spoil(Annotation),
    Absent,
    /// The router accepts the dial, and welcomes at once as a router of this cluster.
    Welcome(&'static str),
    Down,
    RefuseAll,
    /// So many messages are sent.
    Send(usize),
    /// The socket of the next message can't be shared.
    Unsent,
    More(u16, u16),
    /// The socket that waits longest to be made is made, or not.
    Made(bool),
    Pass(u64),
}

fn entry() -> impl Strategy<Value = Entry> {
    let cluster = prop_oneof![2 => Just(None), 1 => Just(Some("a.local")), 1 => Just(Some("z.local"))];
    (0..5_u8, cluster, prop::collection::btree_set(1..5_u16, 1..4), 0..2_u16)
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let which = prop_oneof![Just(Annotation::Exports), Just(Annotation::Imports)];
    let step = prop_oneof![
        4 => (which.clone(), prop::collection::vec(entry(), 0..6)).prop_map(|(a, e)| Step::Edit(a, e)),
        1 => which.prop_map(Step::Spoil),
        1 => Just(Step::Absent),
        3 => prop_oneof![Just("a.local"), Just("b.local")].prop_map(Step::Welcome),
        1 => Just(Step::Down),
        1 => Just(Step::RefuseAll),
        4 => (0..6_usize).prop_map(Step::Send),
        1 => Just(Step::Unsent),
        1 => (0..100_u16, 0..100_u16).prop_map(|(tcp, udp)| Step::More(tcp, udp)),
        5 => any::<bool>().prop_map(Step::Made),
        3 => (0..3000_u64).prop_map(Step::Pass),
    ];
    prop::collection::vec(step, 1..60)
}

fn text(entries: &[Entry]) -> String {
    let mut text = String::from("services:\n");
    for (n, cluster, ports, shift) in entries {
        text.push_str(&format!("- name: s{n}\n"));
        if let Some(cluster) = cluster {
            text.push_str(&format!("  cluster: {cluster}\n"));
        }
        text.push_str("  ports:\n");
        for port in ports {
            let protocol = if port % 2 == 0 { "UDP" } else { "TCP" };
            text.push_str(&format!(
                "  - {{ name: p{port}-{shift}, port: {port}, protocol: {protocol}, targetport: {} }}\n",
                port + shift
            ));
        }
    }
    text
}

/// What the entries mean in a cluster: each port, and its target. Of two entries of one Service the first counts.
fn meaning(entries: &[Entry], cluster: &str) -> BTreeMap<ServicePort, NonZeroU16> {
    let mut services = BTreeSet::new();
    let mut ports = BTreeMap::new();
    for (n, own, numbers, shift) in entries {
        let service = ServiceName {
            name: format!("s{n}").parse::<Label>().unwrap(),
            namespace: "default".parse().unwrap(),
            cluster: own.unwrap_or(cluster).parse().unwrap(),
        };
        if !services.insert(service.clone()) {
            continue;
        }
        for number in numbers {
            let protocol = if number % 2 == 0 { Protocol::Udp } else { Protocol::Tcp };
            let port =
                ServicePort { service: service.clone(), port: NonZeroU16::new(*number).unwrap(), protocol };
            ports.insert(port, NonZeroU16::new(number + shift).unwrap());
        }
    }
    ports
}

/// What a router knows within one conversation.
#[derive(Default)]
struct Router {
    hello: bool,
    imports: BTreeMap<SocketId, ServicePort>,
    exports: BTreeMap<SocketId, (ServicePort, NonZeroU16)>,
    /// Every import that was ever told, and not refused since.
    told: BTreeSet<SocketId>,
    /// What was refused, of which it may hear again.
    refused: BTreeSet<SocketId>,
    /// How many edits of the exports there had been when an export was told.
    told_at: BTreeMap<SocketId, usize>,
}

struct World {
    sidecar: Sidecar,
    now: Instant,
    making: VecDeque<(SocketId, SocketAddrV4)>,
    open: BTreeMap<SocketId, SocketAddrV4>,
    dialled: bool,
    /// Of each router.
    version: u32,
    router: Option<Router>,
    zone: Option<Zone>,
    /// How often the exports were edited.
    edits: usize,
    /// The address of every Service that ever had one.
    addresses: BTreeMap<ServiceName, Ipv4Addr>,
}

impl World {
    fn drive(&mut self) {
        while let Some(command) = self.sidecar.poll_command() {
            match command {
                Command::Make { id, addr, .. } => self.making.push_back((id, addr)),
                Command::Close { id } => assert!(self.open.remove(&id).is_some(), "{id} is closed twice"),
                Command::SetZone(zone) => self.zone = Some(zone),
                Command::Save(_) => {}
                Command::Connect => assert!(!std::mem::replace(&mut self.dialled, true), "dialled twice"),
                Command::Disconnect => (self.dialled, self.router) = (false, None),
            }
        }
        while self.sidecar.poll_notice().is_some() {}
    }

    fn made(&mut self, good: bool) {
        let Some((id, addr)) = self.making.pop_front() else { return };
        let result = if good { Ok(()) } else { Err("in use".to_owned()) };
        if good {
            assert!(self.open.insert(id, addr).is_none(), "{id} is made twice");
        }
        self.sidecar.handle_made(id, result, self.now);
        self.drive();
    }

    fn welcome(&mut self, cluster: &str) {
        if !self.dialled || self.router.is_some() {
            return;
        }
        self.router = Some(Router::default());
        self.sidecar.handle_connected(self.now);
        assert!(self.send(false), "no Hello");
        assert!(!self.send(false), "something before Welcome");
        let welcome = ToSidecar::Welcome {
            version: self.version,
            cluster: cluster.parse().unwrap(),
            node: "n".parse().unwrap(),
        };
        self.sidecar.handle_message(welcome, self.now);
        self.drive();
    }

    fn down(&mut self) {
        if std::mem::take(&mut self.dialled) {
            self.router = None;
            self.sidecar.handle_disconnected("cut".into(), self.now);
            self.drive();
        }
    }

    /// Sends one message that tells something, or fails to. False where there is none.
    fn send(&mut self, fails: bool) -> bool {
        let Some(outgoing) = self.sidecar.poll_message() else { return false };
        let router = self.router.as_mut().expect("nothing is said to nobody");
        match outgoing {
            Outgoing::WithSocket(_, id) if fails => self.sidecar.handle_unsent(id, self.now),
            Outgoing::WithSocket(ToRouter::Import { id, wanted }, socket) => {
                assert_eq!(id, socket);
                assert!(self.open.contains_key(&id), "an import without a socket");
                assert!(router.told.insert(id), "an import is told twice");
                router.refused.remove(&id);
                router.imports.insert(id, wanted);
            }
            Outgoing::Stock { tcp, udp } => {
                assert!((1..=handoff::MAX_DESCRIPTORS as u16).contains(&(tcp + udp)));
                if fails {
                    self.sidecar.handle_short(tcp, udp, self.now);
                }
            }
            Outgoing::Plain(ToRouter::Hello { .. }) => assert!(!std::mem::replace(&mut router.hello, true)),
            Outgoing::Plain(ToRouter::Unimport { id }) => {
                assert!(router.imports.remove(&id).is_some() || router.refused.contains(&id));
            }
            Outgoing::Plain(ToRouter::Unexport { id }) => {
                assert!(router.exports.remove(&id).is_some() || router.refused.contains(&id));
            }
            Outgoing::Plain(ToRouter::Export { id, offered, target, .. }) => {
                router.exports.insert(id, (offered, target));
                router.refused.remove(&id);
                // An edit and one that takes it back may come between two messages; without an edit there is no other.
                let before = router.told_at.insert(id, self.edits);
                assert!(before.is_none_or(|before| before < self.edits), "an export is told twice");
            }
            Outgoing::Plain(ToRouter::Ping) => {
                assert!(self.version >= handoff::PINGS, "an old router is asked");
                if !fails {
                    self.sidecar.handle_message(ToSidecar::Pong, self.now);
                }
                // It tells nothing.
                return self.send(fails);
            }
            other => panic!("{other:?}"),
        }
        true
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.sidecar.poll_timeout().filter(|at| *at <= end) {
            self.now = at.max(self.now);
            self.sidecar.handle_timeout(self.now);
            self.drive();
        }
        self.now = end;
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Edit(annotation, entries) => {
                self.edits += usize::from(*annotation == Annotation::Exports);
                self.sidecar.handle_text(*annotation, Ok(&text(entries)), self.now);
            }
            Step::Spoil(annotation) => self.sidecar.handle_text(*annotation, Ok("a: [b"), self.now),
            Step::Absent => self.sidecar.handle_absent(self.now),
            Step::Welcome(cluster) => self.welcome(cluster),
            Step::Down => self.down(),
            Step::RefuseAll => {
                let Some(router) = &mut self.router else { return };
                // Of those that are over the word is on its way.
                let mut ids = std::mem::take(&mut router.told);
                ids.extend(std::mem::take(&mut router.exports).into_keys());
                router.imports.clear();
                router.told_at.clear();
                router.refused.extend(&ids);
                for id in ids {
                    let refused = ToSidecar::Refused { id: Some(id), reason: "no".into() };
                    self.sidecar.handle_message(refused, self.now);
                }
            }
            Step::Send(messages) => {
                let _ = (0..*messages).all(|_| self.send(false));
            }
            Step::Unsent => {
                self.send(true);
            }
            Step::More(tcp, udp) if self.router.is_some() => {
                self.sidecar.handle_message(ToSidecar::More { tcp: *tcp, udp: *udp }, self.now);
            }
            Step::More(..) => {}
            Step::Made(good) => self.made(*good),
            Step::Pass(milliseconds) => self.pass(Duration::from_millis(*milliseconds)),
        }
        self.drive();
        self.note_addresses();
    }

    /// What is served keeps its address, whatever happens.
    fn note_addresses(&mut self) {
        for import in self.sidecar.imports() {
            let before = self.addresses.insert(import.service.clone(), import.address);
            assert!(before.is_none_or(|before| before == import.address), "an address changed");
        }
    }

    /// Lets everything come to rest, with a kernel and a router that do what they are asked.
    fn settle(&mut self) {
        for _ in 0..3 {
            while !self.making.is_empty() {
                self.made(true);
            }
            self.pass(Duration::from_secs(31));
        }
        if self.router.is_none() {
            self.down();
            self.pass(REFUSED_RETRY);
            self.welcome("a.local");
        }
        while !self.making.is_empty() {
            self.made(true);
        }
        while self.send(false) {}
        self.pass(Duration::from_secs(31));
        assert!(!self.send(false), "something is told that the router knows");
        let refused = [Annotation::Exports, Annotation::Imports].map(|a| self.sidecar.rejected(a).count());
        assert_eq!(refused, [0, 0]);
        assert!(self.making.is_empty());
        self.note_addresses();
    }
}

proptest! {
    /// The sockets that exist are those of the served imports, no more and no less; the router knows each of them
    /// and each export, told once; DNS names them; and nothing that was served well changes its address.
    #[test]
    #[allow(clippy::disallowed_methods)]
    fn any_sequence(configured in any::<bool>(), version in 1..=handoff::VERSION, steps in steps()) {
        let now = Instant::now();
        let config = Config {
            pod: Pod { name: "p".into(), namespace: "default".parse().unwrap(), uid: "u".into() },
            addresses: vec![],
            cluster: configured.then(|| "a.local".parse().unwrap()),
            range: "127.0.66.0/24".parse().unwrap(),
            reserved: vec![],
            search: vec![],
        };
        let mut world = World {
            sidecar: Sidecar::new(config, Saved::default(), now).unwrap(),
            now,
            making: VecDeque::new(),
            open: BTreeMap::new(),
            dialled: false,
            version,
            router: None,
            zone: None,
            edits: 0,
            addresses: BTreeMap::new(),
        };
        world.drive();
        let (mut exports, mut imports) = (Vec::new(), Vec::new());
        for step in &steps {
            match step {
                Step::Edit(Annotation::Exports, entries) => exports.clone_from(entries),
                Step::Edit(Annotation::Imports, entries) => imports.clone_from(entries),
                _ => {}
            }
            world.step(step);
        }
        world.settle();

        let cluster = world.sidecar.cluster().unwrap().0.to_string();
        let wanted = meaning(&imports, &cluster);
        let router = world.router.as_ref().unwrap();
        let ports: Vec<&ServicePort> = router.imports.values().collect();
        prop_assert_eq!(ports.iter().copied().collect::<BTreeSet<_>>(), wanted.keys().collect::<BTreeSet<_>>());
        prop_assert_eq!(ports.len(), wanted.len());
        prop_assert_eq!(
            world.open.keys().collect::<Vec<_>>(),
            router.imports.keys().collect::<Vec<_>>()
        );
        for (id, port) in &router.imports {
            let addr = SocketAddrV4::new(world.addresses[&port.service], port.port.get());
            prop_assert_eq!(world.open[id], addr);
            let name = port.service.to_string();
            let name = Name::from_labels(name.split('.').map(str::as_bytes)).unwrap();
            let answer = world.zone.as_ref().unwrap().answer(&name, record_type::A);
            prop_assert_eq!(answer, Answer::Record(Record::A(*addr.ip())));
        }
        let offered: BTreeMap<ServicePort, NonZeroU16> = router.exports.values().cloned().collect();
        prop_assert_eq!(offered.len(), router.exports.len());
        prop_assert_eq!(world.sidecar.conversation.exports.len(), offered.len());
        prop_assert_eq!(world.sidecar.conversation.imports.len(), wanted.len());
        prop_assert_eq!(offered, meaning(&exports, &cluster));
    }
}
