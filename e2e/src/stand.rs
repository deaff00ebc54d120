//! A stand: routers and sidecars of several clusters on one machine, each pod with a place of its own.

use std::fmt::Write as _;
use std::fs::Permissions;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::{Place, Process, Router, Sidecar, output};

/// Programs, their files and their logs; all gone when dropped.
pub struct Stand {
    dir: TempDir,
    programs: PathBuf,
}

/// What a router is started with.
#[derive(Debug, Clone)]
pub struct RouterOptions<'a> {
    /// Where it runs.
    pub place: Place,
    /// Its cluster; its authority is made at first use.
    pub cluster: &'a str,
    /// Its node.
    pub node: &'a str,
    /// Where it accepts peers; `None`: nowhere.
    pub peers: Option<SocketAddr>,
    /// Whom it dials.
    pub dials: Vec<String>,
    /// The other clusters that it trusts.
    pub trusts: Vec<&'a str>,
}

/// What a sidecar is started with.
#[derive(Debug, Clone)]
pub struct SidecarOptions<'a> {
    /// Where it runs.
    pub place: Place,
    /// The pod's name.
    pub pod: &'a str,
    /// The pod's namespace.
    pub namespace: &'a str,
    /// Its addresses for imports.
    pub range: &'a str,
    /// Where it answers DNS.
    pub dns: SocketAddr,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// The annotation of its exports.
    pub exports: String,
    /// The annotation of its imports.
    pub imports: String,
}

/// An annotation with one port for each entry: (name, namespace, cluster or "", port, protocol, target port).
pub fn annotation(entries: &[(&str, &str, &str, u16, &str, u16)]) -> String {
    let mut text = String::from("services:\n");
    for (name, namespace, cluster, port, protocol, target) in entries {
        let _ = writeln!(text, "  - name: {name}\n    namespace: {namespace}");
        if !cluster.is_empty() {
            let _ = writeln!(text, "    cluster: {cluster}");
        }
        let _ = writeln!(
            text,
            "    ports:\n      - name: p{port}\n        port: {port}\n        protocol: {protocol}"
        );
        // An import has none.
        if target != port {
            let _ = writeln!(text, "        targetport: {target}");
        }
    }
    text
}

/// Waits until `condition` gives a value, asking every 20 ms.
///
/// # Errors
/// Its last error, where it gives none within `limit`.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + limit;
    let mut last = None;
    loop {
        match condition() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => {}
            Err(error) => last = Some(error),
        }
        if Instant::now() > end {
            let waited = format!("{what}: not within {limit:?}");
            return Err(match last {
                Some(error) => error.context(waited),
                None => anyhow::anyhow!(waited),
            });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A TCP port of an address that nobody uses now.
fn free_port(ip: IpAddr) -> Result<SocketAddr> {
    Ok(TcpListener::bind((ip, 0))?.local_addr()?)
}

impl Stand {
    /// A stand with the programs of a directory such as `target/debug`.
    ///
    /// # Errors
    /// Where no temporary directory can be made, or the programs are not there.
    pub fn new(programs: &Path) -> Result<Self> {
        let stand = Self { dir: tempfile::tempdir()?, programs: programs.to_owned() };
        for program in ["servicekeel-router", "servicekeel-sidecar"] {
            let path = stand.program(program);
            ensure!(path.exists(), "{} is missing: cargo build first", path.display());
        }
        Ok(stand)
    }

    /// The stand's directory: configs, authorities, logs.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A program of the project.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// A free TCP port of the machine's own loopback.
    ///
    /// # Errors
    /// Where there is none.
    pub fn free_port(&self) -> Result<SocketAddr> {
        free_port(Ipv4Addr::LOCALHOST.into())
    }

    fn pki(&self, arguments: &[&str]) -> Result<()> {
        let done = output(Command::new(self.program("servicekeel-router")).arg("pki").args(arguments))?;
        if !done.status.success() {
            bail!("pki {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
        }
        Ok(())
    }

    /// The directory of a cluster's authority, made where it is not there yet.
    ///
    /// # Errors
    /// What `servicekeel-router pki` says.
    pub fn authority(&self, cluster: &str) -> Result<PathBuf> {
        let dir = self.dir().join("pki").join(cluster);
        if !dir.exists() {
            let path = dir.to_str().context("a path that is no UTF-8")?;
            self.pki(&["init", "--cluster", cluster, "--dir", path])?;
        }
        Ok(dir)
    }

    /// Issues a node's certificate into a directory.
    ///
    /// # Errors
    /// What `servicekeel-router pki` says.
    pub fn issue(&self, cluster: &str, node: &str, dir: &Path) -> Result<()> {
        let authority = self.authority(cluster)?;
        let (from, to) = (authority.to_str().context("no UTF-8")?, dir.to_str().context("no UTF-8")?);
        self.pki(&["issue", "--dir", from, "--node", node, "--out", to])
    }

    /// Starts a router and waits until it serves.
    ///
    /// # Errors
    /// Where it does not; with its log.
    pub fn router(&self, options: &RouterOptions<'_>) -> Result<Router> {
        let name = format!("router-{}-{}", options.cluster, options.node);
        let dir = self.dir().join(&name);
        std::fs::create_dir_all(&dir)?;
        self.issue(options.cluster, options.node, &dir)?;
        self.give(&options.place, &dir)?;
        // In a namespace of its own every port is free.
        let admin = match options.place.netns {
            None => self.free_port()?,
            Some(_) => SocketAddr::from(([127, 0, 0, 1], 7480)),
        };
        let config = dir.join("router.yaml");
        std::fs::write(&config, self.router_config(options, &dir, admin)?)?;
        let socket = dir.join("router.sock");
        let process = self.start_router(&options.place, &name, &config)?;
        let mut router = Router { process, admin, config, socket, place: options.place.clone(), name };
        router.wait_ready()?;
        Ok(router)
    }

    /// The config of a router.
    ///
    /// # Errors
    /// Where an authority can't be made.
    pub fn router_config(
        &self,
        options: &RouterOptions<'_>,
        dir: &Path,
        admin: SocketAddr,
    ) -> Result<String> {
        let mut text = String::new();
        let peers = options.peers.map_or("off".to_owned(), |addr| addr.to_string());
        let RouterOptions { cluster, node, .. } = options;
        let authority = self.authority(cluster)?.join("ca.crt");
        let (dir, authority) = (dir.display(), authority.display());
        writeln!(
            text,
            "cluster: {cluster}\nnode: {node}\nlisten:\n  sidecars: unix://{dir}/router.sock\n  peers: \"{peers}\"\n  admin: \"{admin}\"\nidentity:\n  ca: {authority}\n  cert: {dir}/node.crt\n  key: {dir}/node.key\nstate: {dir}/state"
        )?;
        if !options.dials.is_empty() {
            text.push_str("peers:\n");
            options.dials.iter().try_for_each(|address| writeln!(text, "  - address: {address}"))?;
        }
        if !options.trusts.is_empty() {
            text.push_str("trust:\n");
            for cluster in &options.trusts {
                let ca = self.authority(cluster)?.join("ca.crt");
                writeln!(text, "  - cluster: {cluster}\n    ca: {}", ca.display())?;
            }
        }
        Ok(text)
    }

    /// Gives a directory, and what is in it, to the user of a place.
    fn give(&self, place: &Place, dir: &Path) -> Result<()> {
        let Some(user) = place.user else { return Ok(()) };
        std::fs::set_permissions(self.dir(), Permissions::from_mode(0o711))?;
        chown(dir, Some(user), Some(user))?;
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            chown(&path, Some(user), Some(user))?;
        }
        Ok(())
    }

    /// A command that runs a program of the project in a place.
    fn command(&self, place: &Place, name: &str) -> Result<Command> {
        let program = self.program(name);
        if place.user.is_none() {
            return Ok(place.command(&program));
        }
        // Another user may not look into the directory where the programs were built.
        let copy = self.dir().join(name);
        if !copy.exists() {
            std::fs::copy(&program, &copy)?;
        }
        Ok(place.command(&copy))
    }

    fn start_router(&self, place: &Place, name: &str, config: &Path) -> Result<Process> {
        let mut command = self.command(place, "servicekeel-router")?;
        Process::start(self.dir(), name, command.arg("--config").arg(config))
    }

    /// Starts a router again, with the config that it has.
    ///
    /// # Errors
    /// Where it does not serve; with its log.
    pub fn restart_router(&self, router: &mut Router) -> Result<()> {
        router.process = self.start_router(&router.place, &router.name, &router.config)?;
        router.wait_ready()
    }

    /// Ends a router, and starts it again with a limit of open files.
    ///
    /// # Errors
    /// Where it does not serve; with its log.
    pub fn limit_router(&self, router: &mut Router, open_files: u32) -> Result<()> {
        router.process.kill()?;
        router.place.open_files = Some(open_files);
        self.restart_router(router)
    }

    /// Starts a sidecar at a router and waits until it is ready.
    ///
    /// # Errors
    /// Where it does not get ready; with its log.
    pub fn sidecar(&self, router: &Router, options: &SidecarOptions<'_>) -> Result<Sidecar> {
        let mut sidecar = self.start_sidecar(router, options)?;
        sidecar.wait_ready()?;
        Ok(sidecar)
    }

    /// Starts a sidecar at a router, and does not wait.
    ///
    /// # Errors
    /// Where it can't be started.
    pub fn start_sidecar(&self, router: &Router, options: &SidecarOptions<'_>) -> Result<Sidecar> {
        self.start_claiming(router, options, options.pod)
    }

    /// Starts a sidecar that says it is the one of another pod, and waits until it is ready.
    ///
    /// # Errors
    /// Where it does not get ready; with its log.
    pub fn pretender(&self, router: &Router, options: &SidecarOptions<'_>, victim: &str) -> Result<Sidecar> {
        let mut sidecar = self.start_claiming(router, options, victim)?;
        sidecar.wait_ready()?;
        Ok(sidecar)
    }

    fn start_claiming(
        &self,
        router: &Router,
        options: &SidecarOptions<'_>,
        claimed: &str,
    ) -> Result<Sidecar> {
        let name = format!("sidecar-{}", options.pod);
        let dir = self.dir().join(&name);
        let config = dir.join("annotations");
        std::fs::create_dir_all(&config)?;
        std::fs::write(config.join("exported-services-config.yaml"), &options.exports)?;
        std::fs::write(config.join("imported-services-config.yaml"), &options.imports)?;
        self.give(&options.place, &dir)?;
        let admin = match options.place.netns {
            None => self.free_port()?,
            Some(_) => SocketAddr::from(([127, 0, 0, 1], 15020)),
        };
        let addresses: Vec<String> = options.addresses.iter().map(ToString::to_string).collect();
        let variables = vec![
            ("SIDECAR_IP_RANGE", options.range.to_owned()),
            ("SIDECAR_DNS_ADDR", options.dns.to_string()),
            ("SIDECAR_SERVER_LISTEN", format!("unix://{}", router.socket.display())),
            ("SIDECAR_SOURCE", "files".to_owned()),
            ("SIDECAR_CONFIG_DIR", config.display().to_string()),
            ("SIDECAR_STATE_DIR", dir.join("state").display().to_string()),
            ("SIDECAR_ADMIN_ADDR", admin.to_string()),
            ("SIDECAR_POD_ADDRS", addresses.join(",")),
            ("POD_NAME", claimed.to_owned()),
            ("POD_NAMESPACE", options.namespace.to_owned()),
            ("POD_UID", format!("uid-of-{claimed}")),
        ];
        let process = self.run_sidecar(&options.place, &name, &variables)?;
        Ok(Sidecar {
            process,
            admin,
            config,
            dns: options.dns,
            variables,
            place: options.place.clone(),
            name,
        })
    }

    fn run_sidecar(
        &self,
        place: &Place,
        name: &str,
        variables: &[(&'static str, String)],
    ) -> Result<Process> {
        let mut command = self.command(place, "servicekeel-sidecar")?;
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        Process::start(self.dir(), name, &mut command)
    }

    /// Starts a sidecar again, as it was.
    ///
    /// # Errors
    /// Where it does not get ready; with its log.
    pub fn restart_sidecar(&self, sidecar: &mut Sidecar) -> Result<()> {
        sidecar.process = self.run_sidecar(&sidecar.place, &sidecar.name, &sidecar.variables)?;
        sidecar.wait_ready()
    }
}
