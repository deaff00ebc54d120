//! The real sidecar as a DNS server: what it takes, and upstreams on a real network.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use e2e::{Answer, Namespaces, Place, Process, annotation, ask, output, programs, wait_for};
use hickory_proto::rr::RecordType;
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(10);
const SERVFAIL: u16 = 2;

/// A sidecar without a router, which answers DNS at `dns`.
fn sidecar(dir: &TempDir, place: &Place, dns: SocketAddr, upstream: Option<SocketAddr>) -> Result<Process> {
    let imports = annotation(&[("web", "default", "b.local", 80, "TCP", 80)]);
    std::fs::write(dir.path().join("imported-services-config.yaml"), imports)?;
    let mut command = place.command(&programs()?.join("servicekeel-sidecar"));
    let at = |file: &str| dir.path().join(file).into_os_string();
    command.arg("--sidecar-config-dir").arg(dir.path());
    command.arg("--sidecar-state-dir").arg(at("state")).arg("--sidecar-server-listen").arg(at("router.sock"));
    command.args(["--sidecar-dns-addr", &dns.to_string(), "--sidecar-cluster", "a.local"]);
    command.args(["--sidecar-ip-range", "127.0.79.0/24", "--sidecar-admin-addr", "off"]);
    if let Some(upstream) = upstream {
        command.args(["--sidecar-dns-upstream", &upstream.to_string()]);
    }
    let process = Process::start(dir.path(), "sidecar", &mut command)?;
    place.run(|| answers(dns))?;
    Ok(process)
}

/// Waits for an answer; one query may be lost among others.
fn answers(dns: SocketAddr) -> Result<Answer> {
    wait_for("the sidecar answers", LIMIT, || Ok(Some(ask(dns, "web", RecordType::A)?).filter(is_found)))
}

fn is_found(answer: &Answer) -> bool {
    answer.code == 0 && !answer.addresses.is_empty()
}

/// Numbers that look random, the same in each run.
fn noise() -> impl FnMut() -> u8 {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    }
}

#[test]
fn noise_takes_no_memory() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let free = UdpSocket::bind("127.0.79.1:0")?.local_addr()?;
    let silent = UdpSocket::bind("127.0.79.2:0")?;
    let sidecar = sidecar(&dir, &Place::default(), free, Some(silent.local_addr()?))?;
    let client = UdpSocket::bind("127.0.0.1:0")?;
    client.connect(free)?;
    let before = sidecar.anonymous_kib()?;
    let mut byte = noise();
    for len in (1..512).cycle().take(20_000) {
        let packet: Vec<u8> = (0..len).map(|_| byte()).collect();
        client.send(&packet)?;
    }
    answers(free)?;
    let after = sidecar.anonymous_kib()?;
    ensure!(after < before + 512, "{before} KiB before, {after} KiB after 20,000 packets of noise");
    // Names that nobody answers: what waits is bounded.
    for number in 0..20_000u32 {
        let mut query = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 8];
        query.extend(format!("{number:08}").as_bytes());
        query.extend(b"\x07example\0\0\x01\0\x01");
        client.send(&query)?;
        // What came before has been read then, rather than dropped by the kernel.
        if number % 200 == 0 {
            answers(free)?;
        }
    }
    answers(free)?;
    let after = sidecar.anonymous_kib()?;
    ensure!(after < before + 6 * 1024, "{before} KiB before, {after} KiB after 20,000 slow names");
    Ok(())
}

/// A refusal comes from another machine some time after the query; it must not be waited for any longer than that.
#[test]
#[ignore = "needs root, for network namespaces: make test-net"]
fn an_upstream_on_another_node_that_refuses_costs_no_time() -> Result<()> {
    let mut net = Namespaces::new(&[])?;
    let dir = tempfile::tempdir()?;
    let (here, there) = (Ipv4Addr::new(10, 66, 0, 1), Ipv4Addr::new(10, 66, 0, 2));
    let (node, _other) = (net.node("here", here)?, net.node("there", there)?);
    let dns = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), 53));
    let _sidecar = sidecar(&dir, &node, dns, Some((there, 53).into()))?;
    node.run(|| {
        let started = Instant::now();
        for round in 0..3 {
            for domain in ["default.svc.example", "svc.example", "cluster.example", "example", "example.com"]
            {
                for kind in [RecordType::A, RecordType::AAAA] {
                    let answer = ask(dns, &format!("name-{round}.{domain}"), kind)?;
                    ensure!(answer.code == SERVFAIL, "{answer:?}");
                }
            }
            // Longer than a refusal is remembered.
            std::thread::sleep(Duration::from_millis(1100));
        }
        let took = started.elapsed().saturating_sub(3 * Duration::from_millis(1100));
        ensure!(took < Duration::from_secs(1), "30 queries took {took:?}");
        Ok(())
    })
}

/// A nameserver of /etc/resolv.conf with a zone, as IPv6 routers announce themselves.
#[test]
#[ignore = "needs root, for network namespaces: make test-net"]
fn a_link_local_nameserver_is_asked() -> Result<()> {
    let mut net = Namespaces::new(&[])?;
    let dir = tempfile::tempdir()?;
    let dns = Ipv4Addr::new(127, 0, 0, 2);
    let other = net.node("other", Ipv4Addr::new(10, 66, 0, 2))?;
    let pod = net.pod("pod", dns)?;
    net.attach(&pod, &other, Ipv4Addr::new(10, 67, 0, 2))?;
    let netns = other.netns.clone().unwrap_or_default();
    for words in [
        ["link", "set", "pod", "address", "02:00:00:00:00:01"].as_slice(),
        &["addr", "add", "fe80::99/64", "dev", "pod", "nodad"],
    ] {
        output(Command::new("ip").args(["-n", &netns]).args(words))?;
    }
    let resolv = Path::new("/etc/netns").join(pod.netns.clone().unwrap_or_default()).join("resolv.conf");
    std::fs::write(resolv, "nameserver 127.0.0.2\nnameserver fe80::99%eth0\nnameserver fe80::98\n")?;
    let upstream = other.run(|| Ok(UdpSocket::bind("[::]:53")?))?;
    upstream.set_read_timeout(Some(LIMIT))?;
    let answering = std::thread::spawn(move || -> Result<()> {
        let mut packet = [0; 512];
        let (len, from) = upstream.recv_from(&mut packet)?;
        // Its question, and one A record for it.
        let question = 12 + packet[12..len].iter().position(|byte| *byte == 0).unwrap_or_default() + 5;
        let head = [&packet[..2], &[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]].concat();
        let record = [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 1];
        upstream.send_to(&[&head, &packet[12..question], &record].concat(), from)?;
        Ok(())
    });
    let dns = SocketAddr::from((dns, 53));
    let sidecar = sidecar(&dir, &pod, dns, None)?;
    let answer = pod.run(|| {
        wait_for("the answer", LIMIT, || {
            Ok(Some(ask(dns, "www.example.com", RecordType::A)?).filter(is_found))
        })
    })?;
    ensure!(answer.addresses == [Ipv4Addr::new(192, 0, 2, 1)], "{answer:?}");
    ensure!(matches!(answering.join(), Ok(Ok(()))), "the nameserver failed");
    ensure!(sidecar.log().matches("fe80::98").count() == 1, "{}", sidecar.log());
    Ok(())
}
