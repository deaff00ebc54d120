//! Certificates that expire: what the tools say of it.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use servicekeel_core::flow::frame::{Kind, Open, Purpose};
use servicekeel_core::name::{Protocol, ServicePort};
use servicekeel_runtime::admin;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::files::{put, started};
use crate::says;
use crate::stand::{Router, Stand, authority, port, tool, wait_for};
use crate::trust::{ends, rogue};

const LIMIT: Duration = Duration::from_secs(25);

async fn looks_expired(router: &Router, of: &str) {
    let said = wait_for(LIMIT, async || Some(router.tool().await).filter(|(code, _)| *code == 1)).await.1;
    let status = router.status().await;
    assert!(said.contains("PROBLEM: ") && said.contains(of), "{said}");
    assert_eq!(status["peers"][0]["state"], "expired", "{status}");
    assert!(status["peers"][0]["reason"].as_str().unwrap().contains(" expired on "), "{status}");
    wait_for(LIMIT, async || (router.metric("links_active").await == 0.0).then_some(())).await;
    assert_eq!(router.metric("links_expired").await, 1.0);
}

async fn looks_well(router: &Router) {
    wait_for(LIMIT, async || Some(router.tool().await).filter(|(code, _)| *code == 0)).await;
    wait_for(LIMIT, async || (router.metric("links_active").await >= 1.0).then_some(())).await;
    assert_eq!(router.status().await["peers"][0]["state"], "up");
    assert_eq!(router.metric("links_expired").await, 0.0);
}

#[tokio::test]
async fn a_certificate_that_expires_while_its_router_runs_is_told_at_both_ends() {
    let mut stand = Stand::new().await;
    looks_well(&stand.b).await;
    stand.b.issue_for(Duration::from_secs(5));
    stand.b.apply();
    let left = stand.b.metric("certificate_expires_seconds").await;
    assert!((0.0..=5.0).contains(&left), "{left}");
    // As of the moment in which it is asked, however seldom the router looks itself.
    for less in [1.0, 2.0] {
        wait_for(Duration::from_secs(2), async || {
            (stand.b.metric("certificate_expires_seconds").await <= left - less).then_some(())
        })
        .await;
    }
    // The other side learns of the new certificate by a new connection.
    stand.connect_often().await;

    looks_expired(&stand.b, "this router's certificate expired on ").await;
    assert_eq!(stand.b.asks("/readyz").await.0, 503);
    assert!(stand.b.metric("certificate_expires_seconds").await < 0.0);
    let status = stand.b.status().await;
    let import = &status["imports"][0];
    assert!(import["route"].is_null(), "{status}");
    assert!(import["reason"].as_str().unwrap().contains("this router's certificate expired"), "{status}");
    looks_expired(&stand.a, "the certificate of b.local/n expired on ").await;
    assert_eq!(stand.a.asks("/readyz").await.0, 200);

    stand.b.issue();
    stand.b.apply();
    looks_well(&stand.b).await;
    assert_eq!(stand.b.asks("/readyz").await.0, 200);
    stand.wait_until_it_works().await;
    looks_well(&stand.a).await;
}

#[tokio::test]
async fn a_router_that_starts_with_an_expired_certificate_says_so_until_it_has_another() {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority("a.local");
    let node = "n".parse().unwrap();
    let long_ago = SystemTime::now() - Duration::from_secs(86_400 + 3600);
    let expired = authority.issue(&node, &[], 1, long_ago).unwrap();
    let (_process, at) = started(dir.path(), &authority, &expired).await;
    let (code, said) =
        wait_for(LIMIT, async || Some(tool(at).await).filter(|(_, said)| !said.is_empty())).await;
    assert!(code == 1 && said.contains("PROBLEM: this router's certificate expired on "), "{said}");
    assert!(said.contains("certificate EXPIRED on ") && !said.contains("no identity"), "{said}");
    let (code, said) = admin::get(at, "/readyz").await.unwrap();
    assert_eq!(
        (code, said.as_str()),
        (503, "waiting for a new certificate: this router's own has expired\n")
    );
    let metrics = admin::get(at, "/metrics").await.unwrap().1;
    let left =
        metrics.lines().find_map(|l| l.strip_prefix("servicekeel_router_certificate_expires_seconds "));
    assert!(left.unwrap().parse::<f64>().unwrap() < -3000.0, "{left:?}");

    put(dir.path(), &authority.issue(&node, &[], 1, SystemTime::now()).unwrap());
    wait_for(LIMIT, async || Some(tool(at).await).filter(|(code, _)| *code == 0)).await;
    assert_eq!(admin::get(at, "/readyz").await.unwrap().0, 200);

    // Nothing that does not prove this router takes the place of what does.
    let other = "m".parse().unwrap();
    let stranger = crate::stand::authority("a.local");
    let now = SystemTime::now();
    let good = authority.issue(&node, &[], 1, now).unwrap();
    for (wrong, why) in [
        (expired, "the certificate of a.local/n expired on "),
        (authority.issue(&other, &[], 1, now).unwrap(), "the certificate is that of a.local/m"),
        (stranger.issue(&node, &[], 1, now).unwrap(), "was not issued by an authority of a.local"),
        (
            authority.issue(&node, &[], 1, now + Duration::from_secs(7200)).unwrap(),
            "the certificate of a.local/n is valid from ",
        ),
    ] {
        put(dir.path(), &wrong);
        let told = async || Some(tool(at).await.1).filter(|said| said.contains(why));
        let said = wait_for(LIMIT, told).await;
        assert!(said.contains("PROBLEM: config rejected since "), "{said}");
        assert!(said.contains("certificate valid until"), "{said}");
        put(dir.path(), &good);
        wait_for(LIMIT, async || Some(tool(at).await).filter(|(code, _)| *code == 0)).await;
    }
}

/// Whether a client's datagram comes back.
async fn echoes(client: &UdpSocket, at: SocketAddr) -> bool {
    client.send_to(b"ping", at).await.unwrap();
    let answered = timeout(Duration::from_secs(2), client.recv_from(&mut [0; 9])).await;
    matches!(answered, Ok(Ok((4, _))))
}

#[tokio::test]
async fn no_flow_begins_by_an_expired_certificate_and_those_that_are_open_go_on() {
    let mut stand = Stand::new().await;
    let earlier = stand.b.fingerprint();
    let mut old = stand.connect().await;
    assert_eq!(says(&mut old, b"before").await.unwrap(), b"before");
    stand.b.issue_for(Duration::from_secs(8));
    stand.b.apply();
    // What was made by the certificate before it is good for a day: it goes.
    stand.a.settings.revoked.push(earlier);
    stand.a.apply();
    assert!(timeout(LIMIT, old.read(&mut [0])).await.unwrap().is_err());
    stand.wait_until_it_works().await;
    // Connections by the new one wait in the pool, and a flow and a session are open.
    stand.connect_often().await;
    let mut flow = stand.connect().await;
    assert_eq!(says(&mut flow, b"before").await.unwrap(), b"before");
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    wait_for(LIMIT, async || echoes(&client, stand.import_udp).await.then_some(())).await;
    // One that does not look at its own dates, with a connection that has carried a flow, and one for sessions.
    let mut careless = rogue(&stand, Purpose::Flows).await;
    let mut sessions = rogue(&stand, Purpose::Datagrams).await;
    let wanted = ServicePort { protocol: Protocol::Udp, ..port(80) };
    let open = Open { flow: 1, wanted, namespace: None, consumer: None };
    assert!(stand.b.metric("certificate_expires_seconds").await > 0.0, "the test was too slow");

    wait_for(LIMIT, async || (stand.b.metric("certificate_expires_seconds").await < 0.0).then_some(())).await;
    let asked = tokio::time::Instant::now();
    for _ in 0..20 {
        // The reset may come before the client has seen that it is connected.
        let Ok(mut new) = TcpStream::connect(stand.import_tcp).await else { continue };
        assert!(says(&mut new, b"x").await.is_err(), "a flow began by the expired certificate");
    }
    assert!(asked.elapsed() < LIMIT);
    let new_client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    assert!(!echoes(&new_client, stand.import_udp).await, "a session began by the expired certificate");
    // The exporter's router closes between two flows, and begins no session.
    assert!(ends(&mut careless).await, "a connection of an expired certificate opens flows still");
    sessions.send_message(Kind::Open, 7, &open).unwrap();
    sessions.flush().await.unwrap();
    assert_eq!(timeout(LIMIT, sessions.recv()).await.unwrap().unwrap().unwrap().0.kind, Kind::Refused);
    assert_eq!(says(&mut flow, b"still").await.unwrap(), b"still");
    assert!(echoes(&client, stand.import_udp).await, "the open session is cut");

    stand.b.issue();
    stand.b.apply();
    stand.wait_until_it_works().await;
    wait_for(LIMIT, async || echoes(&new_client, stand.import_udp).await.then_some(())).await;
    assert_eq!(says(&mut flow, b"renewed").await.unwrap(), b"renewed");
    assert!(echoes(&client, stand.import_udp).await, "the open session is cut");
}
