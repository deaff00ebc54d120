//! What is said to the router, and what its words do.

use super::*;

#[test]
fn everything_is_handed_over_again_with_the_same_sockets() {
    let mut world = World::new(config(Some("a.local")), Saved::default());
    world.imports(WEB_AND_LOG);
    world.exports("services: [{ name: own, ports: [{ port: 9000 }], allow: [b.local] }]");
    let first = world.welcome("a.local");
    assert_eq!(first.len(), 3);
    assert_eq!(world.messages(), []);
    let open = world.open.clone();
    let held =
        |world: &World| world.sidecar.imports().flat_map(|i| i.ports).all(|p| p.state == PortState::Held);
    assert!(!held(&world));

    world.sidecar.handle_disconnected("it ended".into(), world.now);
    assert!(held(&world));
    world.pass(FIRST_RETRY);
    assert_eq!(world.welcome("a.local"), first);
    assert_eq!(world.open, open);
    assert!(matches!(world.sidecar.router(world.now), RouterStatus::Up { .. }));
}

#[test]
fn changes_are_told_once_and_a_change_back_not_at_all() {
    let mut world = World::new(config(Some("a.local")), Saved::default());
    world.imports(WEB);
    world.exports("services: [{ name: own, ports: [{ port: 9000 }] }]");
    world.welcome("a.local");
    // The router is slow: nothing can be sent meanwhile.
    world.imports(WEB_AND_LOG);
    world.imports(WEB);
    world.exports("");
    world.exports("services: [{ name: own, ports: [{ port: 9000, targetport: 9001 }] }]");
    let sent = world.messages();
    assert!(
        matches!(&sent[..], [
            Outgoing::Plain(ToRouter::Unexport { id: gone }),
            Outgoing::Plain(ToRouter::Export { id, target, .. }),
        ] if gone != id && target.get() == 9001),
        "{sent:?}"
    );
    // An altered export keeps its number.
    world.exports("services: [{ name: own, ports: [{ port: 9000, targetport: 9002 }] }]");
    let altered = world.messages();
    assert!(
        matches!((&sent[1], &altered[..]), (
            Outgoing::Plain(ToRouter::Export { id, .. }),
            [Outgoing::Plain(ToRouter::Export { id: same, target, .. })],
        ) if id == same && target.get() == 9002),
        "{altered:?}"
    );
}

#[test]
fn more_ports_than_a_router_takes_and_rules_longer_than_a_message() {
    let mut world = World::new(config(Some("a.local")), Saved::default());
    let ports: Vec<String> = (1..=64).map(|port| format!("{{ name: p{port}, port: {port} }}")).collect();
    let entry = |n: usize| format!("  - {{ name: s{n}, ports: [{}] }}\n", ports.join(", "));
    let mut text: String = "services:\n".into();
    (0..65).for_each(|n| text.push_str(&entry(n)));
    text.push_str("  - { name: small, ports: [{ port: 1 }] }\n");
    world.imports(&text);
    assert_eq!(world.sidecar.counts().sockets, handoff::MAX_SOCKETS);
    let unserved = world.sidecar.findings(Annotation::Imports).unserved;
    assert_eq!(unserved.len(), 2, "no room is left for `small` either");
    assert!(unserved.iter().all(|(_, why)| *why == Unserved::TooManyPorts));
    world.exports(&text);
    assert_eq!(world.sidecar.counts().exports, handoff::MAX_SOCKETS);
    for message in world.welcome("a.local") {
        let (Outgoing::Plain(message) | Outgoing::WithSocket(message, _)) = message else { continue };
        assert!(message.encode().len() <= handoff::MAX_MESSAGE);
    }

    let rule = |n: usize| format!("{}.{}.local", "x".repeat(60), n);
    let rules: Vec<String> = (0..256).map(rule).collect();
    let long = format!("{{ name: long, ports: [{{ port: 1 }}], allow: [{}] }}", rules.join(", "));
    world.exports(&format!("services: [{long}, {{ name: ok, ports: [{{ port: 1 }}] }}]"));
    assert_eq!(world.sidecar.counts().exports, 1);
    let why = world.sidecar.findings(Annotation::Exports).unserved[0].1.to_string();
    assert!(why.contains("16384 is the most"), "{why}");
}

#[test]
fn what_the_router_refuses_is_kept_for_the_status() {
    let mut world = World::new(config(Some("b.local")), Saved::default());
    world.exports("services: [{ name: own, ports: [{ port: 9000 }] }]");
    let sent = world.welcome("a.local");
    let [Outgoing::Plain(ToRouter::Export { id, .. })] = &sent[..] else { panic!("{sent:?}") };
    let refused = |id| ToSidecar::Refused { id: Some(id), reason: "of another cluster".into() };
    world.notices();
    world.sidecar.handle_message(refused(id + 1), world.now);
    world.sidecar.handle_message(refused(*id), world.now);
    assert_eq!(world.notices().len(), 1);
    let state = |world: &World| format!("{:?}", world.sidecar.exports().next().unwrap().ports[0].state);
    assert_eq!(state(&world), "Refused(\"of another cluster\")");
    assert_eq!(world.sidecar.counts().refused, 1);
    let rejected: Vec<_> =
        world.sidecar.rejected(Annotation::Exports).map(|(port, why)| format!("{port}: {why}")).collect();
    assert_eq!(rejected, ["own.default.b.local:9000/TCP: of another cluster"]);
    assert_eq!(world.sidecar.rejected(Annotation::Imports).count(), 0);
    world.sidecar.handle_disconnected("it ended".into(), world.now);
    assert_eq!(state(&world), "Held");
    assert_eq!(world.sidecar.counts().refused, 0);
}

#[test]
fn stock_is_sent_first_and_what_is_short_again() {
    let mut world = World::new(config(Some("a.local")), Saved::default());
    world.welcome("a.local");
    world.imports(WEB);
    world.sidecar.handle_message(ToSidecar::More { tcp: 60, udp: 8 }, world.now);
    let sent = world.messages();
    assert_eq!(sent[..2], [Outgoing::Stock { tcp: 60, udp: 4 }, Outgoing::Stock { tcp: 0, udp: 4 }]);
    assert_eq!(sent.len(), 3);
    world.sidecar.handle_short(3, 1, world.now);
    assert_eq!(world.messages(), []);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.messages(), [Outgoing::Stock { tcp: 3, udp: 1 }]);
    // A router that asks without end gets no more than it can hold.
    (0..1000).for_each(|_| {
        world.sidecar.handle_message(ToSidecar::More { tcp: u16::MAX, udp: u16::MAX }, world.now);
    });
    assert_eq!(world.messages().len(), 2 * 1024 / handoff::MAX_DESCRIPTORS);
    // An import whose socket could not be shared comes again, too.
    let Outgoing::WithSocket(_, id) = sent[2] else { panic!("{sent:?}") };
    world.sidecar.handle_unsent(id, world.now);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.messages(), sent[2..]);
}

#[test]
fn the_router_is_dialled_again_with_backoff_and_its_loss_is_told_once() {
    let mut world = World::new(config(Some("a.local")), Saved::default());
    world.log();
    world.notices();
    let began = world.now;
    for _ in 0..8 {
        world.sidecar.handle_disconnected("no router".into(), world.now);
        let at = world.sidecar.poll_timeout().unwrap();
        world.now = at;
        world.sidecar.handle_timeout(at);
        world.drive();
    }
    assert_eq!(world.now - began, Duration::from_millis(50 + 100 + 200 + 400 + 800 + 3 * 1000));
    assert_eq!(world.log(), ["connect"; 8]);
    assert_eq!(world.notices(), [Notice::RouterDown("no router".into())]);
    let RouterStatus::Down { reason, lasts } = world.sidecar.router(world.now) else { panic!("it is up") };
    assert_eq!(reason, Some("no router"));
    let RouterStatus::Down { lasts: later, .. } = world.sidecar.router(world.now + Duration::from_secs(7))
    else {
        panic!("it is up")
    };
    assert_eq!(later - lasts, Duration::from_secs(7));

    // One that never answers is left again.
    world.sidecar.handle_connected(world.now);
    world.messages();
    world.pass(WELCOME_TIMEOUT);
    assert_eq!(world.log()[0], "disconnect");
    // One that refuses us is left for longer.
    world.pass(LAST_RETRY);
    world.sidecar.handle_connected(world.now);
    world.messages();
    world.log();
    world.sidecar.handle_message(ToSidecar::Refused { id: None, reason: "version".into() }, world.now);
    world.drive();
    world.pass(REFUSED_RETRY - Duration::from_millis(1));
    assert_eq!(world.log(), ["disconnect"]);
    world.pass(Duration::from_millis(1));
    assert_eq!(world.log(), ["connect"]);
    // After a good conversation the next one is not waited for.
    world.welcome("a.local");
    world.pass(Duration::from_secs(2));
    world.sidecar.handle_disconnected("it ended".into(), world.now);
    assert_eq!(world.sidecar.poll_timeout(), Some(world.now + FIRST_RETRY));
}

#[test]
fn welcome_where_it_does_not_belong_ends_the_conversation() {
    let mut world = World::new(config(None), Saved::default());
    world.welcome("a.local");
    let welcome = || ToSidecar::Welcome {
        version: 1,
        cluster: "evil.local".parse().unwrap(),
        node: "n1".parse().unwrap(),
    };
    world.log();
    world.sidecar.handle_message(welcome(), world.now);
    world.drive();
    assert_eq!(world.log(), ["disconnect"]);
    assert_eq!(world.sidecar.cluster().unwrap().0.as_str(), "a.local");
}

#[test]
fn bye_is_the_last_word() {
    let mut world = World::new(config(Some("a.local")), Saved::default());
    world.imports(WEB);
    world.sidecar.handle_connected(world.now);
    world.messages();
    let welcome =
        ToSidecar::Welcome { version: 1, cluster: "a.local".parse().unwrap(), node: "n1".parse().unwrap() };
    world.sidecar.handle_message(welcome, world.now);
    world.sidecar.handle_shutdown();
    assert_eq!(world.messages(), [Outgoing::Plain(ToRouter::Bye)]);
    world.sidecar.handle_disconnected("it ended".into(), world.now);
    assert_eq!(world.sidecar.poll_timeout(), None);

    // Where there is no router, there is nothing to say.
    let mut alone = World::new(config(Some("a.local")), Saved::default());
    alone.sidecar.handle_shutdown();
    assert_eq!(alone.messages(), []);
}
