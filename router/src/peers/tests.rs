use std::time::Duration;

use servicekeel_runtime::net::os::OsNet;
use tokio::time::advance;

use super::*;
use crate::settings::{Config, Listen, Settings};

fn id(cluster: &str) -> RouterId {
    RouterId { cluster: cluster.parse().unwrap(), node: "n".parse().unwrap() }
}

fn node() -> Arc<Node<OsNet>> {
    let RouterId { cluster, node } = id("a.local");
    let listen = Listen { sidecars: "/nowhere".into(), peers: None, admin: None };
    let config = Arc::new(Config { cluster, node, listen, peers: Vec::new(), revoked: Vec::new() });
    let (_, settings) = tokio::sync::watch::channel(Arc::new(Settings {
        config,
        identity: None,
        untimely: None,
        pending: Default::default(),
    }));
    Node::new(OsNet::new(), id("a.local"), 1, settings)
}

fn link() -> LinkState {
    LinkState { ask: mpsc::channel(1).0, dialled: None, with: [127, 0, 0, 1].into(), since: Instant::now() }
}

async fn pass(seconds: u64) {
    // Timers fire as the time passes them.
    for _ in 0..seconds * 10 {
        advance(Duration::from_millis(100)).await;
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn flows_have_their_time_from_the_last_loss_of_the_link() {
    let node = node();
    let peer = node.peer(&id("b.local")).unwrap();
    assert!(peer.link_up(1, 7, link()).is_ok());
    peer.link_down(&node, 1);
    pass(55).await;
    // It comes back for a moment.
    assert!(peer.link_up(2, 7, link()).is_ok());
    peer.link_down(&node, 2);
    pass(55).await;
    assert_eq!(peer.epoch(), 0, "flows were reset 55 s after the loss of the link");
    pass(6).await;
    assert_eq!(peer.epoch(), 1, "flows outlive the loss for ever");
    // One of two links that goes is no loss.
    assert!(peer.link_up(3, 7, link()).is_ok() && peer.link_up(4, 7, link()).is_ok());
    peer.link_down(&node, 3);
    pass(70).await;
    assert_eq!(peer.epoch(), 1);
}

#[tokio::test(start_paused = true)]
async fn another_boot_is_another_peer() {
    let node = node();
    let peer = node.peer(&id("b.local")).unwrap();
    assert!(peer.link_up(1, 7, link()).is_ok() && peer.link_up(2, 7, link()).is_ok());
    assert_eq!(peer.epoch(), 0);
    assert!(peer.link_up(3, 8, link()).is_ok());
    assert_eq!(peer.epoch(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_boot_that_comes_back_is_another_router_of_the_same_name() {
    let node = node();
    let peer = node.peer(&id("b.local")).unwrap();
    assert!(peer.link_up(1, 7, link()).is_ok() && peer.link_up(2, 8, link()).is_ok());
    peer.link_down(&node, 1);
    assert_eq!(peer.epoch(), 1, "8 may be 7 that has started anew");
    assert_eq!(peer.link_up(3, 7, link()), Err(NoLink::Twin));
    assert_eq!(peer.epoch(), 1, "the flows of the one that is linked go on");
    peer.link_down(&node, 2);
    assert!(peer.link_up(4, 7, link()).is_ok(), "the other one is gone");
    assert_eq!((peer.link_up(5, 8, link()), peer.epoch()), (Err(NoLink::Twin), 2));
    for boot in 9..1000 {
        assert!(peer.link_up(boot, boot, link()).is_ok());
        peer.link_down(&node, boot);
    }
    assert_eq!(peer.lock().before.len(), MAX_RUNS);
}

#[tokio::test(start_paused = true)]
async fn links_are_bounded_and_peers_forgotten_once_nobody_holds_them() {
    let node = node();
    let peer = node.peer(&id("b.local")).unwrap();
    for number in 0..MAX_LINKS as u64 {
        assert!(peer.link_up(number, 7, link()).is_ok());
    }
    assert!(peer.link_up(99, 8, link()).is_err());
    assert_eq!(peer.epoch(), 0, "a link that is refused says nothing of the others");
    (0..MAX_LINKS as u64).for_each(|number| peer.link_down(&node, number));
    let remembered = || node.all_peers().len();
    pass(61).await;
    node.sweep();
    assert_eq!(remembered(), 1);
    advance(MEMORY).await;
    node.sweep();
    assert_eq!(remembered(), 1, "it is held here");
    drop(peer);
    node.sweep();
    assert_eq!(remembered(), 0);
}

#[tokio::test(start_paused = true)]
async fn without_a_link_a_flow_fails_at_once_and_with_one_in_time() {
    let node = node();
    let peer = node.peer(&id("b.local")).unwrap();
    let start = Instant::now();
    assert!(peer.checkout(&node).await.is_err());
    assert_eq!(start.elapsed(), Duration::ZERO);
    // Asked to dial back, it does not.
    let (ask, mut asked) = mpsc::channel(16);
    assert!(peer.link_up(1, 7, LinkState { ask, ..link() }).is_ok());
    let refused = peer.checkout(&node).await.err().unwrap().to_string();
    assert!(refused.contains("within 3 s"), "{refused}");
    assert_eq!(start.elapsed(), Duration::from_secs(3));
    assert!(matches!(asked.try_recv(), Ok(Ask::Flows(1))));
    assert_eq!((peer.activity.flows(), peer.lock().waiting), (0, 0));
}
