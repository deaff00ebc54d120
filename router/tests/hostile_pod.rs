//! A pod that means harm: what it does to the sockets that it shares with the router holds up nobody but itself.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

#[allow(dead_code, reason = "each file takes what it needs")]
mod stand;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use servicekeel_core::handoff::{DescriptorKind, Pod, ToRouter, ToSidecar};
use servicekeel_core::name::{Protocol, ServicePort};
use servicekeel_runtime::net::os::{OsDescriptor, OsNet};
use servicekeel_runtime::net::{Descriptor, Handoff, Net};
use socket2::{Domain, SockFilter, SockRef, Socket, Type};
use stand::{Conversation, Stand, port, say_hello};
use tokio::runtime::{Builder, Runtime};

/// A worker that waits in the kernel shows as seconds. Below this, figures of a machine that does other work too say
/// nothing.
const FLOOR: Duration = Duration::from_millis(40);
const PATIENCE: Duration = Duration::from_secs(5);
const ROUNDS: usize = 3;
/// More than the router has workers.
const PODS: u16 = 3;
const FLOWS: usize = 50;

/// Makes a test of each: what a pod's programs may do to a socket whose duplicate the router has.
macro_rules! a_neighbour_is_as_fast_as_ever_while_a_pod {
    ($($name:ident: $act:expr;)+) => {
        mod a_neighbour_is_as_fast_as_ever_while_a_pod {
            use super::*;
            $(#[test] fn $name() { beside($act); })+
        }
    };
}

a_neighbour_is_as_fast_as_ever_while_a_pod! {
    accepts_itself_from_a_listener_that_blocks: |pod| {
        pod.while_blocking(|| {
            // Where one of them is first, the router finds none.
            for _ in 0..4 {
                let listener = TcpListener::from(rustix::io::dup(&pod.listener).unwrap());
                thread::spawn(move || while listener.accept().is_ok() {});
            }
            for _ in 0..200 {
                drop(TcpStream::connect(pod.import).unwrap());
            }
        });
    };
    shuts_a_listener_down_and_listens_again: |pod| {
        let listener = SockRef::from(&pod.listener);
        let _ = listener.shutdown(std::net::Shutdown::Both);
        listener.listen(1).unwrap();
    };
    has_a_same_node_flow_block: |pod| {
        pod.while_blocking(|| pod.flow(pod.import_own));
    };
    has_a_flow_of_another_node_block: |pod| {
        pod.while_blocking(|| pod.flow(pod.import_far));
    };
    has_a_connect_block: |pod| {
        *pod.target.lock().unwrap() = Target::Deaf;
        pod.while_blocking(|| pod.flow(pod.import_own));
    };
    sets_long_timeouts: |pod| {
        for socket in pod.shared.lock().unwrap().iter() {
            let socket = SockRef::from(socket);
            socket.set_read_timeout(Some(Duration::from_secs(3600))).unwrap();
            socket.set_write_timeout(Some(Duration::from_secs(3600))).unwrap();
        }
        pod.while_blocking(|| pod.flow(pod.import_own));
    };
    reads_datagrams_itself_from_a_socket_that_blocks: |pod| {
        pod.while_blocking(|| {
            let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
            for _ in 0..100 {
                sender.send_to(b"x", pod.import_udp).unwrap();
                let _ = rustix::net::recv(&pod.udp, &mut [0; 8], rustix::net::RecvFlags::DONTWAIT);
            }
        });
    };
    shuts_down_or_connects_its_udp_sockets: |pod| {
        let _ = SockRef::from(&pod.udp).shutdown(std::net::Shutdown::Both);
        for socket in
            pod.shared.lock().unwrap().iter().filter(|s| s.check(DescriptorKind::UdpUnconnected).is_ok())
        {
            let _ = SockRef::from(socket).connect(&SocketAddr::from(([127, 0, 0, 1], 9)).into());
        }
    };
    connects_its_stock_elsewhere: |pod| {
        let elsewhere = TcpListener::bind("127.0.0.1:0").unwrap();
        for socket in pod.shared.lock().unwrap().iter() {
            let socket = SockRef::from(socket);
            let _ = socket.connect(&elsewhere.local_addr().unwrap().into());
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        pod.flow(pod.import_own);
    };
    drops_all_by_a_filter: |pod| {
        let none = [SockFilter::new(0x06, 0, 0, 0)];
        for socket in pod.shared.lock().unwrap().iter().chain([&pod.listener, &pod.udp]) {
            SockRef::from(socket).attach_filter(&none).unwrap();
        }
        pod.while_blocking(|| pod.flow(pod.import_own));
    };
    has_the_last_close_wait_for_unsent_bytes: |pod| {
        pod.hand_over(lingering());
    };
}

/// A connection with bytes that nobody takes, and an hour for them at its close.
fn lingering() -> OsDescriptor {
    let deaf = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut stream = TcpStream::connect(deaf.local_addr().unwrap()).unwrap();
    // Accepted and never read, for as long as the test runs.
    std::mem::forget(deaf.accept().unwrap());
    stream.set_nonblocking(true).unwrap();
    while stream.write(&[0; 64 << 10]).is_ok() {}
    SockRef::from(&stream).set_linger(Some(Duration::from_secs(3600))).unwrap();
    OsDescriptor::from(std::os::fd::OwnedFd::from(stream))
}

fn set_blocking(socket: &impl AsFd) {
    rustix::fs::fcntl_setfl(socket, OFlags::empty()).unwrap();
}

/// What the pod's exported port leads to.
#[derive(Clone, Copy, PartialEq)]
enum Target {
    Echo,
    /// Its backlog is full: a connect waits.
    Deaf,
}

struct Hostile {
    /// A duplicate of each socket that the router has.
    shared: Arc<Mutex<Vec<OsDescriptor>>>,
    listener: OsDescriptor,
    udp: OsDescriptor,
    import: SocketAddr,
    import_udp: SocketAddr,
    /// Its own export, from the same node.
    import_own: SocketAddr,
    /// And from the other.
    import_far: SocketAddr,
    target: Arc<Mutex<Target>>,
    more: tokio::sync::mpsc::Sender<OsDescriptor>,
}

impl Hostile {
    /// Whatever the router does meanwhile, it meets sockets that block.
    fn while_blocking(&self, act: impl FnOnce()) {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    set_blocking(&self.listener);
                    set_blocking(&self.udp);
                    self.shared.lock().unwrap().iter().for_each(set_blocking);
                }
            });
            act();
            thread::sleep(Duration::from_millis(200));
            done.store(true, Ordering::Relaxed);
        });
    }

    /// Begins three flows to its own export, which stand still after a byte.
    fn flow(&self, at: SocketAddr) {
        for _ in 0..3 {
            let mut stream = TcpStream::connect(at).unwrap();
            stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            let _ = stream.write_all(b"x").and_then(|()| stream.read_exact(&mut [0]));
            // Open for as long as the test runs.
            std::mem::forget(stream);
        }
    }

    fn hand_over(&self, socket: OsDescriptor) {
        self.more.blocking_send(socket).unwrap();
    }
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

fn pod(name: &str) -> Pod {
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    Pod { name: name.into(), namespace: "default".parse().unwrap(), uid: format!("{name}-{number}") }
}

async fn import(
    net: &OsNet,
    conversation: &Conversation,
    id: u64,
    wanted: ServicePort,
) -> (OsDescriptor, SocketAddr) {
    let kind = match wanted.protocol {
        Protocol::Tcp => DescriptorKind::TcpListener,
        Protocol::Udp => DescriptorKind::UdpBound,
    };
    let socket = net.make_bound(kind, "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let at = socket.local_addr().unwrap();
    let message = ToRouter::Import { id, wanted }.encode();
    conversation.send(&message, vec![socket.share().unwrap()]).await.unwrap();
    (socket, at)
}

/// A pod whose two programs have sockets at both routers.
async fn hostile(stand: &mut Stand, number: u16) -> Hostile {
    let net = OsNet::new();
    let far = say_hello(&net, stand.b.sidecars(), pod("far"), Vec::new()).await;
    let near = say_hello(&net, stand.a.sidecars(), pod("near"), Vec::new()).await;
    let service = port(81 + number);
    let (echo, deaf) = (TcpListener::bind("127.0.0.1:0").unwrap(), deaf());
    let target = Arc::new(Mutex::new(Target::Echo));
    let (listener, import_at) = import(&net, &near, 1, port(80)).await;
    let (udp, import_udp) = import(&net, &near, 2, ServicePort { protocol: Protocol::Udp, ..port(80) }).await;
    let (own, import_own) = import(&net, &near, 3, service.clone()).await;
    let (at_far, import_far) = import(&net, &far, 1, service.clone()).await;
    let export = |id, target: SocketAddr| ToRouter::Export {
        id,
        offered: service.clone(),
        target: target.port().try_into().unwrap(),
        allow: None,
    };
    near.send(&export(4, echo.local_addr().unwrap()).encode(), Vec::new()).await.unwrap();
    let deaf_export = export(4, deaf.local_addr().unwrap().as_socket().unwrap()).encode();
    thread::spawn(move || {
        for stream in echo.incoming() {
            thread::spawn(move || {
                let mut stream = stream.unwrap();
                let mut byte = [0];
                while stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte)).is_ok() {}
            });
        }
    });
    let shared = Arc::new(Mutex::new(Vec::new()));
    let (more, mut further) = tokio::sync::mpsc::channel::<OsDescriptor>(8);
    let (kept, wanted) = (shared.clone(), target.clone());
    stand.spawn(async move {
        let _held = (own, at_far, deaf, far);
        let mut is = Target::Echo;
        loop {
            tokio::select! {
                message = near.recv() => {
                    let Ok(Some((bytes, _))) = message else { return };
                    let Ok(ToSidecar::More { tcp, udp }) = ToSidecar::decode(&bytes) else { continue };
                    let tcps = std::iter::repeat_n(DescriptorKind::TcpUnconnected, tcp.into());
                    let udps = std::iter::repeat_n(DescriptorKind::UdpUnconnected, udp.into());
                    let made: Vec<_> = tcps.chain(udps).map(|kind| net.make_unbound(kind).unwrap()).collect();
                    kept.lock().unwrap().extend(made.iter().map(|socket| socket.share().unwrap()));
                    let _ = near.send(&ToRouter::Stock { tcp, udp }.encode(), made).await;
                }
                Some(socket) = further.recv() => {
                    let _ = near.send(&ToRouter::Stock { tcp: 1, udp: 0 }.encode(), vec![socket]).await;
                }
                () = tokio::time::sleep(Duration::from_millis(5)) => {
                    let now = *wanted.lock().unwrap();
                    if now != is && now == Target::Deaf {
                        near.send(&deaf_export, Vec::new()).await.unwrap();
                    }
                    is = now;
                }
            }
        }
    });
    Hostile { shared, listener, udp, import: import_at, import_udp, import_own, import_far, target, more }
}

/// A listener whose backlog is full.
fn deaf() -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let at = socket.local_addr().unwrap().as_socket().unwrap();
    while let Ok(stream) = TcpStream::connect_timeout(&at, Duration::from_millis(100)) {
        std::mem::forget(stream);
    }
    socket
}

/// From connect to the first byte back: what one of a hundred exceeds. The middle one of the rounds.
fn p99(ways: &[SocketAddr]) -> Duration {
    let mut rounds = Vec::new();
    while rounds.len() < ROUNDS && rounds.last().is_none_or(|took| *took < PATIENCE) {
        rounds.push(round(ways));
    }
    rounds.sort();
    rounds[rounds.len() / 2]
}

fn round(ways: &[SocketAddr]) -> Duration {
    let mut took = Vec::new();
    while took.len() < FLOWS && took.last().is_none_or(|took| *took < PATIENCE) {
        took.push(once(ways[took.len() % ways.len()]));
    }
    took.sort();
    took[(took.len() - 1) * 99 / 100]
}

fn once(at: SocketAddr) -> Duration {
    let start = Instant::now();
    let mut stream = TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    match stream.write_all(b"x").and_then(|()| stream.read_exact(&mut [0])) {
        Ok(()) => start.elapsed(),
        Err(_) => PATIENCE.max(start.elapsed()),
    }
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// One at a time: they measure.
static ALONE: Mutex<()> = Mutex::new(());

fn beside(act: impl Fn(&Hostile)) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let runtime = runtime();
    let (mut stand, ways, _neighbour) = runtime.block_on(async {
        let stand = Stand::new().await;
        let net = OsNet::new();
        let neighbour = say_hello(&net, stand.a.sidecars(), pod("neighbour"), Vec::new()).await;
        let (listener, at) = import(&net, &neighbour, 1, port(80)).await;
        let ways = [at, stand.import_tcp];
        (stand, ways, (neighbour, listener))
    });
    let mut pods = Vec::new();
    for number in 0..PODS {
        let pod = runtime.block_on(hostile(&mut stand, number));
        // Its stock has come, and its offer has reached the other router.
        let works = |at| (0..50).any(|_| once(at) < PATIENCE);
        assert!(works(pod.import_own) && works(pod.import_far));
        pods.push(pod);
    }
    round(&ways);
    let usual = p99(&ways);
    pods.iter().for_each(act);
    thread::sleep(Duration::from_millis(100));
    let now = p99(&ways);
    // What is stuck is not waited for.
    runtime.shutdown_background();
    assert!(now <= FLOOR.max(usual.mul_f64(1.5)), "a neighbour's p99 was {usual:?} and is {now:?}");
}

/// A program that is killed with the test.
struct Program(std::process::Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn get(at: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&at, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

async fn hand_over_lingering(socket: &Path) {
    for _ in 0..3 {
        let conversation = say_hello(&OsNet::new(), socket, pod("hostile"), Vec::new()).await;
        let message = ToRouter::Stock { tcp: 1, udp: 0 }.encode();
        conversation.send(&message, vec![lingering()]).await.unwrap();
        // Refused, and closed.
        while let Ok(Some(_)) = conversation.recv().await {}
    }
}

#[test]
fn three_sockets_that_block_stop_neither_livez_nor_sigterm() {
    let dir = tempfile::tempdir().unwrap();
    let admin = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let socket = dir.path().join("router.sock");
    let config = dir.path().join("router.yaml");
    let listen = format!("{{ sidecars: {}, peers: off, admin: {admin} }}", socket.display());
    std::fs::write(&config, format!("cluster: a.local\nnode: a-1\nlisten: {listen}\n")).unwrap();
    let mut router = Program(
        Command::new(env!("CARGO_BIN_EXE_servicekeel-router"))
            .arg("--config")
            .arg(&config)
            .env("TOKIO_WORKER_THREADS", "2")
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let runtime = runtime();
    // Whether the sidecar hears of its end is not what this is about.
    let refused = async { tokio::time::timeout(PATIENCE, hand_over_lingering(&socket)).await };
    let _ = runtime.block_on(refused);
    assert!(get(admin, "/livez").is_ok_and(|text| text.starts_with("HTTP/1.1 200")), "the node stands");
    let pid = rustix::process::Pid::from_child(&router.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let end = Instant::now() + PATIENCE;
    let status = loop {
        match router.0.try_wait().unwrap() {
            Some(status) => break status,
            None => assert!(Instant::now() < end, "SIGTERM does not end it"),
        }
        thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
}
