//! Bytes between two streams of a node: what splice(2) does, by copying.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::Poll;

use servicekeel_runtime::net::Stream;
use tokio::io::ReadBuf;
use tokio::select;

use super::stream::SimStream;

/// Bytes that are carried at once.
const BURST: usize = 8 << 10;

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

async fn both_ways(a: &SimStream, b: &SimStream, count: &(impl Fn(u64, u64) + Sync)) -> io::Result<()> {
    let mut forth = pin!(carry(a, b, |n| count(n, 0)));
    let mut back = pin!(carry(b, a, |n| count(0, n)));
    // A side that has ended is not read any more, so only its error tells that it is gone.
    select! {
        biased;
        outcome = &mut forth => {
            outcome?;
            select! {
                biased;
                outcome = back => outcome,
                error = broken(a) => Err(error),
            }
        }
        outcome = &mut back => {
            outcome?;
            select! {
                biased;
                outcome = forth => outcome,
                error = broken(b) => Err(error),
            }
        }
    }
}

/// Carries bytes one way until `from` ends, and then ends `to`.
async fn carry(from: &SimStream, to: &SimStream, count: impl Fn(u64)) -> io::Result<()> {
    let mut buffer = vec![0; BURST];
    loop {
        let mut read = ReadBuf::new(&mut buffer);
        poll_fn(|cx| from.poll_read_shared(cx, &mut read)).await?;
        let mut bytes = read.filled();
        if bytes.is_empty() {
            return to.shutdown_shared();
        }
        while !bytes.is_empty() {
            // A reset of `from` is passed on even while `to` takes nothing.
            let n = poll_fn(|cx| match to.poll_write_shared(cx, bytes) {
                Poll::Pending => from.poll_broken(cx).map(Err),
                written => written,
            })
            .await?;
            count(n as u64);
            bytes = &bytes[n..];
        }
        tokio::task::coop::consume_budget().await;
    }
}

async fn broken(stream: &SimStream) -> io::Error {
    poll_fn(|cx| stream.poll_broken(cx)).await
}
