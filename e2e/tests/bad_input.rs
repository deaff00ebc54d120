//! Bad input at every door of the real programs: a clear error, and everything else goes on.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Echo, Pair, Place, Process, RouterOptions, Stand, annotation, ping, programs, wait_for};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketType,
};

const LIMIT: Duration = Duration::from_secs(10);

fn wait_for_log(process: &Process, text: &str) -> Result<()> {
    wait_for(&format!("{text:?} in the log"), LIMIT, || Ok(process.log().contains(text).then_some(())))
        .with_context(|| process.log())
}

/// No program has panicked.
fn sound(pair: &Pair) -> Result<()> {
    for process in [&pair.a.process, &pair.b.process, &pair.client.process, &pair.server.process] {
        let log = process.log();
        ensure!(!log.contains("panicked"), "{log}");
    }
    Ok(())
}

#[test]
fn strangers_at_the_peers_port() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    let web = pair.resolve("web.default")?;
    ping(web)?;
    let before = pair.a.process.settled_descriptors()?;
    for words in
        [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0; 4096], &[0x16, 3, 1, 0xff, 0xff, 1, 2, 3], b""]
    {
        let mut stream = TcpStream::connect(pair.peers)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.write_all(words)?;
        let mut answer = Vec::new();
        // Closed or reset: both are an end, which may be there already.
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut answer);
    }
    wait_for_log(&pair.a.process, "HTTP")?;
    ping(web)?;
    wait_for("no descriptor is leaked", LIMIT, || {
        Ok((pair.a.process.descriptors()? <= before + 2).then_some(()))
    })?;
    sound(&pair)
}

#[test]
fn a_router_of_an_authority_that_is_not_trusted() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    // c.local trusts a.local, and a.local has never heard of c.local.
    let stranger = pair.stand.router(&RouterOptions {
        place: Place::default(),
        cluster: "c.local",
        node: "c-1",
        peers: None,
        dials: vec![pair.peers.to_string()],
        trusts: vec!["a.local"],
    })?;
    wait_for_log(&pair.a.process, "c.local")?;
    ensure!(
        pair.a.status()?["peers"].as_array().is_some_and(|peers| peers.len() == 1),
        "{}",
        pair.a.status()?
    );

    // An authority of the attacker's own that calls itself b.local.
    let forged = tempfile::tempdir()?;
    let router = pair.stand.program("servicekeel-router");
    let forged_dir = forged.path().to_str().context("no UTF-8")?;
    for arguments in [
        vec!["pki", "init", "--cluster", "b.local", "--dir", forged_dir],
        vec!["pki", "issue", "--dir", forged_dir, "--node", "b-1", "--out", forged_dir],
    ] {
        let done = e2e::output(Command::new(&router).args(&arguments))?;
        ensure!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
    let real = pair.stand.authority("a.local")?.join("ca.crt");
    let config = forged.path().join("router.yaml");
    std::fs::write(
        &config,
        format!(
            "cluster: b.local\nnode: b-1\nlisten: {{ sidecars: {forged_dir}/r.sock, peers: \"off\", admin: \"off\" }}\npeers: [ {{ address: \"{}\" }} ]\nidentity: {{ ca: ca.crt, cert: node.crt, key: node.key }}\ntrust: [ {{ cluster: a.local, ca: {} }} ]\nstate: {forged_dir}/state\n",
            pair.peers,
            real.display()
        ),
    )?;
    let impostor =
        Process::start(forged.path(), "impostor", Command::new(&router).arg("--config").arg(&config))?;
    wait_for_log(&pair.a.process, "the certificate of b.local/b-1 was not issued by an authority of b.local")
        .with_context(|| impostor.log())?;
    ping(pair.resolve("web.default")?)?;
    drop(stranger);
    sound(&pair)
}

fn seqpacket(path: &Path) -> Result<OwnedFd> {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn send(socket: &OwnedFd, bytes: &[u8], descriptors: &[rustix::fd::BorrowedFd<'_>]) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(80))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ensure!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

#[test]
fn sidecars_that_send_rubbish() -> Result<()> {
    use servicekeel_core::handoff::{Pod, ToRouter};
    let pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    let web = pair.resolve("web.default")?;
    ping(web)?;
    let before = pair.a.process.settled_descriptors()?;
    let path = &pair.a.socket;
    let hello = ToRouter::Hello {
        version: 1,
        pod: Pod { name: "rogue".into(), namespace: "default".parse()?, uid: String::new() },
        addresses: Vec::new(),
    }
    .encode();
    let import = ToRouter::Import {
        id: 1,
        wanted: servicekeel_core::name::ServicePort {
            service: servicekeel_core::name::ServiceName {
                name: "x".parse()?,
                namespace: "default".parse()?,
                cluster: "a.local".parse()?,
            },
            port: 1.try_into()?,
            protocol: servicekeel_core::name::Protocol::Tcp,
        },
    }
    .encode();
    let file = std::fs::File::open("/dev/null")?;
    let udp = UdpSocket::bind("127.0.0.1:0")?;
    let stream = TcpStream::connect(pair.peers)?;

    // Rubbish instead of Hello.
    send(&seqpacket(path)?, &[0xff; 100], &[])?;
    // A message longer than any.
    let long = seqpacket(path)?;
    send(&long, &vec![0; 60_000], &[])?;
    // More descriptors than any message has.
    let many = seqpacket(path)?;
    send(&many, &hello, &vec![file.as_fd(); 80])?;
    // The wrong kinds of descriptors for an import: a file, a UDP socket, a connected stream.
    let mut rogues = Vec::new();
    for wrong in [file.as_fd(), udp.as_fd(), stream.as_fd()] {
        let rogue = seqpacket(path)?;
        send(&rogue, &hello, &[])?;
        send(&rogue, &import, &[wrong])?;
        rogues.push(rogue);
    }
    // An import with no descriptor at all.
    let none = seqpacket(path)?;
    send(&none, &hello, &[])?;
    send(&none, &import, &[])?;
    // One that dies half way: Hello, a descriptor for nothing, gone.
    let dying = seqpacket(path)?;
    send(&dying, &hello, &[])?;
    send(&dying, &[0x82], &[file.as_fd()])?;
    drop((dying, none, many, long));
    drop(stream);

    // Open until they have their answer: a router that can't say Welcome reads no further.
    wait_for("three refusals", LIMIT, || {
        let refusals = pair.a.process.log().matches("socket from a sidecar rejected").count();
        Ok((refusals >= rogues.len()).then_some(()))
    })
    .with_context(|| pair.a.process.log())?;
    drop(rogues);
    ping(web)?;
    let rogues_gone = || {
        let status = pair.a.status()?;
        let sidecars = status["sidecars"].as_array().context("no sidecars")?;
        Ok(sidecars.iter().all(|s| s["pod"] != "rogue" || s["state"] != "connected").then_some(()))
    };
    wait_for("the rogues are gone", LIMIT, rogues_gone)?;
    wait_for("no descriptor is leaked", LIMIT, || {
        Ok((pair.a.process.descriptors()? <= before + 2).then_some(()))
    })?;
    sound(&pair)
}

#[test]
fn a_router_without_descriptors_blames_no_sidecar() -> Result<()> {
    use rustix::process::{Pid, Resource, Rlimit, prlimit};
    use servicekeel_core::handoff::{Pod, ToRouter};
    let pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    ping(pair.resolve("web.default")?)?;
    let pod = Pod { name: "late".into(), namespace: "default".parse()?, uid: String::new() };
    let hello = ToRouter::Hello { version: 1, pod, addresses: Vec::new() }.encode();
    let late = seqpacket(&pair.a.socket)?;
    send(&late, &hello, &[])?;
    wait_for_log(&pair.a.process, "late")?;
    let pid = Pid::from_raw(pair.a.process.pid().try_into()?);
    let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
    let before = prlimit(pid, Resource::Nofile, Rlimit { current: Some(3), maximum })?;
    let file = std::fs::File::open("/dev/null")?;
    send(&late, &ToRouter::Stock { tcp: 1, udp: 0 }.encode(), &[file.as_fd()])?;
    wait_for_log(&pair.a.process, "out of file descriptors")?;
    prlimit(pid, Resource::Nofile, before)?;
    // What it is told is Welcome and perhaps More, and then the end.
    let mut buf = [0; 4096];
    loop {
        let (n, _) = rustix::net::recv(&late, &mut buf, rustix::net::RecvFlags::empty())?;
        if n == 0 {
            break;
        }
        let message = servicekeel_core::handoff::ToSidecar::decode(&buf[..n])?;
        ensure!(!format!("{message:?}").contains("Refused"), "{message:?}");
    }
    ping(pair.resolve("web.default")?)?;
    sound(&pair)
}

#[test]
fn annotations_that_are_wrong() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    let web = pair.resolve("web.default")?;
    // No YAML at all, an empty colon war, 10 MB, an alias bomb: the last good state stays.
    let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\nservices: [*f,*f,*f,*f,*f,*f,*f,*f,*f]\n";
    for text in ["services: [", "\t- {{{", &"services:\n".repeat(1_000_000), bomb, "just words"] {
        pair.client.set_imports(text)?;
        wait_for("the error is in the status", LIMIT, || {
            let status = pair.client.status()?.to_string();
            Ok(status.contains("line").then_some(()))
        })?;
        ensure!(pair.resolve("web.default")? == web, "the last good state is gone");
        ping(web)?;
    }
    // One bad entry among good ones: refused with its place, the rest is served.
    let mut text = annotation(&[("web", "default", "a.local", 8080, "TCP", 8080)]);
    text.push_str("  - name: bad\n    ports:\n      - port: 99999\n  - name: worse\n    ports:\n      - port: 80\n        protocol: SCTP\n");
    pair.client.set_imports(&text)?;
    let status = wait_for("both refusals", LIMIT, || {
        let status = pair.client.status()?.to_string();
        Ok((status.contains("services[1].ports[0]") && status.contains("services[2].ports[0]"))
            .then_some(status))
    })?;
    ensure!(status.contains("SCTP"), "{status}");
    ping(pair.resolve("web.default")?)?;
    sound(&pair)
}

#[test]
fn a_thousand_services_on_a_small_range() -> Result<()> {
    let pair = Pair::start()?;
    let mut text = String::from("services:\n");
    for i in 0..1000 {
        text.push_str(&format!(
            "  - name: s{i}\n    namespace: default\n    cluster: a.local\n    ports: [{{ name: p, port: {} }}]\n",
            10_000 + i
        ));
    }
    pair.client.set_imports(&text)?;
    wait_for("the first of them", LIMIT, || Ok(pair.resolve("s0.default").ok()))?;
    let status = wait_for("the refusals", LIMIT, || {
        let status = pair.client.status()?.to_string();
        Ok(status.contains("s999").then_some(status))
    })?;
    ensure!(status.contains("127.112"), "{status}");
    let served = (0..1000).filter(|i| pair.resolve(&format!("s{i}.default")).is_ok()).count();
    ensure!((240..=254).contains(&served), "{served} of 1,000 are served by a /24");
    sound(&pair)
}

#[test]
fn datagrams_that_nobody_takes_are_told() -> Result<()> {
    let pair = Pair::start()?;
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    // Offered, and nothing listens.
    let closed = pair.resolve("dgram.default")?;
    wait_for("the refusal in the log", LIMIT, || {
        socket.send_to(b"x", closed)?;
        Ok(pair.b.process.log().contains("refused (os error").then_some(()))
    })
    .with_context(|| pair.b.process.log())?;
    let text = annotation(&[("nobody", "default", "a.local", Pair::PORT, "UDP", Pair::PORT)]);
    pair.client.set_imports(&text)?;
    let nobody = wait_for("the import", LIMIT, || Ok(pair.resolve("nobody.default").ok()))?;
    wait_for("nobody in the log", LIMIT, || {
        socket.send_to(b"x", nobody)?;
        Ok(pair.b.process.log().contains("no linked router of a.local offers it").then_some(()))
    })
    .with_context(|| pair.b.process.log())?;
    for log in [pair.a.process.log(), pair.b.process.log()] {
        ensure!(!log.contains("suppressed=0"), "{log}");
        ensure!(log.matches("no endpoint accepted the datagrams").count() <= 2 + 2, "not throttled: {log}");
    }
    sound(&pair)
}

#[test]
fn noise_at_the_dns_port() -> Result<()> {
    let pair = Pair::start()?;
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let mut state = 0x1234_5678_u32;
    for i in 0..2000 {
        let noise: Vec<u8> = (0..i % 200)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        socket.send_to(&noise, pair.client.dns)?;
    }
    for noise in [&[0xff; 300][..], b"GET / HTTP/1.1\r\n\r\n"] {
        let mut stream = TcpStream::connect(pair.client.dns)?;
        stream.write_all(noise)?;
    }
    wait_for("DNS still answers", LIMIT, || Ok(pair.resolve("web.default").ok()))?;
    sound(&pair)
}

#[test]
fn configs_and_socket_paths() -> Result<()> {
    let pair = Pair::start()?;
    let router = pair.stand.program("servicekeel-router");
    let good = std::fs::read_to_string(&pair.a.config)?;
    let run = |name: &str, text: &str| -> Result<(Option<i32>, String)> {
        let path = pair.dir().join(name);
        std::fs::write(&path, text)?;
        let mut process = Process::start(pair.dir(), name, Command::new(&router).arg("--config").arg(&path))?;
        let status = process.wait(LIMIT)?;
        Ok((status.code(), process.log()))
    };
    // An unknown key: which, where, and what was meant.
    let (code, log) = run("typo.yaml", &good.replace("listen:", "lisen:"))?;
    ensure!(code.is_some_and(|code| code != 0), "{log}");
    ensure!(log.contains("lisen") && log.contains("listen") && log.contains("typo.yaml:3"), "{log}");
    // The path of a live router's socket.
    let (code, log) = run("taken.yaml", &good.replace("peers: \"127", "peers: \"off\" # 127"))?;
    ensure!(code.is_some_and(|code| code != 0) && log.contains("router.sock"), "{log}");
    works_after(&pair)?;
    // A file that is no socket is not removed.
    let file = pair.dir().join("precious");
    std::fs::write(&file, "keep me")?;
    let socket = pair.a.socket.display().to_string();
    let text =
        good.replace(&socket, &file.display().to_string()).replace("peers: \"127", "peers: \"off\" # 127");
    let (code, log) = run("file.yaml", &text)?;
    ensure!(code.is_some_and(|code| code != 0) && log.contains("precious"), "{log}");
    ensure!(std::fs::read_to_string(&file)? == "keep me");
    Ok(())
}

fn works_after(pair: &Pair) -> Result<()> {
    let _echo = Echo::start(pair.service)?;
    ping(pair.resolve("web.default")?)
}

#[test]
fn settings_of_a_sidecar_that_are_wrong() -> Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let stand = Stand::new(&programs()?)?;
    let sidecar = stand.program("servicekeel-sidecar");
    let refused = |name: &str, variables: &[(&str, &[u8])]| -> Result<String> {
        let mut command = Command::new(&sidecar);
        command.envs(variables.iter().map(|(name, value)| (name, std::ffi::OsStr::from_bytes(value))));
        let mut process = Process::start(stand.dir(), name, &mut command)?;
        ensure!(!process.wait(LIMIT)?.success());
        Ok(process.log())
    };
    let log = refused("not-utf8", &[("SIDECAR_DNS_ADDR", b"\xff")])?;
    ensure!(log.contains("not UTF-8: SIDECAR_DNS_ADDR"), "{log}");
    let log =
        refused("in-range", &[("POD_IPS", b"10.0.0.1,127.0.66.1"), ("SIDECAR_DNS_ADDR", b"127.0.0.1:0")])?;
    ensure!(log.contains("POD_IPS has 127.0.66.1, which is inside SIDECAR_IP_RANGE"), "{log}");
    Ok(())
}

#[test]
fn a_config_that_turns_bad_changes_nothing() -> Result<()> {
    let pair = Pair::start()?;
    let good = std::fs::read_to_string(&pair.b.config)?;
    std::fs::write(&pair.b.config, good.replace("cluster: b.local", "cluster: [b.local"))?;
    wait_for_log(&pair.b.process, "router.yaml")?;
    works_after(&pair)?;
    std::fs::write(&pair.b.config, &good)?;
    works_after(&pair)?;
    sound(&pair)
}
