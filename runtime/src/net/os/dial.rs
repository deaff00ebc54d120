//! Connects to a name that may have several addresses, some of them dead ("Happy Eyeballs", RFC 8305).

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::{Instant, sleep_until};

use super::{OsStream, while_doing};

/// How long an attempt is alone before the next address is tried beside it (RFC 8305 §8).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// The most addresses of a name that are tried.
const MAX_ADDRESSES: usize = 8;
/// Names whose address is remembered.
const MAX_NAMES: usize = 1024;

/// Which address of a name answered last.
#[derive(Debug, Default)]
pub(super) struct Answered(Mutex<BTreeMap<String, SocketAddr>>);

impl Answered {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, SocketAddr>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, name: &str, address: SocketAddr) {
        let mut answered = self.lock();
        if answered.len() >= MAX_NAMES && !answered.contains_key(name) {
            answered.pop_first();
        }
        answered.insert(name.to_owned(), address);
    }
}

/// Resolves `host:port` and connects to the first of its addresses that answers.
pub(super) async fn connect(answered: &Answered, name: &str) -> io::Result<OsStream> {
    let resolved = tokio::net::lookup_host(name).await;
    let addresses: Vec<_> = resolved.map_err(while_doing(format_args!("cannot resolve {name}")))?.collect();
    connect_any(answered, name, addresses, OsStream::connect_router).await
}

/// Tries one address after the other: the next one after [`ATTEMPT_DELAY`], or at once where one fails. The first that
/// answers stays, and is tried first the next time.
async fn connect_any<S, A: Future<Output = io::Result<S>>>(
    answered: &Answered,
    name: &str,
    addresses: Vec<SocketAddr>,
    attempt: impl Fn(SocketAddr) -> A,
) -> io::Result<S> {
    let first = answered.lock().get(name).copied();
    let mut left = in_order(addresses, first).into_iter();
    let (mut attempts, mut refusals) = (FuturesUnordered::new(), Vec::new());
    let mut kind = io::ErrorKind::NotFound;
    loop {
        match left.next() {
            Some(address) => {
                let attempt = attempt(address);
                attempts.push(async move { (address, attempt.await) });
            }
            None if attempts.is_empty() => {
                let reasons =
                    if refusals.is_empty() { format!("{name} has no address") } else { refusals.join("; ") };
                return Err(io::Error::new(kind, reasons));
            }
            None => {}
        }
        let next = Instant::now() + ATTEMPT_DELAY;
        tokio::select! {
            biased;
            Some((address, outcome)) = attempts.next() => match outcome {
                Ok(stream) => {
                    answered.remember(name, address);
                    return Ok(stream);
                }
                Err(error) => {
                    kind = error.kind();
                    refusals.push(format!("cannot connect to {address}: {error}"));
                }
            },
            () = sleep_until(next), if left.len() > 0 => {}
        }
    }
}

/// The families in turn, beginning with that of the first (RFC 8305 §4), and in front of all the one that answered last.
fn in_order(addresses: Vec<SocketAddr>, answered: Option<SocketAddr>) -> Vec<SocketAddr> {
    let v4_first = addresses.first().is_some_and(SocketAddr::is_ipv4);
    let answered = answered.filter(|answered| addresses.contains(answered));
    let (one, other): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|a| a.is_ipv4() == v4_first);
    let (mut one, mut other) = (one.into_iter(), other.into_iter());
    let mut order: Vec<_> = answered.into_iter().collect();
    while one.len() + other.len() > 0 && order.len() < MAX_ADDRESSES {
        for address in [one.next(), other.next()].into_iter().flatten() {
            if !order.contains(&address) {
                order.push(address);
            }
        }
    }
    order.truncate(MAX_ADDRESSES);
    order
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use socket2::{Domain, Socket, Type};
    use tokio::net::TcpListener;

    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn families_take_turns_behind_the_one_that_answered() {
        let v6 = |n: u16| SocketAddr::new([0x2001, 0xdb8, 0, 0, 0, 0, 0, n].into(), 1);
        let v4 = |n: u8| SocketAddr::new([192, 0, 2, n].into(), 1);
        let all = vec![v6(1), v6(2), v6(3), v4(1), v4(2)];
        assert_eq!(in_order(all.clone(), None), [v6(1), v4(1), v6(2), v4(2), v6(3)]);
        assert_eq!(in_order(all.clone(), Some(v4(2))), [v4(2), v6(1), v4(1), v6(2), v6(3)]);
        // One that the name has no more is none.
        assert_eq!(in_order(vec![v4(1), v4(1)], Some(v4(9))), [v4(1)]);
        assert_eq!(in_order((0..100).map(v4).collect(), Some(v4(99))).len(), MAX_ADDRESSES);
        assert_eq!(in_order(Vec::new(), Some(v4(1))), []);
    }

    /// Addresses by their port: 1 is never answered, 2 refuses after 100 ms, others answer after 10 ms.
    async fn attempt(address: SocketAddr) -> io::Result<u16> {
        match address.port() {
            1 => std::future::pending().await,
            2 => {
                tokio::time::sleep(Duration::from_millis(100)).await;
                Err(io::ErrorKind::ConnectionRefused.into())
            }
            port => {
                tokio::time::sleep(Duration::from_millis(10)).await;
                Ok(port)
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn dead_addresses_are_got_past_and_the_live_one_is_remembered() {
        let answered = Answered::default();
        let addresses: Vec<_> = [(1, 1), (2, 1), (3, 1), (4, 7)]
            .map(|(host, port)| SocketAddr::new([10, 0, 0, host].into(), port))
            .into();
        for took in [3 * 250 + 10, 10] {
            let start = Instant::now();
            let tried = RefCell::new(Vec::new());
            let dialled = connect_any(&answered, "hub:7", addresses.clone(), |address| {
                tried.borrow_mut().push(address);
                attempt(address)
            });
            assert_eq!(dialled.await.unwrap(), 7);
            assert_eq!(start.elapsed(), Duration::from_millis(took), "{tried:?}");
        }
        // Another name knows nothing of it.
        let start = Instant::now();
        connect_any(&answered, "other:7", addresses, attempt).await.unwrap();
        assert_eq!(start.elapsed(), Duration::from_millis(760));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_refuses_is_got_past_at_once() {
        let answered = Answered::default();
        let start = Instant::now();
        let addresses = vec![at("10.0.0.1:2"), at("10.0.0.2:2"), at("10.0.0.3:7")];
        assert_eq!(connect_any(&answered, "hub", addresses, attempt).await.unwrap(), 7);
        assert_eq!(start.elapsed(), Duration::from_millis(210));
        let error = connect_any(&answered, "hub", vec![at("10.0.0.1:2"), at("10.0.0.2:2")], attempt)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        let text = error.to_string();
        assert!(text.contains("10.0.0.1:2") && text.contains("10.0.0.2:2"), "{text}");
        let error = connect_any(&answered, "nowhere", Vec::new(), attempt).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (io::ErrorKind::NotFound, "nowhere has no address")
        );
    }

    #[test]
    fn names_that_are_remembered_are_bounded() {
        let answered = Answered::default();
        for n in 0..3 * MAX_NAMES {
            answered.remember(&format!("hub-{n}"), at("10.0.0.1:1"));
        }
        assert_eq!(answered.lock().len(), MAX_NAMES);
    }

    /// A listener whose queue is full: the kernel drops what asks to be let in (listen(2)).
    fn dead() -> (Socket, Vec<Socket>, SocketAddr) {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.bind(&at("127.0.0.1:0").into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queue = Vec::new();
        for _ in 0..4 {
            let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            client.set_nonblocking(true).unwrap();
            let _ = client.connect(&address);
            queue.push(client);
        }
        (listener, queue, address.as_socket().unwrap())
    }

    #[tokio::test]
    async fn three_dead_addresses_of_the_kernel_and_a_live_one() {
        let dead: Vec<_> = (0..3).map(|_| dead()).collect();
        let live = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut addresses: Vec<_> = dead.iter().map(|(_, _, address)| *address).collect();
        addresses.push(live.local_addr().unwrap());
        let answered = Answered::default();
        for most in [2000, 240] {
            let start = Instant::now();
            let dialled =
                connect_any(&answered, "hub", addresses.clone(), OsStream::connect_router).await.unwrap();
            assert_eq!(crate::net::Stream::peer_addr(&dialled).unwrap(), addresses[3]);
            assert!(start.elapsed() < Duration::from_millis(most), "{:?}", start.elapsed());
        }
    }
}
