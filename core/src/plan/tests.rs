use proptest::prelude::*;

use super::*;
use crate::annotation::parse_exports;

fn namespace() -> Namespace {
    Namespace {
        defaults: Defaults {
            namespace: "shop".parse().unwrap(),
            cluster: "cluster-a.local".parse().unwrap(),
        },
        export: None,
    }
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// A Service of the pods with `app: web`.
fn service(name: &str, ports: Vec<ServicePort>) -> Service {
    Service {
        name: name.into(),
        external_name: false,
        selector: map(&[("app", "web")]),
        ports,
        export: None,
        allow: None,
    }
}

fn port(name: &str, port: i32, protocol: &str, target: Target) -> ServicePort {
    ServicePort { port, protocol: protocol.into(), name: Some(name.into()), target: Some(target) }
}

fn tcp(number: i32) -> Vec<ServicePort> {
    vec![ServicePort { port: number, protocol: "TCP".into(), name: None, target: None }]
}

fn by_name(name: &str) -> Target {
    Target::Name(name.into())
}

fn container(role: Role, ports: &[(&str, i32, &str)]) -> Container {
    let ports = ports.iter().map(|(name, number, protocol)| ContainerPort {
        name: (!name.is_empty()).then(|| (*name).to_owned()),
        number: *number,
        protocol: (*protocol).to_owned(),
    });
    Container { role, ports: ports.collect() }
}

fn web(containers: Vec<Container>) -> Pod {
    Pod { labels: map(&[("app", "web"), ("tier", "front")]), containers }
}

fn planned(services: &[Service], pod: &Pod) -> Plan {
    plan(&namespace(), services, pod)
}

/// The reasons, as a user reads them.
fn reasons(plan: &Plan) -> Vec<String> {
    plan.left_out.iter().map(ToString::to_string).collect()
}

/// What is exported, as `name number/protocol>target`.
fn exported(plan: &Plan) -> Vec<String> {
    let ports = plan.exports.iter().flat_map(|export| export.ports.iter().map(move |port| (export, port)));
    ports
        .map(|(export, port)| {
            format!("{} {}/{}>{}", export.service.name, port.port, port.protocol, port.target)
        })
        .collect()
}

#[test]
fn what_the_pod_gets() {
    let mut dns = service(
        "dns",
        vec![port("dns", 53, "UDP", by_name("dns")), port("dns-tcp", 53, "TCP", by_name("dns"))],
    );
    dns.allow = Some("cluster-b.local, cluster-c.local/prod".into());
    let shop = service("shop", tcp(80));
    let pod = web(vec![container(Role::Application, &[("dns", 5353, "UDP"), ("dns", 5300, "TCP")])]);
    let plan = planned(&[shop, dns], &pod);
    assert_eq!(plan.left_out, []);
    assert_eq!(
        plan.annotation(&namespace().defaults).unwrap(),
        "services:
- name: dns
  namespace: shop
  ports:
  - name: dns-tcp
    port: 53
    protocol: TCP
    targetport: 5300
  - name: dns
    port: 53
    protocol: UDP
    targetport: 5353
  allow:
  - cluster-b.local
  - cluster-c.local/prod
- name: shop
  namespace: shop
  ports:
  - port: 80
    protocol: TCP
    targetport: 80
"
    );
}

#[test]
fn nothing_to_export_is_no_annotation() {
    let mut other = service("other", tcp(80));
    other.selector = map(&[("app", "other")]);
    let plan = planned(&[other], &web(vec![]));
    assert_eq!(plan, Plan::default());
    assert_eq!(plan.annotation(&namespace().defaults), None);
}

#[test]
fn a_number_needs_no_declared_port() {
    let ports = vec![port("web", 80, "TCP", Target::Number(8080))];
    assert_eq!(exported(&planned(&[service("a", ports)], &web(vec![]))), ["a 80/TCP>8080"]);
}

#[test]
fn a_named_port_is_looked_up_as_kubernetes_does() {
    let services = [service("a", vec![port("web", 80, "TCP", by_name("web"))])];
    let targets = |containers| exported(&planned(&services, &web(containers)));
    let app = || container(Role::Application, &[("", 1, "TCP"), ("web", 8080, "TCP")]);
    let sidecar = || container(Role::Sidecar, &[("web", 9090, "TCP")]);
    let init = || container(Role::Init, &[("web", 7070, "TCP")]);
    assert_eq!(targets(vec![sidecar(), app()]), ["a 80/TCP>8080"]);
    assert_eq!(targets(vec![init(), sidecar()]), ["a 80/TCP>9090"]);
    assert_eq!(targets(vec![init()]), [""; 0]);
    // The name alone is not enough: the protocol is the Service's.
    let udp = container(Role::Application, &[("web", 8080, "UDP")]);
    let plan = planned(&services, &web(vec![udp]));
    assert_eq!(
        reasons(&plan),
        [
            "a:80/TCP: no container of the pod has a port named \"web\" with this protocol",
            "a: none of its ports can be exported"
        ]
    );
}

#[test]
fn each_that_is_left_out_has_its_reason() {
    let with = |name: &str, change: &dyn Fn(&mut Service)| {
        let mut service = service(name, tcp(80));
        change(&mut service);
        service
    };
    let services = [
        with("alias", &|s| s.external_name = true),
        with("by-hand", &|s| s.selector.clear()),
        with("empty", &|s| s.ports.clear()),
        with("mistaken", &|s| s.export = Some("no".into())),
        with("open", &|s| s.allow = Some(String::new())),
        with("out", &|s| s.export = Some("false".into())),
        with("rule", &|s| s.allow = Some("b.local,c_d".into())),
        with("rules", &|s| s.allow = Some(vec!["b.local"; 257].join(","))),
        with("sctp", &|s| s.ports[0].protocol = "SCTP".into()),
        with("un_named", &|_| {}),
        with("zero", &|s| s.ports[0].port = 0),
    ];
    let plan = planned(&services, &web(vec![]));
    assert_eq!(plan.exports, []);
    let how = "; use cluster or cluster/namespace, separated by commas, or remove the annotation to allow every member of the mesh";
    assert_eq!(
        reasons(&plan),
        [
            "alias: type ExternalName has no pods".to_owned(),
            "by-hand: no selector, so it selects no pods".to_owned(),
            "empty: no ports".to_owned(),
            "mistaken: servicekeel.io/export is \"no\"; use \"true\" or \"false\"".to_owned(),
            format!("open: servicekeel.io/allow: the rule \"\" is empty{how}"),
            "out: servicekeel.io/export is \"false\"".to_owned(),
            format!(
                "rule: servicekeel.io/allow: the rule \"c_d\" has the character '_'; letters a-z, digits and '-' are allowed{how}"
            ),
            "rules: servicekeel.io/allow has 257 rules; the limit is 256".to_owned(),
            "sctp:80/SCTP: unsupported protocol; only TCP and UDP are supported".to_owned(),
            "sctp: none of its ports can be exported".to_owned(),
            "un_named: its name has the character '_'; letters a-z, digits and '-' are allowed".to_owned(),
            "zero:0/TCP: 0 is not a port; a port is a number from 1 to 65535".to_owned(),
            "zero: none of its ports can be exported".to_owned(),
        ]
    );
    assert_eq!(plan.left_out.iter().filter(|left_out| left_out.is_wanted()).count(), 1);
}

#[test]
fn one_bad_port_leaves_the_others() {
    let ports = vec![
        port("web", 80, "TCP", by_name("web")),
        port("sctp", 90, "SCTP", Target::Number(90)),
        port("admin", 81, "TCP", Target::Number(65_536)),
        ServicePort { name: None, ..port("", 82, "TCP", Target::Number(82)) },
        port("a_b", 83, "TCP", Target::Number(83)),
        port("dns", 53, "UDP", Target::Number(53)),
        port("dns-again", 53, "UDP", Target::Number(54)),
    ];
    let plan = planned(&[service("a", ports)], &web(vec![]));
    assert_eq!(exported(&plan), ["a 53/UDP>53"]);
    assert_eq!(
        reasons(&plan),
        [
            "a:53/UDP: duplicate; only the first is exported",
            "a:80/TCP: no container of the pod has a port named \"web\" with this protocol",
            "a:81/TCP: 65536 is not a port; a port is a number from 1 to 65535",
            "a:82/TCP: needs a name, since the Service has more than one port",
            "a:83/TCP: its name \"a_b\" has the character '_'; letters a-z, digits and '-' are allowed",
            "a:90/SCTP: unsupported protocol; only TCP and UDP are supported",
        ]
    );
}

#[test]
fn a_namespace_opts_out_with_all_of_its_services() {
    let mut services = [service("a", tcp(80)), service("b", tcp(80))];
    services[1].export = Some("true".into());
    let in_namespace = |export: &str| {
        plan(&Namespace { export: Some(export.into()), ..namespace() }, &services, &web(vec![]))
    };
    assert_eq!(in_namespace("true").exports.len(), 2);
    let out = in_namespace("false");
    assert_eq!((out.exports.len(), out.left_out.iter().filter(|l| l.is_wanted()).count()), (0, 2));
    let mistaken = in_namespace("False");
    assert_eq!((mistaken.exports.len(), mistaken.left_out.iter().filter(|l| l.is_wanted()).count()), (0, 0));
}

#[test]
fn the_bounds_of_the_annotation_are_kept() {
    let ports = (0..70).map(|i| port(&format!("p{i}"), 1000 + i, "TCP", Target::Number(80))).collect();
    let plan = planned(&[service("wide", ports)], &web(vec![]));
    assert_eq!((plan.exports[0].ports.len(), plan.left_out.len()), (64, 6));
    let many: Vec<Service> = (0..5000).map(|i| service(&format!("s{i}"), tcp(80))).collect();
    let plan = planned(&many, &web(vec![]));
    assert_eq!((plan.exports.len(), plan.left_out.len()), (4096, 904));
}

const KEYS: [&str; 3] = ["app", "tier", "zone"];
const VALUES: [&str; 2] = ["web", "db"];

prop_compose! {
    fn some_labels()(values in proptest::array::uniform3(0..3usize)) -> BTreeMap<String, String> {
        let pairs = KEYS.iter().zip(values);
        pairs.filter_map(|(key, value)| Some(((*key).to_owned(), (*VALUES.get(value)?).to_owned()))).collect()
    }
}

fn some_text(common: &'static [&'static str]) -> impl Strategy<Value = Option<String>> {
    let foreign = proptest::string::string_regex("[a-z0-9A-Z_./, :#-]{0,12}").unwrap();
    prop_oneof![
        6 => Just(None),
        6 => proptest::sample::select(common).prop_map(|text| Some(text.to_owned())),
        1 => foreign.prop_map(Some),
    ]
}

prop_compose! {
    fn some_port()(
        port in prop_oneof![1..5i32, Just(0), Just(65_535), Just(65_536), Just(-1)],
        protocol in proptest::sample::select(&["TCP", "UDP", "SCTP", "tcp"][..]),
        name in some_text(&["web", "dns", "null", "8080", "a", "b", "c"]),
        target in proptest::option::of(prop_oneof![
            (0..3i32).prop_map(Target::Number),
            proptest::sample::select(&["web", "dns"][..]).prop_map(|name| Target::Name(name.into())),
        ]),
    ) -> ServicePort {
        ServicePort { port, protocol: protocol.into(), name, target }
    }
}

prop_compose! {
    fn some_service()(
        name in some_text(&["web", "db", "on", "1e3", "123"]),
        external_name in proptest::bool::weighted(0.1),
        selector in some_labels(),
        ports in proptest::collection::vec(some_port(), 0..5),
        export in some_text(&["true", "true", "false"]),
        allow in some_text(&["b.local", "b.local/on,c.local"]),
    ) -> Service {
        Service { name: name.unwrap_or_else(|| "other".into()), external_name, selector, ports, export, allow }
    }
}

prop_compose! {
    fn some_pod()(
        labels in some_labels(),
        containers in proptest::collection::vec((0..3usize, proptest::collection::vec((0..3usize, 0..4i32, 0..2usize), 0..3)), 0..3),
    ) -> Pod {
        let containers = containers.into_iter().map(|(role, ports)| {
            let ports: Vec<_> = ports.into_iter().map(|(n, number, p)| (["", "web", "dns"][n], number, ["TCP", "UDP"][p])).collect();
            container([Role::Application, Role::Sidecar, Role::Init][role], &ports)
        });
        Pod { labels, containers: containers.collect() }
    }
}

proptest! {
    /// Kubernetes' own rule: every pair of the selector is a label of the pod, and a Service without a selector
    /// selects nothing.
    #[test]
    fn only_what_selects_the_pod_is_exported(selector in some_labels(), labels in some_labels()) {
        let service = Service { selector: selector.clone(), ..service("a", tcp(80)) };
        let selects = !selector.is_empty() && KEYS.iter().all(|key| {
            selector.get(*key).is_none_or(|wanted| labels.get(*key) == Some(wanted))
        });
        let plan = planned(&[service], &Pod { labels, containers: vec![] });
        prop_assert_eq!(!plan.exports.is_empty(), selects);
        prop_assert_eq!(!plan.left_out.is_empty(), selector.is_empty());
    }

    /// What the controller writes is what the sidecar reads, and no part of it is refused there.
    #[test]
    fn the_sidecar_reads_what_is_planned(services in proptest::collection::vec(some_service(), 0..6), pod in some_pod()) {
        let plan = planned(&services, &pod);
        let text = plan.annotation(&namespace().defaults).unwrap_or_default();
        let parsed = parse_exports(&text, &namespace().defaults).unwrap();
        prop_assert_eq!(&parsed.refused, &[], "{}", text);
        prop_assert_eq!(&parsed.entries, &plan.exports, "{}", text);
    }

    /// Every Service that could be meant is either exported or told, and none is both.
    #[test]
    fn nothing_is_left_out_in_silence(services in proptest::collection::vec(some_service(), 0..6), pod in some_pod()) {
        let plan = planned(&services, &pod);
        let meant = services.iter().filter(|service| {
            service.external_name || selects(&service.selector, &pod.labels)
        });
        let whole = plan.left_out.iter().filter(|left_out| left_out.port.is_none());
        prop_assert_eq!(plan.exports.len() + whole.count(), meant.count());
    }

    #[test]
    fn the_order_has_no_influence(
        // A namespace has one Service of a name.
        (services, shuffled) in proptest::collection::vec(some_service(), 0..6).prop_flat_map(|services| {
            let by_name: BTreeMap<_, _> = services.into_iter().map(|s| (s.name.clone(), s)).collect();
            let services: Vec<_> = by_name.into_values().collect();
            (Just(services.clone()), Just(services).prop_shuffle())
        }),
        rotate in 0..5usize,
        pod in some_pod(),
    ) {
        let mut shuffled = shuffled;
        for service in &mut shuffled {
            let by = rotate.min(service.ports.len());
            service.ports.rotate_left(by);
        }
        prop_assert_eq!(planned(&services, &pod), planned(&shuffled, &pod));
    }
}
