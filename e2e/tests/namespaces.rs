//! The real programs on real kernels' networks: two nodes and their pods, each a network namespace. `make test-net` runs it.
//!
//! The client's pod has no network but its loopback, and both routers live in other namespaces than the pods: what
//! passes, passes by sockets that changed hands.

#![allow(clippy::print_stdout, reason = "what was measured is shown beside the result")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::{
    Echo, Namespaces, Place, Process, Refusal, Router, RouterOptions, Sidecar, SidecarOptions, Stand,
    UdpEcho, annotation, ask, programs, wait_for,
};
use hickory_proto::rr::RecordType;

const LIMIT: Duration = Duration::from_secs(10);
/// What a client waits for at most where there is no way.
const FAST: Duration = Duration::from_secs(5);
/// From the moment the way is there again to the first flow.
const HEALED: Duration = Duration::from_secs(5);

const A: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 1);
const B: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 2);
const POD: Ipv4Addr = Ipv4Addr::new(10, 67, 0, 2);
const DNS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const PEERS: u16 = 7443;
/// TCP and UDP; the application listens at the pod's address.
const ECHO: u16 = 8080;
/// HTTP; the application listens at the pod's loopback, on another port.
const PAGE: (u16, u16) = (80, 8000);

/// Cluster `a.local` with the pod `server`, cluster `b.local` with the pod `client`. What is to end first stands first.
struct World {
    client: Sidecar,
    server: Sidecar,
    b: Router,
    a: Router,
    stand: Stand,
    client_pod: Place,
    server_pod: Place,
    b_node: Place,
    a_node: Place,
    net: Namespaces,
}

impl World {
    /// All programs run as root.
    fn new() -> Result<Self> {
        Self::with(&[], None)
    }

    /// Each router dials the other; the nodes in `closed` let nobody in; all programs run as `user`.
    fn with(closed: &[(&str, Refusal)], user: Option<u32>) -> Result<Self> {
        let mut net = Namespaces::new(&["dig", "curl", "setpriv"])?;
        let stand = Stand::new(&programs()?)?;
        let (a_node, b_node) = (net.node("a", A)?, net.node("b", B)?);
        let (server_pod, client_pod) = (net.pod("server", DNS)?, net.pod("client", DNS)?);
        net.attach(&server_pod, &a_node, POD)?;
        for (name, refusal) in closed {
            net.refuse_inbound(if *name == "a" { &a_node } else { &b_node }, *refusal)?;
        }
        if user.is_some() {
            // The safe sysctl that the pod's manifest sets: no privilege is needed for port 53.
            for pod in [&server_pod, &client_pod] {
                pod.run(|| Ok(std::fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")?))?;
            }
        }
        let runs = |place: &Place| Place { user, ..place.clone() };
        let router = |place: &Place, cluster, other, node, at: Ipv4Addr, dials: Ipv4Addr| {
            stand.router(&RouterOptions {
                place: runs(place),
                cluster,
                node,
                peers: Some(SocketAddr::from((at, PEERS))),
                dials: vec![format!("{dials}:{PEERS}")],
                trusts: vec![other],
            })
        };
        let a = router(&a_node, "a.local", "b.local", "a-1", A, B)?;
        let b = router(&b_node, "b.local", "a.local", "b-1", B, A)?;
        let services = annotation(&[
            ("web", "default", "a.local", ECHO, "TCP", ECHO),
            ("dgram", "default", "a.local", ECHO, "UDP", ECHO),
            ("page", "default", "a.local", PAGE.0, "TCP", PAGE.1),
        ]);
        let sidecar = |place: &Place, router, pod, addresses, exports, imports| {
            stand.sidecar(
                router,
                &SidecarOptions {
                    place: runs(place),
                    pod,
                    namespace: "default",
                    range: "127.0.66.0/24",
                    dns: SocketAddr::from((DNS, 53)),
                    addresses,
                    exports,
                    imports,
                },
            )
        };
        let server =
            sidecar(&server_pod, &a, "server", vec![IpAddr::V4(POD)], services.clone(), String::new())?;
        let client = sidecar(&client_pod, &b, "client", Vec::new(), String::new(), services)?;
        for offer in ["web.default.a.local:8080/TCP", "dgram.default.a.local:8080/UDP"] {
            b.wait_for_offer(offer)?;
        }
        Ok(Self { client, server, b, a, stand, client_pod, server_pod, b_node, a_node, net })
    }

    fn resolve(&self, name: &str, port: u16) -> Result<SocketAddr> {
        let server = SocketAddr::from((DNS, 53));
        let answer = self.client_pod.run(|| ask(server, name, RecordType::A))?;
        let address = answer.addresses.first().with_context(|| format!("{name}: {answer:?}"))?;
        Ok(SocketAddr::from((*address, port)))
    }

    fn echo(&self) -> Result<Echo> {
        self.server_pod.run(|| Echo::start(SocketAddr::from((POD, ECHO))))
    }

    fn connect(&self, to: SocketAddr) -> Result<TcpStream> {
        self.client_pod.run(|| {
            let stream = TcpStream::connect_timeout(&to, LIMIT)?;
            stream.set_read_timeout(Some(LIMIT))?;
            stream.set_write_timeout(Some(LIMIT))?;
            Ok(stream)
        })
    }

    /// One byte there and back, by a new flow.
    fn ping(&self, to: SocketAddr) -> Result<()> {
        let mut stream = self.connect(to)?;
        bounce(&mut stream)
    }

    /// Every program's log, for a failure.
    fn logs(&self) -> String {
        let processes = [&self.client.process, &self.server.process, &self.b.process, &self.a.process];
        processes.map(|process| format!("--- {}\n{}", process.name(), process.log())).concat()
    }

    /// Runs a program in the client's pod.
    fn in_the_client(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = self.client_pod.command(Path::new(program));
        let done = e2e::output(command.args(arguments))?;
        let text = String::from_utf8_lossy(&done.stdout).into_owned();
        if !done.status.success() {
            let error = String::from_utf8_lossy(&done.stderr);
            bail!("{program} {arguments:?}: {}: {text}{error}", done.status);
        }
        Ok(text)
    }
}

fn bounce(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    Ok(())
}

/// Sends bytes, ends the sending side, and reads to the end.
fn exchange(mut stream: TcpStream, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut reader = stream.try_clone()?;
    std::thread::scope(|scope| {
        let received = scope.spawn(move || {
            let mut received = Vec::new();
            reader.read_to_end(&mut received).map(|_| received)
        });
        stream.write_all(bytes)?;
        stream.shutdown(Shutdown::Write)?;
        Ok(received.join().expect("the reader does not panic")?)
    })
}

fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + i / 251) as u8).collect()
}

fn network_of(process: &Process) -> Result<std::path::PathBuf> {
    Ok(std::fs::read_link(format!("/proc/{}/ns/net", process.pid()))?)
}

/// Serves `requests` requests for a page, then ends.
fn serve_page(requests: usize) -> Result<std::thread::JoinHandle<()>> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, PAGE.1))?;
    Ok(std::thread::spawn(move || {
        for mut stream in listener.incoming().take(requests).flatten() {
            let head =
                BufReader::new(&stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
            let host = head.filter_map(|line| line.strip_prefix("Host: ").map(str::to_owned)).last();
            let body = format!("you asked {}\n", host.unwrap_or_default());
            let _ = write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        }
    }))
}

#[test]
#[ignore = "needs root: make test-net"]
fn a_pod_without_a_network_uses_a_service_of_another_cluster() -> Result<()> {
    let mut world = World::new()?;
    let _tcp = world.echo()?;
    let _udp = world.server_pod.run(|| UdpEcho::start(SocketAddr::from((POD, ECHO))))?;
    // No other way leads there.
    let router = network_of(&world.b.process)?;
    ensure!(network_of(&world.client.process)? != router, "sidecar and router share a network");
    for unreachable in [SocketAddr::from((POD, ECHO)), SocketAddr::from((A, PEERS))] {
        ensure!(world.connect(unreachable).is_err(), "the client's pod reaches {unreachable} by itself");
    }

    let web = world.resolve("web.default", ECHO)?;
    let range = Ipv4Addr::new(127, 0, 66, 0);
    let IpAddr::V4(address) = web.ip() else { bail!("{web}") };
    ensure!(address.octets()[..3] == range.octets()[..3], "{web} is not of {range}/24");
    // Half-close both ways, and enough bytes that windows and acknowledgements count.
    let bytes = pattern(20_000_000);
    let got = exchange(world.connect(web)?, &bytes)?;
    ensure!(got == bytes, "{} bytes went in, {} came out, or changed", bytes.len(), got.len());

    let dgram = world.resolve("dgram.default", ECHO)?;
    let socket = world.client_pod.run(|| Ok(UdpSocket::bind("127.0.0.1:0")?))?;
    socket.set_read_timeout(Some(LIMIT))?;
    let mut buf = vec![0; 65_536];
    for size in [1, 0, 1_472, 9_000, 65_507] {
        let bytes = pattern(size);
        socket.send_to(&bytes, dgram)?;
        let (n, from) = socket.recv_from(&mut buf).with_context(|| format!("{size} bytes"))?;
        ensure!(from == dgram && buf[..n] == bytes, "{size} bytes came back as {n}, or changed, from {from}");
    }

    // No byte passes through the sidecar: a flow does not miss it.
    let mut flow = world.connect(web)?;
    bounce(&mut flow)?;
    world.client.process.kill()?;
    bounce(&mut flow).context("a live flow, without the client's sidecar")?;
    world.ping(web).context("a new flow, without the client's sidecar")
}

/// The test needs root; the programs do not.
#[test]
#[ignore = "needs root: make test-net"]
fn the_programs_need_no_privilege() -> Result<()> {
    let world = World::with(&[], Some(64_001))?;
    for process in [&world.client.process, &world.a.process] {
        let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid()))?;
        for line in ["Uid:\t64001\t64001\t64001\t64001", "CapEff:\t0000000000000000"] {
            ensure!(status.lines().any(|found| found == line), "no {line:?} in {status}");
        }
    }
    let _tcp = world.echo()?;
    let _udp = world.server_pod.run(|| UdpEcho::start(SocketAddr::from((POD, ECHO))))?;
    world.ping(world.resolve("web.default", ECHO)?).with_context(|| world.logs())?;
    let socket = world.client_pod.run(|| Ok(UdpSocket::bind("127.0.0.1:0")?))?;
    socket.set_read_timeout(Some(LIMIT))?;
    socket.send_to(b"datagram", world.resolve("dgram.default", ECHO)?)?;
    let (n, _) = socket.recv_from(&mut [0; 16]).with_context(|| world.logs())?;
    ensure!(n == 8);
    Ok(())
}

#[test]
#[ignore = "needs root: make test-net"]
fn real_clients_are_content() -> Result<()> {
    let world = World::new()?;
    let page = world.resolve("page.default", PAGE.0)?.ip().to_string();
    for transport in ["+notcp", "+tcp"] {
        for name in ["page.default", "page.default.svc.a.local", "page.default.svc.clusterset.local"] {
            let text = world.in_the_client("dig", &["@127.0.0.2", transport, name])?;
            content(&text).with_context(|| format!("dig {transport} {name}"))?;
            let answer = text.lines().find(|line| line.starts_with(&format!("{name}.")));
            let fields: Vec<&str> = answer.context(text.clone())?.split_whitespace().collect();
            ensure!(fields[2..] == ["IN", "A", page.as_str()], "{text}");
        }
        // NODATA with the SOA that says for how long (RFC 2308), not NXDOMAIN.
        let text = world.in_the_client("dig", &["@127.0.0.2", transport, "page.default", "AAAA"])?;
        content(&text)?;
        ensure!(text.contains("ANSWER: 0") && text.contains("SOA"), "{text}");
        let text = world.in_the_client("dig", &["@127.0.0.2", transport, "-x", &page, "+short"])?;
        ensure!(text.trim_end().starts_with("page.default."), "{text}");
    }

    // The resolver of libc, by /etc/resolv.conf, and an HTTP client that knows nothing of all this.
    let names = ["page.default", "page.default.svc", "page.default.a.local", "page.default.svc.a.local"];
    let server = world.server_pod.run(|| serve_page(names.len()))?;
    for name in names {
        let url = format!("http://{name}/");
        let text = world
            .in_the_client("curl", &["--noproxy", "*", "-sS", "-m", "10", &url])
            .with_context(|| world.logs())?;
        ensure!(text == format!("you asked {name}\n"), "{text}");
    }
    server.join().expect("the server does not panic");
    Ok(())
}

/// Whether dig complains of nothing. What it says of every name under `.local`, before it looks at the answer, is about
/// the question.
fn content(text: &str) -> Result<()> {
    let text = text
        .replace(";; WARNING: .local is reserved for Multicast DNS\n", "")
        .replace(";; You are currently testing what happens when an mDNS query is leaked to DNS\n", "");
    ensure!(text.contains("status: NOERROR"), "{text}");
    for complaint in ["warning", "malformed", "mismatch", "truncated", "extra bytes", "timed out", "refused"]
    {
        ensure!(!text.to_ascii_lowercase().contains(complaint), "{text}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root: make test-net"]
fn a_cut_fails_fast_and_heals_fast() -> Result<()> {
    let world = World::new()?;
    let _echo = world.echo()?;
    let web = world.resolve("web.default", ECHO)?;
    let (net, a, b) = (&world.net, &world.a_node, &world.b_node);
    type Cut<'a> = (&'a str, Duration, &'a dyn Fn(bool) -> Result<()>);
    let cuts: [Cut<'_>; 4] = [
        ("the consumer's link", Duration::ZERO, &|up| net.set_link(b, up)),
        ("the exporter's link", Duration::ZERO, &|up| net.set_link(a, up)),
        ("the way between, unseen", Duration::ZERO, &|up| net.set_plugged(a, up)),
        // Both routers dial again by now, and the kernel sends their SYNs more and more seldom.
        ("the way between, for longer", Duration::from_secs(15), &|up| net.set_plugged(b, up)),
    ];
    for (what, longer, set) in cuts {
        world.ping(web).with_context(|| format!("before {what} goes: {}", world.logs()))?;
        let mut flow = world.connect(web)?;
        bounce(&mut flow)?;
        set(false)?;
        for attempt in 1..=2 {
            let start = Instant::now();
            ensure!(world.ping(web).is_err(), "{what} is down, and a flow went through");
            let took = start.elapsed();
            println!("{what} down: flow {attempt} failed after {took:?}");
            ensure!(took < FAST, "{what}: flow {attempt} took {took:?} to fail; {}", world.logs());
            // A name is not lost with the way to it.
            ensure!(world.resolve("web.default", ECHO)? == web);
        }
        flow.write_all(b"into the cut")?;
        std::thread::sleep(longer);
        set(true)?;
        let start = Instant::now();
        wait_for("healing", LIMIT, || world.ping(web).map(Some))
            .with_context(|| format!("{what}; {}", world.logs()))?;
        let took = start.elapsed();
        println!("{what} up: healed after {took:?}");
        ensure!(took < HEALED, "{what}: healed after {took:?}; {}", world.logs());
        // The kernel sends again what it had sent into the cut: later, the longer that lasted.
        flow.set_read_timeout(Some(Duration::from_secs(40)))?;
        let start = Instant::now();
        let mut got = [0; 12];
        flow.read_exact(&mut got).with_context(|| format!("{what}: the flow that ran before the cut"))?;
        ensure!(&got == b"into the cut");
        println!("{what} up: the flow of before went on after {:?}", start.elapsed());
    }
    Ok(())
}

/// TCP and UDP both ways through a pair of which one node lets nobody in.
fn dials_back(closed: &str, refusal: Refusal) -> Result<()> {
    let world = World::with(&[(closed, refusal)], None)?;
    let _tcp = world.echo()?;
    let _udp = world.server_pod.run(|| UdpEcho::start(SocketAddr::from((POD, ECHO))))?;
    // The firewall does what it should: the closed node can't be dialled, the other one can.
    let (open_node, closed_node, closed_address, open_address) = match closed {
        "a" => (&world.b_node, &world.a_node, A, B),
        _ => (&world.a_node, &world.b_node, B, A),
    };
    let dial = |from: &Place, to: Ipv4Addr| {
        from.run(|| {
            let to = SocketAddr::from((to, PEERS));
            Ok(TcpStream::connect_timeout(&to, Duration::from_millis(500))?)
        })
    };
    ensure!(dial(open_node, closed_address).is_err(), "{closed} lets somebody in");
    dial(closed_node, open_address).context("the open node")?;

    let web = world.resolve("web.default", ECHO)?;
    let start = Instant::now();
    world.ping(web).with_context(|| world.logs())?;
    println!("{closed} closed by {refusal:?}: the first flow took {:?}", start.elapsed());
    ensure!(start.elapsed() < Duration::from_secs(2), "{:?}; {}", start.elapsed(), world.logs());
    let bytes = pattern(5_000_000);
    ensure!(exchange(world.connect(web)?, &bytes)? == bytes, "the bytes came back changed");
    // More at once than the pool has spare connections.
    std::thread::scope(|scope| {
        let flows: Vec<_> = (0..20_usize)
            .map(|i| {
                let world = &world;
                scope.spawn(move || -> Result<()> {
                    let bytes = pattern(1000 + i);
                    ensure!(exchange(world.connect(web)?, &bytes)? == bytes, "flow {i}");
                    Ok(())
                })
            })
            .collect();
        flows.into_iter().try_for_each(|flow| flow.join().expect("no panic"))
    })
    .with_context(|| world.logs())?;

    let dgram = world.resolve("dgram.default", ECHO)?;
    let socket = world.client_pod.run(|| Ok(UdpSocket::bind("127.0.0.1:0")?))?;
    socket.set_read_timeout(Some(LIMIT))?;
    let bytes = pattern(65_507);
    socket.send_to(&bytes, dgram)?;
    let mut buf = vec![0; 65_536];
    let (n, _) = socket.recv_from(&mut buf).with_context(|| world.logs())?;
    ensure!(buf[..n] == bytes, "a datagram came back changed");
    Ok(())
}

#[test]
#[ignore = "needs root: make test-net"]
fn the_exporters_node_cannot_be_dialled() -> Result<()> {
    dials_back("a", Refusal::Reject)?;
    dials_back("a", Refusal::Drop)
}

#[test]
#[ignore = "needs root: make test-net"]
fn the_consumers_node_cannot_be_dialled() -> Result<()> {
    dials_back("b", Refusal::Reject)?;
    dials_back("b", Refusal::Drop)
}

#[test]
#[ignore = "needs root: make test-net"]
fn a_router_restarts_in_its_own_network() -> Result<()> {
    let mut world = World::new()?;
    let _echo = world.echo()?;
    let web = world.resolve("web.default", ECHO)?;
    world.ping(web)?;
    // The consumer's: connections wait in the pod's backlog.
    world.b.process.kill()?;
    let mut waiting = world.connect(web).context("a connection while the router is gone")?;
    world.stand.restart_router(&mut world.b)?;
    bounce(&mut waiting).context("the connection that waited").with_context(|| world.logs())?;
    // The exporter's: it gets sockets of the server's pod again.
    world.a.process.kill()?;
    world.stand.restart_router(&mut world.a)?;
    wait_for("the service is back", LIMIT, || world.ping(web).map(Some)).with_context(|| world.logs())
}

/// A program of another pod that says it is this pod's sidecar, while that one restarts, gets nothing of it. It is a
/// sidecar, so that it does all that a pod's next one does, but from a network namespace of its own.
#[test]
#[ignore = "needs root: make test-net"]
fn a_claimed_uid_takes_no_sockets_of_another_network_namespace() -> Result<()> {
    let mut world = World::new()?;
    let _echo = world.echo()?;
    let web = world.resolve("web.default", ECHO)?;
    world.ping(web)?;
    for victim in ["client", "server"] {
        let name = format!("other-{victim}");
        let place = world.net.pod(&name, DNS)?;
        let options = SidecarOptions {
            place,
            pod: &name,
            namespace: "default",
            range: "127.0.66.0/24",
            dns: SocketAddr::from((DNS, 53)),
            addresses: Vec::new(),
            exports: String::new(),
            imports: annotation(&[("page", "default", "a.local", PAGE.0, "TCP", PAGE.1)]),
        };
        let of_victim = |world: &World| if victim == "client" { world.b.status() } else { world.a.status() };
        let missed = |world: &World| -> Result<bool> {
            let status = of_victim(world)?;
            let missing = status["missing"].as_array().context("nothing of who is missing")?;
            Ok(missing.iter().any(|pod| pod["pod"] == victim))
        };
        let mut sidecar = if victim == "client" { &mut world.client } else { &mut world.server };
        sidecar.process.kill()?;
        wait_for("it is missed", LIMIT, || Ok(missed(&world)?.then_some(())))?;
        let router = if victim == "client" { &world.b } else { &world.a };
        let claimer = world.stand.pretender(router, &options, victim)?;
        // Longer than the old sockets of a sidecar stay beside those of the next.
        for _ in 0..5 {
            std::thread::sleep(Duration::from_secs(1));
            world.ping(web).with_context(|| format!("{victim} is claimed; {}", world.logs()))?;
        }
        ensure!(missed(&world)?, "the claim hides that {victim} is missing");
        sidecar = if victim == "client" { &mut world.client } else { &mut world.server };
        world.stand.restart_sidecar(sidecar)?;
        wait_for("its own sidecar has its place", FAST, || {
            let status = of_victim(&world)?;
            let sidecars = status["sidecars"].as_array().context("no sidecars in the status")?;
            let settled = sidecars.iter().all(|sidecar| sidecar["state"] == "connected");
            Ok((settled && sidecars.len() == 2 && !missed(&world)?).then_some(()))
        })
        .with_context(|| world.logs())?;
        wait_for("it is served", LIMIT, || Ok(world.ping(web).ok()))?;
        drop(claimer);
    }
    Ok(())
}
