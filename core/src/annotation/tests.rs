use std::time::{Duration, Instant};

use super::*;

mod limits;
mod properties;
mod yaml;

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
        "line 28, column 9: services[6].ports[2]: 80/TCP is already defined at line 26; remove one of them"
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
fn keys_without_services_are_told_with_what_was_meant() {
    let said = |text: &str| parse_imports(text, &defaults()).unwrap_err().to_string();
    assert_eq!(
        said("Services:\n- name: a\n"),
        "line 1, column 1: there is \"Services\" but no `services` key, so the annotation is ignored: did you \
         mean `services`? To withdraw everything, write `services: []`"
    );
    assert_eq!(
        said("imports:\n- name: a\n"),
        "line 1, column 1: there is \"imports\" but no `services` key, so the annotation is ignored: the list belongs \
         under `services:`. To withdraw everything, write `services: []`"
    );
    let parsed = exports("services: [{name: a, alow: [b.local], ports: [{port: 80, target-port: 81}]}]");
    let said: Vec<_> = parsed.warnings.iter().map(|warning| warning.reason.as_str()).collect();
    assert_eq!(
        said,
        [
            "unknown field, ignored; did you mean `allow`? An export without it is open to every member of the mesh",
            "unknown field, ignored; did you mean `targetport`?"
        ]
    );
}

#[test]
fn what_belongs_to_exports_is_a_warning_in_an_import() {
    for target in ["8080", "http", "{}"] {
        let text = format!("services: [{{name: a, ports: [{{port: 80, targetport: {target}}}]}}]");
        let parsed = parse_imports(&text, &defaults()).unwrap();
        assert_eq!(places(&parsed.warnings), [("services[0].ports[0].targetport", 1, 53)], "{target}");
        assert_eq!(parsed.warnings[0].reason, "applies to exports only; ignored");
        assert_eq!((parsed.refused, parsed.entries[0].ports[0].target.get()), (vec![], 80), "{target}");
    }
    assert_eq!(exports("services: [{name: a, ports: [{port: 80, targetport: 81}]}]").warnings, []);
}

#[test]
fn an_import_of_a_cluster_that_the_mesh_has_not_is_warned_of() {
    let mesh = ["cluster-a.local", "cluster-b.local"].map(|name| name.parse().unwrap()).into();
    let text = "services: [{name: a, cluster: {}, ports: [{port: 80}]}, {name: b, ports: [{port: 80}]}]";
    for (cluster, warnings) in [
        ("cluster-b.local", vec![]),
        (
            "cluster-b",
            vec![
                "cluster-b is not a cluster that the router's `trust` has, so nothing of it is reached; did you mean cluster-b.local?",
            ],
        ),
    ] {
        let parsed = parse_imports_of_mesh(&text.replace("{}", cluster), &defaults(), Some(&mesh)).unwrap();
        assert_eq!((parsed.entries.len(), parsed.refused.len()), (2, 0), "{cluster} is served all the same");
        let told: Vec<_> = parsed.warnings.iter().map(|warning| warning.reason.as_str()).collect();
        assert_eq!(told, warnings);
    }
}

#[test]
fn a_rule_for_a_cluster_that_the_mesh_has_not_is_warned_of() {
    let mesh = ["cluster-a.local", "cluster-b.local", "c.example"].map(|name| name.parse().unwrap()).into();
    let text = "services: [{name: a, ports: [{port: 80}], allow: [{}]}]";
    let said = |rule: &str, mesh| {
        let parsed = parse_exports_of_mesh(&text.replace("{}", rule), &defaults(), mesh).unwrap();
        assert_eq!((parsed.entries.len(), parsed.refused.len()), (1, 0), "{rule} is served all the same");
        parsed.warnings.iter().map(|warning| warning.reason.clone()).collect::<Vec<_>>().join("; ")
    };
    for rule in ["cluster-a.local", "cluster-b.local", "c.example"] {
        assert_eq!(said(rule, Some(&mesh)), "");
    }
    for (rule, meant) in [
        ("cluster-b", "; did you mean cluster-b.local?"),
        ("cluster-b.local.prod", "; did you mean cluster-b.local?"),
        ("cluster-c.local", "; did you mean cluster-a.local?"),
        ("c.exmaple", "; did you mean c.example?"),
        ("another", ""),
    ] {
        let wanted =
            format!("{rule} is not a cluster that the router's `trust` has, so nobody of it gets in{meant}");
        assert_eq!(said(rule, Some(&mesh)), wanted);
        assert_eq!(said(rule, None), "");
    }
}
