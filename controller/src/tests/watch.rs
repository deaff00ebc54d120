//! What a mirror says of the API's events.

use k8s_openapi::api::core::v1::Service;
use kube::runtime::watcher::Event;
use serde_json::json;

use crate::convert::trim_service;
use crate::watch::Mirror;

fn service(name: &str, version: u32, port: u16, cluster_ip: &str) -> Service {
    serde_json::from_value(json!({
        "metadata": { "name": name, "namespace": "shop", "resourceVersion": version.to_string() },
        "spec": { "clusterIP": cluster_ip, "ports": [{ "port": port }] },
    }))
    .unwrap()
}

fn said(mirror: &mut Mirror<Service>, events: impl IntoIterator<Item = Event<Service>>) -> Vec<String> {
    events.into_iter().flat_map(|event| mirror.handle(event)).map(|key| key.name).collect()
}

#[test]
fn says_what_changed_and_nothing_else() {
    let mut mirror = Mirror::new(trim_service);
    let first =
        [Event::Init, Event::InitApply(service("a", 1, 80, "x")), Event::InitApply(service("b", 2, 80, "x"))];
    assert_eq!(said(&mut mirror, first), [""; 0], "a list counts when it is whole");
    assert_eq!(said(&mut mirror, [Event::InitDone]), ["a", "b"]);
    assert_eq!(
        said(&mut mirror, [Event::Apply(service("a", 3, 80, "y"))]),
        [""; 0],
        "nothing that is read changed"
    );
    assert_eq!(said(&mut mirror, [Event::Apply(service("a", 4, 81, "y"))]), ["a"]);
    assert_eq!(said(&mut mirror, [Event::Delete(service("b", 5, 80, "x"))]), ["b"]);
    assert_eq!(said(&mut mirror, [Event::Delete(service("b", 5, 80, "x"))]), [""; 0]);
}

#[test]
fn says_what_went_while_nobody_watched() {
    let mut mirror = Mirror::new(trim_service);
    let old = ["a", "b", "c"].map(|name| Event::InitApply(service(name, 1, 80, "x")));
    said(&mut mirror, std::iter::once(Event::Init).chain(old).chain([Event::InitDone]));
    let new =
        [service("a", 1, 80, "x"), service("b", 2, 81, "x"), service("d", 3, 80, "x")].map(Event::InitApply);
    let changed = said(&mut mirror, std::iter::once(Event::Init).chain(new).chain([Event::InitDone]));
    assert_eq!(changed, ["b", "d", "c"]);
    assert_eq!(mirror.store().len(), 3);
}

#[test]
fn an_object_that_is_of_no_concern_any_more_is_gone() {
    let mut mirror =
        Mirror::new(|service: &mut Service| service.metadata.resource_version.as_deref() != Some("9"));
    let listed =
        [Event::Init, Event::InitApply(service("a", 1, 80, "x")), Event::InitApply(service("b", 9, 80, "x"))];
    said(&mut mirror, listed);
    assert_eq!(said(&mut mirror, [Event::InitDone]), ["a"]);
    assert_eq!(said(&mut mirror, [Event::Apply(service("a", 9, 80, "x"))]), ["a"]);
    assert!(mirror.store().is_empty());
}
