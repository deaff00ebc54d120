//! Real `dig`, where it is installed, against the production server: it must find nothing to remark.

use std::process::{Command, Output};

use tokio::task::{JoinSet, spawn_blocking};

use super::fake::{Fake, answer, negative};
use super::*;
use crate::dns::{Bound, OsDns, Serve};

/// What dig says, without its remark on every name below `.local`, whoever answers.
async fn dig(server: SocketAddr, arguments: &str) -> Option<String> {
    let mut command = Command::new("dig");
    command.arg(format!("@{}", server.ip()));
    command
        .args(["-p", &server.port().to_string(), "+tries=1", "+time=3"])
        .args(arguments.split_whitespace());
    let output = spawn_blocking(move || command.output()).await.unwrap();
    let Output { status, stdout, stderr } = match output {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        output => output.unwrap(),
    };
    let text = String::from_utf8(stdout).unwrap();
    assert!(status.success() && stderr.is_empty(), "{text}{}", String::from_utf8_lossy(&stderr));
    Some(
        text.lines()
            .filter(|line| !line.contains(".local is reserved for Multicast DNS"))
            .filter(|line| {
                !line.contains("You are currently testing what happens when an mDNS query is leaked")
            })
            // Columns as single blanks.
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect::<Vec<_>>()
            .join("\n"),
    )
}

#[tokio::test]
async fn dig_is_content() {
    let upstream = Fake::new(|query, _| {
        vec![match query.queries[0].name().num_labels() {
            2 => answer(query, 300, &[[192, 0, 2, 1]]),
            _ => negative(query, ResponseCode::NXDomain, 60),
        }]
    })
    .await;
    let bound = OsDns.bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let addr = bound.local_addr();
    let dns = dns(&[upstream.addr]);
    let mut serving = JoinSet::new();
    serving.spawn(async move { bound.run(dns).await.unwrap() });

    for (arguments, status, flags, expected) in [
        ("simple-server.default", "NOERROR", "qr aa rd ra", "simple-server.default. 5 IN A 127.0.66.2"),
        ("+tcp simple-server", "NOERROR", "qr aa rd ra", "simple-server. 5 IN A 127.0.66.2"),
        ("+norecurse +noedns SIMPLE-server", "NOERROR", "qr aa ra", "SIMPLE-server. 5 IN A 127.0.66.2"),
        ("simple-server.default.svc.cluster-b.local", "NOERROR", "qr aa rd ra", " A 127.0.66.2"),
        (
            "simple-server.default AAAA",
            "NOERROR",
            "qr aa rd ra",
            "SOA simple-server.default. nobody.invalid. 1 3600 1200 604800 5",
        ),
        ("simple-server.default HTTPS", "NOERROR", "qr aa rd ra", " SOA "),
        ("+dnssec +bufsize=512 simple-server ANY", "NOERROR", "qr aa rd ra", " A 127.0.66.2"),
        (
            "_http._tcp.simple-server SRV",
            "NOERROR",
            "qr aa rd ra",
            "SRV 0 0 8080 simple-server.default.svc.cluster-b.local.",
        ),
        ("_nope._tcp.simple-server SRV", "NXDOMAIN", "qr aa rd ra", " SOA "),
        ("-x 127.0.66.2", "NOERROR", "qr aa rd ra", "PTR simple-server.default.svc.cluster-b.local."),
        ("-x 127.0.66.9", "NXDOMAIN", "qr aa rd ra", "66.0.127.in-addr.arpa. 5 IN SOA"),
        ("example.com", "NOERROR", "qr rd ra", "example.com. 300 IN A 192.0.2.1"),
        ("+tcp +cdflag example.com", "NOERROR", "qr rd ra cd", "192.0.2.1"),
        ("gone.example.com", "NXDOMAIN", "qr rd ra", " SOA "),
        ("version.bind TXT CH", "REFUSED", "qr rd ra", "version.bind."),
        ("+edns=1 +noednsneg simple-server", "BADVERS", "qr rd ra", "EDNS: version: 0"),
        ("+opcode=NOTIFY simple-server", "NOTIMP", "qr rd ra", "simple-server."),
    ] {
        let Some(text) = dig(addr, arguments).await else {
            println!("SKIPPED: there is no dig here");
            return;
        };
        assert!(!text.to_lowercase().contains("warning"), "{text}");
        assert!(!text.contains("malformed") && !text.contains("extra bytes"), "{text}");
        assert!(text.contains(&format!("status: {status},")), "{arguments}: {text}");
        assert!(text.contains(&format!(";; flags: {flags};")), "{arguments}: {text}");
        assert!(text.contains(expected), "{arguments}: {text}");
    }
}
