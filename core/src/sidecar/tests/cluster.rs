//! Which cluster a sidecar takes for its own, and when.

use super::*;

#[test]
fn a_first_start_waits_for_the_cluster_and_no_longer_than_two_seconds() {
    let mut world = World::new(config(None), Saved::default());
    world.imports(WEB);
    world.exports("");
    assert_eq!(world.sidecar.cluster(), None);
    world.pass(CLUSTER_WAIT - Duration::from_millis(1));
    assert!(world.zone.is_none() && world.open.is_empty() && !world.sidecar.is_applied());
    world.pass(Duration::from_millis(1));
    assert!(world.resolve("web.default.cluster.local").is_some());
    assert!(world.sidecar.is_applied());
    assert_eq!(world.saved.as_ref().unwrap().cluster, None, "nobody said it");

    // The router comes, and knows better.
    world.sidecar.handle_disconnected("no router".into(), world.now);
    world.pass(FIRST_RETRY);
    let sent = world.welcome("a.local");
    assert_eq!(world.resolve("web.default.cluster.local"), None);
    assert!(world.resolve("web.default.a.local").is_some());
    assert_eq!(world.open.len(), 1);
    assert!(
        matches!(&sent[..], [Outgoing::WithSocket(ToRouter::Import { wanted, .. }, _)]
            if wanted.to_string() == "web.default.a.local:80/TCP"),
        "{sent:?}"
    );
    assert_eq!(world.saved.as_ref().unwrap().cluster.as_ref().unwrap().as_str(), "a.local");

    // The next start needs no router for it.
    let saved = world.saved.take().unwrap();
    let mut next = World::new(config(None), saved);
    assert_eq!(
        next.sidecar.cluster().map(|(name, source)| (name.as_str(), source)),
        Some(("a.local", ClusterSource::Saved))
    );
    next.sidecar.handle_absent(next.now);
    next.drive();
    assert!(next.sidecar.is_applied());
    assert_eq!(next.resolve("web.default.a.local"), world.resolve("web.default.a.local"));
}

#[test]
fn a_welcome_in_time_is_the_cluster() {
    let mut world = World::new(config(None), Saved::default());
    world.imports(WEB);
    world.welcome("b.local");
    assert!(world.resolve("web.default.b.local").is_some());
    assert_eq!(world.saved.as_ref().unwrap().cluster.as_ref().unwrap().as_str(), "b.local");
    assert_eq!(world.sidecar.poll_timeout(), None, "nothing is waited for");
}

#[test]
fn while_the_cluster_is_waited_for_a_bad_text_hides_no_good_one() {
    let mut world = World::new(config(None), Saved::default());
    world.exports("");
    world.imports("services: []");
    world.imports(WEB);
    world.imports("services: [");
    world.welcome("b.local");
    assert!(world.resolve("web.default.b.local").is_some());
    assert!(world.sidecar.findings(Annotation::Imports).error.is_some());
}

#[test]
fn a_configured_cluster_stays_and_the_difference_is_said() {
    let mut world = World::new(config(Some("own.local")), Saved::default());
    world.imports(WEB);
    world.notices();
    world.welcome("a.local");
    assert!(world.resolve("web.default.own.local").is_some());
    assert!(world.notices().contains(&Notice::OtherCluster { router: "a.local".parse().unwrap() }));
    assert_eq!(world.saved.as_ref().unwrap().cluster, None);
}
