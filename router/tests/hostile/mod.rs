//! A pod that means harm: it keeps a duplicate of each socket that the router has of it, and does with it what it likes.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::fs::OFlags;
use servicekeel_core::handoff::{DescriptorKind, Pod, ToRouter, ToSidecar};
use servicekeel_core::name::{Protocol, ServicePort};
use servicekeel_runtime::net::os::{OsDescriptor, OsNet};
use servicekeel_runtime::net::{Descriptor, Handoff, Net};
use socket2::{Domain, Socket, Type};

use crate::stand::{Conversation, Stand, port, say_hello};

/// Its flows that are open at once: all its node's flows are of one owner, and few open files may be allowed here.
const FLOWS: usize = 6;

/// The pods do it in turns: each has a processor for itself, since the router makes a socket not block right before it
/// uses it.
static TURN: Mutex<()> = Mutex::new(());

/// How long the router has for what came.
const ROUND: Duration = Duration::from_millis(100);

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

pub(crate) struct Hostile {
    /// A duplicate of each socket that the router has.
    pub(crate) shared: Arc<Mutex<Vec<OsDescriptor>>>,
    pub(crate) listener: OsDescriptor,
    pub(crate) udp: OsDescriptor,
    pub(crate) import: SocketAddr,
    pub(crate) import_udp: SocketAddr,
    /// Its own export, from the same node.
    pub(crate) import_own: SocketAddr,
    /// And from the other.
    pub(crate) import_far: SocketAddr,
    /// Where it finds its router.
    pub(crate) router: PathBuf,
    target: Arc<Mutex<Target>>,
    open: Mutex<VecDeque<TcpStream>>,
    accepting: OnceLock<()>,
}

impl Hostile {
    /// A pod with a program on each node of the stand. Its own tasks run where this does.
    pub(crate) async fn start(stand: &mut Stand, number: u16) -> Self {
        let net = OsNet::new();
        let router = stand.a.sidecars().to_owned();
        let far = say_hello(&net, stand.b.sidecars(), pod("far"), Vec::new()).await;
        let near = say_hello(&net, &router, pod("near"), Vec::new()).await;
        let service = port(81 + number);
        let (echo, deaf) = (TcpListener::bind("127.0.0.1:0").unwrap(), deaf());
        let target = Arc::new(Mutex::new(Target::Echo));
        let (listener, import_at) = import(&net, &near, 1, port(80)).await;
        let datagrams = ServicePort { protocol: Protocol::Udp, ..port(80) };
        let (udp, import_udp) = import(&net, &near, 2, datagrams).await;
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
        serve(echo);
        let shared = Arc::new(Mutex::new(Vec::new()));
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
        Self {
            shared,
            listener,
            udp,
            import: import_at,
            import_udp,
            import_own,
            import_far,
            router,
            target,
            open: Mutex::default(),
            accepting: OnceLock::new(),
        }
    }

    /// Whatever the router does meanwhile, it meets sockets that block.
    pub(crate) fn while_blocking(&self, act: impl FnOnce()) {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
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
            thread::sleep(ROUND);
            done.store(true, Ordering::Relaxed);
        });
    }

    /// Begins three flows to its own export, which stand still after a byte.
    pub(crate) fn flow(&self, at: SocketAddr) {
        for _ in 0..3 {
            let mut stream = TcpStream::connect(at).unwrap();
            stream.set_read_timeout(Some(ROUND)).unwrap();
            let _ = stream.write_all(b"x").and_then(|()| stream.read_exact(&mut [0]));
            let mut open = self.open.lock().unwrap();
            open.push_back(stream);
            let most = open.len().saturating_sub(FLOWS);
            open.drain(..most);
        }
    }

    /// Takes what comes at its listener itself from now on: where one of its threads is first, the router finds none.
    pub(crate) fn accept(&self) {
        self.accepting.get_or_init(|| {
            for _ in 0..4 {
                let listener = TcpListener::from(rustix::io::dup(&self.listener).unwrap());
                thread::spawn(move || while listener.accept().is_ok() {});
            }
        });
    }

    /// What it exports leads from now on to a port where a connect waits.
    pub(crate) fn be_deaf(&self) {
        *self.target.lock().unwrap() = Target::Deaf;
    }
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

pub(crate) fn pod(name: &str) -> Pod {
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    Pod { name: name.into(), namespace: "default".parse().unwrap(), uid: format!("{name}-{number}") }
}

pub(crate) async fn import(
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

/// Passes a socket as stock whose last close waits for an hour, in a conversation of its own, which the router ends for it.
pub(crate) async fn hand_over_lingering(router: &Path) {
    let conversation = say_hello(&OsNet::new(), router, pod("hostile"), Vec::new()).await;
    let message = ToRouter::Stock { tcp: 1, udp: 0 }.encode();
    conversation.send(&message, vec![crate::lingering::lingering()]).await.unwrap();
    while let Ok(Some(_)) = conversation.recv().await {}
}

fn serve(echo: TcpListener) {
    thread::spawn(move || {
        for stream in echo.incoming() {
            thread::spawn(move || {
                let mut stream = stream.unwrap();
                let mut byte = [0];
                while stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte)).is_ok() {}
            });
        }
    });
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
