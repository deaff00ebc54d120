//! Who is no longer trusted, or revoked, while connections of the name are up.

use servicekeel_core::flow::frame::{self, Kind, Open, Preface, Purpose, VERSION};
use servicekeel_core::mesh::{LinkMessage, NoLink};
use servicekeel_core::name::Protocol;
use servicekeel_router::tls::{self, BufferPool, Channel};
use servicekeel_runtime::net::Net;
use servicekeel_runtime::net::os::{OsNet, OsStream};
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use crate::stand::{self, Stand};
use crate::{LIMIT, says};

/// A connection to the exporter's router by one who has the consumer's name and key.
pub(crate) async fn rogue(stand: &Stand, purpose: Purpose) -> Channel<OsStream> {
    let identity = stand.b.identity();
    let stream = OsNet::new().connect(&stand.a.peers.to_string()).await.unwrap();
    let (mut channel, _) = tls::connect(stream, identity.client(), BufferPool::new()).await.unwrap();
    let preface = Preface { version: VERSION, purpose, sender: identity.id().clone(), boot: 7 };
    channel.send_message(Kind::Preface, 0, &preface).unwrap();
    channel.flush().await.unwrap();
    assert_eq!(channel.recv().await.unwrap().unwrap().0.kind, Kind::Preface);
    channel
}

async fn open(channel: &mut Channel<OsStream>) -> Kind {
    let wanted = stand::port(80);
    assert_eq!(wanted.protocol, Protocol::Tcp);
    channel.send_message(Kind::Open, 0, &Open { flow: 1, wanted, namespace: None, consumer: None }).unwrap();
    channel.flush().await.unwrap();
    channel.recv().await.unwrap().unwrap().0.kind
}

pub(crate) async fn ends(channel: &mut Channel<OsStream>) -> bool {
    timeout(LIMIT, async { while let Ok(Some(_)) = channel.recv().await {} }).await.is_ok()
}

#[tokio::test]
async fn a_stolen_authority_leaves_with_all_its_connections() {
    let mut stand = Stand::new().await;
    // A thief with the authority of b.local: a connection in use, one that was used, and one for datagrams.
    let mut in_use = rogue(&stand, Purpose::Flows).await;
    assert_eq!(open(&mut in_use).await, Kind::Opened);
    let mut idle = rogue(&stand, Purpose::Flows).await;
    let mut datagrams = rogue(&stand, Purpose::Datagrams).await;

    // The theft is known: b.local has a new authority beside the old one, and its router a certificate of that.
    let stolen = stand.b.authority();
    let renewed = stand::authority("b.local");
    stand.a.settings.trust = vec![format!("{stolen}{}", renewed.certificate())];
    stand.a.apply();
    stand.b.replace_authority(renewed);
    stand.b.apply();
    // Connections by the new one, also of the name that the thief has.
    let mut flows = Vec::new();
    for _ in 0..20 {
        flows.push(stand.connect().await);
    }
    for flow in &mut flows {
        assert_eq!(says(flow, b"renewed").await.unwrap(), b"renewed");
    }
    drop(rogue(&stand, Purpose::Flows).await);

    // The old one goes.
    stand.a.settings.trust = vec![stand.b.authority()];
    stand.a.apply();
    assert!(ends(&mut in_use).await, "the thief's flow goes on");
    assert!(ends(&mut idle).await, "the thief's connection opens flows still");
    assert!(ends(&mut datagrams).await, "the thief's sessions go on");
    stand.wait_until_it_works().await;
}

#[tokio::test]
async fn a_revoked_node_is_cut_off_at_once() {
    timeout(6 * LIMIT, Box::pin(revoked())).await.expect("it stands still");
}

async fn revoked() {
    let mut stand = Stand::new().await;
    for by_fingerprint in [false, true] {
        let mut flow = stand.connect().await;
        assert_eq!(says(&mut flow, b"before").await.unwrap(), b"before");
        let mut idle = rogue(&stand, Purpose::Flows).await;
        let mut datagrams = rogue(&stand, Purpose::Datagrams).await;
        let entry = if by_fingerprint { stand.b.fingerprint() } else { "b.local/n".into() };
        stand.a.settings.revoked = vec![entry];
        stand.a.apply();
        let read = timeout(LIMIT, flow.read(&mut [0])).await.expect("the flow is cut");
        assert!(read.is_err(), "it looks as if the service had ended: {read:?}");
        assert!(ends(&mut idle).await && ends(&mut datagrams).await);
        let refused = timeout(LIMIT, stand.is_reset());
        assert!(refused.await.expect("a new flow fails fast"));
        if by_fingerprint {
            // Its next certificate is another one.
            stand.b.issue();
            stand.b.apply();
        } else {
            stand.a.settings.revoked.clear();
            stand.a.apply();
        }
        stand.wait_until_it_works().await;
    }
}

#[tokio::test]
async fn a_link_that_is_cut_off_is_told_why() {
    let mut stand = Stand::new().await;
    // One that has the name and reads what it is told, in the place of the router that has it.
    stand.b.settings.peers.clear();
    stand.b.apply();
    stand::wait_for(LIMIT, async || (stand.a.status().await["peers"][0]["state"] == "down").then_some(()))
        .await;
    let mut link = rogue(&stand, Purpose::Link).await;
    stand::wait_for(LIMIT, async || (stand.a.status().await["peers"][0]["state"] == "up").then_some(()))
        .await;
    stand.a.settings.revoked = vec!["b.local/n".into()];
    stand.a.apply();
    let last = async {
        let mut last = None;
        while let Ok(Some((_, word))) = link.recv().await {
            last = frame::decode_payload(word).ok();
        }
        last
    };
    let last = timeout(LIMIT, last).await.expect("the link ends");
    assert_eq!(last, Some(LinkMessage::Rejected(NoLink::Distrusted)));
}
