//! Outsiders that make the log grow: a peer and a pod, each in a loop.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

#[allow(dead_code, reason = "each file takes what it needs")]
mod stand;

use std::fmt::{Debug, Write};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use servicekeel_core::flow::frame::{Kind, Preface, Purpose, VERSION};
use servicekeel_core::handoff::{DescriptorKind, Pod, ToRouter};
use servicekeel_core::mesh::LinkMessage;
use servicekeel_core::name::{Protocol, ServicePort};
use servicekeel_router::tls::{self, BufferPool, Channel};
use servicekeel_runtime::net::os::{OsNet, OsStream};
use servicekeel_runtime::net::{Descriptor, Handoff, Net};
use stand::{Stand, wait_for};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

const LIMIT: Duration = Duration::from_secs(10);

/// The log of this process, whose routers are those of all its tests.
static LOG: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Log;

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        write!(self.0, "{field}={value:?} ").unwrap();
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::INFO
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        LOG.lock().unwrap_or_else(PoisonError::into_inner).push(line.0);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn listen() {
    static SET: OnceLock<()> = OnceLock::new();
    SET.get_or_init(|| tracing::subscriber::set_global_default(Log).unwrap());
}

fn lines(words: &str) -> Vec<String> {
    let log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    log.iter().filter(|line| line.contains(words)).cloned().collect()
}

/// How many lines one says that it stands for.
fn suppressed(line: &str) -> u64 {
    let number = line.split_once("suppressed=").and_then(|(_, rest)| rest.split(' ').next());
    number.map_or(0, |number| number.parse().unwrap())
}

/// A link to the router of a.local by that of b.local.
async fn link(stand: &Stand, boot: u64) -> Channel<OsStream> {
    let identity = stand.b.identity();
    let at = stand.a.peers.to_string();
    let stream = wait_for(LIMIT, async || OsNet::new().connect(&at).await.ok()).await;
    let (mut channel, _) = tls::connect(stream, identity.client(), BufferPool::new()).await.unwrap();
    let preface = Preface { version: VERSION, purpose: Purpose::Link, sender: identity.id().clone(), boot };
    say(&mut channel, Kind::Preface, &preface).await;
    assert_eq!(channel.recv().await.unwrap().unwrap().0.kind, Kind::Preface);
    channel
}

async fn say(channel: &mut Channel<OsStream>, kind: Kind, message: &impl minicbor::Encode<()>) {
    channel.send_message(kind, 0, message).unwrap();
    channel.flush().await.unwrap();
}

#[tokio::test]
async fn a_peer_fills_no_log() {
    listen();
    let stand = Stand::apart().await;
    let mut channel = link(&stand, 7).await;
    wait_for(LIMIT, async || (stand.a.metric("links_active").await == 1.0).then_some(())).await;
    for message in [LinkMessage::Synced, LinkMessage::Goodbye] {
        for _ in 0..2_000 {
            say(&mut channel, Kind::Message, &message).await;
        }
    }
    wait_for(LIMIT, async || {
        // The next one that is told says how many were not.
        say(&mut channel, Kind::Message, &LinkMessage::Synced).await;
        let synced = lines("exports synced");
        synced.iter().any(|line| suppressed(line) > 3_900).then_some(())
    })
    .await;
    let words = lines("exports synced").len() + lines("peer is shutting down").len();
    assert!((1..30).contains(&words), "{words} lines");
    drop(channel);

    for boot in 8..100 {
        drop(link(&stand, boot).await);
    }
    // It has met the last of them, and seen the ends of all.
    wait_for(LIMIT, async || (stand.a.metric("links_active").await == 0.0).then_some(())).await;
    let turns = ["link up", "link down", "link closed", "peer restarted"].map(|words| lines(words).len());
    let sum: usize = turns.iter().sum();
    assert!((2..30).contains(&sum), "{turns:?}");
}

#[tokio::test]
async fn many_strangers_that_make_room_are_told_once() {
    listen();
    servicekeel_runtime::limit::raise_open_files();
    let stand = Stand::apart().await;
    let words = "too many unidentified connections";
    let closed = async || stand.a.metric("peers_refused_total").await;
    let mut strangers = vec![wait_for(LIMIT, async || TcpStream::connect(stand.a.peers).await.ok()).await];
    let mut crowd = async |number: usize| {
        for _ in 0..number {
            strangers.push(TcpStream::connect(stand.a.peers).await.unwrap());
        }
    };
    crowd(400).await;
    wait_for(LIMIT, async || (closed().await >= 100.0).then_some(())).await;
    let told = lines(words);
    assert!(told.len() == 1 && suppressed(&told[0]) == 0, "{told:#?}");
    // The next line says how many were not told. It is due 10 s after the first, which is when a handshake has lasted too
    // long as well: more come than end.
    let told = wait_for(2 * LIMIT, async || {
        crowd(40).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        (lines(words).len() > 1).then(|| lines(words))
    })
    .await;
    assert!(told.len() == 2 && suppressed(&told[1]) >= 99, "{told:#?}");
}

/// As b.local's disk is copied to another machine, which starts while flows run.
#[tokio::test]
async fn two_routers_of_one_name_are_told_at_both_ends_and_the_first_keeps_its_flows() {
    listen();
    let mut stand = Stand::new().await;
    let mut flow = stand.connect().await;
    let echoes = async |flow: &mut TcpStream| {
        flow.write_all(b"x").await.is_ok() && flow.read_exact(&mut [0]).await.is_ok()
    };
    assert!(echoes(&mut flow).await);
    let mut twin = stand.twin().await;
    twin.start(3);
    // Rejected again and again, it is told as what it is, once.
    wait_for(LIMIT, async || (stand.a.metric("peers_refused_total").await >= 3.0).then_some(())).await;
    assert!(echoes(&mut flow).await, "the flow of the one that was first is cut");
    for number in 0..20 {
        assert!(echoes(&mut stand.connect().await).await, "new flow {number} of the one that was first");
    }
    let twins = lines("another router with this name is already linked");
    assert!(twins.len() <= 2, "{twins:#?}");
    let unreached = twins.iter().filter(|line| line.contains("peer unreachable; retrying")).count();
    assert_eq!(unreached, 1, "{twins:#?}");
    let (code, said) = twin.tool().await;
    let problem = "PROBLEM: the peer ";
    let line = said.lines().find(|line| line.starts_with(problem)).unwrap_or_else(|| panic!("{said}"));
    assert!(code == 1 && line.contains("another router with this name is already linked"), "{said}");
    let (code, said) = stand.a.tool().await;
    assert!(code == 1 && said.contains("PROBLEM: two routers have the name b.local/n: "), "{said}");
    assert_eq!(stand.b.tool().await.0, 0);

    // The first one goes, and the other takes its place.
    stand.b.end().await;
    wait_for(LIMIT, async || (twin.tool().await.0 == 0).then_some(())).await;
}

#[tokio::test]
async fn an_import_that_is_made_anew_in_a_loop_fills_no_log() {
    listen();
    let stand = Stand::apart().await;
    let net = OsNet::new();
    let pod = Pod { name: "loud".into(), namespace: "default".parse().unwrap(), uid: "loud".into() };
    let conversation = stand::say_hello(&net, stand.b.sidecars(), pod, Vec::new()).await;
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for number in 0..100 {
        let mut wanted = ServicePort { protocol: Protocol::Udp, ..stand::port(80) };
        wanted.service.name = format!("loud-{number}").parse().unwrap();
        let socket = net.make_bound(DescriptorKind::UdpBound, "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let at = socket.local_addr().unwrap();
        conversation.send(&ToRouter::Import { id: 1, wanted }.encode(), vec![socket]).await.unwrap();
        let before = f64::from(number);
        client.send_to(b"x", at).await.unwrap();
        wait_for(LIMIT, async || (stand.b.metric("datagrams_dropped_total").await > before).then_some(()))
            .await;
    }
    let told = lines("loud-").len();
    assert!((1..50).contains(&told), "{told} lines");
}
