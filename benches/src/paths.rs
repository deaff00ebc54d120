//! The ways from a client to the service, each as processes of its own.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use e2e::{Place, Process, Router, RouterOptions, Sidecar, SidecarOptions, Stand, annotation, wait_for};

/// All that runs, and where a client connects for each path.
pub(crate) struct Paths {
    pub(crate) named: Vec<(&'static str, SocketAddr)>,
    /// The router of the consumer, and the one of the service.
    pub(crate) routers: Vec<(&'static str, Router)>,
    pub(crate) sidecars: Vec<(&'static str, Sidecar)>,
    _others: Vec<Process>,
    _stand: Stand,
}

const PORT: u16 = 18_080;

impl Paths {
    pub(crate) fn start(programs: &Path, rathole: Option<&Path>) -> Result<Self> {
        let stand = Stand::new(programs)?;
        let pod = IpAddr::V4(Ipv4Addr::new(127, 101, 0, 2));
        let service = SocketAddr::new(pod, PORT);
        let mut serve = Command::new(std::env::current_exe()?);
        let server = Process::start(stand.dir(), "service", serve.arg("serve").arg(service.to_string()))?;
        let mut others = vec![server];

        let here = Place::default();
        let peers = stand.free_port()?;
        let a = stand.router(&RouterOptions {
            place: here.clone(),
            cluster: "a.local",
            node: "a-1",
            peers: Some(peers),
            dials: Vec::new(),
            trusts: vec!["b.local"],
        })?;
        let b = stand.router(&RouterOptions {
            place: here.clone(),
            cluster: "b.local",
            node: "b-1",
            peers: None,
            dials: vec![peers.to_string()],
            trusts: vec!["a.local"],
        })?;
        let sidecar = |router, pod, range, dns, addresses, exports, imports| {
            let options = SidecarOptions {
                place: Place::default(),
                pod,
                namespace: "default",
                range,
                dns,
                addresses,
                exports,
                imports,
            };
            stand.sidecar(router, &options)
        };
        let import = || annotation(&[("bench", "default", "a.local", PORT, "TCP", PORT)]);
        let export = import();
        let dns = |n| SocketAddr::from(([127, 101, 1, n], 10_053));
        let server = sidecar(&a, "server", "127.101.66.0/24", dns(1), vec![pod], export, String::new())?;
        let near = sidecar(&a, "near", "127.102.66.0/24", dns(2), Vec::new(), String::new(), import())?;
        let far = sidecar(&b, "far", "127.103.66.0/24", dns(3), Vec::new(), String::new(), import())?;
        let port = format!("bench.default.a.local:{PORT}/TCP");
        b.wait_for_offer(&port)?;

        let mut named = vec![
            ("direct", service),
            ("same node", SocketAddr::from(([127, 102, 66, 1], PORT))),
            ("across", SocketAddr::from(([127, 103, 66, 1], PORT))),
        ];
        if let Some(program) = rathole {
            let (control, visitors) = (stand.free_port()?, stand.free_port()?);
            let config = |name: &str, text: String| -> Result<_> {
                let path = stand.dir().join(name);
                std::fs::write(&path, text)?;
                Ok(path)
            };
            let server = config(
                "rathole-server.toml",
                format!("[server]\nbind_addr = \"{control}\"\ndefault_token = \"t\"\n[server.services.bench]\nbind_addr = \"{visitors}\"\n"),
            )?;
            let client = config(
                "rathole-client.toml",
                format!("[client]\nremote_addr = \"{control}\"\ndefault_token = \"t\"\n[client.services.bench]\nlocal_addr = \"{service}\"\n"),
            )?;
            for (name, role, path) in [("rathole-server", "--server", server), ("rathole-client", "--client", client)] {
                others.push(Process::start(stand.dir(), name, Command::new(program).arg(role).arg(path))?);
            }
            named.push(("rathole", visitors));
        }
        for (name, addr) in &named {
            wait_for(name, Duration::from_secs(10), || crate::load::ping(*addr).map(|()| Some(())))
                .with_context(|| format!("the path {name:?} does not work"))?;
        }
        Ok(Self {
            named,
            routers: vec![("consumer's router", b), ("service's router", a)],
            sidecars: vec![("consumer's sidecar", far), ("service's sidecar", server), ("near sidecar", near)],
            _others: others,
            _stand: stand,
        })
    }
}
