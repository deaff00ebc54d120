//! What a router says of an export to those who may not use it: nothing.

use std::time::Duration;

use servicekeel_core::flow::frame::{Kind, Open, Purpose, Refused, decode_payload};
use servicekeel_core::mesh::LinkMessage;
use servicekeel_core::name::ServicePort;
use servicekeel_router::tls::Channel;
use servicekeel_runtime::admin;
use servicekeel_runtime::net::os::OsStream;
use tokio::time::timeout;

use crate::stand::{self, Stand, wait_for};
use crate::trust::rogue;

fn named(name: &str) -> ServicePort {
    let mut port = stand::port(80);
    port.service.name = name.parse().unwrap();
    port
}

/// All that comes on a link until nothing has for a while.
async fn heard(link: &mut Channel<OsStream>) -> Vec<Vec<u8>> {
    let mut heard = Vec::new();
    while let Ok(Ok(Some((header, payload)))) = timeout(Duration::from_millis(500), link.recv()).await {
        assert_eq!(header.kind, Kind::Message);
        heard.push(payload.to_vec());
    }
    heard
}

fn has(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|part| part == text.as_bytes())
}

async fn refusal(channel: &mut Channel<OsStream>, name: &str, namespace: Option<&str>) -> Refused {
    let namespace = namespace.map(|namespace| namespace.parse().unwrap());
    channel
        .send_message(Kind::Open, 0, &Open { flow: 1, wanted: named(name), namespace, consumer: None })
        .unwrap();
    channel.flush().await.unwrap();
    let (header, payload) = channel.recv().await.unwrap().unwrap();
    assert_eq!(header.kind, Kind::Refused, "{name} is opened");
    decode_payload(payload).unwrap()
}

#[tokio::test]
async fn who_may_not_use_an_export_does_not_know_of_it() {
    let mut stand = Stand::new().await;
    let mut pod = stand.exporter("hider").await;
    pod.export(1, named("secret"), Some(&["c.local"])).await;
    pod.export(2, named("shown"), Some(&["b.local", "c.local"])).await;
    pod.export(3, named("claimed"), Some(&["b.local/prod"])).await;
    let status = async || admin::get(stand.b.admin, "/status").await.unwrap().1;
    wait_for(Duration::from_secs(5), async || status().await.contains("shown.default").then_some(())).await;

    // The router of b.local: its status, and what it says of a flow to it.
    let told = status().await;
    assert!(!told.contains("secret") && !told.contains("claimed") && !told.contains("c.local"), "{told}");
    let absent = async |name: &str| {
        let (_pod, _) = stand.nameless(named(name), "127.0.0.1:0".parse().unwrap()).await;
        wait_for(Duration::from_secs(5), async || {
            let status: serde_json::Value = serde_json::from_str(&status().await).unwrap();
            let imports = status["imports"].as_array().unwrap();
            let service = named(name).to_string();
            let import = imports.iter().find(|import| import["service"] == service)?;
            assert_eq!(import["route"], serde_json::Value::Null);
            Some(import["reason"].as_str().unwrap().replace(name, "NAME"))
        })
        .await
    };
    assert_eq!(absent("secret").await, absent("nobody").await);

    // A flow that is asked for all the same, whatever is claimed of its consumer.
    let mut flows = rogue(&stand, Purpose::Flows).await;
    let nobody = refusal(&mut flows, "nobody", None).await;
    for (name, namespace) in
        [("secret", None), ("secret", Some("prod")), ("claimed", None), ("claimed", Some("prod"))]
    {
        let refused = refusal(&mut flows, name, namespace).await;
        assert_eq!(refused.cause, nobody.cause, "{name} {namespace:?}");
        assert_eq!(refused.reason.replace(name, "NAME"), nobody.reason.replace("nobody", "NAME"));
    }
    drop(flows);

    // All that it is sent on a link, from the beginning and on each change. There is one router of a name.
    stand.b.end().await;
    let mut link = rogue(&stand, Purpose::Link).await;
    let first = heard(&mut link).await;
    assert!(first.iter().any(|bytes| has(bytes, "shown")), "{first:?}");
    for hidden in ["secret", "claimed", "c.local", "prod"] {
        assert!(!first.iter().any(|bytes| has(bytes, hidden)), "{hidden}: {first:?}");
    }
    let messages = async |link: &mut Channel<OsStream>| {
        let heard = heard(link).await;
        let all = heard.iter().map(|bytes| decode_payload::<LinkMessage>(bytes).unwrap());
        all.filter(|message| *message != LinkMessage::Ping).collect::<Vec<_>>()
    };
    pod.export(1, named("secret"), Some(&["c.local", "d.local"])).await;
    assert_eq!(messages(&mut link).await, []);
    // A change of `allow` is an offer or a withdrawal for it.
    pod.export(1, named("secret"), Some(&["b.local"])).await;
    let [LinkMessage::Offer(offer)] = &messages(&mut link).await[..] else { panic!("it is not offered") };
    assert_eq!((&offer.port, &offer.allow), (&named("secret"), &None));
    pod.export(1, named("secret"), Some(&["c.local"])).await;
    assert_eq!(messages(&mut link).await, [LinkMessage::Withdraw(named("secret"))]);
}
