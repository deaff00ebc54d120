//! A peer that offers more than is held for it, or says that it does not take what it is offered.

use std::time::Duration;

use servicekeel_core::flow::frame::{Kind, Purpose, decode_payload};
use servicekeel_core::mesh::table::MAX_OFFERS;
use servicekeel_core::mesh::{LinkMessage, Offer};
use servicekeel_router::tls::Channel;
use servicekeel_runtime::net::os::OsStream;
use tokio::time::timeout;

use crate::LIMIT;
use crate::stand::{self, Stand, wait_for};
use crate::trust::rogue;

async fn say(link: &mut Channel<OsStream>, message: &LinkMessage) {
    link.send_message(Kind::Message, 0, message).unwrap();
    if link.is_full() {
        link.flush().await.unwrap();
    }
}

/// It lives, whatever it was asked meanwhile.
async fn lives(link: &mut Channel<OsStream>) {
    say(link, &LinkMessage::Pong).await;
    link.flush().await.unwrap();
}

/// The reason for which not all is taken, as the router says it.
async fn declined(link: &mut Channel<OsStream>) -> String {
    loop {
        let (_, payload) = link.recv().await.unwrap().expect("it closes the link");
        if let LinkMessage::Declined { reason } = decode_payload(payload).unwrap() {
            return reason;
        }
    }
}

#[tokio::test]
async fn what_is_beyond_a_bound_is_told_at_both_ends_and_no_terminal_obeys_a_peer() {
    let mut stand = Stand::new().await;
    // There is one router of a name.
    stand.b.end().await;
    let notes = async || stand.a.status().await["notes"].to_string();
    let mut link = rogue(&stand, Purpose::Link).await;
    for number in 0..MAX_OFFERS + 3 {
        let mut port = stand::port(80);
        port.service.cluster = "b.local".parse().unwrap();
        port.service.name = format!("web-{number}").parse().unwrap();
        say(&mut link, &LinkMessage::Offer(Offer { port, allow: None })).await;
    }
    link.flush().await.unwrap();
    let reason = timeout(LIMIT, declined(&mut link)).await.expect("it is not told");
    assert_eq!(reason, "b.local/n offers more than 16384 ports");
    lives(&mut link).await;
    let rejected = || stand.a.metric("offers_rejected_total");
    wait_for(LIMIT, async || (rejected().await == 3.0).then_some(())).await;
    lives(&mut link).await;
    let told = notes().await;
    assert!(told.contains("not all offers of b.local/n are taken: b.local/n offers more than"), "{told}");
    assert!(told.contains("15384 offers of other routers are not listed"), "{told}");
    assert_eq!(stand.a.status().await["offers"].as_array().unwrap().len(), 1000);
    lives(&mut link).await;
    // Once in a while, however much is offered.
    let again = timeout(Duration::from_millis(200), declined(&mut link)).await;
    assert!(again.is_err(), "{again:?}");

    let reason = format!("x\n2026 ERROR forged\u{1b}[31m\u{7}\u{202e}{}", "A".repeat(60_000));
    say(&mut link, &LinkMessage::Declined { reason }).await;
    link.flush().await.unwrap();
    let shown = r"does not take all offers of this router: x\n2026 ERROR forged\u{1b}[31m\u{7}\u{202e}AAA";
    let text = wait_for(LIMIT, async || {
        let (_, text) = stand.a.tool().await;
        text.contains(shown).then_some(text)
    })
    .await;
    assert!(text.chars().all(|c| c == '\n' || !(c.is_control() || c == '\u{202e}')), "{text:?}");
    assert!(text.lines().all(|line| line.len() < 1000));
}
