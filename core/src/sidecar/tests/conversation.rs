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
    assert!(why.contains("the limit is 16384"), "{why}");
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

fn refuse(world: &mut World, message: &Outgoing) {
    let (Outgoing::WithSocket(ToRouter::Import { id, .. }, _) | Outgoing::Plain(ToRouter::Export { id, .. })) =
        message
    else {
        panic!("{message:?}")
    };
    let refused = ToSidecar::Refused { id: Some(*id), reason: "no room".into() };
    world.sidecar.handle_message(refused, world.now);
}

#[test]
fn what_the_router_refuses_is_asked_for_again_until_it_serves_it() {
    let mut world = World::new(config(Some("a.local")), Saved::default());
    world.imports(WEB);
    world.exports("services: [{ name: own, ports: [{ port: 9000 }] }]");
    let first = world.welcome("a.local");
    assert_eq!(first.len(), 2);
    world.notices();
    let mut times = Vec::new();
    let began = world.now;
    while world.now - began < Duration::from_secs(60) {
        first.iter().for_each(|message| refuse(&mut world, message));
        while world.messages().is_empty() {
            assert_eq!(world.sidecar.counts().refused, 2, "it is refused still");
            assert!(world.now - began < Duration::from_secs(120), "it is not asked again");
            world.now = world.sidecar.poll_timeout().expect("it is asked again");
            world.sidecar.handle_timeout(world.now);
            world.drive();
        }
        times.push((world.now - began).as_secs());
    }
    // After 1, 2, 4, 8, 15, 15, 15 s; and 1 s for each answer.
    assert_eq!(times, [1, 4, 9, 18, 34, 50, 66]);
    assert_eq!(world.notices().len(), 2, "it is told once");
    // No word is the answer.
    world.pass(Duration::from_millis(999));
    assert_eq!(world.sidecar.counts().refused, 2);
    world.pass(Duration::from_millis(1));
    let ports =
        world.sidecar.imports().flat_map(|i| i.ports).chain(world.sidecar.exports().flat_map(|e| e.ports));
    assert!(ports.map(|port| port.state).all(|state| state == PortState::HandedOver));
    assert_eq!(world.sidecar.counts().refused, 0);
    let accepted = world.notices();
    assert!(matches!(accepted[..], [Notice::Accepted { .. }, Notice::Accepted { .. }]), "{accepted:?}");
    world.pass(Duration::from_secs(60));
    assert_eq!((world.messages(), world.sidecar.poll_timeout()), (vec![], None));
}

#[test]
fn of_many_that_are_refused_each_has_its_turn_and_what_is_not_sent_is_not_served() {
    let mut world = World::new(config(Some("a.local")), Saved::default());
    let entry = |n| format!("{{ name: s{n}, ports: [{{ port: 80 }}] }}");
    let entries: Vec<String> = (1..=100).map(entry).collect();
    world.imports(&format!("services: [{}]", entries.join(", ")));
    world.exports("");
    let all = world.welcome("a.local");
    assert_eq!(all.len(), 100);
    all.iter().for_each(|message| refuse(&mut world, message));
    let (mut turns, began) = (Vec::new(), world.now);
    while turns.len() < 3 {
        assert!(world.now - began < Duration::from_secs(60), "{turns:?}");
        world.pass(Duration::from_millis(100));
        let turn = world.messages();
        turn.iter().for_each(|message| refuse(&mut world, message));
        turns.extend(Some(turn).filter(|turn| !turn.is_empty()));
    }
    assert_eq!(turns[0], all[..64]);
    assert_eq!(turns[1], [&all[..28], &all[64..]].concat());
    assert_eq!(turns[2], all[28..92]);
    // The router reads nothing.
    world.pass(Duration::from_secs(60));
    assert_eq!(world.sidecar.counts().refused, 100);
    // It has room, and takes all of them one turn after the other.
    let mut turns = vec![world.messages().len()];
    let began = world.now;
    while world.sidecar.counts().refused > 0 {
        world.pass(Duration::from_millis(100));
        turns.extend(Some(world.messages().len()).filter(|number| *number > 0));
        assert!(world.now - began < LAST_ASK + Duration::from_secs(3), "{turns:?}");
    }
    assert_eq!(turns, [64, 36]);
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

#[test]
fn a_router_that_stops_answering_is_told_once_and_heard_again() {
    let mut world = World::new(config(Some("a.local")), Saved::default());
    world.imports(WEB);
    world.welcome_of(handoff::PINGS, "a.local");
    world.notices();
    world.log();
    let ping = [Outgoing::Plain(ToRouter::Ping)];
    // One that answers, and one that has something to say, is well.
    for word in [ToSidecar::Pong, ToSidecar::More { tcp: 0, udp: 0 }] {
        world.pass(PING_AFTER - Duration::from_millis(1));
        assert_eq!(world.messages(), []);
        world.pass(Duration::from_millis(1));
        assert_eq!(world.messages(), ping);
        world.pass(PONG_WITHIN - Duration::from_millis(1));
        assert_eq!(world.messages(), []);
        world.sidecar.handle_message(word, world.now);
    }
    assert_eq!(world.notices(), []);
    assert!(matches!(world.sidecar.router(world.now), RouterStatus::Up { .. }));

    world.pass(PING_AFTER + PONG_WITHIN);
    assert_eq!(world.messages(), ping);
    let silent = |world: &World| match world.sidecar.router(world.now) {
        RouterStatus::Silent { router, lasts } => Some((router.to_string(), lasts)),
        _ => None,
    };
    assert_eq!(silent(&world), Some(("a.local/n1".into(), PING_AFTER + PONG_WITHIN)));
    let notices = world.notices();
    assert!(
        matches!(&notices[..], [Notice::RouterSilent { lasts, .. }] if *lasts == PING_AFTER + PONG_WITHIN)
    );
    // It may be stopped for a day, and is asked and told no more: the conversation waits for it.
    world.pass(Duration::from_secs(86_400));
    assert_eq!((world.messages(), world.notices(), world.log()), (vec![], vec![], vec![]));
    assert_eq!(silent(&world).unwrap().1, PING_AFTER + PONG_WITHIN + Duration::from_secs(86_400));
    world.sidecar.handle_message(ToSidecar::Pong, world.now);
    assert!(matches!(&world.notices()[..], [Notice::RouterAnswers { silent }] if silent.as_secs() > 86_400));
    assert_eq!(silent(&world), None);
    world.pass(PING_AFTER);
    assert_eq!(world.messages(), ping);
}

#[test]
fn a_router_that_knows_no_ping_is_not_asked() {
    let mut world = World::new(config(Some("a.local")), Saved::default());
    world.welcome_of(1, "a.local");
    world.pass(Duration::from_secs(3600));
    assert_eq!(world.messages(), []);
    assert!(matches!(world.sidecar.router(world.now), RouterStatus::Up { .. }));
    // Nor is a new sidecar refused by it.
    assert_eq!(handoff::LEAST, 1);
}
