//! The routers, and the honest and the hostile pods, of the tests of shares.

use crate::program::{Files, Program};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use servicekeel_core::handoff::{DescriptorKind, Pod, ToRouter, ToSidecar};
use servicekeel_core::name::{Protocol, ServiceName, ServicePort};
use servicekeel_router::pki::Authority;
use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::net::{Descriptor, Handoff, Net};
use std::fs::Permissions;
use std::future::Future;
use std::io::Read;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::runtime::Builder;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// What a flow of an honest pod may take.
pub(crate) const SOON: Duration = Duration::from_secs(1);
pub(crate) const LIMIT: Duration = Duration::from_secs(20);
/// A router's open files where it is to run short.
pub(crate) const FEW: u32 = 1024;
pub(crate) const MANY: u32 = 8192;

/// A user of one test alone.
pub(crate) fn user() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    60_000 + std::process::id() % 1000 * 4 + NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The limits of a router.
#[derive(Clone, Copy)]
pub(crate) struct Most {
    pub(crate) files: u32,
    /// Whose, and how many threads it may have.
    pub(crate) threads: Option<(u32, u32)>,
}

pub(crate) type Conversation = <OsNet as Net>::Handoff;

/// A router that is killed with the test.
pub(crate) struct Router {
    pub(crate) process: Program,
    pub(crate) socket: PathBuf,
    pub(crate) peers: SocketAddr,
    pub(crate) admin: SocketAddr,
}

impl Router {
    pub(crate) fn start(
        dir: &Path,
        own: &Authority,
        other: &Authority,
        peer: Option<SocketAddr>,
        most: Most,
    ) -> Self {
        let Files { config, socket, peers, admin } = Files::write(dir, own, other, peer);
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={0}:{0}", most.files));
        match most.threads {
            Some((user, threads)) => {
                // Nothing limits root, so it is another user, who can reach its directory alone.
                let home = config.parent().unwrap();
                let program = home.join("servicekeel-router");
                std::fs::copy(env!("CARGO_BIN_EXE_servicekeel-router"), &program).unwrap();
                std::fs::set_permissions(dir, Permissions::from_mode(0o711)).unwrap();
                let files = std::fs::read_dir(home).unwrap().map(|file| file.unwrap().path());
                files.chain([home.to_owned()]).for_each(|file| chown(file, Some(user), Some(user)).unwrap());
                command.arg(format!("--nproc={threads}:{threads}")).arg(program).uid(user).gid(user);
            }
            None => drop(command.arg(env!("CARGO_BIN_EXE_servicekeel-router"))),
        }
        command.arg("--config").arg(config).env("TOKIO_WORKER_THREADS", "2").stdout(Stdio::null());
        let process = Program::start(&mut command);
        Self { process, socket, peers, admin }
    }

    pub(crate) fn log(&self) -> String {
        self.process.log()
    }

    /// How many descriptors it has open.
    pub(crate) fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.process.id())).unwrap().count()
    }

    /// What the tool says.
    pub(crate) fn status(&self) -> String {
        let mut tool = Command::new(env!("CARGO_BIN_EXE_servicekeel-router"));
        let output = tool.args(["status", "--admin", &self.admin.to_string()]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }
}

/// The routers of a.local, which offers an echo, and of b.local.
pub(crate) struct Pair {
    pub(crate) a: Router,
    pub(crate) b: Router,
    pub(crate) tasks: JoinSet<()>,
    pub(crate) _dir: tempfile::TempDir,
}

impl Pair {
    pub(crate) async fn start(a_files: u32, b_files: u32) -> Self {
        Self::of(Most { files: a_files, threads: None }, Most { files: b_files, threads: None }).await
    }

    pub(crate) async fn of(a: Most, b: Most) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let [of_a, of_b] = ["a.local", "b.local"]
            .map(|cluster| Authority::generate(&cluster.parse().unwrap(), 2, SystemTime::now()).unwrap());
        let a = Router::start(dir.path(), &of_a, &of_b, None, a);
        let b = Router::start(dir.path(), &of_b, &of_a, Some(a.peers), b);
        let mut tasks = JoinSet::new();
        let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = tcp.local_addr().unwrap().port();
        let udp = UdpSocket::bind(("127.0.0.1", target)).await.unwrap();
        tasks.spawn(echo(tcp));
        tasks.spawn(async move {
            let mut buf = [0; 2048];
            while let Ok((n, from)) = udp.recv_from(&mut buf).await {
                let _ = udp.send_to(&buf[..n], from).await;
            }
        });
        let socket = a.socket.clone();
        let server = greet(&socket, "server").await;
        for (id, protocol) in [(1, Protocol::Tcp), (2, Protocol::Udp)] {
            let target = target.try_into().unwrap();
            let export = ToRouter::Export { id, offered: port(80, protocol), target, allow: None };
            server.send(&export.encode(), Vec::new()).await.unwrap();
        }
        tasks.spawn(stock(server));
        Self { a, b, tasks, _dir: dir }
    }
}

pub(crate) async fn echo(listener: tokio::net::TcpListener) {
    let mut tasks = JoinSet::new();
    while let Ok((mut stream, _)) = listener.accept().await {
        tasks.spawn(async move {
            let (mut reader, mut writer) = stream.split();
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
        });
    }
}

pub(crate) fn port(number: u16, protocol: Protocol) -> ServicePort {
    let service = ServiceName {
        name: "web".parse().unwrap(),
        namespace: "default".parse().unwrap(),
        cluster: "a.local".parse().unwrap(),
    };
    ServicePort { service, port: number.try_into().unwrap(), protocol }
}

pub(crate) async fn greet(socket: &Path, pod: &str) -> Conversation {
    let end = Instant::now() + LIMIT;
    let conversation = loop {
        match OsNet::new().handoff_connect(socket).await {
            Ok(conversation) => break conversation,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        sleep(Duration::from_millis(20)).await;
    };
    let pod = Pod { name: pod.into(), namespace: "default".parse().unwrap(), uid: pod.into() };
    let hello = ToRouter::Hello { version: 1, pod, addresses: Vec::new() };
    conversation.send(&hello.encode(), Vec::new()).await.unwrap();
    conversation
}

/// Gives the router the sockets that it asks for, until the conversation ends.
pub(crate) async fn stock(conversation: Conversation) {
    let net = OsNet::new();
    while let Ok(Some((bytes, _))) = conversation.recv().await {
        if let Ok(ToSidecar::More { tcp, udp }) = ToSidecar::decode(&bytes) {
            let tcps = std::iter::repeat_n(DescriptorKind::TcpUnconnected, tcp.into());
            let udps = std::iter::repeat_n(DescriptorKind::UdpUnconnected, udp.into());
            let sockets = tcps.chain(udps).map(|kind| net.make_unbound(kind).unwrap()).collect();
            let _ = conversation.send(&ToRouter::Stock { tcp, udp }.encode(), sockets).await;
        }
    }
}

/// Hands over an import, in the network namespace of the caller, and returns where it is.
pub(crate) async fn import(conversation: &Conversation, id: u64, wanted: &ServicePort) -> SocketAddr {
    let kind = match wanted.protocol {
        Protocol::Tcp => DescriptorKind::TcpListener,
        Protocol::Udp => DescriptorKind::UdpBound,
    };
    let socket = OsNet::new().make_bound(kind, "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let at = socket.local_addr().unwrap();
    let wanted = wanted.clone();
    conversation.send(&ToRouter::Import { id, wanted }.encode(), vec![socket]).await.unwrap();
    at
}

/// Whether a new flow is there soon: a byte there and back.
pub(crate) async fn is_served(at: SocketAddr) -> bool {
    let flow = async {
        let mut stream = TcpStream::connect(at).await?;
        stream.write_all(b"x").await?;
        stream.read_exact(&mut [0]).await
    };
    timeout(SOON, flow).await.is_ok_and(|read| read.is_ok())
}

pub(crate) async fn is_served_by_udp(at: SocketAddr) -> bool {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(at).await.unwrap();
    let session = async {
        socket.send(b"x").await?;
        socket.recv(&mut [0]).await
    };
    timeout(SOON, session).await.is_ok_and(|read| read.is_ok())
}

pub(crate) async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !condition().await {
        assert!(Instant::now() < end, "not within {LIMIT:?}: {what}");
        sleep(Duration::from_millis(50)).await;
    }
}

/// A network namespace, while it is not dropped.
pub(crate) struct Namespace(Child);

impl Namespace {
    pub(crate) fn new() -> Self {
        let up = "ip link set lo up && echo up && exec sleep 600";
        let mut child = Command::new("unshare")
            .args(["--net", "sh", "-c", up])
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare (util-linux)");
        let mut said = [0; 2];
        child.stdout.take().unwrap().read_exact(&mut said).expect("root, and ip (iproute2)");
        Self(child)
    }

    pub(crate) fn enter(&self) {
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", self.0.id())).unwrap();
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A pod in a network namespace of its own: what it does goes on until it is dropped.
pub(crate) struct Hostile {
    pub(crate) stop: Option<oneshot::Sender<()>>,
    pub(crate) thread: Option<thread::JoinHandle<()>>,
    pub(crate) _namespace: Arc<Namespace>,
}

impl Hostile {
    /// Returns once the deed is done. What it returned is kept until the pod ends.
    pub(crate) async fn does<T: 'static, F: Future<Output = T>>(
        deed: impl FnOnce() -> F + Send + 'static,
    ) -> Self {
        let (stop, stopped) = oneshot::channel::<()>();
        let (done, doing) = oneshot::channel();
        let namespace = Arc::new(Namespace::new());
        let place = namespace.clone();
        let thread = thread::spawn(move || {
            place.enter();
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let _held = deed().await;
                let _ = done.send(());
                // Its tasks go on.
                let _ = stopped.await;
            });
        });
        doing.await.expect("the deed is done");
        Self { stop: Some(stop), thread: Some(thread), _namespace: namespace }
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// Flows that stand still after a byte there and back: so many are asked for, and what is there when no more is served
/// is kept. Says how many are.
pub(crate) async fn idle_flows(at: SocketAddr, number: usize) -> (usize, Vec<TcpStream>) {
    let mut flows = Vec::new();
    for _ in 0..number {
        // Behind a full backlog a connect waits.
        let Ok(Ok(flow)) = timeout(Duration::from_millis(200), TcpStream::connect(at)).await else { break };
        let _ = flow.try_write(b"x");
        flows.push(flow);
    }
    let (mut served, mut since) = (0, Instant::now());
    while since.elapsed() < SOON {
        sleep(Duration::from_millis(20)).await;
        let more = flows.iter().filter(|flow| flow.try_read(&mut [0]).is_ok_and(|n| n == 1)).count();
        if more > 0 {
            (served, since) = (served + more, Instant::now());
        }
    }
    (served, flows)
}

/// An honest pod of a router, with the echo as an import by TCP and by UDP.
pub(crate) struct Honest {
    pub(crate) tcp: SocketAddr,
    pub(crate) udp: SocketAddr,
    pub(crate) _tasks: JoinSet<()>,
}

impl Honest {
    pub(crate) async fn new(router: &Router, name: &str) -> Self {
        Self::of(&router.socket, name).await
    }

    pub(crate) async fn of(socket: &Path, name: &str) -> Self {
        let conversation = greet(socket, name).await;
        let tcp = import(&conversation, 1, &port(80, Protocol::Tcp)).await;
        let udp = import(&conversation, 2, &port(80, Protocol::Udp)).await;
        let mut tasks = JoinSet::new();
        tasks.spawn(stock(conversation));
        Self { tcp, udp, _tasks: tasks }
    }

    pub(crate) async fn is_served(&self) -> bool {
        is_served(self.tcp).await && is_served_by_udp(self.udp).await
    }
}
