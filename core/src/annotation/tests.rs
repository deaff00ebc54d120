use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::diff::{ExportChange, ImportChange, Offer, offered, wanted};
use super::*;

fn defaults() -> Defaults {
    Defaults { namespace: "default".parse().unwrap(), cluster: "cluster-a.local".parse().unwrap() }
}

fn exports(text: &str) -> Parsed<Export> {
    parse_exports(text, &defaults()).unwrap()
}

fn names(parsed: &Parsed<Export>) -> Vec<String> {
    parsed.entries.iter().map(|entry| entry.service.to_string()).collect()
}

/// Where each refusal stands: path, line, column.
fn places(findings: &[Finding]) -> Vec<(&str, u64, u64)> {
    findings.iter().map(|f| (f.path.as_str(), f.line, f.column)).collect()
}

const CONTRACT: &str = r#"services:
  - name: simple-server        # required, a DNS label
    namespace: default         # optional: the pod's own namespace
    cluster: cluster-a.local   # optional: the pod's own cluster
    ports:                     # required, at least one
      - name: tcp              # optional if there is one port
        port: 8080             # what the client connects to
        protocol: TCP          # TCP (default) or UDP
        targetport: 8080       # container port; default: port
    allow: ["cluster-b.local", "cluster-c.local/prod"]
"#;

#[test]
fn what_withdraws_all_and_is_hardly_meant_is_warned_of() {
    for (text, path) in [("services:\n", "services"), ("services: ~", "services"), ("# - name: a\n", "")] {
        let parsed = exports(text);
        assert_eq!(
            (parsed.entries.len(), parsed.refused.len(), parsed.warnings.len()),
            (0, 0, 1),
            "{text:?}"
        );
        assert_eq!(parsed.warnings[0].path, path);
        assert!(parsed.warnings[0].reason.contains("withdrawn"), "{}", parsed.warnings[0]);
    }
    for text in ["", "\n", "---\n", "services: []\n", "services: [] # none\n", "# none\nservices: []\n"] {
        assert_eq!(exports(text).warnings, [], "{text:?}");
    }
}

#[test]
fn the_contract_as_it_stands() {
    let parsed = exports(CONTRACT);
    assert_eq!(parsed.refused, []);
    // A rule by namespace is kept, and nobody attests one yet.
    assert_eq!(places(&parsed.warnings), [("services[0].allow[1]", 10, 32)]);
    let port = NonZeroU16::new(8080).unwrap();
    let expected = Export {
        service: ServiceName {
            name: "simple-server".parse().unwrap(),
            namespace: "default".parse().unwrap(),
            cluster: "cluster-a.local".parse().unwrap(),
        },
        ports: vec![Port { name: Some("tcp".parse().unwrap()), port, protocol: Protocol::Tcp, target: port }],
        allow: Some(vec!["cluster-b.local".parse().unwrap(), "cluster-c.local/prod".parse().unwrap()]),
    };
    assert_eq!(parsed.entries, [expected]);
    assert_eq!(exports(&CONTRACT.replace('\n', "\r\n")).entries, parsed.entries);
}

#[test]
fn what_is_left_out_is_the_pods_own() {
    let parsed = exports("services: [{name: Web, ports: [{port: 53, protocol: udp, targetPort: 5353}]}]");
    assert_eq!(parsed.refused, []);
    assert_eq!(names(&parsed), ["web.default.cluster-a.local"]);
    let port = &parsed.entries[0].ports[0];
    assert_eq!((port.port.get(), port.protocol, port.target.get()), (53, Protocol::Udp, 5353));
    assert_eq!((&port.name, &parsed.entries[0].allow), (&None, &None));
    let silent = exports("services: [{name: web, namespace: , cluster: ~, ports: [{port: 80}]}]");
    assert_eq!(silent.entries[0].ports[0].target.get(), 80);
}

#[test]
fn nothing_at_all_is_no_entries() {
    for text in
        ["", "\n", "# only a comment\n", "---\n", "services:\n", "services: []\n", "{}", "~", "\u{feff}"]
    {
        let parsed = parse_imports(text, &defaults()).unwrap_or_else(|e| panic!("{text:?}: {e}"));
        assert_eq!((parsed.entries, parsed.refused), (vec![], vec![]), "{text:?}");
    }
}

#[test]
fn a_text_that_is_no_annotation_is_an_error_as_a_whole() {
    for (text, place) in [
        ("services:\n\t- name: a\n", ("", 2, 2)),
        ("services:\n  - name: a\n   ports: []\n", ("", 3, 4)),
        ("services: [\n", ("", 1, 11)),
        ("hello", ("", 1, 1)),
        ("- name: a\n", ("", 1, 1)),
        ("services: a\n", ("services", 1, 11)),
        ("services: {a: b}\n", ("services", 1, 11)),
        ("services: []\nservices: []\n", ("services", 2, 1)),
        ("services: []\n---\nservices: []\n", ("", 2, 1)),
        ("services: []\n---\n~\n", ("", 2, 1)),
        ("service: []\n", ("", 1, 1)),
        ("other: 1\n", ("", 1, 1)),
        ("# a comment\nversion: 2\nSevices:\n- name: a\n", ("", 3, 1)),
        ("0x10: []\n", ("", 1, 1)),
        ("x: &a [1]\ny: *a\n", ("", 1, 1)),
        ("services: [{name: !Ref a, ports: [{port: 80}]}]", ("", 1, 24)),
        ("a: *unknown\n", ("", 1, 4)),
        ("\u{0}", ("", 1, 1)),
    ] {
        let finding = parse_exports(text, &defaults()).expect_err(text);
        assert_eq!(places(std::slice::from_ref(&finding)), [place], "{text:?}: {finding}");
    }
}

#[test]
fn each_wrong_entry_is_refused_where_it_stands_and_the_rest_is_served() {
    let text = "\
services:
  - name: first
    ports:
      - port: 80
  - namespace: default
    ports:
      - port: 80
  - name: under_score
    ports:
      - port: 80
  - name: zero
    ports:
      - port: 0
  - name: large
    ports:
      - name: a
        port: 80
      - name: b
        port: 65536
  - name: sctp
    ports:
      - port: 80
        protocol: SCTP
  - name: twice
    ports:
      - {name: a, port: 80}
      - {name: b, port: 80, protocol: UDP}
      - {name: c, port: 80, protocol: tcp}
  - name: unnamed
    ports:
      - port: 80
      - {name: b, port: 81}
  - name: first
    ports:
      - port: 81
  - name: rules
    allow: [b.local, c.local/no/body]
    ports:
      - port: 80
  - name: everybody
    allow:
    ports:
      - port: 80
  - name: none
    ports: []
  - just a text
  - name: named-target
    ports:
      - port: 80
        targetport: http
  - name: again
    name: again
    ports:
      - port: 80
  - name: last
    ports:
      - port: 80
";
    let parsed = exports(text);
    assert_eq!(names(&parsed), ["first.default.cluster-a.local", "last.default.cluster-a.local"]);
    assert_eq!(
        places(&parsed.refused),
        [
            ("services[1].name", 5, 5),
            ("services[2].name", 8, 11),
            ("services[3].ports[0].port", 13, 15),
            ("services[4].ports[1].port", 19, 15),
            ("services[5].ports[0].protocol", 23, 19),
            ("services[6].ports[2]", 28, 9),
            ("services[7].ports[0].name", 31, 9),
            ("services[8]", 33, 5),
            ("services[9].allow[1]", 37, 22),
            ("services[10].allow", 41, 10),
            ("services[11].ports", 45, 12),
            ("services[12]", 46, 5),
            ("services[13].ports[0].targetport", 50, 21),
            ("services[14].name", 52, 5),
        ],
        "{:#?}",
        parsed.refused
    );
    assert_eq!(parsed.warnings, []);
    let said = parsed.refused[5].to_string();
    assert_eq!(
        said,
        "line 28, column 9: services[6].ports[2]: 80/TCP already stands at line 26; remove one of the two"
    );
}

#[test]
fn unknown_fields_are_warnings_and_change_nothing() {
    let parsed = parse_imports(
        "version: 2\nservices:\n  - name: a\n    weight: {x: [1]}\n    allow: [b.local]\n    ports: [{port: 80, Port: 81}]\n",
        &defaults(),
    )
    .unwrap();
    assert_eq!((parsed.entries.len(), parsed.refused.len()), (1, 0));
    assert_eq!(
        places(&parsed.warnings),
        [
            ("version", 1, 1),
            ("services[0].weight", 4, 5),
            ("services[0].ports[0].Port", 6, 24),
            ("services[0].allow", 5, 12),
        ]
    );
}

#[test]
fn numbers_that_yaml_versions_read_differently_are_refused() {
    for port in ["010", "8_0", "80.0", "8e1", "-1", "''", "[80]", "99999999999999999999", ".inf", "eighty"] {
        let parsed = exports(&format!("services: [{{name: a, ports: [{{port: {port}}}]}}]"));
        assert_eq!(places(&parsed.refused), [("services[0].ports[0].port", 1, 37)], "{port}");
    }
    assert_eq!(exports("services: [{name: a, ports: [{port: \"80\"}]}]").entries.len(), 1);
    assert_eq!(exports("services: [{name: no, namespace: 0123, ports: [{port: 80}]}]").refused, []);
    assert_eq!(exports("services: [{name: a, cluster: 1.10, ports: [{port: 80}]}]").entries, []);
}

#[test]
fn aliases_and_merge_keys_work_and_errors_stand_where_the_text_does() {
    let text = "x: &p\n  - port: 80\nservices:\n  - &e {name: a, ports: *p}\n  - {<<: *e, name: b}\n";
    assert_eq!(names(&exports(text)), ["a.default.cluster-a.local", "b.default.cluster-a.local"]);
    let wrong = exports(&text.replace("80", "0"));
    let place = |entry: &'static str| (entry, 2, 11);
    assert_eq!(
        places(&wrong.refused),
        [place("services[0].ports[0].port"), place("services[1].ports[0].port")]
    );
}

#[test]
fn limits() {
    let entry = |i| format!("  - {{name: s{i}, ports: [{{port: 80}}]}}\n");
    let text: String =
        std::iter::once("services:\n".to_owned()).chain((0..=MAX_ENTRIES).map(entry)).collect();
    let parsed = exports(&text);
    assert_eq!(parsed.entries.len(), MAX_ENTRIES);
    assert_eq!(places(&parsed.refused), [("services[4096]", 4098, 5)]);

    let ports: Vec<_> = (1..=MAX_PORTS + 1).map(|i| format!("{{name: p{i}, port: {i}}}")).collect();
    let fits = exports(&format!("services: [{{name: a, ports: [{}]}}]", ports[..MAX_PORTS].join(",")));
    assert_eq!(fits.entries[0].ports.len(), MAX_PORTS);
    let over = exports(&format!("services: [{{name: a, ports: [{}]}}]", ports.join(",")));
    assert_eq!(places(&over.refused), [("services[0].ports", 1, 29)]);

    let port = |i| format!("{{name: p{i}, port: {i}, protocol: TCP, targetport: 80{i}}}");
    let ports = [port(1), port(2), port(3)].join(",");
    let entry =
        |i| format!("  - {{name: service-{i}, namespace: default, cluster: b.local, ports: [{ports}]}}\n");
    let text: String = std::iter::once("services:\n".to_owned()).chain((0..1000).map(entry)).collect();
    assert_eq!(exports(&text).entries.len(), 1000, "{} bytes", text.len());
    let dense = format!("services: [{}]", "{name: a,ports: [{port: 1}]},".repeat(9000));
    assert_eq!(exports(&dense).entries.len(), 1, "{} bytes", dense.len());

    let huge = format!("# {}\n", "x".repeat(10 << 20));
    assert!(parse_exports(&huge, &defaults()).unwrap_err().reason.contains("262144 is the most"));

    let wrong: String = (0..1000).map(|i| format!("  - name: s{i}\n    x: 1\n")).collect();
    let parsed = exports(&format!("services:\n{wrong}"));
    assert_eq!((parsed.refused.len(), parsed.warnings.len()), (MAX_FINDINGS, MAX_FINDINGS));
    assert!(parsed.refused[MAX_FINDINGS - 1].reason.ends_with("(and 744 more findings after this one)"));
}

#[test]
fn a_bomb_is_refused_fast() {
    let mut aliases = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
    for i in 1..10 {
        let inner = vec![format!("*a{}", i - 1); 10].join(",");
        aliases += &format!("a{i}: &a{i} [{inner}]\n");
    }
    let wide = format!("a: &a [{}]\nb:\n{}", "x,".repeat(100), "  - *a\n".repeat(30_000));
    let bombs = [
        (aliases, "its aliases unfold to too much: "),
        (wide, "its aliases unfold to too much: "),
        ("[".repeat(100_000), ""),
        ("- ".repeat(100_000), ""),
        ("x,".repeat(100_000) + "[[", ""),
        (format!("services: [{}]", "a,".repeat(120_000)), ""),
    ];
    for (bomb, reason) in bombs {
        // The wall clock of a test, not of the core.
        #[allow(clippy::disallowed_methods)]
        let start = Instant::now();
        let result = parse_exports(&bomb, &defaults());
        let took = start.elapsed();
        let said = result.unwrap_err().reason;
        assert!(said.starts_with(reason) && !said.contains('{'), "{said} for {}", &bomb[..40]);
        // One that goes off takes hours; seconds are a debug build on a busy machine.
        assert!(took < Duration::from_secs(60), "{took:?} for {}", &bomb[..40]);
    }
}

#[test]
fn keys_without_services_are_told_with_what_was_meant() {
    let said = |text: &str| parse_imports(text, &defaults()).unwrap_err().to_string();
    assert_eq!(
        said("Services:\n- name: a\n"),
        "line 1, column 1: there is no `services` beside \"Services\", so nothing of this text is used: did you mean \
         `services`? A text that withdraws all says `services: []`"
    );
    assert_eq!(
        said("imports:\n- name: a\n"),
        "line 1, column 1: there is no `services` beside \"imports\", so nothing of this text is used: the list stands \
         under `services:` A text that withdraws all says `services: []`"
    );
    let parsed = exports("services: [{name: a, alow: [b.local], ports: [{port: 80, target-port: 81}]}]");
    let said: Vec<_> = parsed.warnings.iter().map(|warning| warning.reason.as_str()).collect();
    assert_eq!(
        said,
        [
            "an unknown field; it is ignored: did you mean `allow`?",
            "an unknown field; it is ignored: did you mean `targetport`?"
        ]
    );
}

#[test]
fn what_yaml_would_convert_is_refused_with_what_stands_there() {
    let entry = |field: &str| exports(&format!("services: [{{{field}, ports: [{{port: 80}}]}}]"));
    for (field, reason) in [
        (
            "name: 0x10",
            "is \"0x10\", which is the number 16 to YAML; where the name is meant as it is written, put it in quotes: \"0x10\"",
        ),
        ("name: 0o17", "is \"0o17\", which is the number 15 to YAML"),
        ("name: 0b11", "is \"0b11\", which is the number 3 to YAML"),
        ("name: 1e3", "is \"1e3\", which is the number 1000 to YAML"),
        ("name: +5", "is \"+5\", which is the number 5 to YAML"),
        ("name: -0", "is \"-0\", which is the number 0 to YAML"),
        ("name: True", "is \"True\", which is the boolean true to YAML"),
        ("name: !!int \"0x10\"", "is \"\\\"0x10\\\"\", which is the number 16 to YAML"),
        ("name: a, namespace: 0x10", "is \"0x10\", which is the number 16 to YAML"),
        ("name: a, cluster: 1.10", "is \"1.10\", which is the number 1.1 to YAML"),
        ("name: a, cluster: 1e999", "is \"1e999\", which is the number inf to YAML"),
        ("name: a, allow: [0x10]", "is \"0x10\", which is the number 16 to YAML"),
        (
            "name: a, ports: [{port: 0x1F90}]",
            "is \"0x1F90\", which is the number 8080 to YAML; write the port as a plain decimal number",
        ),
        ("name: a, ports: [{port: 8e3}]", "is \"8e3\", which is the number 8000 to YAML"),
        ("name: a, ports: [{port: 0o777}]", "is \"0o777\", which is the number 511 to YAML"),
        ("name: a, ports: [{port: +80}]", "is \"+80\", which is the number 80 to YAML"),
        ("name: a, ports: [{port: 80, name: 0x10}]", "is \"0x10\", which is the number 16 to YAML"),
        (
            "name: a, ports: [{port: 80, protocol: 0x10}]",
            "\"0x10\", which is the number 16 to YAML is not supported",
        ),
        (
            "name: a, ports: [{port: 80, protocol: yes}]",
            "\"yes\" is not supported; the protocol is TCP or UDP",
        ),
        ("name: a, ports: [{port: 8_080}]", "\"8_080\" is not a port; a port is a number from 1 to 65535"),
        ("name: a, ports: [{port: 010}]", "\"010\" is not a port; a port is a number from 1 to 65535"),
        ("name: !!binary Lg==", "\"Lg==\" "),
    ] {
        let parsed =
            if field.contains("ports") { exports(&format!("services: [{{{field}}}]")) } else { entry(field) };
        assert_eq!(parsed.entries, [], "{field}");
        let said = &parsed.refused[0].reason;
        assert!(said.starts_with(reason), "{field}: {said}");
    }
    for (field, name) in [
        ("name: 16", "16"),
        ("name: \"0x10\"", "0x10"),
        ("name: !!str 0x10", "0x10"),
        ("name: 0123", "0123"),
        ("name: true", "true"),
        ("name: no", "no"),
    ] {
        let parsed = entry(field);
        let names: Vec<_> = parsed.entries.iter().map(|entry| entry.service.name.to_string()).collect();
        assert_eq!(names, [name], "{field}: {:?}", parsed.refused);
    }
    // Wherever it stands: behind letters of several bytes, a byte order mark, other line ends, and by an alias.
    for text in [
        "\u{feff}services:\n  - {name: 0x10, ports: [{port: 80}]}\n",
        "# é\u{10000}\r\nservices:\r\n  - {name: 0x10, ports: [{port: 80}]}\r\n",
        "x: &x 0x10\nservices:\n  - {name: *x, ports: [{port: 80}]}\n",
        "x: &x {name: 0x10}\nservices:\n  - {<<: *x, ports: [{port: 80}]}\n",
    ] {
        let parsed = exports(text);
        assert!(
            parsed.refused[0].reason.contains("\"0x10\", which is the number 16"),
            "{text:?}: {:?}",
            parsed.refused
        );
    }
}

#[test]
fn a_document_with_nothing_in_it_is_none() {
    let entry = "services: [{name: a, ports: [{port: 80}]}]\n";
    for text in [
        format!("{entry}---\n"),
        format!("{entry}---"),
        format!("---\r\n{entry}--- # the end\r\n\r\n"),
        format!("{entry}...\n"),
        format!("{entry}...\n---\n...\n# so\n---\n"),
        format!("---\n# of a template\n---\n{entry}"),
        format!("%YAML 1.2\n---\n{entry}---\n"),
    ] {
        let parsed = parse_exports(&text, &defaults()).unwrap_or_else(|error| panic!("{text:?}: {error}"));
        assert_eq!(names(&parsed), ["a.default.cluster-a.local"], "{text:?}");
    }
}

#[test]
fn aliases_cost_no_more_than_a_text_of_their_length() {
    let ports: String = (1..=MAX_PORTS).map(|i| format!("{{name: p{i}, port: {i}}},")).collect();
    let honest = |entries: usize| {
        let entries = (0..entries).map(|i| format!("- {{name: a{i}, ports: *p}}\n"));
        format!("p: &p [{ports}]\nservices:\n{}", entries.collect::<String>())
    };
    assert_eq!(exports(&honest(40)).entries.len(), 40);
    let bomb = |n: usize| {
        format!("a: &a [{}]\nb: &b [{}]\nservices: [{}]\n", "x,".repeat(n), "*a,".repeat(n), "*b,".repeat(n))
    };
    let said = parse_exports(&bomb(40), &defaults()).unwrap_err().reason;
    assert!(said.contains("4096 values are the most here"), "{said}");
}

#[test]
fn a_second_document_is_called_so() {
    let text = "services: []\n---\nservices: []\n";
    assert_eq!(
        parse_exports(text, &defaults()).unwrap_err().to_string(),
        "line 2, column 1: a second YAML document begins here, and one is read: put its services under the first"
    );
}

// Generators.

fn label() -> impl Strategy<Value = Label> {
    let hard =
        prop::sample::select(vec!["no", "null", "true", "y", "0", "0123", "1e3", "0x1f", "0o7", "on", "n"]);
    prop_oneof![
        1 => hard.prop_map(|text| text.parse().unwrap()),
        4 => "[a-z0-9]([a-z0-9-]{0,6}[a-z0-9])?".prop_map(|text| text.parse().unwrap()),
    ]
}

fn cluster() -> impl Strategy<Value = ClusterName> {
    prop_oneof![
        2 => Just("cluster-a.local".parse().unwrap()),
        2 => "[a-c]\\.local".prop_map(|text| text.parse().unwrap()),
        1 => "[0-9]{1,2}(\\.[0-9]{1,2}){0,2}".prop_map(|text| text.parse().unwrap()),
    ]
}

fn ports() -> impl Strategy<Value = Vec<Port>> {
    let key = (1u16.., any::<bool>());
    (prop::collection::btree_map(key, (label(), 1u16..), 1..5), any::<bool>())
        .prop_map(|(ports, named)| {
            let several = ports.len() > 1;
            ports
                .into_iter()
                .map(|((port, udp), (name, target))| Port {
                    name: (several || named).then_some(name),
                    port: NonZeroU16::new(port).unwrap(),
                    protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
                    target: NonZeroU16::new(target).unwrap(),
                })
                .collect()
        })
        .prop_shuffle()
}

fn allow() -> impl Strategy<Value = Option<Vec<AllowRule>>> {
    let rule = (cluster(), prop::option::of(label()))
        .prop_map(|(cluster, namespace)| AllowRule { cluster, namespace });
    prop::option::of(prop::collection::vec(rule, 0..4))
}

fn some_exports() -> impl Strategy<Value = Vec<Export>> {
    // Few names, so that the old and the new list have services in common.
    let service =
        (prop_oneof![label(), "[ab]".prop_map(|t| t.parse().unwrap())], "[ab]", cluster()).prop_map(
            |(name, namespace, cluster)| ServiceName { name, namespace: namespace.parse().unwrap(), cluster },
        );
    prop::collection::btree_map(service, (ports(), allow()), 0..6)
        .prop_map(|entries| {
            entries
                .into_iter()
                .map(|(service, (ports, allow))| Export { service, ports, allow })
                .collect::<Vec<_>>()
        })
        .prop_shuffle()
}

fn as_imports(exports: &[Export]) -> Vec<Import> {
    exports.iter().map(|e| Import { service: e.service.clone(), ports: e.ports.clone() }).collect()
}

/// The same exports in another order, with other port names and repeated rules.
fn disguise(exports: &[Export]) -> Vec<Export> {
    let mut exports = exports.to_vec();
    exports.reverse();
    for export in &mut exports {
        export.ports.reverse();
        for (i, port) in export.ports.iter_mut().enumerate() {
            port.name = Some(format!("renamed-{i}").parse().unwrap());
        }
        if let Some(rules) = &mut export.allow {
            rules.reverse();
            rules.extend(rules.clone());
        }
    }
    exports
}

proptest! {
    #[test]
    fn what_is_rendered_is_read_back(exports in some_exports()) {
        let text = render::exports(&exports, &defaults());
        let parsed = parse_exports(&text, &defaults()).unwrap();
        prop_assert_eq!(&parsed.refused, &[], "{}", text);
        prop_assert_eq!(&parsed.entries, &exports, "{}", text);
        let imports = as_imports(&exports);
        let parsed = parse_imports(&render::imports(&imports, &defaults()), &defaults()).unwrap();
        prop_assert_eq!(parsed.entries, imports);
    }

    #[test]
    fn changes_lead_from_the_old_to_the_new(old in some_exports(), new in some_exports()) {
        let mut state = offered(&old);
        let changes = diff::exports(&old, &new);
        // The fewest: no port is touched twice, and each step is of the kind that it says.
        let mut touched = std::collections::BTreeSet::new();
        for change in &changes {
            let (port, before, after) = match change.clone() {
                ExportChange::Withdraw(port) => (port.clone(), state.remove(&port), None),
                ExportChange::Alter(port, offer) => (port.clone(), state.insert(port, offer.clone()), Some(offer)),
                ExportChange::Offer(port, offer) => {
                    let before: Option<Offer> = state.insert(port.clone(), offer.clone());
                    prop_assert!(before.is_none());
                    (port, None, Some(offer))
                }
            };
            prop_assert!(touched.insert(port));
            prop_assert_ne!(before, after);
        }
        prop_assert_eq!(state, offered(&new));

        let (old, new) = (as_imports(&old), as_imports(&new));
        let mut state = wanted(&old);
        for change in diff::imports(&old, &new) {
            let changed = match change {
                ImportChange::Close(port) => state.remove(&port),
                ImportChange::Open(port) => state.insert(port),
            };
            prop_assert!(changed);
        }
        prop_assert_eq!(state, wanted(&new));
    }

    #[test]
    fn a_new_name_or_another_order_changes_nothing(exports in some_exports()) {
        let disguised = disguise(&exports);
        prop_assert_eq!(diff::exports(&exports, &disguised), []);
        prop_assert_eq!(diff::imports(&as_imports(&exports), &as_imports(&disguised)), []);
    }

    #[test]
    fn noise_never_panics(text in "\\PC{0,200}") {
        let _ = parse_exports(&text, &defaults());
    }

    #[test]
    fn noise_of_yaml_never_panics(bytes in prop::collection::vec(prop::sample::select(b" \n-:[]{}&*!|>'\"%@`#?,~<0ab\t\r".to_vec()), 0..120)) {
        let _ = parse_exports(std::str::from_utf8(&bytes).unwrap(), &defaults());
    }

    #[test]
    fn a_damaged_annotation_never_panics_and_points_into_itself(
        at in 0..CONTRACT.len(), with in prop::sample::select(b" \n-:[]{}&*'\"#0a".to_vec())
    ) {
        let mut text = CONTRACT.as_bytes().to_vec();
        text[at] = with;
        let text = String::from_utf8(text).unwrap();
        let lines = text.lines().count() as u64;
        let (findings, _) = match parse_exports(&text, &defaults()) {
            Ok(parsed) => ([parsed.refused, parsed.warnings].concat(), ()),
            Err(finding) => (vec![finding], ()),
        };
        for finding in findings {
            prop_assert!((1..=lines + 1).contains(&finding.line), "{}", finding);
            prop_assert!(!finding.reason.is_empty());
        }
    }
}
