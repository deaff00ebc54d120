//! Whole routers on the kernel's loopback, with a stand-in for their sidecars: what changes while flows run.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

mod crowd;
mod expiry;
mod files;
mod flood;
mod hidden;
mod offers;
mod program;
mod reasons;
mod refused;
mod sessions;
mod sidecars;
mod slow;
mod stand;
mod told;
mod trust;

use std::time::Duration;

use servicekeel_runtime::admin;
use stand::{Stand, pattern};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(10);

async fn says(stream: &mut TcpStream, word: &[u8]) -> std::io::Result<Vec<u8>> {
    stream.write_all(word).await?;
    let mut got = vec![0; word.len()];
    timeout(LIMIT, stream.read_exact(&mut got)).await??;
    Ok(got)
}

#[tokio::test]
async fn a_flow_outlives_new_certificates_and_ends_with_the_trust() {
    let mut stand = Stand::new().await;
    let mut flow = stand.connect().await;
    assert_eq!(says(&mut flow, b"before").await.unwrap(), b"before");

    // Both get new certificates of the same authorities, and a peer that nobody answers for.
    for router in [&mut stand.a, &mut stand.b] {
        router.issue();
        router.settings.peers.push("127.0.0.1:1".into());
        router.apply();
    }
    assert_eq!(says(&mut flow, b"rotated").await.unwrap(), b"rotated");
    // New connections, by the new certificates: more at once than the pool holds.
    let mut more = Vec::new();
    for _ in 0..20 {
        more.push(stand.connect().await);
    }
    for stream in &mut more {
        assert_eq!(says(stream, b"x").await.unwrap(), b"x");
    }

    // The exporter no longer trusts the consumer's cluster.
    stand.a.settings.trust.clear();
    stand.a.apply();
    let read = timeout(LIMIT, flow.read(&mut [0])).await.expect("the flow is cut");
    assert!(read.is_err(), "it looks as if the service had ended: {read:?}");
    let refused = timeout(LIMIT, stand.is_reset());
    assert!(refused.await.expect("a new flow fails fast"));

    // And trusts it again.
    stand.a.settings.trust.push(stand.b.authority());
    stand.a.apply();
    stand.wait_until_it_works().await;
}

#[tokio::test]
async fn another_authority_of_the_same_name_is_another_cluster() {
    let mut stand = Stand::new().await;
    let mut flow = stand.connect().await;
    assert_eq!(says(&mut flow, b"before").await.unwrap(), b"before");
    // As after the loss of a key: a new authority for b.local. What the old one vouched for is cut off.
    let renewed = stand::authority("b.local");
    stand.a.settings.trust = vec![renewed.certificate().to_owned()];
    stand.a.apply();
    let read = timeout(LIMIT, flow.read(&mut [0])).await.expect("the flow is cut");
    assert!(read.is_err(), "{read:?}");
    // The router of b.local gets a certificate of the new one.
    stand.b.replace_authority(renewed);
    stand.b.apply();
    stand.wait_until_it_works().await;
}

#[tokio::test]
async fn an_identity_that_comes_late() {
    let mut stand = Stand::without_identities().await;
    let refused = timeout(LIMIT, stand.is_reset());
    assert!(refused.await.expect("no route: reset"));
    for router in [&mut stand.a, &mut stand.b] {
        router.settings.has_identity = true;
        router.apply();
    }
    stand.wait_until_it_works().await;
}

#[tokio::test]
async fn an_address_for_peers_that_is_taken_is_tried_again() {
    let mut stand = Stand::without_identities().await;
    let taken = std::net::TcpListener::bind(stand.a.peers).unwrap();
    for router in [&mut stand.a, &mut stand.b] {
        router.settings.has_identity = true;
        router.apply();
    }
    stand::wait_for(LIMIT, async || {
        let (code, text) = admin::get(stand.a.admin, "/readyz").await.ok()?;
        (code == 503 && text.contains("listen.peers")).then_some(())
    })
    .await;
    drop(taken);
    stand.wait_until_it_works().await;
    assert_eq!(stand.a.asks("/readyz").await.0, 200);
}

#[tokio::test]
async fn a_peer_that_is_no_longer_configured() {
    let mut stand = Stand::new().await;
    let mut flow = stand.connect().await;
    assert_eq!(says(&mut flow, b"before").await.unwrap(), b"before");
    let address = stand.b.settings.peers.remove(0);
    stand.b.apply();
    // New flows find no route; the old one has its time to end.
    stand::wait_for(LIMIT, async || {
        let Ok(mut stream) = TcpStream::connect(stand.import_tcp).await else { return Some(()) };
        says(&mut stream, b"x").await.is_err().then_some(())
    })
    .await;
    assert_eq!(says(&mut flow, b"still").await.unwrap(), b"still");
    stand.b.settings.peers.push(address);
    stand.b.apply();
    stand.wait_until_it_works().await;
    assert_eq!(says(&mut flow, b"again").await.unwrap(), b"again");
}

#[tokio::test]
async fn strangers_who_say_nothing_keep_nobody_out() {
    let stand = Stand::new().await;
    let mut strangers = Vec::new();
    for _ in 0..600 {
        strangers.push(TcpStream::connect(stand.a.peers).await.unwrap());
    }
    // The exporter's router is at its bound of handshakes; the consumer's needs some for what follows.
    let mut flows = Vec::new();
    for _ in 0..20 {
        flows.push(stand.connect().await);
    }
    for flow in &mut flows {
        assert_eq!(says(flow, b"let me in").await.unwrap(), b"let me in");
    }
    // The oldest of them were closed, long before their time was over.
    let soon = Duration::from_secs(2);
    let closed = timeout(soon, strangers[0].read(&mut [0])).await.expect("the oldest makes room");
    assert!(matches!(closed, Ok(0) | Err(_)));
}

#[tokio::test]
async fn datagrams_of_every_size_and_of_many_clients() {
    let stand = Stand::new().await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut buf = vec![0; 70_000];
    for size in [0, 1, 1_500, 65_507] {
        let bytes = pattern(size);
        socket.send_to(&bytes, stand.import_udp).await.unwrap();
        let (n, from) = timeout(LIMIT, socket.recv_from(&mut buf)).await.unwrap().unwrap();
        assert_eq!((&buf[..n], from), (&bytes[..], stand.import_udp));
    }
    // Many clients, each with a session of its own.
    let mut clients = Vec::new();
    for i in 0..300_u32 {
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.send_to(&i.to_be_bytes(), stand.import_udp).await.unwrap();
        let n = timeout(LIMIT, client.recv(&mut buf)).await.unwrap().unwrap();
        assert_eq!(buf[..n], i.to_be_bytes());
        clients.push(client);
    }
}

#[tokio::test]
async fn many_new_clients_at_once_are_all_answered() {
    let stand = Stand::new().await;
    let mut clients = Vec::new();
    for _ in 0..200 {
        clients.push(std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
    }
    // Before anything of the routers has its turn; as many as the application's own socket holds.
    for client in &clients {
        client.send_to(b"first", stand.import_udp).unwrap();
    }
    let (mut answered, deadline) = (0, tokio::time::Instant::now() + LIMIT);
    for client in clients {
        client.set_nonblocking(true).unwrap();
        let client = UdpSocket::from_std(client).unwrap();
        answered += usize::from(tokio::time::timeout_at(deadline, client.recv(&mut [0; 8])).await.is_ok());
    }
    assert_eq!(answered, 200);
}

#[tokio::test]
async fn a_sidecar_without_a_uid_takes_its_old_place() {
    let stand = Stand::new().await;
    let (first, at) = stand.nameless(stand::port(80), "127.0.0.1:0".parse().unwrap()).await;
    let mut flow = TcpStream::connect(at).await.unwrap();
    assert_eq!(says(&mut flow, b"x").await.unwrap(), b"x");
    drop(first);
    // It has lost its leases: another Service has the address now, which nobody offers.
    let (_second, _) = stand.nameless(stand::port(81), at).await;
    // The first flow that fails was the new import's: it serves, so nothing of the old one may.
    let served = async {
        while let Ok(mut flow) = TcpStream::connect(at).await
            && says(&mut flow, b"x").await.is_ok()
        {}
    };
    timeout(LIMIT, served).await.unwrap();
    let mut flows = tokio::task::JoinSet::new();
    for _ in 0..40 {
        flows.spawn(async move { says(&mut TcpStream::connect(at).await?, b"x").await });
    }
    while let Some(outcome) = flows.join_next().await {
        assert!(outcome.unwrap().is_err(), "a flow has reached the Service of before");
    }
    assert_eq!(says(&mut flow, b"still").await.unwrap(), b"still");
}

#[tokio::test]
async fn one_that_comes_and_goes_keeps_no_sidecar_out() {
    let stand = Stand::new().await;
    let mut flow = stand.connect().await;
    for i in 0..5000 {
        stand.come_and_go().await;
        if i % 1000 == 0 {
            assert_eq!(says(&mut flow, b"meanwhile").await.unwrap(), b"meanwhile");
        }
    }
    let (_sidecar, at) = stand.nameless(stand::port(80), "127.0.0.1:0".parse().unwrap()).await;
    let mut flow = TcpStream::connect(at).await.unwrap();
    assert_eq!(says(&mut flow, b"x").await.unwrap(), b"x");
}

#[tokio::test]
async fn the_end_resets_what_still_runs_within_two_seconds() {
    let mut stand = Stand::new().await;
    let mut flow = stand.connect().await;
    assert_eq!(says(&mut flow, b"before").await.unwrap(), b"before");
    let start = std::time::Instant::now();
    stand.b.end().await;
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    let read = timeout(LIMIT, flow.read(&mut [0])).await.unwrap();
    assert!(read.is_err(), "it looks as if the service had ended: {read:?}");
    // What connects now waits in the backlog of the listener, which its sidecar still holds.
    let waiting = TcpStream::connect(stand.import_tcp).await.unwrap();
    let nothing = timeout(Duration::from_millis(200), async { waiting.readable().await }).await;
    assert!(nothing.is_err(), "a connection does not wait for the next router");
}

#[tokio::test]
async fn an_export_is_not_dialled_where_its_own_pod_imports() {
    let mut stand = Stand::new().await;
    let at = stand.selfish().await;
    let mut flow = TcpStream::connect(at).await.unwrap();
    assert_eq!(says(&mut flow, b"ping").await.unwrap(), b"ping");
}
