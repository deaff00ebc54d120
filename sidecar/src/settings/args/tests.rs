use super::*;

fn parse(flags: &[&str]) -> Result<Args, String> {
    let words = ["servicekeel-sidecar"].into_iter().chain(flags.iter().copied());
    Args::of(words).map_err(|error| error.to_string())
}

fn settings(flags: &[&str]) -> Result<Settings, String> {
    let text = "nameserver 127.0.0.2\nnameserver 10.96.0.10\nsearch default.svc.cluster.local\n";
    let resolv = Resolv::parse(text, resolv::interface);
    let interfaces = vec![IpAddr::from([10, 244, 1, 7])];
    parse(flags)?.settings_with(resolv, interfaces, "pod-0".into(), false).map_err(|error| error.to_string())
}

fn refused(flags: &[&str], text: &str) {
    let error = settings(flags).unwrap_err();
    assert!(error.contains(text), "{flags:?}: {error}");
}

#[test]
fn defaults_are_those_of_the_contract() {
    let expected = Settings {
        range: "127.0.66.0/24".parse().unwrap(),
        dns_addr: Some("127.0.0.2:53".parse().unwrap()),
        upstreams: vec!["10.96.0.10:53".parse().unwrap()],
        router: "/tmp/router.sock".into(),
        cluster: None,
        state_dir: Some("/var/lib/servicekeel/sidecar".into()),
        admin: Some("0.0.0.0:15020".parse().unwrap()),
        private_status: true,
        pod: Pod { name: "pod-0".into(), namespace: "default".parse().unwrap(), uid: String::new() },
        addresses: vec![IpAddr::from([10, 244, 1, 7])],
        search: vec!["default.svc.cluster.local".parse().unwrap()],
    };
    assert_eq!(settings(&[]), Ok(expected));
    let args = parse(&[]).unwrap();
    assert_eq!(args.config_dir(), Path::new("/etc/servicekeel"));
    assert_eq!(args.sidecar_source, SourceKind::Auto);
}

#[test]
fn the_status_is_for_everybody_in_a_pod_only() {
    let private = |flags: &[&str], in_pod: bool| {
        let args = parse(flags).unwrap();
        let resolv = Resolv::parse("", resolv::interface);
        args.settings_with(resolv, Vec::new(), String::new(), in_pod).unwrap().private_status
    };
    assert!(private(&[], false));
    assert!(!private(&[], true));
    assert!(!private(&["--pod-ips=10.1.0.1"], false));
}

#[test]
fn lists_sockets_and_switches() {
    let read = settings(&[
        "--sidecar-dns-upstream=10.0.0.1, 10.0.0.2:5353,fd00::1",
        "--sidecar-server-listen=/run/r:1.sock",
        "--sidecar-admin-addr=off",
        "--pod-ips=10.1.0.1,fd00::7",
        "--sidecar-ip-range=127.0.70.9/24",
    ])
    .unwrap();
    let shown: Vec<String> = read.upstreams.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["10.0.0.1:53", "10.0.0.2:5353", "[fd00::1]:53"]);
    assert_eq!(read.router, Path::new("/run/r:1.sock"));
    assert_eq!(read.admin, None);
    assert_eq!(read.addresses, ["10.1.0.1".parse::<IpAddr>().unwrap(), "fd00::7".parse().unwrap()]);
    assert_eq!(read.range.to_string(), "127.0.70.0/24");
    for ips in ["10.1.0.1,", ",10.1.0.1", "10.1.0.1, ,"] {
        let read = settings(&[&format!("--pod-ips={ips}"), "--sidecar-pod-addrs=,"]).unwrap();
        assert_eq!(
            (read.addresses, read.private_status),
            (vec![IpAddr::from([10, 1, 0, 1])], false),
            "{ips}"
        );
    }
    let none = settings(&["--pod-ips=,", "--sidecar-dns-upstream=,"]).unwrap();
    assert_eq!(
        (none.upstreams.len(), none.addresses, none.private_status),
        (1, vec![IpAddr::from([10, 244, 1, 7])], true)
    );
    let both = settings(&["--pod-ips=10.1.0.1", "--sidecar-pod-addrs=10.2.0.2"]).unwrap();
    assert_eq!(both.addresses, [IpAddr::from([10, 2, 0, 2])]);
    assert_eq!(settings(&["--sidecar-server-listen=unix:/r.sock"]).unwrap().router, Path::new("/r.sock"));
}

#[test]
fn what_is_wrong_is_said() {
    refused(&["--sidecar-ip-range=10.0.0.0/24"], "not inside 127.0.0.0/8");
    refused(&["--sidecar-ip-range=127.0.66.0/32"], "no usable address");
    refused(&["--sidecar-ip-range=local"], "such as 127.0.66.0/24");
    refused(&["--sidecar-server-listen=tcp://1.2.3.4:5"], "unix:///tmp/router.sock");
    refused(&["--sidecar-server-listen=unix://"], "has no path");
    refused(&["--sidecar-dns-addr=127.0.0.2"], "such as 127.0.0.2:53");
    refused(&["--sidecar-dns-upstream=dns.local"], "\"dns.local\" is not an address");
    refused(&["--sidecar-dns-upstream=127.0.0.2"], "where this sidecar itself answers");
    for address in ["127.0.66.1", "127.0.66.255", "::ffff:127.0.66.9"] {
        let pod_addrs = format!("--sidecar-pod-addrs=10.1.0.1,{address}");
        refused(&[&pod_addrs], &format!("SIDECAR_POD_ADDRS has {address}, which is inside SIDECAR_IP_RANGE"));
    }
    refused(&["--pod-ips=10.1.0.1,x"], "\"x\" is not an IP address");
    refused(&["--pod-ips=127.0.66.1"], "POD_IPS has 127.0.66.1, which is inside SIDECAR_IP_RANGE");
    refused(&["--sidecar-cluster=a_b"], "'_'");
    refused(&["--sidecar-source=api"], "set SIDECAR_SOURCE=files");
    refused(&["--sidecar-source=etcd"], "files, api, auto");
    refused(&["--pod-namespace="], "--pod-namespace");
    refused(&["--sidecar-admin-addr=15020"], "nor `off`");
    refused(&["--pod-name", &"x".repeat(254)], "the limit is 253");
}

/// Each flag is the variable's name in lower case.
#[test]
fn flags_and_variables_have_the_same_names() {
    let command = Args::command();
    let mut seen = 0;
    for arg in command.get_arguments() {
        let Some(variable) = arg.get_env().and_then(|name| name.to_str()) else { continue };
        assert_eq!(arg.get_long(), Some(variable.to_lowercase().replace('_', "-").as_str()));
        seen += 1;
    }
    assert_eq!(seen, 14);
}

#[test]
fn a_link_local_upstream_names_its_interface() {
    let flag = "--sidecar-dns-upstream";
    let upstreams =
        settings(&[flag, "fe80::1%lo,[fe80::2%lo]:5353,[fe80::3%1]:54,[fd00::1]:55"]).unwrap().upstreams;
    let shown: Vec<String> = upstreams.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["[fe80::1%1]:53", "[fe80::2%1]:5353", "[fe80::3%1]:54", "[fd00::1]:55"]);
    for (text, reason) in [
        ("fe80::1", "without an interface"),
        ("fe80::1%nowhere0", "does not exist"),
        ("10.0.0.1%lo", "not an address such as"),
    ] {
        assert!(parse(&[flag, text]).unwrap_err().contains(reason), "{text}");
    }
}
