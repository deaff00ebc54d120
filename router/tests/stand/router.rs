//! A router of the stand: what it is told, its identity, and what it says of itself.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use servicekeel_core::name::{ClusterName, RouterId};
use servicekeel_router::identity::{Fingerprint, Identity, Material, Revocation};
use servicekeel_router::pki::{Authority, cluster_of};
use servicekeel_router::settings::{Config, Listen, Peer, Settings};
use servicekeel_runtime::net::os::OsNet;
use tokio::sync::{oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};

fn name(text: &str) -> ClusterName {
    text.parse().unwrap()
}

pub(crate) fn authority(cluster: &str) -> Authority {
    Authority::generate(&name(cluster), 2, SystemTime::now()).unwrap()
}

/// What `status` says of the router there, and its exit code.
pub(crate) async fn tool(admin: SocketAddr) -> (i32, String) {
    let mut tool = std::process::Command::new(env!("CARGO_BIN_EXE_servicekeel-router"));
    tool.args(["status", "--admin", &admin.to_string()]);
    let output = tokio::task::spawn_blocking(move || tool.output().unwrap()).await.unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
}

/// What a router is told.
pub(crate) struct Choice {
    pub(crate) peers: Vec<String>,
    /// Certificates of other clusters' authorities.
    pub(crate) trust: Vec<String>,
    pub(crate) revoked: Vec<String>,
    pub(crate) has_identity: bool,
}

pub(crate) struct Router {
    id: RouterId,
    pub(super) authority: Authority,
    pub(crate) settings: Choice,
    pub(super) listen: Listen,
    pub(super) certificate: (String, String),
    sender: Option<watch::Sender<Arc<Settings>>>,
    stop: Option<oneshot::Sender<()>>,
    tasks: JoinSet<()>,
    running: Option<AbortHandle>,
    /// Where it accepts peers.
    pub(crate) peers: SocketAddr,
    /// Where it tells its status.
    pub(crate) admin: SocketAddr,
}

impl Router {
    pub(super) fn new(cluster: &str, dir: &Path, peers: SocketAddr, admin: SocketAddr) -> Self {
        let id = RouterId { cluster: name(cluster), node: name("n") };
        let listen =
            Listen { sidecars: dir.join(format!("{cluster}.sock")), peers: Some(peers), admin: Some(admin) };
        let settings =
            Choice { peers: Vec::new(), trust: Vec::new(), revoked: Vec::new(), has_identity: true };
        let mut router = Self {
            id,
            authority: authority(cluster),
            settings,
            listen,
            certificate: Default::default(),
            sender: None,
            stop: None,
            tasks: JoinSet::new(),
            running: None,
            peers,
            admin,
        };
        router.issue();
        router
    }

    pub(crate) fn authority(&self) -> String {
        self.authority.certificate().to_owned()
    }

    pub(crate) fn replace_authority(&mut self, authority: Authority) {
        self.authority = authority;
        self.issue();
    }

    /// Makes a new certificate, for the next [`Router::apply`].
    pub(crate) fn issue(&mut self) {
        let issued = self.authority.issue(&self.id.node, &[], 1, SystemTime::now()).unwrap();
        self.certificate = (issued.certificate, issued.key);
    }

    /// Makes one that expires so soon.
    pub(crate) fn issue_for(&mut self, left: Duration) {
        let began = SystemTime::now() - Duration::from_secs(86_400) + left;
        let issued = self.authority.issue(&self.id.node, &[], 1, began).unwrap();
        self.certificate = (issued.certificate, issued.key);
    }

    /// What its admin endpoint answers.
    pub(crate) async fn asks(&self, path: &str) -> (u16, String) {
        servicekeel_runtime::admin::get(self.admin, path).await.unwrap()
    }

    pub(crate) async fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.asks("/status").await.1).unwrap()
    }

    /// What the tool says, and its exit code.
    pub(crate) async fn tool(&self) -> (i32, String) {
        tool(self.admin).await
    }

    /// A metric's value.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.asks("/metrics").await;
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("servicekeel_router_{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }

    /// The SHA-256 of its certificate.
    pub(crate) fn fingerprint(&self) -> String {
        let certificate = CertificateDer::from_pem_slice(self.certificate.0.as_bytes()).unwrap();
        Fingerprint::of(&certificate).to_string()
    }

    /// Who it is, by its own certificate.
    pub(crate) fn identity(&self) -> Identity {
        Identity::from_pem(self.id.clone(), &self.material()).unwrap()
    }

    fn material(&self) -> Material {
        let trust = self.settings.trust.iter();
        Material {
            ca: self.authority.certificate().into(),
            certificate: self.certificate.0.clone().into(),
            key: self.certificate.1.clone().into(),
            trust: trust.map(|pem| (cluster_of(pem).unwrap(), pem.clone().into())).collect(),
            revoked: self.revoked().into_iter().collect(),
        }
    }

    fn revoked(&self) -> Vec<Revocation> {
        self.settings.revoked.iter().map(|entry| entry.parse().unwrap()).collect()
    }

    fn make(&self) -> Arc<Settings> {
        let identity = self.settings.has_identity.then(|| Arc::new(self.identity()));
        let peers = self.settings.peers.iter().map(|address| Peer { address: address.clone() }).collect();
        let (cluster, node) = (self.id.cluster.clone(), self.id.node.clone());
        Arc::new(Settings {
            config: Arc::new(Config {
                cluster,
                node,
                listen: self.listen.clone(),
                peers,
                revoked: self.revoked(),
            }),
            identity,
            untimely: None,
            pending: Default::default(),
        })
    }

    /// Where its sidecars come in.
    pub(crate) fn sidecars(&self) -> &Path {
        &self.listen.sidecars
    }

    pub(crate) fn apply(&mut self) {
        let settings = self.make();
        self.sender.as_ref().unwrap().send_replace(settings);
    }

    pub(crate) fn start(&mut self, seed: u64) {
        let (sender, receiver) = watch::channel(self.make());
        let (stop, stopped) = oneshot::channel();
        let net = OsNet::new();
        let running = self.tasks.spawn(async move {
            let shutdown = async {
                let _ = stopped.await;
            };
            servicekeel_router::run(receiver, net, seed, shutdown).await.unwrap();
        });
        (self.sender, self.stop, self.running) = (Some(sender), Some(stop), Some(running));
    }

    /// Whether it runs no more, such as where it could not listen.
    pub(super) fn has_ended(&self) -> bool {
        self.running.as_ref().is_some_and(AbortHandle::is_finished)
    }

    /// Asks it to end, and waits until it has.
    pub(crate) async fn end(&mut self) {
        drop(self.stop.take());
        self.tasks.join_next().await.unwrap().unwrap();
    }
}
