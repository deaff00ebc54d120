//! Stories of one sidecar.

mod cluster;
mod conversation;

use std::net::SocketAddrV4;

use super::*;
use crate::dns::{Answer, Name, Record, Zone, record_type};

#[allow(clippy::disallowed_methods)]
fn start() -> Instant {
    Instant::now()
}

fn config(cluster: Option<&str>) -> Config {
    Config {
        pod: Pod { name: "web-0".into(), namespace: "default".parse().unwrap(), uid: "u".into() },
        addresses: vec![IpAddr::from([10, 0, 0, 7])],
        cluster: cluster.map(|name| name.parse().unwrap()),
        range: "127.0.66.0/24".parse().unwrap(),
        reserved: vec![],
        search: vec![],
    }
}

const WEB: &str = "services: [{ name: web, ports: [{ name: http, port: 80 }] }]";
const WEB_AND_LOG: &str = "services:\n  - { name: log, ports: [{ name: syslog, port: 514, protocol: UDP }] }\n  \
                           - { name: web, ports: [{ name: renamed, port: 80 }] }\n";

/// A sidecar, and what the world around it has.
struct World {
    sidecar: Sidecar,
    now: Instant,
    open: Vec<(SocketId, SocketAddrV4)>,
    /// Addresses where no socket can be made.
    blocked: Vec<SocketAddrV4>,
    zone: Option<Zone>,
    saved: Option<Saved>,
    /// What the driver has done, in short words.
    log: Vec<String>,
}

impl World {
    fn new(config: Config, saved: Saved) -> Self {
        let now = start();
        let sidecar = Sidecar::new(config, saved, now).unwrap();
        let mut world =
            Self { sidecar, now, open: vec![], blocked: vec![], zone: None, saved: None, log: vec![] };
        world.drive();
        world
    }

    fn drive(&mut self) {
        while let Some(command) = self.sidecar.poll_command() {
            match command {
                Command::Make { id, addr, .. } if self.blocked.contains(&addr) => {
                    self.log.push(format!("fail {addr}"));
                    self.sidecar.handle_made(id, Err("in use".into()), self.now);
                }
                Command::Make { id, addr, .. } => {
                    self.log.push(format!("make {addr}"));
                    self.open.push((id, addr));
                    self.sidecar.handle_made(id, Ok(()), self.now);
                }
                Command::Close { id } => {
                    let at = self.open.iter().position(|(open, _)| *open == id).unwrap();
                    self.log.push(format!("close {}", self.open.remove(at).1));
                }
                Command::SetZone(zone) => {
                    self.log.push("zone".into());
                    self.zone = Some(zone);
                }
                Command::Save(saved) => self.saved = Some(saved),
                Command::Connect => self.log.push("connect".into()),
                Command::Disconnect => self.log.push("disconnect".into()),
            }
        }
    }

    fn imports(&mut self, text: &str) {
        self.sidecar.handle_text(Annotation::Imports, Ok(text), self.now);
        self.drive();
    }

    fn exports(&mut self, text: &str) {
        self.sidecar.handle_text(Annotation::Exports, Ok(text), self.now);
        self.drive();
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.sidecar.poll_timeout().filter(|at| *at <= end) {
            assert!(at >= self.now || self.now == end, "a timer of the past");
            self.now = at.max(self.now);
            self.sidecar.handle_timeout(self.now);
            self.drive();
        }
        self.now = end;
    }

    fn welcome(&mut self, cluster: &str) -> Vec<Outgoing> {
        self.welcome_of(1, cluster)
    }

    /// As [`Self::welcome`], by a router of this version.
    fn welcome_of(&mut self, version: u32, cluster: &str) -> Vec<Outgoing> {
        self.sidecar.handle_connected(self.now);
        let hello = self.messages();
        assert!(matches!(&hello[..], [Outgoing::Plain(ToRouter::Hello { .. })]), "{hello:?}");
        let welcome =
            ToSidecar::Welcome { version, cluster: cluster.parse().unwrap(), node: "n1".parse().unwrap() };
        self.sidecar.handle_message(welcome, self.now);
        self.drive();
        self.messages()
    }

    fn messages(&mut self) -> Vec<Outgoing> {
        std::iter::from_fn(|| self.sidecar.poll_message()).collect()
    }

    fn notices(&mut self) -> Vec<Notice> {
        std::iter::from_fn(|| self.sidecar.poll_notice()).collect()
    }

    fn resolve(&self, name: &str) -> Option<Ipv4Addr> {
        let name = Name::from_labels(name.split('.').map(str::as_bytes)).unwrap();
        match self.zone.as_ref()?.answer(&name, record_type::A) {
            Answer::Record(Record::A(address)) => Some(address),
            _ => None,
        }
    }

    fn log(&mut self) -> Vec<String> {
        std::mem::take(&mut self.log)
    }
}

#[test]
fn a_name_comes_after_its_socket_and_a_socket_goes_after_its_name() {
    let mut world = World::new(config(Some("a.local")), Saved::default());
    assert_eq!(world.log(), ["connect"]);
    assert!(!world.sidecar.is_applied());
    world.imports(WEB);
    assert_eq!(world.log(), ["make 127.0.66.1:80", "zone"]);
    assert_eq!(world.resolve("web.default.a.local"), Some(Ipv4Addr::new(127, 0, 66, 1)));
    assert!(!world.sidecar.is_applied(), "the exports are not read yet");
    world.exports("");
    assert!(world.sidecar.is_applied());

    // Another order and another port name: the new socket is made, nothing else is touched.
    world.imports(WEB_AND_LOG);
    assert_eq!(world.log(), ["make 127.0.66.2:514", "zone"]);
    assert_eq!(world.resolve("web.default"), Some(Ipv4Addr::new(127, 0, 66, 1)));
    // The same text, and the same in other words: nothing at all, nor a new zone.
    world.imports(WEB_AND_LOG);
    world.imports(&format!("{WEB_AND_LOG}# a comment\n"));
    assert_eq!(world.log(), [] as [&str; 0]);

    world.imports("");
    assert_eq!(world.log(), ["zone", "close 127.0.66.2:514", "close 127.0.66.1:80"]);
    assert_eq!(world.resolve("web.default"), None);
}

#[test]
fn what_is_no_yaml_changes_nothing_and_a_wrong_entry_only_itself() {
    let mut world = World::new(config(Some("a.local")), Saved::default());
    world.imports(WEB);
    world.exports("");
    world.log();
    world.notices();
    world.imports("services: [");
    world.imports("services: [");
    assert_eq!(world.log(), [] as [&str; 0]);
    assert_eq!(world.notices(), [Notice::Unusable(Annotation::Imports)]);
    let error = world.sidecar.findings(Annotation::Imports).error.unwrap().to_string();
    assert!(error.starts_with("line 1"), "{error}");
    assert_eq!(world.saved.as_ref().unwrap().imports.as_deref(), Some(WEB));
    assert_eq!(world.sidecar.counts(), Counts { imports: 1, sockets: 1, refused: 1, ..Counts::default() });

    let unread = Finding { path: String::new(), line: 1, column: 1, reason: "too long".into() };
    world.sidecar.handle_text(Annotation::Imports, Err(unread.clone()), world.now);
    assert_eq!(world.sidecar.findings(Annotation::Imports).error, Some(&unread));

    // The last good text again: the error goes, and nothing else happens.
    world.imports(WEB);
    assert_eq!(world.sidecar.findings(Annotation::Imports).error, None);
    assert_eq!(world.log(), [] as [&str; 0]);

    world
        .imports("services: [{ name: web, ports: [{ port: 80 }] }, { name: bad, ports: [{ port: 99999 }] }]");
    let refused = world.sidecar.findings(Annotation::Imports).refused;
    assert_eq!(refused[0].path, "services[1].ports[0].port");
    assert_eq!(world.sidecar.counts().imports, 1);
}

#[test]
fn a_text_that_has_no_services_changes_nothing_and_an_empty_one_withdraws() {
    let mut world = World::new(config(Some("a.local")), Saved::default());
    world.imports(WEB);
    world.exports("");
    world.log();
    world.notices();
    world.imports("serivces: [{ name: web, ports: [{ port: 80 }] }]");
    assert_eq!(world.log(), [] as [&str; 0]);
    assert_eq!(world.notices(), [Notice::Unusable(Annotation::Imports)]);
    assert_eq!(world.sidecar.counts(), Counts { imports: 1, sockets: 1, refused: 1, ..Counts::default() });
    // What is there and what nobody asked for any more.
    for (text, imports) in [("", 0), (WEB, 1), ("services: []\n---\n", 0)] {
        world.imports(text);
        assert_eq!(world.sidecar.findings(Annotation::Imports).error, None, "{text}");
        assert_eq!(world.sidecar.counts().imports, imports, "{text}");
    }
}

#[test]
fn a_socket_that_cannot_be_made_is_tried_again_and_disturbs_no_other() {
    let mut world = World::new(config(Some("a.local")), Saved::default());
    world.blocked.push("127.0.66.1:514".parse().unwrap());
    world.imports(WEB_AND_LOG);
    world.exports("");
    assert!(world.sidecar.is_applied(), "what can be served is");
    assert_eq!(world.sidecar.counts(), Counts { imports: 2, sockets: 1, failed: 1, ..Counts::default() });
    let failed = |world: &mut World| {
        world.notices().into_iter().filter(|n| matches!(n, Notice::MakeFailed { .. })).count()
    };
    assert_eq!(failed(&mut world), 1);
    assert_eq!(world.welcome("a.local").len(), 1);
    let states: Vec<_> = world.sidecar.imports().flat_map(|import| import.ports).map(|p| p.state).collect();
    assert_eq!(states, [PortState::Failed("in use"), PortState::HandedOver]);

    world.log();
    world.pass(Duration::from_secs(60));
    // 0.25, 0.5, 1, 2, 4, 8, 16 s.
    assert_eq!(world.log().len(), 7);
    assert_eq!(failed(&mut world), 0, "the log has it already");
    world.blocked.clear();
    world.pass(Duration::from_secs(30));
    assert_eq!(world.messages().len(), 1);
    assert!(world.notices().iter().any(|n| matches!(n, Notice::Made { .. })));

    // One that fails and is no longer wanted is not tried again.
    world.blocked.push("127.0.66.3:1".parse().unwrap());
    world.imports("services: [{ name: x, ports: [{ port: 1 }] }]");
    world.imports("");
    assert_eq!(world.sidecar.poll_timeout(), None);
}

#[test]
fn a_full_range_serves_the_first_and_the_others_when_addresses_have_rested() {
    let mut config = config(Some("a.local"));
    config.range = "127.0.66.0/30".parse().unwrap();
    let mut world = World::new(config, Saved::default());
    let text = |names: &[&str]| {
        let entries: Vec<String> =
            names.iter().map(|name| format!("{{ name: {name}, ports: [{{ port: 80 }}] }}")).collect();
        format!("services: [{}]", entries.join(", "))
    };
    world.imports(&text(&["a", "b", "c"]));
    let unserved = world.sidecar.findings(Annotation::Imports).unserved;
    assert_eq!(unserved.len(), 1);
    assert_eq!(unserved[0].0.name.as_str(), "c");
    let why = unserved[0].1.at(world.now);
    assert!(why.contains("127.0.66.0/30 has no address left") && why.contains("wider range"), "{why}");
    let b = world.resolve("b").unwrap();
    world.imports(&text(&["b", "c"]));
    assert_eq!(world.resolve("b"), Some(b));
    assert_eq!(world.resolve("c"), None, "the freed address rests");
    world.notices();
    world.pass(REST - Duration::from_millis(1));
    assert_eq!(world.resolve("c"), None);
    let why = world.sidecar.findings(Annotation::Imports).unserved[0].1.at(world.now);
    assert!(why.ends_with("it will be served by itself in 1 s") && !why.contains("wider range"), "{why}");
    world.pass(Duration::from_millis(1));
    assert!(world.resolve("c").is_some());
    assert_eq!(world.notices(), [Notice::Unserved(Annotation::Imports)]);
    assert_eq!(world.sidecar.findings(Annotation::Imports).unserved, []);
}

#[test]
fn the_last_good_state_serves_until_there_is_a_text() {
    let saved = Saved { imports: Some(WEB.into()), ..Saved::default() };
    let mut world = World::new(config(Some("a.local")), saved.clone());
    world.sidecar.handle_absent(world.now);
    world.sidecar.handle_absent(world.now);
    world.drive();
    assert!(world.sidecar.is_applied() && world.sidecar.is_absent());
    assert_eq!(world.open.len(), 1);
    assert_eq!(world.notices().iter().filter(|n| **n == Notice::Absent).count(), 1);
    world.imports("");
    assert!(world.open.is_empty() && !world.sidecar.is_absent());

    // A text that is no YAML does not hide it, either.
    let mut world = World::new(config(Some("a.local")), saved);
    world.imports("services: [");
    assert_eq!(world.open.len(), 1);
    assert!(world.sidecar.findings(Annotation::Imports).error.is_some());
    assert!(world.notices().contains(&Notice::Unusable(Annotation::Imports)));

    // Without any, nothing is in service, and the sidecar says so.
    let mut world = World::new(config(Some("a.local")), Saved::default());
    world.sidecar.handle_absent(world.now);
    world.drive();
    assert!(!world.sidecar.is_applied());
    assert!(world.zone.is_some(), "DNS of others waits for nothing");
}

#[test]
fn leases_that_are_not_kept_are_told_in_one_notice() {
    let leases = (1..=20).map(|last: u8| crate::lease::SnapshotEntry {
        service: crate::name::ServiceName {
            name: format!("s{last}").parse().unwrap(),
            namespace: "default".parse().unwrap(),
            cluster: "b.local".parse().unwrap(),
        },
        address: [127, 0, 99, last].into(),
        freed: false,
    });
    let saved = Saved { leases: crate::lease::Snapshot { leases: leases.collect() }, ..Saved::default() };
    let mut sidecar = Sidecar::new(config(Some("a.local")), saved, start()).unwrap();
    let told: Vec<Notice> = std::iter::from_fn(|| sidecar.poll_notice())
        .filter(|notice| matches!(notice, Notice::LeasesDropped { .. }))
        .collect();
    let [Notice::LeasesDropped { count: 20, first }] = &told[..] else { panic!("{told:?}") };
    assert_eq!(first.len(), 3);
    assert!(first[0].starts_with("the lease of s1.default.b.local is dropped"), "{}", first[0]);
}
