//! Two routers, of a.local and b.local, with a pod each: the one serves an echo, the other imports it.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use servicekeel_core::handoff::{DescriptorKind, Pod, ToRouter, ToSidecar};
use servicekeel_core::name::{ClusterName, Protocol, RouterId, ServiceName, ServicePort};
use servicekeel_router::identity::{Fingerprint, Identity, Material, Revocation};
use servicekeel_router::pki::{Authority, cluster_of};
use servicekeel_router::settings::{Config, Listen, Peer, Settings};
use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::net::{Handoff, Net};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

pub(crate) fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + i / 251) as u8).collect()
}

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

/// The Service that is imported.
pub(crate) fn port(number: u16) -> ServicePort {
    let service = ServiceName {
        name: "web".parse().unwrap(),
        namespace: "default".parse().unwrap(),
        cluster: name("a.local"),
    };
    ServicePort { service, port: number.try_into().unwrap(), protocol: Protocol::Tcp }
}

pub(crate) async fn wait_for<T>(limit: Duration, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let end = tokio::time::Instant::now() + limit;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(tokio::time::Instant::now() < end, "not within {limit:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
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
    authority: Authority,
    pub(crate) settings: Choice,
    listen: Listen,
    certificate: (String, String),
    sender: Option<watch::Sender<Arc<Settings>>>,
    stop: Option<oneshot::Sender<()>>,
    tasks: JoinSet<()>,
    /// Where it accepts peers.
    pub(crate) peers: SocketAddr,
    /// Where it tells its status.
    pub(crate) admin: SocketAddr,
}

impl Router {
    fn new(cluster: &str, dir: &Path, peers: SocketAddr, admin: SocketAddr) -> Self {
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

    fn start(&mut self, seed: u64) {
        let (sender, receiver) = watch::channel(self.make());
        let (stop, stopped) = oneshot::channel();
        let net = OsNet::new();
        self.tasks.spawn(async move {
            let shutdown = async {
                let _ = stopped.await;
            };
            servicekeel_router::run(receiver, net, seed, shutdown).await.unwrap();
        });
        (self.sender, self.stop) = (Some(sender), Some(stop));
    }

    /// Asks it to end, and waits until it has.
    pub(crate) async fn end(&mut self) {
        drop(self.stop.take());
        self.tasks.join_next().await.unwrap().unwrap();
    }
}

pub(crate) struct Stand {
    pub(crate) a: Router,
    pub(crate) b: Router,
    /// Where the client's pod finds the Service.
    pub(crate) import_tcp: SocketAddr,
    pub(crate) import_udp: SocketAddr,
    tasks: JoinSet<()>,
    _dir: tempfile::TempDir,
}

impl Stand {
    /// Started, and linked.
    pub(crate) async fn new() -> Self {
        let stand = Self::start(true, true).await;
        stand.wait_until_it_works().await;
        stand
    }

    pub(crate) async fn without_identities() -> Self {
        Self::start(false, true).await
    }

    /// Nobody dials.
    pub(crate) async fn apart() -> Self {
        Self::start(true, false).await
    }

    async fn start(identities: bool, linked: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut free = Vec::new();
        for _ in 0..4 {
            free.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
        }
        let addresses: Vec<_> = free.iter().map(|listener| listener.local_addr().unwrap()).collect();
        drop(free);
        let mut a = Router::new("a.local", dir.path(), addresses[0], addresses[2]);
        let mut b = Router::new("b.local", dir.path(), addresses[1], addresses[3]);
        a.settings.trust.push(b.authority());
        b.settings.trust.push(a.authority());
        // The side that exports can't be reached by the other: it dials, and is asked to dial back.
        if linked {
            b.settings.peers.push(addresses[0].to_string());
        }
        for (router, seed) in [(&mut a, 1), (&mut b, 2)] {
            router.settings.has_identity = identities;
            router.start(seed);
        }

        let mut tasks = JoinSet::new();
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (tcp_target, udp_target) = (tcp.local_addr().unwrap().port(), udp.local_addr().unwrap().port());
        tasks.spawn(echo(tcp));
        tasks.spawn(echo_datagrams(udp));
        let (net, socket) = (OsNet::new(), a.listen.sidecars.clone());
        tasks.spawn(async move { exporter(net, &socket, tcp_target, udp_target).await });

        let net = OsNet::new();
        let make = async |kind| net.make_bound(kind, "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let listener = make(DescriptorKind::TcpListener).await;
        let datagrams = make(DescriptorKind::UdpBound).await;
        let local = servicekeel_runtime::net::Descriptor::local_addr;
        let (import_tcp, import_udp) = (local(&listener).unwrap(), local(&datagrams).unwrap());
        let (net, socket) = (net.clone(), b.listen.sidecars.clone());
        tasks.spawn(async move { importer(net, &socket, listener, datagrams).await });
        Self { a, b, import_tcp, import_udp, tasks, _dir: dir }
    }

    /// A pod of b.local without a uid, whose sidecar has handed over one listener.
    pub(crate) async fn nameless(&self, wanted: ServicePort, at: SocketAddr) -> (Conversation, SocketAddr) {
        use servicekeel_runtime::net::Descriptor;
        let net = OsNet::new();
        let listener = net.make_bound(DescriptorKind::TcpListener, at).await.unwrap();
        let at = listener.local_addr().unwrap();
        let pod = Pod { name: "bare".into(), namespace: "default".parse().unwrap(), uid: String::new() };
        let conversation = say_hello(&net, &self.b.listen.sidecars, pod, Vec::new()).await;
        conversation.send(&ToRouter::Import { id: 1, wanted }.encode(), vec![listener]).await.unwrap();
        // Welcome: it was heard.
        conversation.recv().await.unwrap();
        (conversation, at)
    }

    /// A further pod of a.local, which exports a port of its loopback.
    pub(crate) async fn export(&mut self, offered: ServicePort, target: u16) {
        let net = OsNet::new();
        let conversation = meet(&net, &self.a.listen.sidecars, "further").await;
        let export = ToRouter::Export { id: 1, offered, target: target.try_into().unwrap(), allow: None };
        conversation.send(&export.encode(), Vec::new()).await.unwrap();
        self.tasks.spawn(stock(net, conversation));
    }

    /// A pod of a.local that imports what it exports, and counts the import's address among its own. Its application
    /// listens on its loopback. Returns where the import is.
    pub(crate) async fn selfish(&mut self) -> SocketAddr {
        use servicekeel_runtime::net::Descriptor;
        let application = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = application.local_addr().unwrap().port();
        let net = OsNet::new();
        let at = SocketAddr::from(([127, 115, 0, 1], target));
        let listener = net.make_bound(DescriptorKind::TcpListener, at).await.unwrap();
        let pod = Pod { name: "selfish".into(), namespace: "default".parse().unwrap(), uid: "s".into() };
        let conversation = say_hello(&net, &self.a.listen.sidecars, pod, vec![at.ip()]).await;
        let offered = port(81);
        let import = ToRouter::Import { id: 1, wanted: offered.clone() };
        conversation.send(&import.encode(), vec![listener.share().unwrap()]).await.unwrap();
        let export = ToRouter::Export { id: 2, offered, target: target.try_into().unwrap(), allow: None };
        conversation.send(&export.encode(), Vec::new()).await.unwrap();
        self.tasks.spawn(echo(application));
        self.tasks.spawn(async move {
            let _held = listener;
            stock(net, conversation).await;
        });
        at
    }

    /// A pod of a.local that exports what it is told to.
    pub(crate) async fn exporter(&self, pod: &str) -> Exporter {
        Exporter(meet(&OsNet::new(), &self.a.listen.sidecars, pod).await)
    }

    /// A conversation with the router of b.local that says Hello and no more.
    pub(crate) async fn come_and_go(&self) {
        let pod = Pod { name: "rogue".into(), namespace: "default".parse().unwrap(), uid: String::new() };
        drop(say_hello(&OsNet::new(), &self.b.listen.sidecars, pod, Vec::new()).await);
    }

    /// Something that goes on until the end of the test.
    pub(crate) fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task);
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.import_tcp).await.unwrap()
    }

    /// More connections at once than the pool has: some are new.
    pub(crate) async fn connect_often(&self) {
        let mut streams = Vec::new();
        for _ in 0..20 {
            streams.push(self.connect().await);
        }
        for stream in &mut streams {
            stream.write_all(b"x").await.unwrap();
            stream.read_exact(&mut [0]).await.unwrap();
        }
    }

    pub(crate) async fn wait_until_it_works(&self) {
        wait_for(Duration::from_secs(20), async || {
            let answer = async {
                let mut stream = self.connect().await;
                stream.write_all(b"ping").await.ok()?;
                let mut got = [0; 4];
                stream.read_exact(&mut got).await.ok()?;
                (got == *b"ping").then_some(())
            };
            // As a client would: one that waits for ever is no reason not to try again.
            tokio::time::timeout(Duration::from_secs(5), answer).await.ok()?
        })
        .await;
    }
}

/// A pod that exports.
pub(crate) struct Exporter(Conversation);

impl Exporter {
    pub(crate) async fn export(&mut self, id: u64, offered: ServicePort, allow: Option<&[&str]>) {
        let allow = allow.map(|rules| rules.iter().map(|rule| rule.parse().unwrap()).collect());
        let export = ToRouter::Export { id, target: offered.port, offered, allow };
        self.0.send(&export.encode(), Vec::new()).await.unwrap();
    }
}

async fn echo(listener: TcpListener) {
    let mut tasks = JoinSet::new();
    while let Ok((mut stream, _)) = listener.accept().await {
        tasks.spawn(async move {
            let (mut reader, mut writer) = stream.split();
            // However it ends, the test's side tells.
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
        });
    }
}

async fn echo_datagrams(socket: UdpSocket) {
    let mut buf = vec![0; 70_000];
    while let Ok((n, from)) = socket.recv_from(&mut buf).await {
        let _ = socket.send_to(&buf[..n], from).await;
    }
}

pub(crate) type Conversation = <OsNet as Net>::Handoff;

async fn meet(net: &OsNet, socket: &Path, pod: &str) -> Conversation {
    let pod = Pod { name: pod.into(), namespace: "default".parse().unwrap(), uid: pod.into() };
    say_hello(net, socket, pod, Vec::new()).await
}

pub(crate) async fn say_hello(net: &OsNet, socket: &Path, pod: Pod, addresses: Vec<IpAddr>) -> Conversation {
    let conversation = loop {
        match net.handoff_connect(socket).await {
            Ok(conversation) => break conversation,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    let hello = ToRouter::Hello { version: 1, pod, addresses };
    conversation.send(&hello.encode(), Vec::new()).await.unwrap();
    conversation
}

async fn exporter(net: OsNet, socket: &Path, tcp: u16, udp: u16) {
    let conversation = meet(&net, socket, "server").await;
    for (id, protocol, target) in [(1, Protocol::Tcp, tcp), (2, Protocol::Udp, udp)] {
        let offered = ServicePort { protocol, ..port(80) };
        let export = ToRouter::Export { id, offered, target: target.try_into().unwrap(), allow: None };
        conversation.send(&export.encode(), Vec::new()).await.unwrap();
    }
    stock(net, conversation).await;
}

/// Gives the router the sockets that it asks for.
pub(crate) async fn stock(net: OsNet, conversation: Conversation) {
    while let Ok(Some((bytes, _))) = conversation.recv().await {
        if let Ok(ToSidecar::More { tcp, udp }) = ToSidecar::decode(&bytes) {
            let tcps = std::iter::repeat_n(DescriptorKind::TcpUnconnected, tcp.into());
            let udps = std::iter::repeat_n(DescriptorKind::UdpUnconnected, udp.into());
            let sockets = tcps.chain(udps).map(|kind| net.make_unbound(kind).unwrap()).collect();
            conversation.send(&ToRouter::Stock { tcp, udp }.encode(), sockets).await.unwrap();
        }
    }
}

async fn importer(
    net: OsNet,
    socket: &Path,
    listener: <OsNet as Net>::Descriptor,
    datagrams: <OsNet as Net>::Descriptor,
) {
    use servicekeel_runtime::net::Descriptor;
    let conversation = meet(&net, socket, "client").await;
    for (id, protocol, socket) in [(1, Protocol::Tcp, &listener), (2, Protocol::Udp, &datagrams)] {
        let import = ToRouter::Import { id, wanted: ServicePort { protocol, ..port(80) } };
        conversation.send(&import.encode(), vec![socket.share().unwrap()]).await.unwrap();
    }
    // The sockets are held for as long as the pod lives.
    while let Ok(Some(_)) = conversation.recv().await {}
    std::future::pending().await
}
