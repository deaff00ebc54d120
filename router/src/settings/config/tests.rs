use super::*;

const HOST: &str = "Host-1";

fn parsed(text: &str) -> Parsed {
    parse(text, Path::new("/etc/sk/router.yaml"), HOST).unwrap()
}

fn problems(text: &str) -> Vec<String> {
    let problems = parse(text, Path::new("router.yaml"), HOST).unwrap_err();
    problems.0.iter().map(ToString::to_string).collect()
}

#[test]
fn the_defaults_are_the_contracts() {
    let Parsed { config, identity, trust, warnings } = parsed("cluster: cluster-a.local\n");
    assert_eq!((config.cluster.as_str(), config.node.as_str()), ("cluster-a.local", "host-1"));
    assert_eq!(config.listen.sidecars, Path::new("/tmp/router.sock"));
    assert_eq!(config.listen.peers, Some("0.0.0.0:7443".parse().unwrap()));
    assert_eq!(config.listen.admin, Some("127.0.0.1:7480".parse().unwrap()));
    assert!(config.peers.is_empty() && identity.is_none() && trust.is_empty() && warnings.is_empty());
}

#[test]
fn the_contracts_example() {
    let read = parsed(
        "cluster: cluster-a.local
node: node-1                       # default: the host's name
listen:
  sidecars: unix:///tmp/router.sock
  peers: 0.0.0.0:7443              # TCP and UDP, the same number
  admin: 127.0.0.1:7480            # /livez /readyz /metrics /status and the status page
peers:                             # whom to dial; a router that dials nobody only accepts
  - address: hub.example:7443
identity: { ca: ca.crt, cert: node.crt, key: /keys/node.key }
trust: [ { cluster: cluster-b.local, ca: cluster-b-ca.crt } ]   # other clusters' authorities
revoked: []                        # nodes (cluster/node) or certificate fingerprints that are cut off at once
state: /var/lib/servicekeel/router
",
    );
    assert_eq!(read.config.peers, [Peer { address: "hub.example:7443".into() }]);
    // Relative to the config, unless they are absolute.
    let files: Vec<_> = read.files().map(|named| named.path.display().to_string()).collect();
    assert_eq!(files, ["/etc/sk/ca.crt", "/etc/sk/node.crt", "/keys/node.key", "/etc/sk/cluster-b-ca.crt"]);
    assert_eq!(read.identity.unwrap().key.place, (9, 46));
}

#[test]
fn a_document_with_nothing_in_it_is_none_and_names_stay_as_they_are_written() {
    let read = parsed("---\ncluster: 1.10\nnode: 0x10\n---\n# the end\n").config;
    assert_eq!((read.cluster.as_str(), read.node.as_str()), ("1.10", "0x10"));
}

#[test]
fn off_and_a_bare_path() {
    for off in ["off", "\"off\""] {
        let text =
            format!("cluster: a.local\nlisten: {{ sidecars: /run/r.sock, peers: {off}, admin: {off} }}\n");
        let listen = parsed(&text).config.listen;
        assert_eq!(listen, Listen { sidecars: "/run/r.sock".into(), peers: None, admin: None });
    }
    let one_slash = parsed("cluster: a.local\nlisten: { sidecars: \"unix:/run/r.sock\" }\n");
    assert_eq!(one_slash.config.listen.sidecars, Path::new("/run/r.sock"));
    let empty = parsed("cluster: a.local\nlisten:\npeers:\ntrust:\nidentity:\n");
    assert_eq!(empty.config.listen.peers, Some("0.0.0.0:7443".parse().unwrap()));
}

#[test]
fn unknown_keys_are_told_with_place_and_what_was_meant() {
    assert_eq!(
        problems("cluster: a.local\nnode: n\nlisen:\n  peers: off\n"),
        ["router.yaml:3:1: unknown key \"lisen\"; did you mean \"listen\"?"]
    );
    assert_eq!(
        problems("cluster: a.local\nlisten:\n  amdin: off\n"),
        ["router.yaml:3:3: listen: unknown key \"amdin\"; did you mean \"admin\"?"]
    );
    assert_eq!(
        problems("cluster: a.local\ntrust: [ { cluster: b.local, colour: red } ]\n"),
        ["router.yaml:2:30: trust[0]: unknown key \"colour\"; known keys: cluster, ca"]
    );
}

#[test]
fn what_has_another_shape_is_told_with_its_place() {
    for (text, place, word) in [
        ("cluster: [a.local\nnode: n\n", "router.yaml:1:10: cluster:", "single value"),
        ("cluster: a.local\nnode: \"n\n", "router.yaml:", "not YAML"),
        ("cluster: a.local\ncluster: b.local\n", "router.yaml:2:1:", "duplicate key"),
        ("cluster: a.local\npeers: hub:7443\n", "router.yaml:2:8: peers:", "a list"),
        ("cluster: a.local\nidentity: { ca: x, cert: y }\n", "router.yaml:2:", "\"key\" is missing"),
        (
            "cluster: a.local\npeers: [ { address: [hub] } ]\n",
            "router.yaml:2:21: peers[0].address:",
            "single",
        ),
        ("cluster: a.local\n---\ncluster: b.local\n", "router.yaml:2:1: a second YAML document", "only one"),
        ("cluster: True\n---\nnode: !!int 0x10\n", "router.yaml:2:1: a second YAML document", "only one"),
        ("cluster: { a: b }\n", "router.yaml:1:10:", "single value"),
        ("just words", "router.yaml:1:1:", "mapping"),
        ("", "router.yaml:", "\"cluster\" is missing"),
        ("node: n", "router.yaml:", "\"cluster\" is missing"),
    ] {
        let problems = problems(text);
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].starts_with(place) && problems[0].contains(word), "{text:?}: {problems:?}");
    }
    for much in ["cluster: ", "trust: "] {
        let deep = format!("{much}{}\n", "[".repeat(100_000));
        assert_eq!(problems(&deep).len(), 1);
    }
    let bomb = "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\ntrust: *c\n";
    assert_eq!(problems(bomb).len(), 1);
    assert!(problems(&" ".repeat(300_000))[0].contains("the limit is"));
}

#[test]
fn all_wrong_values_are_told_at_once() {
    let problems = problems(
        "cluster: Cluster_A
node: -n
listen: { sidecars: r.sock, peers: 7443, admin: localhost:7480 }
peers:
  - address: hub.example
  - address: https://hub.example:7443
  - address: hub.example:0
  - address: fe80::1
  - address: \"a b:1\"
  - address: \"[::1]:7443\"
  - address: hub_1:7443
trust:
  - { cluster: b_local, ca: \"\" }
",
    );
    let wanted = [
        ("1:10", "'_'"),
        ("2:7", "node"),
        ("3:21", "absolute"),
        ("3:36", "listen.peers"),
        ("3:49", "listen.admin"),
        ("5:14", "write hub.example:7443"),
        ("6:14", "URL"),
        ("7:14", "1 to 65535"),
        ("8:14", "write [fe80::1]:7443"),
        ("9:14", "' '"),
        ("13:29", "trust.ca"),
        ("13:16", "trust.cluster"),
    ];
    for ((place, word), problem) in wanted.iter().zip(&problems) {
        let place = format!("router.yaml:{place}: ");
        assert!(problem.starts_with(&place) && problem.contains(word), "{place} {word}: {problem}");
    }
    assert_eq!(problems.len(), wanted.len(), "{problems:#?}");
}

#[test]
fn an_ipv6_address_without_brackets_is_told_with_them() {
    for (written, advice) in [
        ("::1:7443", "write [::1]:7443"),
        ("::1:443", "write [::1:443]:7443"),
        ("fd00::2:17443", "write [fd00::2]:17443"),
        ("1:2:3:4:5:6:7:8:443", "write [1:2:3:4:5:6:7:8]:443"),
        ("fd00::1", "write [fd00::1]:7443"),
        ("1:2:3:4:5:6:7:7443", "write [1:2:3:4:5:6:7:7443]:7443"),
    ] {
        let told = check_address(written).unwrap_err();
        assert!(told.ends_with(advice), "{written}: {told}");
    }
}

#[test]
fn trust_is_for_others_and_once_each() {
    let problems = problems(
        "cluster: a.local
trust:
  - { cluster: a.local, ca: a.crt }
  - { cluster: b.local, ca: b.crt }
  - { cluster: B.local., ca: c.crt }
",
    );
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(
        problems[0].starts_with("router.yaml:3:16: ") && problems[0].contains("identity.ca"),
        "{problems:?}"
    );
    assert!(problems[1].starts_with("router.yaml:5:16: ") && problems[1].contains("twice"), "{problems:?}");
}

#[test]
fn a_host_without_a_good_name_is_told() {
    let wrong = parse("cluster: a.local", Path::new("r.yaml"), "my_host").unwrap_err().to_string();
    assert!(wrong.contains("my_host") && wrong.contains("set \"node\""), "{wrong}");
    parse("cluster: a.local\nnode: n", Path::new("r.yaml"), "my_host").unwrap();
}

#[test]
fn a_path_too_long_for_a_socket() {
    let at = |n: usize| format!("cluster: a.local\nlisten: {{ sidecars: /{} }}\n", "x".repeat(n - 1));
    assert_eq!(parsed(&at(107)).config.listen.sidecars.as_os_str().len(), 107);
    assert!(problems(&at(108))[0].contains("the limit is 107"));
}

#[test]
fn peers_without_an_identity_are_hardly_meant() {
    let read = parsed("cluster: a.local\npeers: [ { address: \"h:1\" } ]\n");
    assert!(read.warnings[0].text.contains("without \"identity\""), "{:?}", read.warnings);
}

#[test]
fn revoked_nodes_and_certificates() {
    let digits = "0123456789abcdef".repeat(4);
    let read = parsed(&format!(
        "cluster: a.local\nidentity: {{ ca: a, cert: b, key: c }}\nrevoked: [b.local/edge-7, {digits}]\n"
    ));
    assert_eq!(read.config.revoked, ["b.local/edge-7".parse().unwrap(), digits.parse().unwrap()]);
    assert_eq!(
        problems("cluster: a.local\nrevoked:\n  - edge-7\n  - b.local/edge-7\n  - ab:cd\n"),
        [
            "router.yaml:3:5: revoked: \"edge-7\" is neither a node, such as cluster-b.local/node-1, nor a certificate's \
             SHA-256 fingerprint: it has 6 digits; a SHA-256 fingerprint has 64",
            "router.yaml:5:5: revoked: \"ab:cd\" is neither a node, such as cluster-b.local/node-1, nor a certificate's \
             SHA-256 fingerprint: it has 4 digits; a SHA-256 fingerprint has 64",
        ]
    );
    let many = "\n  - b.local/n".repeat(MAX_REVOKED + 1);
    assert_eq!(
        problems(&format!("cluster: a.local\nrevoked:{many}\n")),
        ["router.yaml: revoked: 4097 entries; the limit is 4096"]
    );
    // Without an identity it has no effect.
    assert_eq!(parsed("cluster: a.local\nrevoked: [b.local/n]\n").warnings.len(), 1);
}
