//! What YAML makes of a text.

use super::*;

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
fn what_yaml_would_convert_is_refused_with_what_stands_there() {
    let entry = |field: &str| exports(&format!("services: [{{{field}, ports: [{{port: 80}}]}}]"));
    for (field, reason) in [
        (
            "name: 0x10",
            "is \"0x10\", which YAML reads as the number 16; to use the name as written, quote it: \"0x10\"",
        ),
        ("name: 0o17", "is \"0o17\", which YAML reads as the number 15"),
        ("name: 0b11", "is \"0b11\", which YAML reads as the number 3"),
        ("name: 1e3", "is \"1e3\", which YAML reads as the number 1000"),
        ("name: +5", "is \"+5\", which YAML reads as the number 5"),
        ("name: -0", "is \"-0\", which YAML reads as the number 0"),
        ("name: True", "is \"True\", which YAML reads as the boolean true"),
        ("name: !!int \"0x10\"", "is \"\\\"0x10\\\"\", which YAML reads as the number 16"),
        ("name: a, namespace: 0x10", "is \"0x10\", which YAML reads as the number 16"),
        ("name: a, cluster: 1.10", "is \"1.10\", which YAML reads as the number 1.1"),
        ("name: a, cluster: 1e999", "is \"1e999\", which YAML reads as the number inf"),
        ("name: a, allow: [0x10]", "is \"0x10\", which YAML reads as the number 16"),
        (
            "name: a, ports: [{port: 0x1F90}]",
            "is \"0x1F90\", which YAML reads as the number 8080; write a plain decimal number",
        ),
        ("name: a, ports: [{port: 8e3}]", "is \"8e3\", which YAML reads as the number 8000"),
        ("name: a, ports: [{port: 0o777}]", "is \"0o777\", which YAML reads as the number 511"),
        ("name: a, ports: [{port: +80}]", "is \"+80\", which YAML reads as the number 80"),
        ("name: a, ports: [{port: 80, name: 0x10}]", "is \"0x10\", which YAML reads as the number 16"),
        (
            "name: a, ports: [{port: 80, protocol: 0x10}]",
            "\"0x10\", which YAML reads as the number 16 is not supported",
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
            parsed.refused[0].reason.contains("\"0x10\", which YAML reads as the number 16"),
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
fn a_second_document_is_called_so() {
    let text = "services: []\n---\nservices: []\n";
    assert_eq!(
        parse_exports(text, &defaults()).unwrap_err().to_string(),
        "line 2, column 1: a second YAML document starts here; only one is allowed: merge its services into the first"
    );
}
