//! What a restart of each program does to names, connections and flows.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::{Echo, Pair, annotation, ping, wait_for};

const LIMIT: Duration = Duration::from_secs(15);

/// How many connections to an address the kernel holds, whether a program has taken them or not: /proc/net/tcp.
fn accepted_by(addr: SocketAddr) -> Result<usize> {
    let SocketAddr::V4(v4) = addr else { bail!("{addr} is not IPv4") };
    let local = format!("{:08X}:{:04X}", u32::from_le_bytes(v4.ip().octets()), v4.port());
    let established = |line: &&str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.get(1) == Some(&local.as_str()) && fields.get(3) == Some(&"01")
    };
    Ok(std::fs::read_to_string("/proc/net/tcp")?.lines().filter(established).count())
}

#[test]
fn connections_wait_while_the_consumers_router_is_gone() -> Result<()> {
    let mut pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    let web = pair.resolve("web.default")?;
    ping(web)?;
    pair.b.process.kill()?;
    // DNS answers, and the kernel takes the connection: nothing is refused.
    ensure!(pair.resolve("web.default")? == web);
    let waiting: Vec<_> = (0..20).map(|_| std::thread::spawn(move || ping(web))).collect();
    wait_for("the clients wait", LIMIT, || Ok((accepted_by(web)? >= 20).then_some(())))?;
    pair.stand.restart_router(&mut pair.b)?;
    for client in waiting {
        client.join().expect("no panic").context("a connection that waited")?;
    }
    ping(web)
}

#[test]
fn the_exporters_router_comes_back() -> Result<()> {
    let mut pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    let web = pair.resolve("web.default")?;
    ping(web)?;
    let mut flow = TcpStream::connect(web)?;
    flow.set_read_timeout(Some(LIMIT))?;
    flow.write_all(b"x")?;
    flow.read_exact(&mut [0])?;
    pair.a.process.kill()?;
    let start = Instant::now();
    ensure!(flow.read(&mut [0]).is_err(), "the flow ended as if the service had closed it");
    ensure!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    // No route: fast, not for ever.
    let start = Instant::now();
    ensure!(ping(web).is_err());
    ensure!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    pair.stand.restart_router(&mut pair.a)?;
    wait_for("the service is back", LIMIT, || Ok(ping(web).ok()))
}

#[test]
fn flows_live_on_while_a_sidecar_restarts_and_addresses_stay() -> Result<()> {
    let mut pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    // A second import, removed again, so that the address that stays is not simply the first of the range.
    let web = pair.resolve("web.default")?;
    let mut flow = TcpStream::connect(web)?;
    flow.set_read_timeout(Some(LIMIT))?;
    for sidecar in ["client", "server"] {
        flow.write_all(b"x")?;
        flow.read_exact(&mut [0])?;
        let pair_sidecar = if sidecar == "client" { &mut pair.client } else { &mut pair.server };
        pair_sidecar.process.kill()?;
        flow.write_all(b"y")?;
        flow.read_exact(&mut [0]).with_context(|| format!("a live flow, without the {sidecar}'s sidecar"))?;
        ping(web).with_context(|| format!("a new flow, without the {sidecar}'s sidecar"))?;
        pair.stand.restart_sidecar(pair_sidecar)?;
        flow.write_all(b"z")?;
        flow.read_exact(&mut [0])
            .with_context(|| format!("a live flow, after the {sidecar}'s sidecar came back"))?;
    }
    ensure!(pair.resolve("web.default")? == web, "the address changed");
    // The old sockets go, the new ones serve.
    for router in [&pair.a, &pair.b] {
        wait_for("the old sockets go", LIMIT, || {
            let status = router.status()?;
            let sidecars = status["sidecars"].as_array().context("no sidecars in the status")?;
            Ok((sidecars.len() == 1).then_some(()))
        })?;
    }
    for _ in 0..20 {
        ping(web)?;
    }
    Ok(())
}

#[test]
fn a_sidecar_that_is_told_to_end_leaves_its_imports_to_the_next() -> Result<()> {
    let mut pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    let web = pair.resolve("web.default")?;
    ping(web)?;
    pair.client.process.terminate()?;
    pair.client.process.wait(LIMIT)?;
    ping(web).context("a new flow, without the client's sidecar")?;
    pair.stand.restart_sidecar(&mut pair.client)?;
    ensure!(pair.resolve("web.default")? == web, "the address changed");
    ping(web).context("a new flow, after the client's sidecar came back")?;
    // What the other one exports is withdrawn at once: the pod may be about to end.
    pair.server.process.terminate()?;
    pair.server.process.wait(LIMIT)?;
    wait_for("the export is withdrawn", LIMIT, || {
        let offers = pair.b.status()?["offers"].as_array().context("no offers in the status")?.len();
        Ok((offers == 0).then_some(()))
    })?;
    ensure!(ping(web).is_err(), "an export outlived its sidecar's goodbye");
    pair.stand.restart_sidecar(&mut pair.server)?;
    wait_for("the service is back", LIMIT, || Ok(ping(web).ok()))
}

#[test]
fn a_crowd_of_new_flows_waits_for_the_exporters_sidecar() -> Result<()> {
    let mut pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    let web = pair.resolve("web.default")?;
    ping(web)?;
    pair.server.process.kill()?;
    // More than the router has sockets of the pod.
    let waiting: Vec<_> = (0..40).map(|_| std::thread::spawn(move || ping(web))).collect();
    wait_for("the clients wait, or are served from what the router has", LIMIT, || {
        let served = waiting.iter().filter(|client| client.is_finished()).count();
        Ok((served + accepted_by(web)? >= 40).then_some(()))
    })?;
    pair.stand.restart_sidecar(&mut pair.server)?;
    for client in waiting {
        client.join().expect("no panic").context("a connection that waited")?;
    }
    Ok(())
}

#[test]
fn a_sidecar_starts_without_its_annotations_from_the_last_good_state() -> Result<()> {
    let mut pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    let web = pair.resolve("web.default")?;
    pair.client.process.kill()?;
    std::fs::remove_dir_all(&pair.client.config)?;
    pair.stand.restart_sidecar(&mut pair.client)?;
    ensure!(pair.resolve("web.default")? == web);
    ping(web)
}

#[test]
fn sigterm_ends_every_program_within_two_seconds() -> Result<()> {
    let mut pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    ping(pair.resolve("web.default")?)?;
    let Pair { client, server, a, b, .. } = &mut pair;
    for process in [&mut client.process, &mut server.process, &mut b.process, &mut a.process] {
        process.terminate()?;
        let start = Instant::now();
        let status = process.wait(Duration::from_secs(5))?;
        ensure!(status.success(), "{status}; {}", process.log());
        ensure!(start.elapsed() < Duration::from_secs(2), "{:?}; {}", start.elapsed(), process.log());
    }
    Ok(())
}

#[test]
fn a_log_that_cannot_be_written_stops_nothing() -> Result<()> {
    let mut pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    let web = pair.resolve("web.default")?;
    for process in [&mut pair.client.process, &mut pair.b.process] {
        process.kill()?;
        process.fill_log()?;
    }
    pair.stand.restart_router(&mut pair.b)?;
    pair.stand.restart_sidecar(&mut pair.client)?;
    wait_for("the service", LIMIT, || Ok(ping(web).ok()))?;
    // What is told then, such as a link that goes and comes, is lost, and what is done is done.
    pair.a.process.kill()?;
    pair.stand.restart_router(&mut pair.a)?;
    wait_for("the service is back", LIMIT, || Ok(ping(web).ok()))?;
    for process in [&mut pair.client.process, &mut pair.b.process] {
        process.terminate()?;
        let status = process.wait(LIMIT)?;
        ensure!(status.success(), "{}: {status}", process.name());
    }
    Ok(())
}

#[test]
fn a_router_says_why_a_flow_has_nowhere_to_go() -> Result<()> {
    let mut pair = Pair::start()?;
    let port = Pair::PORT;
    let imports = [
        ("web", "default", "a.local", port + 1, "TCP", port),
        ("other", "default", "a.local", port, "TCP", port),
        ("far", "default", "z.local", port, "TCP", port),
        ("own", "default", "b.local", port, "TCP", port),
    ];
    pair.client.set_imports(&annotation(&imports))?;
    let reasons = |router: &e2e::Router, wanted: [(&str, &str); 4]| {
        wait_for("the reasons", LIMIT, || {
            let status = router.status()?;
            let imports = status["imports"].as_array().context("no imports in the status")?;
            let said = |(name, reason): (&str, &str)| {
                let of = |i: &&serde_json::Value| i["service"].as_str().is_some_and(|s| s.starts_with(name));
                imports
                    .iter()
                    .find(of)
                    .is_some_and(|i| i["reason"].as_str().is_some_and(|r| r.contains(reason)))
            };
            Ok(wanted.into_iter().all(said).then_some(()))
        })
        .with_context(|| format!("{:?}", router.status().map(|status| status["imports"].to_string())))
    };
    let here = "no pod on this node exports it";
    reasons(
        &pair.b,
        [
            ("web", "offered at 8080/TCP, not at 8081/TCP"),
            ("other", "no linked router of a.local offers it"),
            ("far", "z.local is not in this router's `trust`"),
            ("own", here),
        ],
    )?;
    pair.a.process.kill()?;
    let down = "no router of a.local is linked: a-1 is down";
    reasons(&pair.b, [("web", down), ("other", down), ("far", "`trust`"), ("own", here)])
}

#[test]
fn imports_stay_put_when_another_goes() -> Result<()> {
    let pair = Pair::start()?;
    let web = ("web", "default", "a.local", 8080, "TCP", 8080);
    let first = ("aaa", "default", "a.local", 8082, "TCP", 8080);
    pair.client.set_imports(&annotation(&[first, web]))?;
    wait_for("the new name", LIMIT, || Ok(pair.resolve("aaa.default").ok()))?;
    let (aaa, web_addr) = (pair.resolve("aaa.default")?, pair.resolve("web.default")?);
    pair.client.set_imports(&annotation(&[web]))?;
    wait_for("the name goes", LIMIT, || Ok(pair.resolve("aaa.default").is_err().then_some(())))?;
    // A freed address rests: the next Service gets another one.
    let next = ("zzz", "default", "a.local", 8083, "TCP", 8080);
    pair.client.set_imports(&annotation(&[next, web]))?;
    let zzz = wait_for("the next name", LIMIT, || Ok(pair.resolve("zzz.default").ok()))?;
    ensure!(zzz.ip() != aaa.ip() && zzz.ip() != web_addr.ip(), "{zzz} {aaa} {web_addr}");
    ensure!(pair.resolve("web.default")? == web_addr);
    Ok(())
}
