//! Two clusters in one process: production routers on the kernel's sockets, pods that hand over theirs, and a
//! service.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use servicekeel_core::handoff::{self, DescriptorKind, ToRouter, ToSidecar};
use servicekeel_core::name::{ClusterName, Protocol, RouterId, ServiceName, ServicePort};
use servicekeel_router::identity::Identity;
use servicekeel_router::pki::Authority;
use servicekeel_router::settings::{Config, Listen, Peer, Settings};
use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::net::{Handoff, Listener, Net};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

const CHUNK: usize = 256 * 1024;

/// What runs, and where a client connects. Dropped, it all ends.
pub(crate) struct Mesh {
    /// The service itself.
    pub(crate) direct: SocketAddr,
    /// By the one router of its node.
    pub(crate) same_node: SocketAddr,
    /// By two routers.
    pub(crate) across: SocketAddr,
    _tasks: JoinSet<()>,
    _dir: TempDir,
}

impl Mesh {
    /// Starts it, and waits until a byte has gone each way.
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut tasks = JoinSet::new();
        let net = OsNet::new();
        let service = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let direct = service.local_addr().unwrap();
        tasks.spawn(serve(service));

        let now = SystemTime::now();
        let authority = |cluster: &str| Authority::generate(&cluster.parse().unwrap(), 2, now).unwrap();
        let (a, b) = (authority("a.local"), authority("b.local"));
        let peers = net.listen((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap().local_addr().unwrap();
        let exporting = start_router(&mut tasks, dir.path(), &net, &a, &b, Some(peers), Vec::new());
        let dialled = vec![Peer { address: peers.to_string() }];
        let consuming = start_router(&mut tasks, dir.path(), &net, &b, &a, None, dialled);

        let wanted = ServicePort {
            service: ServiceName {
                name: "bench".parse().unwrap(),
                namespace: "default".parse().unwrap(),
                cluster: a.cluster().clone(),
            },
            port: 80.try_into().unwrap(),
            protocol: Protocol::Tcp,
        };
        let target = direct.port().try_into().unwrap();
        let export = ToRouter::Export { id: 1, offered: wanted.clone(), target, allow: None };
        tasks.spawn(pod(net.clone(), exporting.clone(), "server", export, None));
        let mut import = async |router, name| {
            let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
            let listener = net.make_bound(DescriptorKind::TcpListener, any).await.unwrap();
            let addr = servicekeel_runtime::net::Descriptor::local_addr(&listener).unwrap();
            let import = ToRouter::Import { id: 1, wanted: wanted.clone() };
            tasks.spawn(pod(net.clone(), router, name, import, Some(listener)));
            addr
        };
        let same_node = import(exporting, "near").await;
        let across = import(consuming, "far").await;

        let mesh = Self { direct, same_node, across, _tasks: tasks, _dir: dir };
        for addr in [mesh.direct, mesh.same_node, mesh.across] {
            let end = Instant::now() + Duration::from_secs(10);
            while let Err(error) = ping(addr).await {
                assert!(Instant::now() < end, "{addr} does not answer: {error}");
                sleep(Duration::from_millis(50)).await;
            }
        }
        mesh
    }
}

/// Starts a router of a cluster that trusts another one: the path of its sidecars' socket.
fn start_router(
    tasks: &mut JoinSet<()>,
    dir: &Path,
    net: &OsNet,
    own: &Authority,
    other: &Authority,
    peers: Option<SocketAddr>,
    dials: Vec<Peer>,
) -> PathBuf {
    let cluster = own.cluster().clone();
    let node: ClusterName = "node-1".parse().unwrap();
    let sidecars = dir.join(format!("{cluster}.sock"));
    let id = RouterId { cluster: cluster.clone(), node: node.clone() };
    let material = own.material(&node, &[other], SystemTime::now()).unwrap();
    let identity = Some(Arc::new(Identity::from_pem(id, &material).unwrap()));
    let listen = Listen { sidecars: sidecars.clone(), peers, admin: None };
    let seed = u64::from(peers.is_some());
    let config = Config { cluster, node, listen, peers: dials, revoked: Vec::new() };
    let settings =
        Settings { config: Arc::new(config), identity, untimely: None, pending: Default::default() };
    let net = net.clone();
    tasks.spawn(async move {
        let (_settings, watched) = tokio::sync::watch::channel(Arc::new(settings));
        servicekeel_router::run(watched, net, seed, std::future::pending()).await.unwrap();
    });
    sidecars
}

/// A sidecar as its router sees it: hands over one import or export, and unconnected sockets when asked.
async fn pod(
    net: OsNet,
    router: PathBuf,
    name: &str,
    offers: ToRouter,
    socket: Option<<OsNet as Net>::Descriptor>,
) {
    let end = Instant::now() + Duration::from_secs(10);
    let conversation = loop {
        match net.handoff_connect(&router).await {
            Ok(conversation) => break conversation,
            // The router has only just been started.
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        sleep(Duration::from_millis(10)).await;
    };
    let namespace = "default".parse().unwrap();
    let pod = handoff::Pod { name: name.to_owned(), namespace, uid: format!("uid-of-{name}") };
    let hello = ToRouter::Hello { version: handoff::VERSION, pod, addresses: Vec::new() };
    conversation.send(&hello.encode(), Vec::new()).await.unwrap();
    conversation.send(&offers.encode(), socket.into_iter().collect()).await.unwrap();
    while let Some((message, _)) = conversation.recv().await.unwrap() {
        match ToSidecar::decode(&message).unwrap() {
            ToSidecar::More { tcp, udp } => {
                let make = |kind, n| (0..n).map(move |_| (kind, ()));
                let kinds = make(DescriptorKind::TcpUnconnected, tcp)
                    .chain(make(DescriptorKind::UdpUnconnected, udp));
                let sockets =
                    kinds.map(|(kind, ())| net.make_unbound(kind)).collect::<io::Result<_>>().unwrap();
                conversation.send(&ToRouter::Stock { tcp, udp }.encode(), sockets).await.unwrap();
            }
            ToSidecar::Refused { id, reason } => panic!("{name}: {id:?} is refused: {reason}"),
            ToSidecar::Welcome { .. } | ToSidecar::Pong => {}
        }
    }
}

/// The service: sends as many bytes as it is asked for, again and again.
async fn serve(listener: TcpListener) {
    static BYTES: [u8; CHUNK] = [0x5a; CHUNK];
    let mut clients = JoinSet::new();
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        while clients.try_join_next().is_some() {}
        stream.set_nodelay(true).unwrap();
        clients.spawn(async move {
            // Ends with the error of the client's close.
            while let Ok(mut left) = stream.read_u64().await {
                while left > 0 {
                    let n = left.min(CHUNK as u64) as usize;
                    if stream.write_all(&BYTES[..n]).await.is_err() {
                        return;
                    }
                    left -= n as u64;
                }
            }
        });
    }
}

/// A client that keeps its flow.
pub(crate) struct Client {
    stream: TcpStream,
    buf: Vec<u8>,
}

impl Client {
    pub(crate) async fn connect(addr: SocketAddr) -> Self {
        let stream = TcpStream::connect(addr).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, buf: vec![0; CHUNK] }
    }

    /// Asks for so many bytes and receives them.
    pub(crate) async fn fetch(&mut self, bytes: u64) {
        self.stream.write_u64(bytes).await.unwrap();
        let mut left = bytes;
        while left > 0 {
            let n = self.stream.read(&mut self.buf).await.unwrap();
            assert!(n > 0, "the flow ended early");
            left -= n as u64;
        }
    }
}

/// A new flow that carries one byte.
pub(crate) async fn ping(addr: SocketAddr) -> io::Result<()> {
    let exchange = async {
        let mut stream = TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        stream.write_u64(1).await?;
        stream.read_u8().await
    };
    timeout(Duration::from_secs(5), exchange).await?.map(drop)
}
