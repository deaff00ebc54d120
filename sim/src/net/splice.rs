//! Bytes between two streams of a node: what splice(2) does, by copying.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::time::Duration;

use servicekeel_runtime::net::Stream;
use tokio::io::ReadBuf;
use tokio::select;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::stream::SimStream;

/// Bytes that are carried at once.
const BURST: usize = 8 << 10;

/// How often it is asked whether the other side's system has all.
const ASK: Duration = Duration::from_millis(1);
/// How long what came before a reset may take to be written.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Both ends of a flow. Dropped before both directions have ended, each peer sees a reset: an end would tell it that
/// it had everything.
struct Ends(Option<(SimStream, SimStream)>);

impl Drop for Ends {
    fn drop(&mut self) {
        if let Some((a, b)) = self.0.take() {
            a.reset();
            b.reset();
        }
    }
}

/// See [`servicekeel_runtime::net::Net::splice`].
pub(super) async fn splice(
    a: SimStream,
    b: SimStream,
    count: impl Fn(u64, u64) + Send + Sync,
) -> io::Result<()> {
    let mut ends = Ends(Some((a, b)));
    let outcome = match &ends.0 {
        Some((a, b)) => both_ways(a, b, &count).await,
        None => Ok(()),
    };
    if outcome.is_ok()
        && let Some((a, b)) = ends.0.take()
    {
        a.close();
        b.close();
    }
    outcome
}

/// The side that one direction failed by: the one that it reads from, or the one that it writes to.
enum Broken {
    From(io::Error),
    To(io::Error),
}

type Carried = Result<(), Broken>;

async fn both_ways(a: &SimStream, b: &SimStream, count: &(impl Fn(u64, u64) + Sync)) -> io::Result<()> {
    let mut forth = pin!(carry(a, b, |n| count(n, 0)));
    let mut back = pin!(carry(b, a, |n| count(0, n)));
    let outcome = select! {
        biased;
        outcome = &mut forth => finish(outcome, back, a, b).await,
        outcome = &mut back => finish(outcome, forth, b, a).await,
    };
    if outcome.is_err() {
        let _ = timeout(LAST_WORDS / 2, async { tokio::join!(has_all(a), has_all(b)) }).await;
    }
    outcome
}

/// Resolves when the other side's system has what was written: a reset loses the rest.
async fn has_all(stream: &SimStream) {
    while !stream.is_taken() {
        sleep(ASK).await;
    }
}

/// The direction `from` one side `to` the other is over; `back` goes on. What a side said before a reset is passed on
/// before it.
async fn finish(
    outcome: Carried,
    mut back: Pin<&mut impl Future<Output = Carried>>,
    from: &SimStream,
    to: &SimStream,
) -> io::Result<()> {
    let end = |to: &SimStream| to.shutdown_shared().map_err(Broken::To);
    match outcome.and_then(|()| end(to)) {
        Ok(()) => {
            let outcome = select! {
                biased;
                outcome = &mut back => outcome.and_then(|()| end(from)),
                // It has ended and is not read any more, so only its error tells that it is gone.
                error = broken(from) => Err(Broken::To(error)),
            };
            outcome.map_err(|(Broken::From(error) | Broken::To(error))| error)
        }
        Err(Broken::From(error)) => Err(error),
        Err(Broken::To(error)) => {
            let _ = timeout(LAST_WORDS, back).await;
            Err(error)
        }
    }
}

/// Carries bytes one way until `from` ends. What came before a reset of `from` goes first, for a while.
async fn carry(from: &SimStream, to: &SimStream, count: impl Fn(u64)) -> Carried {
    let mut buffer = vec![0; BURST];
    let mut gone = None;
    loop {
        let mut read = ReadBuf::new(&mut buffer);
        poll_fn(|cx| from.poll_read_shared(cx, &mut read)).await.map_err(Broken::From)?;
        let mut bytes = read.filled();
        if bytes.is_empty() {
            return gone.map_or(Ok(()), |(kind, _): (io::ErrorKind, _)| Err(Broken::From(kind.into())));
        }
        while !bytes.is_empty() {
            let n = select! {
                biased;
                n = poll_fn(|cx| to.poll_write_shared(cx, bytes)) => n.map_err(Broken::To)?,
                // It is passed on even while `to` takes nothing.
                error = late(from, &mut gone) => return Err(Broken::From(error)),
            };
            count(n as u64);
            bytes = &bytes[n..];
        }
        tokio::task::coop::consume_budget().await;
    }
}

/// Resolves [`LAST_WORDS`] after a stream has broken.
async fn late(stream: &SimStream, gone: &mut Option<(io::ErrorKind, Instant)>) -> io::Error {
    let (kind, until) = match *gone {
        Some(gone) => gone,
        None => (broken(stream).await.kind(), Instant::now() + LAST_WORDS),
    };
    *gone = Some((kind, until));
    sleep_until(until).await;
    kind.into()
}

async fn broken(stream: &SimStream) -> io::Error {
    poll_fn(|cx| stream.poll_broken(cx)).await
}
