//! [`Net::splice`]: bytes, ends, resets and backpressure go through it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use super::*;
use crate::net::Stream;

type Between = JoinSet<(u64, u64, io::Result<()>)>;

/// A client and a server, and the splice between them.
struct Flow<N: Net> {
    client: N::TcpStream,
    server: N::TcpStream,
    between: Between,
}

async fn flow<N: Net>(net: &N) -> Flow<N> {
    let (client, a) = pair(net).await;
    let (server, b) = pair(net).await;
    let mut between = JoinSet::new();
    let net = net.clone();
    between.spawn(async move {
        let counted = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
        let counts = counted.clone();
        let count = move |n, m| {
            counts.0.fetch_add(n, Ordering::Relaxed);
            counts.1.fetch_add(m, Ordering::Relaxed);
        };
        let outcome = net.splice(a, b, count).await;
        (counted.0.load(Ordering::Relaxed), counted.1.load(Ordering::Relaxed), outcome)
    });
    Flow { client, server, between }
}

/// What was counted each way, and how the splice ended.
async fn outcome(between: &mut Between) -> (u64, u64, io::Result<()>) {
    soon(between.join_next()).await.unwrap().unwrap()
}

async fn read_all(stream: &mut impl Stream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    soon(stream.read_to_end(&mut bytes)).await?;
    Ok(bytes)
}

async fn is_reset(stream: &mut impl Stream) -> bool {
    matches!(read_all(stream).await, Err(e) if e.kind() == io::ErrorKind::ConnectionReset)
}

pub async fn bytes_go_both_ways_at_once_and_are_counted(net: impl Net) {
    let mut flow = flow(&net).await;
    let (there, back) = (pattern(0, 5_000_001), pattern(7, 3_000_017));
    let (mut client_read, mut client_write) = tokio::io::split(&mut flow.client);
    let (mut server_read, mut server_write) = tokio::io::split(&mut flow.server);
    let (mut got_there, mut got_back) = (Vec::new(), Vec::new());
    let both = async {
        tokio::try_join!(
            async {
                client_write.write_all(&there).await?;
                client_write.shutdown().await
            },
            async {
                server_write.write_all(&back).await?;
                server_write.shutdown().await
            },
            server_read.read_to_end(&mut got_there),
            client_read.read_to_end(&mut got_back),
        )
    };
    soon(both).await.unwrap();
    assert!(got_there == there && got_back == back);
    let (forth, back, ended) = outcome(&mut flow.between).await;
    ended.unwrap();
    assert_eq!((forth, back), (5_000_001, 3_000_017));
}

pub async fn an_end_is_passed_on_and_the_other_direction_of_a_splice_goes_on(net: impl Net) {
    let mut flow = flow(&net).await;
    flow.client.write_all(b"question").await.unwrap();
    flow.client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut flow.server).await.unwrap(), b"question");
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(2)).await;
        flow.server.write_all(b"answer").await.unwrap();
    }
    flow.server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut flow.client).await.unwrap(), b"answer".repeat(10));
    let (forth, back, ended) = outcome(&mut flow.between).await;
    ended.unwrap();
    assert_eq!((forth, back), (8, 60));
}

pub async fn a_reset_is_passed_on_either_way(net: impl Net) {
    let mut f = flow(&net).await;
    f.client.reset();
    assert!(is_reset(&mut f.server).await);

    let mut f = flow(&net).await;
    f.server.reset();
    assert!(is_reset(&mut f.client).await);
    assert!(outcome(&mut f.between).await.2.is_err());
}

pub async fn a_reset_after_an_end_is_passed_on_to_a_silent_side(net: impl Net) {
    let mut flow = flow(&net).await;
    flow.client.shutdown().await.unwrap();
    assert!(read_all(&mut flow.server).await.unwrap().is_empty());
    flow.client.reset();
    assert!(outcome(&mut flow.between).await.2.is_err());
    assert!(flow.server.write(b"x").await.is_err());
}

pub async fn a_reset_of_a_blocked_sender_is_passed_on(net: impl Net) {
    let mut flow = flow(&net).await;
    fill_up(&mut flow.client).await;
    flow.client.reset();
    assert!(outcome(&mut flow.between).await.2.is_err());
    assert!(is_reset(&mut flow.server).await);
}

pub async fn a_receiver_that_closes_resets_the_sender(net: impl Net) {
    let mut flow = flow(&net).await;
    flow.client.write_all(b"x").await.unwrap();
    drop(flow.server);
    // It writes on into nothing until it hears of it.
    soon(async { while flow.client.write_all(&[0; 1000]).await.is_ok() {} }).await;
}

pub async fn what_a_sender_said_before_its_reset_is_passed_on(net: impl Net) {
    let mut flow = flow(&net).await;
    let written = fill_up(&mut flow.client).await;
    let (mut got, mut block) = (Vec::<u8>::new(), vec![0_u8; 32 << 10]);
    // What its own system still has is lost with it; the rest is the splice's, or waits for the server.
    while !flow.client.is_taken() {
        let n = soon(flow.server.read(&mut block)).await.unwrap();
        got.extend(&block[..n]);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    flow.client.reset();
    tokio::time::sleep(STILL).await;
    while let Ok(n) = soon(flow.server.read(&mut block)).await {
        assert!(n > 0, "an end after {} of {written} bytes", got.len());
        got.extend(&block[..n]);
    }
    assert_eq!(got.len(), written);
    assert!(got == pattern(0, written));
}

pub async fn an_early_answer_comes_before_the_reset_of_a_request_that_is_not_read(net: impl Net) {
    let mut flow = flow(&net).await;
    fill_up(&mut flow.client).await;
    flow.server.write_all(b"413").await.unwrap();
    flow.server.reset();
    let mut answer = [0; 3];
    soon(flow.client.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"413");
    assert!(is_reset(&mut flow.client).await);
}

pub async fn a_slow_reader_stops_the_writer_and_gets_everything(net: impl Net) {
    let mut flow = flow(&net).await;
    let written = fill_up(&mut flow.client).await;
    flow.client.shutdown().await.unwrap();
    assert!(read_all(&mut flow.server).await.unwrap() == pattern(0, written));
}

pub async fn a_blocked_direction_does_not_hold_up_the_other(net: impl Net) {
    let mut flow = flow(&net).await;
    fill_up(&mut flow.client).await;
    for _ in 0..100 {
        flow.server.write_all(b"ping").await.unwrap();
        soon(flow.client.read_exact(&mut [0; 4])).await.unwrap();
    }
}

pub async fn a_dropped_splice_resets_both_sides(net: impl Net) {
    let mut flow = flow(&net).await;
    flow.client.write_all(b"half of it").await.unwrap();
    soon(flow.server.read_exact(&mut [0; 4])).await.unwrap();
    flow.between.shutdown().await;
    assert!(is_reset(&mut flow.client).await);
    // What came before the reset may still be read.
    assert!(read_all(&mut flow.server).await.is_err());
}
