//! Two clusters on this machine: their routers, joined through a path that can be cut, and the pods' sidecars.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{Place, Process, Router, RouterOptions, Sidecar, Stand};
use servicekeel_core::name::Protocol;

use crate::ending::{Ending, HEARD};
use crate::pods::{CLIENT_CLUSTER, Pods, SERVER_CLUSTER};
use crate::report::{Report, time};
use crate::server;
use crate::uplink::Uplink;

/// How long a program may take to end (the contract's clean shutdown).
const SHUTDOWN: Duration = Duration::from_secs(2);
/// The lines of a log that are shown when a step fails.
const TAIL: usize = 12;

/// Everything that runs. What is dropped is ended: the sidecars first, then the routers.
pub struct Stage {
    /// The client's sidecar.
    pub client: Sidecar,
    /// The server's sidecar.
    pub server: Sidecar,
    /// The client's router.
    pub near: Router,
    /// The server's router.
    pub far: Router,
    /// The path between the routers.
    pub uplink: Uplink,
}

impl Stage {
    /// Starts it.
    ///
    /// # Errors
    /// Where something does not start; with its log.
    pub fn start(stand: &Stand, pods: &Pods, report: &mut Report, ending: &Ending) -> Result<Self> {
        report.step("Start two clusters: fresh authorities, a router each, a sidecar for each pod");
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let (_, at) = pods.shared(protocol)?;
            match protocol {
                Protocol::Tcp => server::http(at, &pods.server.name)?,
                Protocol::Udp => server::udp(at, &pods.server.name)?,
            }
        }

        let started = Instant::now();
        stand.authority(SERVER_CLUSTER)?;
        stand.authority(CLIENT_CLUSTER)?;
        report.measured(
            "an authority for each cluster, made by servicekeel-router pki",
            time(started.elapsed()),
        );

        let peers = stand.free_port()?;
        let router = |cluster, node, peers, dials: Vec<String>, trusts| -> Result<Router> {
            let started = Instant::now();
            let place = Place::default();
            let router = stand.router(&RouterOptions { place, cluster, node, peers, dials, trusts })?;
            ending.adopt(router.process.pid())?;
            report.measured(format_args!("router {node} of {cluster} serves"), time(started.elapsed()));
            Ok(router)
        };
        let far = router(SERVER_CLUSTER, "a-1", Some(peers), Vec::new(), vec![CLIENT_CLUSTER])?;
        let uplink = Uplink::start(peers)?;
        let dials = vec![uplink.addr().to_string()];
        let near = router(CLIENT_CLUSTER, "b-1", None, dials, vec![SERVER_CLUSTER])?;

        let sidecar = |router, options: &e2e::SidecarOptions<'_>| -> Result<Sidecar> {
            let started = Instant::now();
            let sidecar = stand.sidecar(router, options)?;
            ending.adopt(sidecar.process.pid())?;
            report.measured(format_args!("sidecar of {} is ready", options.pod), time(started.elapsed()));
            Ok(sidecar)
        };
        let server = sidecar(&far, &pods.server())?;
        let client = sidecar(&near, &pods.client()?)?;

        let started = Instant::now();
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            near.wait_for_offer(&pods.shared(protocol)?.0.to_string())?;
        }
        report.measured("router b-1 has heard what a-1 offers", time(started.elapsed()));
        report
            .say("Peers speak TLS 1.3 with certificates on both sides. b-1 dials a-1 through a forwarder of");
        report.say("this demo, so that the path can be cut. The programs are debug builds.");
        Ok(Self { client, server, near, far, uplink })
    }

    /// Ends every program as Kubernetes would, by SIGTERM.
    ///
    /// # Errors
    /// Where one does not end well within 2 s.
    pub fn end(mut self, report: &mut Report, ending: &Ending) -> Result<()> {
        report.step("End everything");
        ending.release();
        let programs: [(&str, &mut Process); 4] = [
            ("sidecar of the client", &mut self.client.process),
            ("sidecar of the server", &mut self.server.process),
            ("router b-1", &mut self.near.process),
            ("router a-1", &mut self.far.process),
        ];
        for (name, process) in programs {
            let started = Instant::now();
            let ends = ending.by().is_some() && process.wait(HEARD).is_ok();
            if !ends {
                process.terminate()?;
            }
            let status = process.wait(Duration::from_secs(10))?;
            let took = started.elapsed();
            ensure!(status.success(), "expected {name} to end well after SIGTERM; it ended with {status}");
            ensure!(took < SHUTDOWN, "expected {name} to end within 2 s of SIGTERM; it took {}", time(took));
            report.measured(format_args!("{name} ended"), time(took));
        }
        Ok(())
    }
}

/// The last lines of every log of the stand.
pub fn tails(dir: &Path) -> Result<String> {
    let mut logs = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            logs.push(path);
        }
    }
    logs.sort();
    let mut text = String::new();
    for log in logs {
        let all = std::fs::read_to_string(&log)?;
        let lines: Vec<&str> = all.lines().collect();
        let name = log.file_stem().unwrap_or_default().to_string_lossy();
        text.push_str(&format!("--- {name}: the last of {} lines\n", lines.len()));
        for line in &lines[lines.len().saturating_sub(TAIL)..] {
            text.push_str(&format!("    {line}\n"));
        }
    }
    Ok(text)
}
