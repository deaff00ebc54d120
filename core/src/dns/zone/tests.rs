use proptest::prelude::*;

use super::*;
use crate::name::Label;

fn label(text: &str) -> Label {
    text.parse().unwrap()
}

fn domain(text: &str) -> ClusterName {
    text.parse().unwrap()
}

fn pod() -> Defaults {
    Defaults { namespace: label("default"), cluster: domain("cluster-a.local") }
}

fn port(name: Option<&str>, number: u16, protocol: Protocol) -> Port {
    let number = NonZeroU16::new(number).unwrap();
    Port { name: name.map(label), port: number, protocol, target: number }
}

fn import(name: &str, namespace: &str, cluster: &str, last: u8) -> (Import, Ipv4Addr) {
    let service = ServiceName { name: label(name), namespace: label(namespace), cluster: domain(cluster) };
    let ports = vec![
        port(Some("http"), 8080, Protocol::Tcp),
        port(Some("echo"), 7, Protocol::Udp),
        port(None, 9090, Protocol::Tcp),
    ];
    (Import { service, ports }, Ipv4Addr::new(127, 0, 66, last))
}

fn search() -> Vec<ClusterName> {
    ["default.svc.cluster-a.local", "svc.cluster-a.local", "cluster-a.local", "corp.example"]
        .map(domain)
        .into()
}

fn range() -> Ipv4Net {
    "127.0.66.0/24".parse().unwrap()
}

fn zone(imports: &[(Import, Ipv4Addr)]) -> Zone {
    Zone::new(&pod(), &search(), range(), imports)
}

/// What is answered where the upstreams know no name at all.
fn ask<'z>(zone: &'z Zone, name: &str, qtype: u16) -> Answer<'z> {
    let name = name.parse().unwrap();
    zone.answer(&name, qtype).found().unwrap_or_else(|| zone.fallback(&name, qtype))
}

fn address<'z>(last: u8) -> Answer<'z> {
    Answer::Record(Record::A(Ipv4Addr::new(127, 0, 66, last)))
}

const AAAA: u16 = 28;
const HTTPS: u16 = 65;

#[test]
fn every_form_of_the_contract() {
    let zone = zone(&[import("simple-server", "default", "cluster-b.local", 2)]);
    for form in [
        "simple-server.default.cluster-b.local",
        "simple-server.default.svc.cluster-b.local",
        "simple-server.default",
        "simple-server.default.svc",
        "simple-server",
        "simple-server.default.svc.clusterset.local",
    ] {
        for name in
            std::iter::once(form.to_owned()).chain(search().iter().map(|domain| format!("{form}.{domain}")))
        {
            assert_eq!(ask(&zone, &name, record_type::A), address(2), "{name}");
            assert_eq!(ask(&zone, &name, record_type::ANY), address(2), "{name}");
            let apex = name.split('.').count() as u8;
            for qtype in [AAAA, HTTPS, record_type::SRV, record_type::PTR, 6, 16, 0, 65535] {
                assert_eq!(ask(&zone, &name, qtype), Answer::NoData { apex }, "{name} type {qtype}");
            }
            let srv = Record::Srv {
                port: NonZeroU16::new(8080).unwrap(),
                target: "simple-server.default.svc.cluster-b.local",
                address: Ipv4Addr::new(127, 0, 66, 2),
            };
            assert_eq!(ask(&zone, &format!("_http._tcp.{name}"), record_type::SRV), Answer::Record(srv));
            assert_eq!(ask(&zone, &format!("_http._tcp.{name}"), record_type::A), Answer::NoData { apex });
            assert_eq!(ask(&zone, &format!("_tcp.{name}"), record_type::SRV), Answer::NoData { apex });
            assert_eq!(ask(&zone, &format!("_udp.{name}"), record_type::A), Answer::NoData { apex });
            assert_eq!(ask(&zone, &format!("_http._udp.{name}"), record_type::SRV), Answer::NoName { apex });
            assert_eq!(ask(&zone, &format!("_9090._tcp.{name}"), record_type::SRV), Answer::NoName { apex });
        }
    }
}

#[test]
fn other_search_domains_have_names_of_their_own() {
    let imports = [import("git", "default", "cluster-b.local", 2)];
    let own = |search: &[&str], name: &str| {
        let search: Vec<ClusterName> = search.iter().copied().map(domain).collect();
        let zone = Zone::new(&pod(), &search, range(), &imports);
        let name = name.parse().unwrap();
        let (first, later) = (zone.answer(&name, record_type::A), zone.fallback(&name, record_type::A));
        assert!(first == address(2) || later == address(2), "{name}: {first:?}, {later:?}");
        first == address(2)
    };
    // As the kubelet writes it, where the DNS domain is not the cluster's name.
    let kubelet =
        ["default.svc.cluster.local", "svc.cluster.local", "cluster.local", "example.com", "svc.example.com"];
    for name in [
        "git",
        "git.default",
        "git.default.cluster-b.local",
        "git.default.svc.clusterset.local",
        "git.default.svc.cluster.local",
        "git.default.default.svc.cluster.local",
        "git.svc.cluster.local",
        "git.cluster.local",
    ] {
        assert!(own(&kubelet, name), "{name}");
    }
    for name in
        ["git.example.com", "git.default.example.com", "git.default.svc.example.com", "git.svc.example.com"]
    {
        assert!(!own(&kubelet, name), "{name}");
    }
    // The cluster's name is its domain in any case.
    assert!(own(&["prod.svc.cluster-a.local"], "git.prod.svc.cluster-a.local"));
    assert!(own(&["cluster-a.local"], "git.cluster-a.local"));
    for other in ["xcluster-a.local", "a.cluster-a.local", "xsvc.cluster-a.local", "a.b.svc.cluster-a.local"]
    {
        assert!(!own(&[other], &format!("git.{other}")), "{other}");
    }
    // Another namespace before `svc` may be anybody's.
    assert!(!own(&["prod.svc.example.com", "example.com"], "git.example.com"));
}

#[test]
fn what_is_beside_is_not_ours() {
    let zone = zone(&[
        import("simple-server", "default", "cluster-b.local", 2),
        import("example", "com", "cluster-b.local", 3),
        import("io", "default", "cluster-b.local", 4),
    ]);
    for name in [
        "default",
        "local",
        "cluster-b.local",
        "default.svc.cluster-b.local",
        "other.default",
        "other.default.svc.cluster-b.local",
        "simple-server.prod",
        "simple-server.default.svc.cluster-c.local",
        "simple-server.default.corp",
        "simple-server.default.svc.cluster-b.local.example",
        "simple-server.default.cluster-a.local.corp.example",
        "x.simple-server.default",
        "xsimple-server.default",
        "simple-server.default.xcorp.example",
        "www.example.com",
        "_dmarc.example.com",
        "_x._sctp.example.com",
        "_a._b._tcp.example.com",
        "github.io",
        "clusterset.local",
        "example",
    ] {
        assert_eq!(ask(&zone, name, record_type::A), Answer::NotOurs, "{name}");
        assert_eq!(ask(&zone, name, record_type::SRV), Answer::NotOurs, "{name}");
    }
    assert_eq!(ask(&zone, "example.com", record_type::A), address(3));
    assert_eq!(ask(&zone, "io", record_type::A), address(4));
}

#[test]
fn two_clusters_one_name() {
    let zone = zone(&[
        import("web", "default", "cluster-b.local", 2),
        import("web", "default", "cluster-a.local", 3),
        import("web", "prod", "cluster-c.local", 4),
    ]);
    for (name, last) in [
        ("web.default.svc.cluster-b.local", 2),
        ("web.default.cluster-b.local", 2),
        ("web.default.svc.cluster-a.local", 3),
        ("web.default.cluster-a.local", 3),
        ("web.default", 2),
        ("web", 2),
        ("web.default.svc.clusterset.local", 2),
        ("web.default.corp.example", 2),
        ("web.prod", 4),
        ("web.prod.svc.cluster-a.local", 4),
    ] {
        assert_eq!(ask(&zone, name, record_type::A), address(last), "{name}");
    }
    assert_eq!(ask(&zone, "web.prod.svc.cluster-b.local", record_type::A), Answer::NotOurs);
}

#[test]
fn one_service_in_two_entries_has_the_ports_of_both() {
    let (first, lease) = import("web", "default", "cluster-b.local", 2);
    let second = Import { ports: vec![port(Some("extra"), 99, Protocol::Tcp)], ..first.clone() };
    let zone = zone(&[(first, lease), (second, lease)]);
    assert!(matches!(ask(&zone, "_extra._tcp.web", record_type::SRV), Answer::Record(Record::Srv { .. })));
    assert!(matches!(ask(&zone, "_http._tcp.web", record_type::SRV), Answer::Record(Record::Srv { .. })));
}

#[test]
fn a_port_may_be_named_as_a_protocol() {
    let (web, lease) = import("web", "default", "cluster-b.local", 2);
    let ports = vec![port(Some("tcp"), 80, Protocol::Tcp), port(Some("udp"), 53, Protocol::Udp)];
    let zone = zone(&[(Import { ports, ..web }, lease)]);
    for (name, number) in [("_tcp._tcp.web", 80), ("_udp._udp.web.default.svc", 53)] {
        let Answer::Record(Record::Srv { port, .. }) = ask(&zone, name, record_type::SRV) else {
            panic!("{name}: {:?}", ask(&zone, name, record_type::SRV))
        };
        assert_eq!(port.get(), number);
    }
    assert!(matches!(ask(&zone, "_udp._tcp.web", record_type::SRV), Answer::NoName { .. }));
    assert_eq!(ask(&zone, "_tcp._tcp.other", record_type::SRV), Answer::NotOurs);
}

#[test]
fn reverse() {
    let imports = [import("web", "default", "cluster-b.local", 2)];
    let zone = zone(&imports);
    let web = Answer::Record(Record::Ptr("web.default.svc.cluster-b.local"));
    assert_eq!(ask(&zone, "2.66.0.127.in-addr.arpa", record_type::PTR), web);
    assert_eq!(ask(&zone, "2.66.0.127.in-addr.arpa", record_type::A), Answer::NoData { apex: 5 });
    assert_eq!(ask(&zone, "3.66.0.127.in-addr.arpa", record_type::PTR), Answer::NoName { apex: 5 });
    assert_eq!(ask(&zone, "x.2.66.0.127.in-addr.arpa", record_type::PTR), Answer::NoName { apex: 5 });
    assert_eq!(ask(&zone, "66.0.127.in-addr.arpa", 6), Answer::NoData { apex: 5 });
    for other in [
        "2.67.0.127.in-addr.arpa",
        "0.127.in-addr.arpa",
        "in-addr.arpa",
        "02.66.0.127.in-addr.arpa",
        "256.66.0.127.in-addr.arpa",
        "a.66.0.127.in-addr.arpa",
        "1.0.0.127.in-addr.arpa",
    ] {
        assert_eq!(ask(&zone, other, record_type::PTR), Answer::NotOurs, "{other}");
    }
    let small = Zone::new(&pod(), &[], "127.0.66.0/29".parse().unwrap(), &imports);
    assert_eq!(ask(&small, "2.66.0.127.in-addr.arpa", record_type::PTR), web);
    assert_eq!(ask(&small, "3.66.0.127.in-addr.arpa", record_type::PTR), Answer::NoName { apex: 6 });
    assert_eq!(ask(&small, "8.66.0.127.in-addr.arpa", record_type::PTR), Answer::NotOurs);
    assert_eq!(ask(&small, "66.0.127.in-addr.arpa", record_type::PTR), Answer::NotOurs);
    assert!(small.is_above_ours(&"66.0.127.in-addr.arpa".parse().unwrap()));
    assert!(!small.is_above_ours(&"67.0.127.in-addr.arpa".parse().unwrap()));
}

#[test]
fn names_above_ours_are_known() {
    let zone = zone(&[import("web", "prod", "cluster-b.local", 2)]);
    for name in [
        "prod",
        "svc",
        "prod.svc.cluster-b.local",
        "svc.cluster-b.local",
        "cluster-b.local",
        "local",
        "cluster-a.local",
        "corp.example",
        "example",
        "prod.svc.cluster-a.local",
        "0.127.in-addr.arpa",
        "arpa",
    ] {
        assert!(zone.is_above_ours(&name.parse().unwrap()), "{name}");
        assert_eq!(ask(&zone, name, record_type::A), Answer::NotOurs, "{name}");
    }
    for name in ["web", "web.prod", "default", "other.svc.cluster-b.local", "example.com", "127"] {
        assert!(!zone.is_above_ours(&name.parse().unwrap()), "{name}");
    }
}

#[test]
fn a_cluster_with_a_very_long_name() {
    let cluster = [["c"; 63].concat(), ["d"; 63].concat(), ["e"; 63].concat(), ["f"; 52].concat()].join(".");
    let zone = zone(&[import("web", "ns", &cluster, 2)]);
    assert_eq!(ask(&zone, &format!("web.ns.{cluster}"), record_type::A), address(2));
    let target = ask(&zone, "2.66.0.127.in-addr.arpa", record_type::PTR);
    assert_eq!(target, Answer::Record(Record::Ptr("web.ns.svc.clusterset.local")));
}

/// Few words, so that names collide often.
fn word() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["a", "b", "svc", "local", "default", "clusterset"]).prop_map(str::to_owned)
}

fn words(count: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = String> {
    prop::collection::vec(word(), count).prop_map(|words| words.join("."))
}

/// The contract's table, written down once more without regard to cost.
fn model(
    imports: &[(Import, Ipv4Addr)],
    search: &[ClusterName],
    own: &Label,
    asked: &str,
) -> Option<Ipv4Addr> {
    let mut clusters = vec!["cluster-a.local"];
    clusters.extend(search.iter().filter_map(|domain| domain.as_str().strip_prefix(&format!("{own}.svc."))));
    let is_other = |suffix: &String| {
        let labels: Vec<&str> = suffix[1..].split('.').collect();
        !clusters.iter().any(|cluster| {
            let domain: Vec<&str> = cluster.split('.').collect();
            let before = labels.strip_suffix(domain.as_slice());
            matches!(before, Some([] | ["svc"] | [_, "svc"]))
        })
    };
    let mut suffixes: Vec<String> = search.iter().map(|domain| format!(".{domain}")).collect();
    suffixes.sort_by_key(|suffix| (is_other(suffix), suffix.len()));
    suffixes.insert(0, String::new());
    suffixes.iter().find_map(|suffix| {
        let form = asked.strip_suffix(suffix.as_str())?;
        let long = |service: &ServiceName| {
            form == format!("{}.{}.{}", service.name, service.namespace, service.cluster)
                || form == format!("{}.{}.svc.{}", service.name, service.namespace, service.cluster)
        };
        let short = |service: &ServiceName| {
            let both = format!("{}.{}", service.name, service.namespace);
            form == both
                || form == format!("{both}.svc")
                || form == format!("{both}.svc.clusterset.local")
                || (form == service.name.as_str() && service.namespace == *own)
        };
        let first = imports.iter().find(|(import, _)| long(&import.service));
        first.or_else(|| imports.iter().find(|(import, _)| short(&import.service))).map(|found| found.1)
    })
}

proptest! {
    #[test]
    fn answers_what_the_contract_says_and_nothing_else(
        services in prop::collection::vec((word(), word(), words(1..=2)), 0..5),
        search in prop::collection::vec(words(1..=3), 0..3),
        asked in words(1..=7),
        qtype in prop::sample::select(vec![1u16, 28, 33, 12, 65, 255]),
    ) {
        let mut imports: Vec<(Import, Ipv4Addr)> = Vec::new();
        for (name, namespace, cluster) in &services {
            let next = import(name, namespace, cluster, imports.len() as u8 + 1);
            if !imports.iter().any(|known| known.0.service == next.0.service) {
                imports.push(next);
            }
        }
        let search: Vec<ClusterName> = search.iter().map(|text| domain(text)).collect();
        let zone = Zone::new(&pod(), &search, range(), &imports);
        let expected = match model(&imports, &search, &pod().namespace, &asked) {
            Some(lease) if qtype == 1 || qtype == 255 => Answer::Record(Record::A(lease)),
            Some(_) => Answer::NoData { apex: asked.split('.').count() as u8 },
            None => Answer::NotOurs,
        };
        prop_assert_eq!(ask(&zone, &asked, qtype), expected);
    }

    /// A target leads back to its own address: clients follow it.
    #[test]
    fn targets_resolve(services in prop::collection::vec((word(), word()), 1..5)) {
        let clusters = ["one.example", "two.example"];
        let mut imports: Vec<(Import, Ipv4Addr)> = Vec::new();
        for (at, (name, namespace)) in services.iter().enumerate() {
            imports.push(import(name, namespace, clusters[at % 2], at as u8 + 1));
        }
        let zone = Zone::new(&pod(), &[], range(), &imports);
        for lease in zone.services.iter().map(|service| service.address) {
            let [a, b, c, d] = lease.octets();
            let Answer::Record(Record::Ptr(target)) =
                ask(&zone, &format!("{d}.{c}.{b}.{a}.in-addr.arpa"), record_type::PTR)
            else {
                return Err(TestCaseError::fail("no PTR"));
            };
            prop_assert_eq!(ask(&zone, target, record_type::A), Answer::Record(Record::A(lease)));
        }
    }

    #[test]
    fn any_name_of_bytes_is_answered(labels in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..70), 0..8), qtype: u16) {
        if let Ok(name) = Name::from_labels(labels.iter().map(Vec::as_slice)) {
            let zone = zone(&[import("web", "default", "cluster-b.local", 2)]);
            zone.answer(&name, qtype);
            zone.is_above_ours(&name);
        }
    }
}
