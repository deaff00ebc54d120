//! `make demo`: the main job on one machine. Two clusters, a router each, the pods of `examples/simple`; names, TCP and
//! UDP through the tunnel, an annotation that changes, a path that is cut and joined. Ends with 0 only if all held.

use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use e2e::Stand;
use examples::ending::{Ended, Ending};
use examples::pods::{Changed, Pods};
use examples::report::{Report, time};
use examples::stage::{self, Stage};
use examples::{cut, steps};
use servicekeel_core::name::Protocol;

fn main() -> ExitCode {
    let keep = std::env::var("KEEP").is_ok_and(|value| !value.is_empty() && value != "0");
    let mut report = Report::default();
    let outcome = Ending::listen().and_then(|ending| demo(&mut report, &ending, keep));
    let Err(error) = outcome else { return ExitCode::SUCCESS };
    let mut out = std::io::stderr();
    if let Some(ended) = error.downcast_ref::<Ended>() {
        let _ = writeln!(out, "\nEnded by {}; the programs ended with the demo.", ended.0);
        return ExitCode::from(130);
    }
    let _ = writeln!(out, "\nFAILED in step {}: {error:#}", report.current());
    ExitCode::FAILURE
}

fn demo(report: &mut Report, ending: &Ending, keep: bool) -> Result<()> {
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("simple");
    report.headline("ServiceKeel: a Service of another cluster, by its name. No Kubernetes, no root.");
    report.step("Read the pods of examples/simple");
    let pods = Pods::read(&manifests)?;
    show(&pods, report);

    let program = std::env::current_exe()?;
    let stand = Stand::new(program.parent().context("a program without a directory")?)?;
    let outcome = show_all(&stand, &pods, report, ending, keep);
    match (outcome, ending.by()) {
        (Ok(()), _) => Ok(()),
        // What failed, failed because the programs were ended.
        (Err(_), Some(by)) => Err(Ended(by).into()),
        (Err(error), None) => {
            let tails = stage::tails(stand.dir()).unwrap_or_default();
            let _ = writeln!(std::io::stderr(), "\n{tails}");
            Err(error)
        }
    }
}

fn show_all(stand: &Stand, pods: &Pods, report: &mut Report, ending: &Ending, keep: bool) -> Result<()> {
    let stage = Stage::start(stand, pods, report, ending)?;
    ending.check()?;
    let address = steps::names(&stage, pods, report)?;
    let (port, _) = pods.shared(Protocol::Tcp)?;
    let addr = SocketAddr::from((address, port.port.get()));
    steps::tcp(addr, pods, report, ending)?;
    steps::udp(address, pods, report)?;
    ending.check()?;
    steps::reload(address, &stage, pods, report)?;
    ending.check()?;
    cut::cut_and_heal(address, &stage, pods, report, ending)?;
    ending.check()?;
    if keep {
        let (datagrams, _) = pods.shared(Protocol::Udp)?;
        leave(&stage, stand, addr, datagrams.port.get(), &port.service.to_string(), report);
        ending.wait();
    }
    stage.end(report, ending)?;
    report.headline(format_args!("\nAll held, in {}.", time(report.elapsed())));
    Ok(())
}

fn show(pods: &Pods, report: &Report) {
    for export in &pods.exports {
        let ports = export.ports.iter().map(|port| format!("{}/{}", port.port, port.protocol));
        let ports = ports.collect::<Vec<_>>().join(", ");
        report.say(format_args!("{:<14} exports {}, {ports}", pods.server.name, export.service));
    }
    for import in &pods.imports {
        report.say(format_args!("{:<14} imports {}", pods.client.name, import.service));
    }
    report.say(
        "In a cluster each pod has a network and a socket directory of its own. Here all pods share this",
    );
    report.say("machine's loopback, so that these settings of the manifests differ:");
    for Changed { pod, variable, from, to, why } in &pods.changed {
        report.say(format_args!("  {pod:<14} {variable}: {to} for {from}; {why}"));
    }
    report
        .say("  both           the router's socket, state, annotations' files: in a directory of this demo;");
    report.say("                 the admin port: a free one; other names go to this machine's own DNS");
}

/// Says what there is to try.
fn leave(stage: &Stage, stand: &Stand, addr: SocketAddr, udp: u16, service: &str, report: &mut Report) {
    let (dns, port) = (stage.client.dns, addr.port());
    let dig = format!("dig @{} -p {} +noall +answer", dns.ip(), dns.port());
    let name = service.split('.').take(2).collect::<Vec<_>>().join(".");
    let by_name = format!("curl --resolve {name}:{port}:{} http://{name}:{port}/hostname", addr.ip());
    let router = stand.program("servicekeel-router");
    let imports = stage.client.config.join("imported-services-config.yaml");
    let exports = stage.server.config.join("exported-services-config.yaml");
    let another = port.saturating_add(10);
    let edit =
        format!("sed -i 's/ port: {port}$/ port: {another}/' {} {}", exports.display(), imports.display());
    let udp = format!(
        "python3 -c \"import socket as s; u = s.socket(type=s.SOCK_DGRAM); u.settimeout(5); \
         u.sendto(b'hostname', ('{}', {udp})); print(u.recv(99).decode())\"",
        addr.ip()
    );
    report.step(
        "Left running: try it from another terminal; Ctrl-C ends it here (make then says \"Interrupt\")",
    );
    for (what, line) in [
        ("a name", format!("{dig} {name}")),
        ("over TCP", format!("{dig} +tcp {service}")),
        ("fetch", format!("curl http://{addr}/hostname")),
        ("fetch by name", by_name),
        ("fetch a GB", format!("curl -o /dev/null http://{addr}/bytes/16000")),
        ("over UDP", udp),
        ("the exports", exports.display().to_string()),
        ("the imports", imports.display().to_string()),
        ("another port", edit),
        ("and fetch", format!("curl http://{}:{another}/hostname", addr.ip())),
        ("the sidecar", format!("curl http://{}/status", stage.client.admin)),
        ("the router", format!("{} status --config {}", router.display(), stage.near.config.display())),
        ("in a browser", format!("http://{}/", stage.near.admin)),
        ("the logs", format!("tail -f {}/*.log", stand.dir().display())),
    ] {
        report.say(format_args!("{what:<14} {line}"));
    }
}
