//! Nodes and pods as containers: a router, and an application whose network its sidecar shares.

use std::fmt::Write as _;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use testcontainers::core::{AccessMode, ExecCommand, Mount};
use testcontainers::runners::AsyncRunner;
use testcontainers::{ContainerAsync, GenericImage, ImageExt};
use tokio::runtime::Handle;
use tokio::task::block_in_place;
use tokio::time::{Instant, sleep, timeout};

use crate::panics::{fail, panic_in};
use crate::{Engine, Stand};

/// How long something may take that takes a moment on an idle machine.
const LIMIT: Duration = Duration::from_secs(20);

/// The directory of the router's socket, in its container and in the pods'.
const SOCKET_DIR: &str = "/run/servicekeel";

/// A program of the project or an application in its container, which is removed when this is dropped. Where it has
/// panicked, the test fails then.
pub struct Contained {
    container: ContainerAsync<GenericImage>,
}

impl Drop for Contained {
    fn drop(&mut self) {
        let log = block_in_place(|| Handle::current().block_on(self.log()));
        if let Some(panic) = panic_in(log.as_bytes()) {
            fail(self.container.id(), &panic);
        }
    }
}

/// What a node is started with.
pub struct NodeOptions<'a> {
    /// Its cluster; its authority is made at first use.
    pub cluster: &'a str,
    /// Its node.
    pub node: &'a str,
    /// The other clusters that it trusts.
    pub trusts: &'a [&'a str],
    /// The container of the router that it dials.
    pub dials: Option<String>,
}

/// A node: its router, in a container.
pub struct Node {
    /// The router.
    pub router: Contained,
    /// The name of its container, by which other routers dial it.
    pub name: String,
    sockets: PathBuf,
}

/// What a pod is started with.
pub struct PodOptions<'a> {
    /// Its name.
    pub name: &'a str,
    /// What its application runs, and a directory for it at `/srv`.
    pub application: (&'a GenericImage, &'a [&'a str], &'a Path),
    /// The annotation of its exports.
    pub exports: String,
    /// The annotation of its imports.
    pub imports: String,
    /// What its sidecar's environment says beside what the manifests of `examples/simple` say.
    pub variables: &'a [(&'a str, &'a str)],
}

/// A pod: two containers with one network, which is a loopback and nothing else.
pub struct Pod {
    /// The sidecar; before the application, whose network it shares, so that it ends first.
    pub sidecar: Contained,
    /// The application.
    pub application: Contained,
}

/// Waits until `condition` gives a value.
///
/// # Errors
/// Its last error, where it gives none within 20 s.
pub async fn until<T>(what: &str, mut condition: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + LIMIT;
    loop {
        let past = Instant::now() > end;
        match condition().await {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if past => bail!("{what}: not within {LIMIT:?}"),
            Err(error) if past => return Err(error.context(format!("{what}: not within {LIMIT:?}"))),
            _ => sleep(Duration::from_millis(50)).await,
        }
    }
}

impl Contained {
    /// Runs a program of the container there, and gives what it prints.
    ///
    /// # Errors
    /// Where it fails or takes more than 20 s; with what it says.
    pub async fn run(&self, words: &[&str]) -> Result<Vec<u8>> {
        self.run_to(words, &[0]).await
    }

    /// As [`Self::run`], where other exit codes are an answer too.
    async fn run_to(&self, words: &[&str], codes: &[i64]) -> Result<Vec<u8>> {
        let run = async {
            let mut exec = self.container.exec(ExecCommand::new(words.iter().copied())).await?;
            let (output, errors) = (exec.stdout_to_vec().await?, exec.stderr_to_vec().await?);
            // The output ends before the engine knows that the program has.
            let code = loop {
                match exec.exit_code().await? {
                    Some(code) => break code,
                    None => sleep(Duration::from_millis(5)).await,
                }
            };
            ensure!(
                codes.contains(&code),
                "exit {code}: {}",
                String::from_utf8_lossy(&[&output[..], &errors].concat())
            );
            Ok(output)
        };
        let done = timeout(LIMIT, run).await.with_context(|| format!("still runs after {LIMIT:?}")).flatten();
        done.with_context(|| words.join(" "))
    }

    /// Starts a program, and does not wait.
    ///
    /// # Errors
    /// Where the engine refuses.
    pub async fn start(engine: &Engine, image: &GenericImage) -> Result<Self> {
        Ok(Self { container: engine.container(image).start().await? })
    }

    /// The exit code; `None` while it runs.
    ///
    /// # Errors
    /// Where the engine does not say.
    pub async fn ended(&self) -> Result<Option<i64>> {
        Ok(self.container.exit_code().await?)
    }

    /// Sends SIGTERM, and gives the exit code and how long the end took.
    ///
    /// # Errors
    /// Where the engine does not say.
    pub async fn terminate(&self) -> Result<(i64, Duration)> {
        let start = Instant::now();
        self.container.stop_with_timeout(Some(10)).await?;
        let code = self.ended().await?.context("no exit code")?;
        Ok((code, start.elapsed()))
    }

    /// What it has logged.
    pub async fn log(&self) -> String {
        let log = self.container.stderr_to_vec().await.unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }
}

impl Node {
    /// Starts a router in a network of nodes, and waits until it serves.
    ///
    /// # Errors
    /// Where it does not; with its log.
    pub async fn start(
        engine: &Engine,
        stand: &Stand,
        image: &GenericImage,
        options: &NodeOptions<'_>,
    ) -> Result<Self> {
        let name = engine.name(options.node);
        let config = stand.dir().join(options.node).join("config");
        let sockets = stand.dir().join(options.node).join("run");
        std::fs::create_dir_all(&config)?;
        stand.issue(options.cluster, options.node, &config)?;
        write_config(stand, &config, options)?;
        open_to_all(&config, 0o755, 0o644)?;
        std::fs::create_dir_all(&sockets)?;
        open_to_all(&sockets, 0o777, 0o666)?;
        let container = engine
            .container(image)
            .with_container_name(&name)
            .with_network(engine.name("nodes"))
            .with_mount(bind(&config, "/etc/servicekeel")?.with_access_mode(AccessMode::ReadOnly))
            .with_mount(bind(&sockets, SOCKET_DIR)?)
            .start()
            .await
            .with_context(|| format!("the router of {}", options.node))?;
        let node = Self { router: Contained { container }, name, sockets };
        until("the router serves", async || node.status().await.map(Some))
            .await
            .with_context(|| options.node.to_owned())?;
        Ok(node)
    }

    /// What the router says of itself.
    ///
    /// # Errors
    /// Where it says nothing; with its log.
    pub async fn status(&self) -> Result<serde_json::Value> {
        // It exits with 1 where it has a problem to tell.
        match self.router.run_to(&["/servicekeel-router", "status", "--json"], &[0, 1]).await {
            Ok(status) => Ok(serde_json::from_slice(&status)?),
            Err(error) => Err(error.context(self.router.log().await)),
        }
    }
}

impl Pod {
    /// Starts a pod at a node, and waits until its sidecar is ready.
    ///
    /// # Errors
    /// Where it does not get ready; with its log.
    pub async fn start(
        engine: &Engine,
        stand: &Stand,
        node: &Node,
        sidecar: &GenericImage,
        options: &PodOptions<'_>,
    ) -> Result<Self> {
        let annotations = stand.dir().join(options.name);
        std::fs::create_dir_all(&annotations)?;
        std::fs::write(annotations.join("exported-services-config.yaml"), &options.exports)?;
        std::fs::write(annotations.join("imported-services-config.yaml"), &options.imports)?;
        open_to_all(&annotations, 0o755, 0o644)?;

        let (image, words, dir) = options.application;
        open_to_all(dir, 0o755, 0o644)?;
        let application = engine
            .container(image)
            .with_cmd(words.iter().copied())
            .with_hostname(options.name)
            .with_network("none")
            .with_mount(bind(dir, "/srv")?.with_access_mode(AccessMode::ReadOnly))
            // The manifests' dnsConfig and sysctls.
            .with_host_config_modifier(|config| {
                config.dns = Some(vec!["127.0.0.2".to_owned()]);
                config.dns_search = Some(vec!["default.svc.cluster.local".to_owned()]);
                config.dns_options = Some(vec!["ndots:5".to_owned()]);
                let sysctls = config.sysctls.get_or_insert_default();
                sysctls.insert("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned());
            })
            .start()
            .await
            .with_context(|| format!("the application of {}", options.name))?;

        let network = format!("container:{}", application.id());
        let mut request = engine
            .container(sidecar)
            .with_env_var("SIDECAR_SERVER_LISTEN", format!("unix://{SOCKET_DIR}/router.sock"))
            .with_env_var("SIDECAR_SOURCE", "files")
            .with_env_var("POD_NAME", options.name)
            .with_env_var("POD_NAMESPACE", "default")
            .with_mount(bind(&annotations, "/etc/servicekeel")?.with_access_mode(AccessMode::ReadOnly))
            .with_mount(bind(&node.sockets, SOCKET_DIR)?.with_access_mode(AccessMode::ReadOnly))
            .with_mount(Mount::tmpfs_mount("/var/lib/servicekeel/sidecar"))
            // Not by with_network, which would make a network of this name.
            .with_host_config_modifier(move |config| {
                config.network_mode = Some(network.clone());
                config.publish_all_ports = None;
            });
        for (name, value) in options.variables {
            request = request.with_env_var(*name, *value);
        }
        let container = request.start().await.with_context(|| format!("the sidecar of {}", options.name))?;

        let pod =
            Self { sidecar: Contained { container }, application: Contained { container: application } };
        let ready = until("the sidecar is ready", async || {
            let page = "http://127.0.0.1:15020/readyz";
            pod.application.run(&["/busybox", "wget", "-q", "-O", "-", page]).await.map(Some)
        });
        if let Err(error) = ready.await {
            return Err(error.context(format!("{}: {}", options.name, pod.sidecar.log().await)));
        }
        Ok(pod)
    }
}

/// The config of a router, beside its certificate, with the authorities that it names.
fn write_config(stand: &Stand, dir: &Path, options: &NodeOptions<'_>) -> Result<()> {
    let NodeOptions { cluster, node, .. } = options;
    let mut text = format!(
        "cluster: {cluster}\nnode: {node}\nlisten: {{ sidecars: \"unix://{SOCKET_DIR}/router.sock\" }}\n\
         identity: {{ ca: ca.crt, cert: node.crt, key: node.key }}\n"
    );
    if let Some(name) = &options.dials {
        writeln!(text, "peers: [ {{ address: \"{name}:7443\" }} ]")?;
    }
    if !options.trusts.is_empty() {
        text.push_str("trust:\n");
    }
    for other in options.trusts {
        writeln!(text, "  - {{ cluster: {other}, ca: {other}.crt }}")?;
        std::fs::copy(stand.authority(other)?.join("ca.crt"), dir.join(format!("{other}.crt")))?;
    }
    std::fs::write(dir.join("router.yaml"), text)?;
    Ok(())
}

/// A directory of this machine, mounted.
fn bind(dir: &Path, at: &str) -> Result<Mount> {
    Ok(Mount::bind_mount(dir.to_str().context("a path that is no UTF-8")?, at))
}

/// Sets the modes of a directory and its files. The containers' user is not the test's; other users of this machine
/// can't look into the stand's directory, which these are in.
fn open_to_all(dir: &Path, dir_mode: u32, file_mode: u32) -> Result<()> {
    std::fs::set_permissions(dir, Permissions::from_mode(dir_mode))?;
    for entry in std::fs::read_dir(dir)? {
        std::fs::set_permissions(entry?.path(), Permissions::from_mode(file_mode))?;
    }
    Ok(())
}
