//! The stock of one pod: unconnected sockets of its network namespace, asked for before they run out.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use servicekeel_core::handoff::DescriptorKind;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::bounds::{Held, Owner};
use crate::turns::Turns;

/// TCP and UDP sockets kept for a pod that is hardly used.
const FIRST_TARGET: (usize, usize) = (8, 2);
/// The most sockets kept for a pod, of each kind, where there are descriptors enough: see [`crate::bounds::Limits`].
pub(crate) const LAST_TARGET: usize = 512;
/// How long a flow waits for a socket that the sidecar was asked for.
const PATIENCE: Duration = Duration::from_secs(2);
/// A sidecar that did not give what it was asked for within this time is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// How long a stock that did not run low stays as large as it is.
const SHRINK: Duration = Duration::from_secs(60);

/// A socket of the stock, which counts against its pod as long as it lies there.
pub(crate) struct Stocked<D> {
    pub(crate) socket: D,
    pub(crate) _held: Held,
}

struct Shelf<D> {
    held: Vec<D>,
    /// Who waits where none is held, each in the name of whoever opens the flow or session.
    waiting: Turns<D>,
    first: usize,
    target: usize,
    /// Asked for and not there yet, and when last.
    asked: usize,
    asked_at: Instant,
    /// When it ran out last, or became smaller.
    settled: Instant,
}

impl<D> Shelf<D> {
    fn new(first: usize) -> Self {
        let now = Instant::now();
        Self {
            held: Vec::new(),
            waiting: Turns::default(),
            first,
            target: first,
            asked: 0,
            asked_at: now,
            settled: now,
        }
    }

    fn missing(&self) -> usize {
        self.target.saturating_sub(self.held.len() + self.asked)
    }

    /// What a sidecar owes for long it does not have: such as one at its limit of descriptors.
    fn forget_asked(&mut self, now: Instant) {
        if self.asked > 0 && now - self.asked_at >= ASK_AGAIN {
            self.asked = 0;
        }
    }

    fn ask(&mut self, most: usize) -> usize {
        let n = self.missing().min(most);
        if n > 0 {
            self.asked += n;
            self.asked_at = Instant::now();
        }
        n
    }

    /// Becomes as small as at first.
    fn settle(&mut self, now: Instant) {
        self.target = self.first;
        self.held.truncate(self.target);
        self.settled = now;
    }

    fn shrink(&mut self, now: Instant) {
        if self.target > self.first && now - self.settled >= SHRINK {
            self.target = (self.target / 2).max(self.first);
            self.held.truncate(self.target);
            self.settled = now;
        }
    }
}

struct Shelves<D> {
    tcp: Shelf<D>,
    udp: Shelf<D>,
    /// The most of each kind.
    most: usize,
    closed: bool,
}

impl<D> Shelves<D> {
    fn of(&mut self, kind: DescriptorKind) -> &mut Shelf<D> {
        match kind {
            DescriptorKind::UdpBound | DescriptorKind::UdpUnconnected => &mut self.udp,
            DescriptorKind::TcpListener | DescriptorKind::TcpUnconnected => &mut self.tcp,
        }
    }

    fn is_low(&self) -> bool {
        self.tcp.missing() + self.udp.missing() > 0
    }
}

/// The stock. `D` is the network's descriptor.
pub(crate) struct Stock<D> {
    shelves: Mutex<Shelves<D>>,
    /// The session should ask for more.
    low: Notify,
}

impl<D> Stock<D> {
    /// A stock that grows to `most` of each kind where it is needed.
    pub(crate) fn new(most: usize) -> Self {
        let (tcp, udp) = FIRST_TARGET;
        let shelves = Shelves { tcp: Shelf::new(tcp), udp: Shelf::new(udp), most, closed: false };
        Self { shelves: Mutex::new(shelves), low: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Shelves<D>> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a socket, waiting for the sidecar where there is none: owners have what comes in turns.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotConnected`] where the sidecar is gone, [`io::ErrorKind::TimedOut`] where it does not answer.
    pub(crate) async fn take(&self, kind: DescriptorKind, owner: &Owner) -> io::Result<D> {
        let gone = || io::Error::new(io::ErrorKind::NotConnected, "the pod's sidecar is gone");
        let deadline = Instant::now() + PATIENCE;
        let (number, arrival) = {
            let mut shelves = self.lock();
            let (closed, most) = (shelves.closed, shelves.most);
            let shelf = shelves.of(kind);
            let taken = shelf.held.pop();
            if taken.is_none() {
                shelf.target = (shelf.target * 2).min(most);
                shelf.settled = Instant::now();
            }
            shelf.forget_asked(Instant::now());
            if shelf.missing() * 2 >= shelf.target {
                self.low.notify_one();
            }
            if closed && shelf.held.is_empty() {
                self.low.notify_one();
            }
            match taken {
                Some(socket) => return Ok(socket),
                None if closed => return Err(gone()),
                None => shelf.waiting.wait(owner),
            }
        };
        let _waits = Waits { stock: self, kind, owner, number };
        match timeout_at(deadline, arrival).await {
            Ok(arrived) => arrived.map_err(|_| gone()),
            Err(_) => {
                let text = "the pod's sidecar does not hand over sockets";
                Err(io::Error::new(io::ErrorKind::TimedOut, text))
            }
        }
    }

    /// Waits until the sidecar should be asked for more.
    pub(crate) async fn low(&self) {
        while !self.lock().is_low() {
            self.low.notified().await;
        }
    }

    /// Waits until the sidecar is gone and no UDP socket is left.
    pub(crate) async fn udp_spent(&self) {
        loop {
            {
                let shelves = self.lock();
                if shelves.closed && shelves.udp.held.is_empty() {
                    return;
                }
            }
            self.low.notified().await;
        }
    }

    /// For how many TCP and UDP sockets the sidecar is to be asked now, `most` together: they are on their way then.
    pub(crate) fn ask(&self, most: usize) -> (u16, u16) {
        let mut shelves = self.lock();
        let tcp = shelves.tcp.ask(most);
        let udp = shelves.udp.ask(most - tcp);
        (tcp as u16, udp as u16)
    }

    /// Whether the sidecar was asked for as many TCP and UDP sockets, and for some at all.
    pub(crate) fn awaits(&self, tcp: usize, udp: usize) -> bool {
        let shelves = self.lock();
        tcp + udp > 0 && tcp <= shelves.tcp.asked && udp <= shelves.udp.asked
    }

    /// So many TCP and UDP sockets came from the sidecar, which owes as many less. There was room for these of them; what is
    /// far beyond the target was not asked for and is closed.
    pub(crate) fn put(&self, (tcps, udps): (usize, usize), tcp: Vec<D>, udp: Vec<D>) {
        let mut shelves = self.lock();
        let most = shelves.most;
        for (is_tcp, came, sockets) in [(true, tcps, tcp), (false, udps, udp)] {
            let shelf = if is_tcp { &mut shelves.tcp } else { &mut shelves.udp };
            shelf.asked = shelf.asked.saturating_sub(came);
            let left = sockets.into_iter().filter_map(|socket| shelf.waiting.give(socket).err());
            let room = most.saturating_sub(shelf.held.len());
            shelf.held.extend(left.take(room));
        }
        if shelves.is_low() {
            self.low.notify_one();
        }
    }

    /// No more will come: what is held can still be taken.
    pub(crate) fn close(&self) {
        let mut shelves = self.lock();
        shelves.closed = true;
        shelves.tcp.waiting.end();
        shelves.udp.waiting.end();
    }

    /// Gives back what a burst had needed and the time since has not.
    pub(crate) fn sweep(&self) {
        let now = Instant::now();
        let mut shelves = self.lock();
        shelves.tcp.shrink(now);
        shelves.udp.shrink(now);
    }

    /// Gives back all that a burst had needed.
    pub(crate) fn settle(&self) {
        let now = Instant::now();
        let mut shelves = self.lock();
        shelves.tcp.settle(now);
        shelves.udp.settle(now);
    }

    /// How many TCP and UDP sockets are held.
    pub(crate) fn held(&self) -> (usize, usize) {
        let shelves = self.lock();
        (shelves.tcp.held.len(), shelves.udp.held.len())
    }
}

/// Someone who waits for a socket.
struct Waits<'a, D> {
    stock: &'a Stock<D>,
    kind: DescriptorKind,
    owner: &'a Owner,
    number: u64,
}

impl<D> Drop for Waits<'_, D> {
    fn drop(&mut self) {
        self.stock.lock().of(self.kind).waiting.leave(self.owner, self.number);
    }
}

#[cfg(test)]
mod tests {
    use futures::stream::FuturesUnordered;
    use futures::{FutureExt, StreamExt};
    use servicekeel_core::handoff::MAX_DESCRIPTORS;

    use super::*;

    const POD: Owner = Owner::Namespace(1);

    impl<D> Stock<D> {
        fn put_all(&self, tcp: Vec<D>, udp: Vec<D>) {
            self.put((tcp.len(), udp.len()), tcp, udp);
        }
    }

    async fn asked(stock: &Stock<u32>) -> (u16, u16) {
        let low = tokio::time::timeout(Duration::from_millis(1), stock.low()).await;
        low.map_or((0, 0), |()| stock.ask(MAX_DESCRIPTORS))
    }

    #[tokio::test(start_paused = true)]
    async fn grows_with_need_and_shrinks_without() {
        let stock = Stock::new(LAST_TARGET);
        assert_eq!(asked(&stock).await, (8, 2));
        stock.put_all((0..8).collect(), vec![8, 9]);
        for _ in 0..8 {
            stock.take(DescriptorKind::TcpUnconnected, &POD).await.unwrap();
        }
        let more = asked(&stock).await.0;
        assert!(more >= 4, "asked before it ran out: {more}");
        stock.put_all((0..more.into()).collect(), vec![]);
        for _ in 0..more {
            stock.take(DescriptorKind::TcpUnconnected, &POD).await.unwrap();
        }
        assert!(stock.take(DescriptorKind::TcpUnconnected, &POD).await.is_err());
        assert_eq!(asked(&stock).await.0, 16);
        stock.put_all((0..16).collect(), vec![]);
        assert_eq!((stock.held(), asked(&stock).await), ((16, 2), (0, 0)));
        tokio::time::advance(SHRINK).await;
        stock.sweep();
        assert_eq!(stock.held(), (8, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_sidecar_that_owes_is_asked_again() {
        let stock: Stock<u32> = Stock::new(LAST_TARGET);
        assert_eq!(asked(&stock).await, (8, 2));
        let start = Instant::now();
        let refused = stock.take(DescriptorKind::TcpUnconnected, &POD).await.unwrap_err();
        assert_eq!((refused.kind(), start.elapsed()), (io::ErrorKind::TimedOut, PATIENCE));
        tokio::time::advance(ASK_AGAIN).await;
        assert!(stock.take(DescriptorKind::TcpUnconnected, &POD).await.is_err());
        assert_eq!(asked(&stock).await.0, 32);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_held_outlives_the_sidecar() {
        let stock = Stock::new(LAST_TARGET);
        stock.put_all(vec![1], vec![]);
        stock.close();
        assert_eq!(stock.take(DescriptorKind::TcpUnconnected, &POD).await.unwrap(), 1);
        let start = Instant::now();
        let gone = stock.take(DescriptorKind::TcpUnconnected, &POD).await.unwrap_err();
        assert_eq!((gone.kind(), start.elapsed()), (io::ErrorKind::NotConnected, Duration::ZERO));
    }

    #[test]
    fn no_more_than_the_bound_is_kept() {
        let stock = Stock::new(LAST_TARGET);
        stock.put_all((0..2000).collect(), (0..2000).collect());
        assert_eq!(stock.held(), (LAST_TARGET, LAST_TARGET));
    }

    /// A peer's flood of sessions, and one of a neighbour that comes last.
    #[tokio::test(start_paused = true)]
    async fn who_opens_many_at_once_waits_behind_who_opens_one() {
        let stock = Stock::new(LAST_TARGET);
        let take = |owner: u64| {
            let stock = &stock;
            async move { stock.take(DescriptorKind::UdpUnconnected, &Owner::Namespace(owner)).await }
        };
        let mut flood: FuturesUnordered<_> = (0..1000).map(|_| take(1)).collect();
        assert!(flood.next().now_or_never().is_none());
        let mut one = std::pin::pin!(take(2));
        assert!(one.as_mut().now_or_never().is_none());
        stock.put_all(Vec::new(), vec![0, 1]);
        assert!(one.now_or_never().is_some_and(|taken| taken.is_ok()), "it waits behind the flood");
        assert!(flood.next().now_or_never().is_some_and(|taken| taken.is_some_and(|taken| taken.is_ok())));
        // Who gave up takes nothing of what comes.
        drop(flood);
        stock.put_all(Vec::new(), vec![2, 3]);
        assert_eq!(stock.held(), (0, 2));
    }

    /// What comes in answer to nothing is handled at the pace of a loop.
    #[tokio::test(start_paused = true)]
    async fn what_came_and_found_no_room_is_owed_no_more() {
        let stock: Stock<u32> = Stock::new(LAST_TARGET);
        assert_eq!(asked(&stock).await, (8, 2));
        assert!(stock.awaits(8, 2));
        stock.put((8, 2), vec![1], Vec::new());
        assert!(!stock.awaits(1, 0) && !stock.awaits(0, 1));
        assert_eq!(asked(&stock).await, (7, 2));
    }
}
