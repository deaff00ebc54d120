use std::time::Duration;

use servicekeel_core::name::{Protocol, ServiceName, ServicePort};
use servicekeel_runtime::net::os::OsNet;
use tokio::time::advance;

use super::*;
use crate::settings::{Config, Listen, Settings};

pub(crate) fn id(cluster: &str) -> RouterId {
    RouterId { cluster: cluster.parse().unwrap(), node: "n".parse().unwrap() }
}

pub(crate) fn node() -> Arc<Node<OsNet>> {
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

/// A port of a Service of this cluster.
pub(crate) fn web(cluster: &str) -> ServicePort {
    let [name, namespace] = ["web", "default"].map(|label| label.parse().unwrap());
    let service = ServiceName { name, namespace, cluster: cluster.parse().unwrap() };
    ServicePort { service, port: 80.try_into().unwrap(), protocol: Protocol::Tcp }
}

/// What a connection of the peer stands on whose certificates end at `until`.
pub(crate) fn stand(peer: &Arc<Peer<OsNet>>, until: UnixTime) -> Standing<OsNet> {
    peer.stand(Shown { chain: Vec::new(), at: UnixTime::now(), expires: until, until }).unwrap()
}

/// So many seconds from now.
pub(crate) fn later(seconds: u64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(UnixTime::now().as_secs() + seconds))
}

pub(crate) fn link() -> LinkState {
    LinkState {
        ask: mpsc::channel(1).0,
        dialled: None,
        with: [127, 0, 0, 1].into(),
        since: Instant::now(),
        declined: None,
    }
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
    assert!(peer.link_up(1, 7, link(), None).is_ok());
    peer.link_down(&node, 1);
    pass(55).await;
    // It comes back for a moment.
    assert!(peer.link_up(2, 7, link(), None).is_ok());
    peer.link_down(&node, 2);
    pass(55).await;
    assert_eq!(peer.epoch(), 0, "flows were reset 55 s after the loss of the link");
    pass(6).await;
    assert_eq!(peer.epoch(), 1, "flows outlive the loss for ever");
    // One of two links that goes is no loss.
    assert!(peer.link_up(3, 7, link(), None).is_ok() && peer.link_up(4, 7, link(), None).is_ok());
    peer.link_down(&node, 3);
    pass(70).await;
    assert_eq!(peer.epoch(), 1);
}

#[tokio::test(start_paused = true)]
async fn another_boot_takes_the_place_of_one_that_is_dead_alone() {
    let node = node();
    let peer = node.peer(&id("b.local")).unwrap();
    assert!(peer.link_up(1, 7, link(), None).is_ok() && peer.link_up(2, 7, link(), None).is_ok());
    assert_eq!((peer.epoch(), peer.twin()), (0, None));
    assert_eq!(peer.link_up(3, 8, link(), None), Err(NoLink::Twin));
    assert_eq!(peer.epoch(), 0, "the flows of the one that is linked go on");
    let told = peer.twin().unwrap();
    assert!(told.contains("two routers have the name b.local/n"), "{told}");
    pass(61).await;
    assert_eq!(peer.twin(), None, "it is gone for good");
    assert!(peer.link_up(4, 8, link(), Some(7)).is_ok());
    assert_eq!(peer.epoch(), 1);
    // Whoever found 7 dead meanwhile comes too late.
    assert_eq!(peer.link_up(5, 9, link(), Some(7)), Err(NoLink::Twin));
    peer.link_down(&node, 4);
    (1..3).for_each(|id| peer.link_down(&node, id));
    assert!(peer.link_up(6, 9, link(), None).is_ok(), "nobody is there");
}

#[tokio::test(start_paused = true)]
async fn whether_a_run_is_alive_is_asked_where_another_wants_its_place() {
    let node = node();
    let peer = node.peer(&id("b.local")).unwrap();
    let start = Instant::now();
    assert_eq!(peer.probe(7).await, None);
    let (ask, mut asked) = mpsc::channel(16);
    assert!(peer.link_up(1, 7, LinkState { ask, ..link() }, None).is_ok());
    assert_eq!(peer.probe(7).await, None);
    assert!(asked.try_recv().is_err() && start.elapsed() == Duration::ZERO, "nobody else wants it");

    assert_eq!(peer.probe(8).await, Some(7), "it does not answer");
    assert_eq!(start.elapsed(), PROBE);
    assert!(matches!(asked.try_recv(), Ok(Ask::Probe)));

    let answers = async {
        assert!(matches!(asked.recv().await, Some(Ask::Probe)));
        peer.answered();
    };
    assert_eq!(tokio::join!(peer.probe(8), answers).0, None, "it is alive");
    let goes = async {
        assert!(matches!(asked.recv().await, Some(Ask::Probe)));
        peer.link_down(&node, 1);
    };
    assert_eq!(tokio::join!(peer.probe(8), goes).0, None, "it is gone");
    assert_eq!(start.elapsed(), PROBE, "neither takes time");
    assert!(peer.link_up(2, 8, link(), None).is_ok());
}

#[tokio::test(start_paused = true)]
async fn links_are_bounded_and_peers_forgotten_once_nobody_holds_them() {
    let node = node();
    let peer = node.peer(&id("b.local")).unwrap();
    for number in 0..MAX_LINKS as u64 {
        assert!(peer.link_up(number, 7, link(), None).is_ok());
    }
    assert!(peer.link_up(99, 8, link(), None).is_err());
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
    assert!(peer.link_up(1, 7, LinkState { ask, ..link() }, None).is_ok());
    let refused = peer.checkout(&node).await.err().unwrap().to_string();
    assert!(refused.contains("within 3 s"), "{refused}");
    assert_eq!(start.elapsed(), Duration::from_secs(3));
    assert!(matches!(asked.try_recv(), Ok(Ask::Flows(1))));
    assert_eq!((peer.activity.flows(), peer.lock().waiting), (0, 0));
}

#[tokio::test]
async fn the_pool_has_no_connection_of_an_expired_certificate_of_a_broken_link_or_of_none() {
    use crate::tls::tests::channels;
    let node = node();
    let peer = node.peer(&id("b.local")).unwrap();
    let idle = || peer.describe().1;
    let put = async |standing| {
        let (near, far) = channels().await;
        peer.put(&node, near, standing);
        far
    };
    let _far = put(stand(&peer, later(60))).await;
    assert_eq!(idle(), 0, "nobody would say that it is dead");
    assert!(peer.link_up(1, 7, link(), None).is_ok());
    let before = stand(&peer, later(60));
    peer.link_broke();
    let _far = put(before).await;
    assert_eq!(idle(), 0, "it may be as dead as the link that broke");
    let _far = put(stand(&peer, UnixTime::since_unix_epoch(Duration::from_secs(9)))).await;
    assert_eq!(idle(), 0, "it has expired");
    // It expires in the pool.
    let soon = stand(&peer, UnixTime::now());
    let _far = put(soon).await;
    assert_eq!(idle(), 1);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert!(peer.checkout(&node).await.is_err(), "a flow began on it");
    let _far = put(stand(&peer, UnixTime::now())).await;
    let _other = put(stand(&peer, later(60))).await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    node.sweep();
    assert_eq!(idle(), 1);
    assert!(peer.checkout(&node).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn the_routers_of_another_cluster_have_a_part_of_the_names_and_the_oldest_without_a_link_goes() {
    let node = node();
    let name = |cluster: &str, n: usize| RouterId {
        cluster: cluster.parse().unwrap(),
        node: format!("n{n}").parse().unwrap(),
    };
    let linked = node.peer(&name("m.local", 0)).unwrap();
    assert!(linked.link_up(1, 7, link(), None).is_ok());
    drop(linked);
    let used = node.peer(&name("m.local", 1)).unwrap();
    for n in 2..3000 {
        advance(Duration::from_millis(1)).await;
        assert!(node.peer(&name("m.local", n)).is_some(), "{n}");
    }
    let known = |id: &RouterId| node.all_peers().iter().any(|peer| peer.id == *id);
    assert!(known(&name("m.local", 0)) && known(&used.id) && known(&name("m.local", 2999)));
    assert!(!known(&name("m.local", 2)));
    let of_m = node.all_peers().len();
    assert!(of_m < 2500, "{of_m}");
    // Where all are in use the next is rejected, and nobody else.
    let all = node.all_peers();
    assert!(node.peer(&name("m.local", 3000)).is_none());
    assert!((0..3000).all(|n| node.peer(&name("a.local", n)).is_some()));
    assert!((0..64).all(|n| node.peer(&name("b.local", n)).is_some()));
    let notes = crate::status::read(&node).await.notes;
    assert!(
        notes.iter().any(|note| note.starts_with(&format!("m.local: {of_m} of its routers"))),
        "{notes:?}"
    );
    drop(all);
}
