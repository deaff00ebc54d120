//! What a pod that means harm does to the sockets that it shares with the router holds up nobody but itself: beside it a
//! neighbour's flows begin as fast as those of a node that has no such pod, measured at the same time.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

mod hostile;
mod lingering;
mod program;
#[allow(dead_code, reason = "each file takes what it needs")]
mod stand;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use hostile::{Hostile, hand_over_lingering, import, pod};
use program::Program;
use servicekeel_core::handoff::DescriptorKind;
use servicekeel_runtime::net::Descriptor;
use servicekeel_runtime::net::os::{OsDescriptor, OsNet};
use socket2::{SockFilter, SockRef};
use stand::{Conversation, Stand, port, say_hello};
use tokio::runtime::{Builder, Runtime};

const PATIENCE: Duration = Duration::from_secs(5);
/// More than the router has workers.
const PODS: u16 = 3;
/// Of one round, on each of the two nodes.
const FLOWS: usize = 200;
/// What is slower by less than this says nothing: the pods' threads have their turns on the processors, of some
/// milliseconds each, and a flow needs several of the router's. A worker that waits in the kernel shows as tenths of a
/// second and more.
const FLOOR: Duration = Duration::from_millis(10);
/// On a machine that does other work as well some rounds are spoilt, those of either node. So many must be as fast, while
/// the pods do so many deeds ...
const ENOUGH: usize = 4;
const DEEDS: u32 = 4 * PODS as u32;
/// ... of so many at most. What a worker waits for shows in each from then on.
const ROUNDS: usize = 12;

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
        pod.accept();
        pod.while_blocking(|| {
            for _ in 0..20 {
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
        pod.be_deaf();
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
        let is_udp = |socket: &&OsDescriptor| socket.check(DescriptorKind::UdpUnconnected).is_ok();
        for socket in pod.shared.lock().unwrap().iter().filter(is_udp) {
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
        let refused = async { tokio::time::timeout(PAUSE, hand_over_lingering(&pod.router)).await };
        // Whether its sidecar hears of its end is not what this is about.
        let _ = Builder::new_current_thread().enable_all().build().unwrap().block_on(refused);
    };
}

/// What a pod does it does again after this time: what it takes of the processors is not what this is about.
const PAUSE: Duration = Duration::from_millis(50);

/// A node whose router carries a neighbour's flows, and the one behind it.
struct Node {
    runtime: Runtime,
    stand: Stand,
    /// To the other node, from each of the two.
    ways: [SocketAddr; 2],
    _neighbour: (Conversation, OsDescriptor),
}

impl Node {
    fn start() -> Self {
        let runtime = runtime();
        let (stand, ways, neighbour) = runtime.block_on(async {
            let stand = Stand::new().await;
            let neighbour = say_hello(&OsNet::new(), stand.a.sidecars(), pod("neighbour"), Vec::new()).await;
            let (listener, at) = import(&OsNet::new(), &neighbour, 1, port(80)).await;
            let ways = [at, stand.import_tcp];
            (stand, ways, (neighbour, listener))
        });
        Self { runtime, stand, ways, _neighbour: neighbour }
    }

    fn once(&self, number: usize) -> Duration {
        once(self.ways[number % self.ways.len()])
    }

    /// What is stuck is not waited for.
    fn end(self) {
        self.runtime.shutdown_background();
    }
}

/// From connect to the first byte back.
fn once(at: SocketAddr) -> Duration {
    let start = Instant::now();
    let mut stream = TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    match stream.write_all(b"x").and_then(|()| stream.read_exact(&mut [0])) {
        Ok(()) => start.elapsed(),
        Err(_) => PATIENCE.max(start.elapsed()),
    }
}

/// The p99 of one round of each node, whose flows begin in turns: what else the machine does slows both.
fn round(calm: &Node, harmed: &Node) -> [Duration; 2] {
    let mut took = [Vec::new(), Vec::new()];
    let is_stuck = |took: &Vec<Duration>| took.last().is_some_and(|took| *took >= PATIENCE);
    while took[0].len() < FLOWS && !took.iter().any(is_stuck) {
        let number = took[0].len();
        took[0].push(calm.once(number));
        took[1].push(harmed.once(number));
    }
    took.map(|mut took| {
        took.sort();
        // One that is stuck is not left out as the slowest of a hundred.
        let stuck = took.last().copied().filter(|took| *took >= PATIENCE);
        stuck.unwrap_or(took[(took.len() - 1) * 99 / 100])
    })
}

/// Measures until it is known, while the pods do their `deeds`.
///
/// # Errors
/// The neighbour is slower beside the harm: the rounds.
fn compare(calm: &Node, harmed: &Node, deeds: &AtomicU32) -> Result<(), String> {
    let (mut as_fast, mut rounds) = (0, Vec::new());
    let is_known = |as_fast| as_fast >= ENOUGH && deeds.load(Ordering::Relaxed) >= DEEDS;
    while !is_known(as_fast) && rounds.len() < ROUNDS {
        let [usual, now] = round(calm, harmed);
        as_fast += usize::from(now <= usual.mul_f64(1.5).max(usual + FLOOR));
        rounds.push(format!("{now:?} where it is {usual:?} without"));
        if now >= PATIENCE && usual < PATIENCE {
            return Err(rounds.join(", "));
        }
    }
    if as_fast < ENOUGH { Err(rounds.join(", ")) } else { Ok(()) }
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// One at a time: they measure.
static ALONE: Mutex<()> = Mutex::new(());

fn beside(act: impl Fn(&Hostile) + Sync) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (calm, mut harmed) = (Node::start(), Node::start());
    // The pods' own tasks wait for no worker of the routers.
    let elsewhere = runtime();
    let mut pods = Vec::new();
    for number in 0..PODS {
        let pod = elsewhere.block_on(Hostile::start(&mut harmed.stand, number));
        // Its stock has come, and its offer has reached the other router.
        let works = |at| (0..50).any(|_| once(at) < PATIENCE);
        assert!(works(pod.import_own) && works(pod.import_far));
        pods.push(pod);
    }
    let (over, deeds) = (AtomicBool::new(false), AtomicU32::new(0));
    let compared = thread::scope(|scope| {
        for pod in &pods {
            let (act, over, deeds) = (&act, &over, &deeds);
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    act(pod);
                    deeds.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(PAUSE);
                }
            });
        }
        let compared = compare(&calm, &harmed, &deeds);
        over.store(true, Ordering::Relaxed);
        compared
    });
    [calm, harmed].into_iter().for_each(Node::end);
    elsewhere.shutdown_background();
    if let Err(rounds) = compared {
        panic!("a neighbour's p99 is {rounds}");
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

#[test]
fn three_sockets_that_block_stop_neither_livez_nor_sigterm() {
    let dir = tempfile::tempdir().unwrap();
    let admin = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let socket = dir.path().join("router.sock");
    let config = dir.path().join("router.yaml");
    let listen = format!("{{ sidecars: {}, peers: off, admin: {admin} }}", socket.display());
    std::fs::write(&config, format!("cluster: a.local\nnode: a-1\nlisten: {listen}\n")).unwrap();
    let mut router = Program::start(
        Command::new(env!("CARGO_BIN_EXE_servicekeel-router"))
            .arg("--config")
            .arg(&config)
            .env("TOKIO_WORKER_THREADS", "2"),
    );
    let refused = async {
        for _ in 0..3 {
            hand_over_lingering(&socket).await;
        }
    };
    // Whether the sidecar hears of its end is not what this is about.
    let _ = runtime().block_on(async { tokio::time::timeout(PATIENCE, refused).await });
    assert!(get(admin, "/livez").is_ok_and(|text| text.starts_with("HTTP/1.1 200")), "the node stands");
    let pid = rustix::process::Pid::from_child(&router);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let end = Instant::now() + PATIENCE;
    let status = loop {
        match router.try_wait().unwrap() {
            Some(status) => break status,
            None => assert!(Instant::now() < end, "SIGTERM does not end it"),
        }
        thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
}
