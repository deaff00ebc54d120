//! What the programs say: to whom, and in which words, since operators look for them.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Pair, Process, Stand, get, programs, wait_for};

const LIMIT: Duration = Duration::from_secs(20);

/// An address of this machine other than loopback. Nothing is sent.
fn own_address() -> Option<std::net::IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect("203.0.113.1:9").ok()?;
    socket.local_addr().ok().map(|own| own.ip()).filter(|own| !own.is_loopback() && !own.is_unspecified())
}

#[test]
fn a_sidecars_status_is_private_unless_it_runs_in_a_pod() -> Result<()> {
    let Some(outside) = own_address() else {
        eprintln!("SKIPPED: this machine has no address but loopback");
        return Ok(());
    };
    let stand = Stand::new(&programs()?)?;
    for (pod_ip, code) in [("", 403), ("10.1.0.1", 200)] {
        let port = stand.free_port()?.port();
        let mut command = Command::new(stand.program("servicekeel-sidecar"));
        command
            .env_remove("POD_IPS")
            .env_remove("KUBERNETES_SERVICE_HOST")
            .env("POD_IP", pod_ip)
            .env("SIDECAR_DNS_ADDR", "127.0.0.1:0")
            .env("SIDECAR_ADMIN_ADDR", format!("0.0.0.0:{port}"))
            .env("SIDECAR_CONFIG_DIR", stand.dir())
            .env("SIDECAR_STATE_DIR", stand.dir().join("state"))
            .env("SIDECAR_SERVER_LISTEN", stand.dir().join("nobody.sock"));
        let sidecar = Process::start(stand.dir(), &format!("sidecar-{code}"), &mut command)?;
        let here = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let (own, _) =
            wait_for("an answer", LIMIT, || Ok(get(here, "/status").ok())).with_context(|| sidecar.log())?;
        let there = SocketAddr::new(outside, port);
        let (other, said) = get(there, "/status")?;
        ensure!((own, other) == (200, code), "{own} here, {other} at {there} with POD_IP={pod_ip:?}: {said}");
        for path in ["/livez", "/metrics"] {
            ensure!(get(there, path)?.0 == 200, "{path}");
        }
        // No annotations are there: it waits for them, and says so to everybody.
        ensure!(get(there, "/readyz")?.1.contains("annotations"), "{:?}", get(there, "/readyz")?);
    }
    Ok(())
}

#[test]
fn a_client_that_nobody_takes_and_an_end_on_request_are_logged() -> Result<()> {
    let mut pair = Pair::start()?;
    let web = pair.resolve("web.default")?;
    let words = "no endpoint accepted the connection; client reset";
    wait_for(&format!("{words:?} in the log"), LIMIT, || {
        let mut client = TcpStream::connect(web)?;
        client.set_read_timeout(Some(LIMIT))?;
        ensure!(client.read(&mut [0]).is_err(), "somebody answered");
        Ok(pair.b.process.log().contains(words).then_some(()))
    })
    .with_context(|| pair.b.process.log())?;
    // A field of the line says which Service it is, and another why.
    let log = pair.b.process.log();
    let line = log.lines().find(|line| line.contains(words)).context("no line")?;
    ensure!(line.contains("wanted=web.default.a.local:8080/TCP") && line.contains("reason="), "{line}");
    for process in
        [&mut pair.client.process, &mut pair.server.process, &mut pair.b.process, &mut pair.a.process]
    {
        process.terminate()?;
        ensure!(process.wait(LIMIT)?.success(), "{}", process.log());
        ensure!(process.log().contains("shutting down on SIGTERM"), "{}", process.log());
    }
    Ok(())
}

#[test]
fn what_keeps_a_program_from_starting_is_told_under_its_name() -> Result<()> {
    let stand = Stand::new(&programs()?)?;
    for program in ["servicekeel-router", "servicekeel-sidecar"] {
        let says = |arguments: &[&str]| -> Result<(Option<i32>, String)> {
            let mut command = Command::new(stand.program(program));
            let done = e2e::output(command.args(arguments).env("SIDECAR_SOURCE", "api"))?;
            Ok((done.status.code(), String::from_utf8(done.stderr)?))
        };
        let (code, said) = says(&["--nonsense"])?;
        ensure!(code == Some(2), "{code:?}: {said}");
        ensure!(said.starts_with(&format!("{program}: unexpected argument '--nonsense' found")), "{said}");
        ensure!(said.contains(&format!("Usage: {program}")) && said.contains("'--help'"), "{said}");
        // The router has no such config, the sidecar no such source.
        let absent: &[&str] = if program.ends_with("router") { &["--config=/nowhere/x.yaml"] } else { &[] };
        let (code, said) = says(absent)?;
        ensure!(code == Some(1) && said.contains(&format!(" {program}: ")), "{code:?}: {said}");
        let done = e2e::output(Command::new(stand.program(program)).arg("--version"))?;
        ensure!(done.status.success() && done.stderr.is_empty(), "{done:?}");
    }
    let mut command = Command::new(stand.program("servicekeel-router"));
    let done = e2e::output(command.args(["check", "--kind", "poem", "x"]))?;
    let said = String::from_utf8(done.stderr)?;
    ensure!(said.starts_with("servicekeel-router: invalid value 'poem'"), "{said}");
    Ok(())
}
