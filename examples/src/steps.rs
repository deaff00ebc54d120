//! What the demo shows while the path is whole: names, TCP, UDP, and an annotation that changes under a download.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{Answer, ask, wait_for};
use hickory_proto::rr::RecordType;
use servicekeel_core::annotation::{self, Export, Import};
use servicekeel_core::name::{Protocol, ServiceName, ServicePort};

use crate::content::BLOCK;
use crate::ending::Ending;
use crate::fetch::Download;
use crate::pods::{CLIENT_CLUSTER, Pods, SERVER_CLUSTER, defaults};
use crate::report::{Report, rate, size, time};
use crate::stage::Stage;

/// How long what should come soon may take before the demo has failed.
const LIMIT: Duration = Duration::from_secs(10);
/// How long a change of an annotation may take to be served (design: within 2 s by files).
const RELOAD: Duration = Duration::from_secs(2);
/// Requests of which the median is taken.
const REQUESTS: usize = 100;
/// 67 MB in one flow.
const BULK: u64 = 1024;

/// Asks the client's DNS for the address of a name.
///
/// # Errors
/// Where it does not answer with one address.
pub fn address(stage: &Stage, name: &str) -> Result<Ipv4Addr> {
    let answer = ask(stage.client.dns, name, RecordType::A)?;
    match (answer.code, &answer.addresses[..]) {
        (0, [address]) => Ok(*address),
        _ => anyhow::bail!("expected one address for {name}; the answer is {answer:?}"),
    }
}

/// Fetches the server's name, once.
///
/// # Errors
/// Where the answer is not the server's; the flow's own error where it breaks.
pub fn hostname(addr: SocketAddr, expected: &str) -> Result<()> {
    let (code, body) = e2e::get(addr, "/hostname")?;
    ensure!(code == 200 && body == expected, "expected 200 and {expected:?}; got {code} and {body:?}");
    Ok(())
}

/// Every name of the Service gives the same address.
///
/// # Errors
/// Where one does not.
pub fn names(stage: &Stage, pods: &Pods, report: &mut Report) -> Result<Ipv4Addr> {
    let (port, _) = pods.shared(Protocol::Tcp)?;
    let ServiceName { name, namespace, cluster } = &port.service;
    report.step(&format!("Ask the client's DNS at {} for the Service by its names", stage.client.dns));
    let mut forms = vec![
        format!("{name}.{namespace}"),
        format!("{name}.{namespace}.svc"),
        format!("{name}.{namespace}.{cluster}"),
        format!("{name}.{namespace}.svc.{cluster}"),
        format!("{name}.{namespace}.svc.clusterset.local"),
    ];
    if namespace.as_str() == pods.client.namespace {
        forms.insert(0, name.to_string());
    }
    let expected = address(stage, &forms[0])?;
    for form in forms {
        let started = Instant::now();
        let found = address(stage, &form)?;
        let took = started.elapsed();
        ensure!(found == expected, "expected {expected} for every name; {form} is {found}");
        report.measured(format_args!("{form:<46} A {found}"), time(took));
    }
    let long = format!("{name}.{namespace}");
    let nothing = ask(stage.client.dns, &long, RecordType::AAAA)?;
    ensure!(
        nothing == Answer { code: 0, addresses: Vec::new() },
        "expected NOERROR and no record for AAAA of {long}; the answer is {nothing:?}"
    );
    report.say(format_args!("{long:<46} AAAA: NOERROR, no record"));
    Ok(expected)
}

/// HTTP through the tunnel.
///
/// # Errors
/// Where an answer or a byte is wrong.
pub fn tcp(addr: SocketAddr, pods: &Pods, report: &mut Report, ending: &Ending) -> Result<()> {
    report.step(&format!("Fetch over TCP from http://{addr}, which is the server pod's application"));
    let started = Instant::now();
    hostname(addr, &pods.server.name).context("GET /hostname")?;
    report.measured(format_args!("GET /hostname: 200 {:?}", pods.server.name), time(started.elapsed()));

    let mut times = Vec::with_capacity(REQUESTS);
    for _ in 0..REQUESTS {
        ending.check()?;
        let started = Instant::now();
        hostname(addr, &pods.server.name).context("one of many GET /hostname")?;
        times.push(started.elapsed());
    }
    times.sort();
    report.measured(
        format_args!("the same {REQUESTS} times, a connection each: the median"),
        time(times[times.len() / 2]),
    );
    let got = Download::start(addr, BULK, None).finish().context("a download")?;
    report.measured(
        format_args!("a download of {} in one flow, every byte checked", size(got.bytes)),
        rate(got.bytes, got.time),
    );
    Ok(())
}

/// Datagrams through the tunnel.
///
/// # Errors
/// Where one does not come back as it was sent.
pub fn udp(address: Ipv4Addr, pods: &Pods, report: &mut Report) -> Result<()> {
    let (port, _) = pods.shared(Protocol::Udp)?;
    let addr = SocketAddr::from((address, port.port.get()));
    report.step(&format!("Send datagrams to {addr}"));
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut buf = vec![0; 65_536];
    let mut exchange = |sent: &[u8]| -> Result<(Vec<u8>, Duration)> {
        let started = Instant::now();
        socket.send_to(sent, addr)?;
        let (n, from) =
            socket.recv_from(&mut buf).with_context(|| format!("no answer to {} bytes", sent.len()))?;
        ensure!(from == addr, "expected an answer from {addr}; it came from {from}");
        Ok((buf[..n].to_vec(), started.elapsed()))
    };
    let (answer, took) = exchange(b"hostname")?;
    ensure!(answer == pods.server.name.as_bytes(), "expected the server's name; got {answer:?}");
    report.measured(format_args!("\"hostname\": {:?}", pods.server.name), time(took));
    for size in [1, 1_472, 9_000, 65_507] {
        let sent: Vec<u8> = (0..size).map(|i: u32| (i / 251 + i * 7) as u8).collect();
        let (answer, took) = exchange(&sent)?;
        ensure!(answer == sent, "expected the {size} bytes that were sent; got {} others", answer.len());
        report.measured(format_args!("a datagram of size {size} comes back whole"), time(took));
    }
    Ok(())
}

/// A Service is added to the annotations while a download runs.
///
/// # Errors
/// Where the new Service does not come soon, or the download does not go on.
pub fn reload(address_before: Ipv4Addr, stage: &Stage, pods: &Pods, report: &mut Report) -> Result<()> {
    const BLOCKS: u64 = 768;
    const MB_PER_SECOND: u32 = 25;
    report.step("Add a Service to the annotations while a download runs");
    let (port, _) = pods.shared(Protocol::Tcp)?;
    let addr = SocketAddr::from((address_before, port.port.get()));
    let download = Download::start(addr, BLOCKS, Some(MB_PER_SECOND));
    wait_for("the download to begin", LIMIT, || Ok((download.received() > 0).then_some(())))?;

    let (exports, imports, extra) = with_another(pods, &port)?;
    let name = format!("{}.{}", extra.service.name, extra.service.namespace);
    let unknown = ask(stage.client.dns, &name, RecordType::A);
    ensure!(unknown.is_ok_and(|answer| answer.addresses.is_empty()), "expected no address for {name} yet");
    let (before, edited) = (download.received(), Instant::now());
    stage.server.set_exports(&exports)?;
    stage.client.set_imports(&imports)?;
    let found = wait_for(&format!("a name for {name}"), RELOAD, || Ok(address(stage, &name).ok()))?;
    report.measured(format_args!("{name} added: its name resolves, to {found}"), time(edited.elapsed()));
    let new = SocketAddr::from((found, extra.port.get()));
    wait_for(&format!("an answer of {name}"), RELOAD, || Ok(hostname(new, &pods.server.name).ok()))?;
    report.measured(format_args!("http://{name}:{} answers", extra.port), time(edited.elapsed()));

    ensure!(!download.is_over(), "expected the download to run still; it ended: {:?}", download.finish());
    let after = download.received();
    report.measured("the download meanwhile, in the same flow", format_args!("+{}", size(after - before)));
    let now = address(stage, &format!("{}.{}", port.service.name, port.service.namespace))?;
    ensure!(now == address_before, "expected the address to stay {address_before}; it is {now}");
    let got = download.finish().context("the download over the change")?;
    ensure!(got.bytes == BLOCKS * BLOCK as u64, "expected {BLOCKS} blocks");
    report.measured(
        format_args!("it ends with {}, every byte right; its longest pause", size(got.bytes)),
        time(got.longest_pause),
    );
    Ok(())
}

/// The annotations of both pods with one more Service, at another port of the same application.
fn with_another(pods: &Pods, port: &ServicePort) -> Result<(String, String, ServicePort)> {
    let (mut exports, mut imports) = (pods.exports.clone(), pods.imports.clone());
    let export = exports.iter().find(|e| e.service == port.service).context("the Service is exported")?;
    let mut export: Export = export.clone();
    export.ports.retain(|p| p.protocol == port.protocol && p.port == port.port);
    export.service.name = "simple-extra".parse()?;
    let at = export.ports.first_mut().context("the port is exported")?;
    at.port = at.port.checked_add(2).context("a port above the Service's")?;
    let extra = at.of(&export.service);
    imports.push(Import { service: export.service.clone(), ports: export.ports.clone() });
    exports.push(export);
    Ok((
        annotation::render::exports(&exports, &defaults(&pods.server, SERVER_CLUSTER)?),
        annotation::render::imports(&imports, &defaults(&pods.client, CLIENT_CLUSTER)?),
        extra,
    ))
}
