use std::sync::atomic::AtomicUsize;

use servicekeel_core::handoff::DescriptorKind;
use servicekeel_core::name::{Protocol, ServicePort};
use servicekeel_runtime::net::Descriptor;
use servicekeel_runtime::net::os::{OsNet, OsPodThread};
use tokio::net::UdpSocket;
use tokio::time::{Instant, sleep};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use super::*;
use crate::bounds::{Owner, Party};
use crate::peers::LinkState;
use crate::peers::tests::{id, link, node, web};
use crate::rooms::Rooms;
use crate::tasks::AbortOnDrop;
use tokio::sync::mpsc;

/// Counts the lines of a log.
struct Lines(Arc<AtomicUsize>);

impl Subscriber for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_sessions_is_told_now_and_then() {
    let lines = Arc::new(AtomicUsize::new(0));
    let _log = tracing::subscriber::set_default(Lines(lines.clone()));
    let crowd = Crowd::new();
    for expected in 1..4 {
        for _ in 0..10_000 {
            crowd.tell(&"a flood");
        }
        assert_eq!(lines.load(Ordering::Relaxed), expected);
        tokio::time::advance(TELL).await;
    }
}

#[test]
fn a_burst_of_one_pod_holds_its_part_and_a_neighbours_datagrams_go_through() {
    let rooms = Rooms::default();
    let (hog, neighbour) = (rooms.datagrams.account(), rooms.datagrams.account());
    let burst = vec![7; 65_507];
    let sessions: Vec<_> = (0..MAX_SESSIONS).map(|_| pod::queue()).collect();
    let queue = |datagram: &[u8], owner, (to, _): &(mpsc::Sender<Queued>, mpsc::Receiver<Queued>)| {
        Queued::new(datagram, owner).is_some_and(|datagram| to.try_send(datagram).is_ok())
    };
    let waiting = sessions.iter().filter(|session| queue(&burst, &hog, session)).count() * burst.len();
    assert!(waiting < 8 << 20, "{waiting} bytes of one pod wait");
    // Small ones count for what they take beside their bytes.
    let small = sessions.iter().cycle().take(1 << 18).filter(|session| queue(b"x", &hog, session)).count();
    assert!(small < 1 << 12, "{small} more datagrams of one pod wait");
    let neighbours = pod::queue();
    assert!((0..50).all(|_| queue(&burst, &neighbour, &neighbours)), "a neighbour's are dropped");
    drop(sessions);
    assert_eq!(hog.held(), 0);
}

/// A pod's import of a UDP Service, in service.
struct Served {
    at: SocketAddr,
    account: Arc<Account>,
    client: UdpSocket,
    _task: AbortOnDrop,
}

impl Served {
    async fn start(node: &Arc<Node<OsNet>>, owner: u64, wanted: &ServicePort) -> Self {
        let made = node.net.make_bound(DescriptorKind::UdpBound, ([127, 0, 0, 1], 0).into()).await.unwrap();
        let at = made.local_addr().unwrap();
        let socket = node.net.adopt_udp(made).await.unwrap();
        let log = Arc::new(Throttle::new(1, TELL));
        let party = Party::new(Owner::Namespace(owner), &node.rooms, log);
        let account = party.datagrams.clone();
        let outlet = Outlet::new(node, &OsPodThread::default());
        let serving = import::serve(node.clone(), socket, wanted.clone(), party, outlet);
        let task = AbortOnDrop(node.tasks.spawn(serving));
        Self { at, account, client: UdpSocket::bind("127.0.0.1:0").await.unwrap(), _task: task }
    }

    /// Sends up to so many datagrams until it `is_enough`, no faster than they are read.
    async fn sends(&self, most: usize, datagram: &[u8], is_enough: impl Fn() -> bool) {
        for _ in 0..most {
            self.client.send_to(datagram, self.at).await.unwrap();
            sleep(Duration::from_millis(1)).await;
            if is_enough() {
                return;
            }
        }
    }
}

/// The router that offers the Service does not dial back, so nothing leaves.
#[tokio::test]
async fn what_a_pod_sends_and_nobody_drains_is_its_share_and_a_neighbours_is_queued_beside_it() {
    let node = node();
    let peer = node.peer(&id("b.local")).unwrap();
    let (ask, _asked) = mpsc::channel(16);
    assert!(peer.link_up(1, 7, LinkState { ask, ..link() }, None).is_ok());
    let wanted = ServicePort { protocol: Protocol::Udp, ..web("b.local") };
    node.change(|table| table.offer(&peer.id, 1, wanted.clone())).unwrap();
    let (hog, neighbour) = (Served::start(&node, 1, &wanted).await, Served::start(&node, 2, &wanted).await);
    let dropped = || node.counters.datagrams_dropped.get();

    hog.sends(400, &[7; 65_507], || dropped() >= 20).await;
    let held = hog.account.held();
    assert!((6 << 20..8 << 20).contains(&held), "{held} bytes wait, {} datagrams were dropped", dropped());
    assert!(dropped() >= 20);

    let (each, before) = ((1000 + OVERHEAD) as u64, dropped());
    neighbour.sends(20, &[7; 1000], || false).await;
    let end = Instant::now() + Duration::from_secs(3);
    while neighbour.account.held() < 20 * each && Instant::now() < end {
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!((neighbour.account.held(), dropped()), (20 * each, before));
}
