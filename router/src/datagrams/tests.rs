use std::sync::atomic::AtomicUsize;

use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use super::*;
use crate::rooms::Rooms;
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
