//! Two routers, of a.local and b.local, with a pod each: the one serves an echo, the other imports it.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use servicekeel_core::handoff::{DescriptorKind, Pod, ToRouter};
use servicekeel_core::name::{Protocol, ServiceName, ServicePort};
use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::net::{Handoff, Net};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

mod pods;
mod router;

#[allow(unused_imports, reason = "each file takes what it needs")]
pub(crate) use pods::{Conversation, say_hello, stock};
use pods::{Exporter, echo, echo_datagrams, exporter, importer, meet};
#[allow(unused_imports, reason = "each file takes what it needs")]
pub(crate) use router::{Router, authority, tool};

/// A loopback address of a stand's own: no other test, and no client's port that the kernel draws, takes a port there
/// between the moment in which it is found free and that in which a router listens.
fn address() -> IpAddr {
    static STANDS: AtomicU16 = AtomicU16::new(0);
    let [high, low] = STANDS.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let process = std::process::id() % 60;
    [127, 130 + 2 * process as u8 + high % 2, low, 1].into()
}

pub(crate) fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + i / 251) as u8).collect()
}

/// The Service that is imported.
pub(crate) fn port(number: u16) -> ServicePort {
    let service = ServiceName {
        name: "web".parse().unwrap(),
        namespace: "default".parse().unwrap(),
        cluster: "a.local".parse().unwrap(),
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
        let (at, mut free) = (address(), Vec::new());
        for _ in 0..4 {
            free.push(TcpListener::bind((at, 0)).await.unwrap());
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

    /// A router with the identity of b.local's, as on a machine whose disk is a copy of its disk. It is not started.
    #[allow(dead_code, reason = "not every test needs one")]
    pub(crate) async fn twin(&self) -> Router {
        let mut free = Vec::new();
        for _ in 0..2 {
            free.push(TcpListener::bind((self.b.admin.ip(), 0)).await.unwrap().local_addr().unwrap());
        }
        let dir = self._dir.path().join("twin");
        std::fs::create_dir(&dir).unwrap();
        let mut twin = Router::new("b.local", &dir, free[0], free[1]);
        twin.authority = servicekeel_router::pki::Authority::from_pem(
            self.b.authority.certificate(),
            &self.b.authority.key(),
        )
        .unwrap();
        twin.certificate = self.b.certificate.clone();
        twin.settings.trust = self.b.settings.trust.clone();
        twin.settings.peers = self.b.settings.peers.clone();
        twin
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

    /// Whether a new flow is reset: that may be quicker than the end of its connect.
    pub(crate) async fn is_reset(&self) -> bool {
        match TcpStream::connect(self.import_tcp).await {
            Ok(mut stream) => stream.read(&mut [0]).await.is_err(),
            Err(_) => true,
        }
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
            assert!(!self.a.has_ended() && !self.b.has_ended(), "a router has ended");
            let answer = async {
                let mut stream = TcpStream::connect(self.import_tcp).await.ok()?;
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
