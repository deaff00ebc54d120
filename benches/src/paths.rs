//! The ways from a client to the service, with every program on them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use e2e::{Place, Process, RouterOptions, SidecarOptions, Stand, annotation, wait_for};

use crate::{load, rathole};

const PORT: u16 = 18_080;

/// A path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Client and service alone.
    Direct,
    /// By the one router of a node.
    SameNode,
    /// By two routers, encrypted.
    Across,
    /// By rathole, over plain TCP.
    Rathole,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Direct => "direct",
            Self::SameNode => "same node",
            Self::Across => "across",
            Self::Rathole => "rathole",
        })
    }
}

/// What a program is, beside the applications.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// A servicekeel-router.
    Router,
    /// A servicekeel-sidecar.
    Sidecar,
    /// One end of rathole.
    Rathole,
}

/// A program that runs.
pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) role: Role,
    /// The paths that need it.
    on: &'static [Kind],
    pub(crate) process: Process,
}

/// All that runs.
pub(crate) struct Paths {
    /// Each path, and where a client connects for it.
    pub(crate) all: Vec<(Kind, SocketAddr)>,
    pub(crate) programs: Vec<Program>,
    _service: Process,
    // Dropped last: it has the programs' files.
    _stand: Stand,
}

impl Paths {
    /// Starts everything, and sends a byte along each path.
    ///
    /// # Errors
    /// Where something does not start or does not answer; with its log.
    pub(crate) fn start(built: &Path, rathole: Option<&Path>) -> Result<Self> {
        let stand = Stand::new(built)?;
        let pod = IpAddr::V4(Ipv4Addr::new(127, 101, 0, 2));
        let service = SocketAddr::new(pod, PORT);
        let mut serve = Command::new(std::env::current_exe()?);
        let application =
            Process::start(stand.dir(), "service", serve.arg("serve").arg(service.to_string()))?;

        let peers = stand.free_port()?;
        let router = |cluster, node, listens, dials, trusts| {
            let place = Place::default();
            stand.router(&RouterOptions { place, cluster, node, peers: listens, dials, trusts })
        };
        let exporting = router("a.local", "a-1", Some(peers), Vec::new(), vec!["b.local"])?;
        let consuming = router("b.local", "b-1", None, vec![peers.to_string()], vec!["a.local"])?;

        let text = annotation(&[("bench", "default", "a.local", PORT, "TCP", PORT)]);
        let sidecar = |router, pod, n: u8, addresses, exports: &str, imports: &str| {
            let range = format!("127.101.{n}.0/24");
            let dns = SocketAddr::from(([127, 101, 1, n], 10_053));
            let (place, namespace) = (Place::default(), "default");
            let (exports, imports) = (exports.to_owned(), imports.to_owned());
            let options =
                SidecarOptions { place, pod, namespace, range: &range, dns, addresses, exports, imports };
            stand.sidecar(router, &options)
        };
        let server = sidecar(&exporting, "server", 66, vec![pod], &text, "")?;
        let near = sidecar(&exporting, "near", 67, Vec::new(), "", &text)?;
        let far = sidecar(&consuming, "far", 68, Vec::new(), "", &text)?;
        consuming.wait_for_offer(&format!("bench.default.a.local:{PORT}/TCP"))?;

        // The one import of a fresh sidecar has the lowest address of its range.
        let import = |n| SocketAddr::from(([127, 101, n, 1], PORT));
        let mut all = vec![(Kind::Direct, service), (Kind::SameNode, import(67)), (Kind::Across, import(68))];
        let (near_only, far_only, both) =
            (&[Kind::SameNode], &[Kind::Across], &[Kind::SameNode, Kind::Across]);
        let program = |name, role, on, process| Program { name, role, on, process };
        let mut programs = vec![
            program("consumer's router", Role::Router, far_only, consuming.process),
            program("service's router", Role::Router, both, exporting.process),
            program("consumer's sidecar", Role::Sidecar, far_only, far.process),
            program("service's sidecar", Role::Sidecar, both, server.process),
            program("sidecar of the same node", Role::Sidecar, near_only, near.process),
        ];
        if let Some(peer) = rathole {
            let (visitors, [server, client]) = rathole::start(&stand, peer, service)?;
            all.push((Kind::Rathole, visitors));
            programs.push(program("rathole server", Role::Rathole, &[Kind::Rathole], server));
            programs.push(program("rathole client", Role::Rathole, &[Kind::Rathole], client));
        }
        let paths = Self { all, programs, _service: application, _stand: stand };
        for (kind, addr) in &paths.all {
            wait_for("a first byte", Duration::from_secs(10), || load::ping(*addr).map(Some))
                .with_context(|| format!("the path {kind} does not work; {}", paths.logs(*kind)))?;
        }
        Ok(paths)
    }

    /// The programs on a path.
    pub(crate) fn on(&self, kind: Kind) -> impl Iterator<Item = &Program> {
        self.programs.iter().filter(move |program| program.on.contains(&kind))
    }

    /// Processor time that the programs on a path have had, in seconds.
    ///
    /// # Errors
    /// Where one of them is gone.
    pub(crate) fn cpu_seconds(&self, kind: Kind) -> Result<f64> {
        let ticks: Result<u64> = self.on(kind).map(|program| program.process.cpu_ticks()).sum();
        Ok(ticks? as f64 / 100.0)
    }

    /// What the programs on a path have logged.
    pub(crate) fn logs(&self, kind: Kind) -> String {
        let logs = self.on(kind).map(|program| format!("{}:\n{}", program.name, program.process.log()));
        logs.collect::<Vec<_>>().join("\n")
    }
}
