//! The main job with the real programs, over loopback: names, TCP and UDP across two clusters.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{Echo, Pair, UdpEcho, annotation, ask, wait_for};
use hickory_proto::rr::RecordType;

const LIMIT: Duration = Duration::from_secs(10);

fn connect(addr: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&addr, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// Sends bytes, ends the sending side, and reads to the end.
fn exchange(addr: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut stream = connect(addr)?;
    let mut reader = stream.try_clone()?;
    std::thread::scope(|scope| {
        let received = scope.spawn(move || -> Result<Vec<u8>> {
            let mut received = Vec::new();
            reader.read_to_end(&mut received)?;
            Ok(received)
        });
        stream.write_all(bytes)?;
        stream.shutdown(Shutdown::Write)?;
        received.join().expect("the reader does not panic")
    })
}

fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + i / 251) as u8).collect()
}

#[test]
fn a_service_of_another_cluster_by_its_names() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    let web = pair.resolve("web.default")?;
    for name in [
        "web",
        "web.default.svc",
        "web.default.a.local",
        "web.default.svc.a.local",
        "web.default.svc.clusterset.local",
        "WEB.Default",
    ] {
        ensure!(pair.resolve(name)? == web, "{name} is elsewhere");
    }
    // NODATA, not NXDOMAIN: a resolver that asks for both must take the A.
    let aaaa = ask(pair.client.dns, "web.default", RecordType::AAAA)?;
    ensure!(aaaa.code == 0 && aaaa.addresses.is_empty(), "AAAA: {aaaa:?}");

    ensure!(exchange(web, b"hello")? == b"hello");
    // Half-close both ways, and enough bytes that windows and acknowledgements count.
    let bytes = pattern(20_000_000);
    ensure!(exchange(web, &bytes)? == bytes, "the bytes came back changed");
    let status = pair.b.status()?;
    ensure!(status["flows"]["outbound"] == 2, "{status}");
    Ok(())
}

#[test]
fn datagrams_keep_their_boundaries_at_every_size() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = UdpEcho::start(pair.service)?;
    let dgram = pair.resolve("dgram.default")?;
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.set_read_timeout(Some(LIMIT))?;
    let mut buf = vec![0; 65_536];
    for size in [1, 0, 1_200, 1_472, 9_000, 16_384, 32_768, 65_507] {
        let bytes = pattern(size);
        socket.send_to(&bytes, dgram)?;
        let (n, from) = socket.recv_from(&mut buf).with_context(|| format!("{size} bytes"))?;
        ensure!(from == dgram, "an answer from {from}");
        ensure!(buf[..n] == bytes, "{size} bytes came back as {n}, or changed");
    }
    Ok(())
}

fn metric(admin: SocketAddr, name: &str) -> Result<u64> {
    let (_, metrics) = e2e::get(admin, "/metrics")?;
    let line = metrics.lines().find(|line| line.starts_with(name)).with_context(|| metrics.clone())?;
    Ok(line.rsplit(' ').next().context("no value")?.parse()?)
}

#[test]
fn bytes_are_counted_while_the_flow_runs() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    let mut stream = connect(pair.resolve("web.default")?)?;
    stream.write_all(&pattern(100_000))?;
    stream.read_exact(&mut vec![0; 100_000])?;
    for router in [&pair.a, &pair.b] {
        for name in ["servicekeel_router_sent_bytes_total", "servicekeel_router_received_bytes_total"] {
            wait_for(name, LIMIT, || Ok((metric(router.admin, name)? == 100_000).then_some(())))?;
        }
    }
    Ok(())
}

#[test]
fn many_flows_reuse_connections() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    let web = pair.resolve("web.default")?;
    for i in 0..200 {
        let bytes = pattern(i * 100);
        ensure!(exchange(web, &bytes)? == bytes, "flow {i}");
    }
    let (dialled, reused) = (
        metric(pair.b.admin, "servicekeel_router_pool_dialled_total")?,
        metric(pair.b.admin, "servicekeel_router_pool_reused_total")?,
    );
    ensure!(dialled <= 8 && reused >= 190, "dialled {dialled}, reused {reused}");
    Ok(())
}

#[test]
fn a_reset_is_a_reset_and_a_refusal_is_fast() -> Result<()> {
    let pair = Pair::start()?;
    let web = pair.resolve("web.default")?;
    // Nothing listens there yet.
    let start = Instant::now();
    let mut stream = connect(web)?;
    let read = stream.read(&mut [0]);
    ensure!(read.is_err(), "a flow without an endpoint ended as if the service had closed it: {read:?}");
    ensure!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());

    let echo = Echo::start(pair.service)?;
    wait_for("the endpoint is tried again", LIMIT, || Ok(exchange(web, b"x").ok()))?;
    let before = echo.resets.load(std::sync::atomic::Ordering::SeqCst);
    let mut stream = connect(web)?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
    drop(stream);
    wait_for("the service sees a reset", LIMIT, || {
        Ok((echo.resets.load(std::sync::atomic::Ordering::SeqCst) > before).then_some(()))
    })?;
    Ok(())
}

#[test]
fn a_slow_reader_stops_a_fast_writer() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    let web = pair.resolve("web.default")?;
    let mut stream = connect(web)?;
    stream.set_nonblocking(true)?;
    let chunk = vec![7; 64 * 1024];
    let (mut sent, mut quiet) = (0_u64, 0);
    // Nothing is read: the echo stops, and with it, through both routers, the writer.
    while quiet < 50 {
        match stream.write(&chunk) {
            Ok(n) => {
                sent += n as u64;
                quiet = 0;
                ensure!(sent < 1 << 30, "1 GiB went in and nothing came out: there is no backpressure");
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                quiet += 1;
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error.into()),
        }
    }
    for router in [&pair.a, &pair.b] {
        let kib = router.process.anonymous_kib()?;
        ensure!(kib < 64 * 1024, "a router holds {kib} KiB for one stalled flow");
    }
    // Everything arrives once the reader reads.
    stream.set_nonblocking(false)?;
    stream.shutdown(Shutdown::Write)?;
    let mut received = 0_u64;
    let mut buf = vec![0; 256 * 1024];
    loop {
        match stream.read(&mut buf)? {
            0 => break,
            n => received += n as u64,
        }
    }
    ensure!(received == sent, "{sent} bytes went in, {received} came out");
    Ok(())
}

#[test]
fn a_service_is_added_and_removed_while_a_flow_runs() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    let web = pair.resolve("web.default")?;
    let mut stream = connect(web)?;
    stream.write_all(b"before")?;
    stream.read_exact(&mut [0; 6])?;

    let other = ("other", "default", "a.local", 8081, "TCP", 8080);
    let all = [
        ("web", "default", "a.local", 8080, "TCP", 8080),
        ("dgram", "default", "a.local", 8080, "UDP", 8080),
        other,
    ];
    pair.server.set_exports(&annotation(&all))?;
    let start = Instant::now();
    // Another order and another port name on top: neither disturbs anything.
    pair.client.set_imports(&annotation(&[other, all[1], all[0]]).replace("name: p8080", "name: renamed"))?;
    let other = wait_for("the new name", LIMIT, || Ok(pair.resolve("other.default").ok()))?;
    ensure!(start.elapsed() < Duration::from_secs(2), "a changed annotation took {:?}", start.elapsed());
    let other = SocketAddr::new(other.ip(), 8081);
    wait_for("the new service", LIMIT, || Ok(exchange(other, b"new").ok().filter(|got| got == b"new")))?;
    ensure!(pair.resolve("web.default")? == web, "an address changed");

    stream.write_all(b"after")?;
    let mut got = [0; 5];
    stream.read_exact(&mut got).context("the running flow")?;
    ensure!(&got == b"after");

    pair.client.set_imports(&annotation(&all[..2]))?;
    wait_for("the old name goes", LIMIT, || {
        Ok(ask(pair.client.dns, "other.default", RecordType::A)?.addresses.is_empty().then_some(()))
    })?;
    stream.write_all(b"still")?;
    stream.read_exact(&mut got).context("the running flow, after the removal")?;
    Ok(())
}

#[test]
fn allow_is_kept_by_the_exporter() -> Result<()> {
    let closed = Pair::with("    allow: [\"c.local\", \"b.local/default\"]\n")?;
    let _udp = UdpEcho::start(closed.service)?;
    let _tcp = Echo::start(closed.service)?;
    // The rule stands at the last entry, dgram; web is open to all.
    closed.b.wait_for_offer("web.default.a.local:8080/TCP")?;
    ensure!(exchange(closed.resolve("web.default")?, b"open")? == b"open");
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    socket.send_to(b"let me in", closed.resolve("dgram.default")?)?;
    ensure!(socket.recv_from(&mut [0; 16]).is_err(), "a consumer that is not allowed got an answer");

    let open = Pair::with("    allow: [\"b.local\"]\n")?;
    let _udp = UdpEcho::start(open.service)?;
    open.b.wait_for_offer("dgram.default.a.local:8080/UDP")?;
    socket.send_to(b"let me in", open.resolve("dgram.default")?)?;
    let (n, _) = socket.recv_from(&mut [0; 16]).context("a consumer that is allowed")?;
    ensure!(n == 9);
    Ok(())
}
