use std::sync::atomic::{AtomicU64, Ordering};

use servicekeel_runtime::net::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use super::*;

/// A client and a server, and the code between them.
struct Flow {
    client: SimStream,
    server: SimStream,
    between: JoinSet<(u64, u64, io::Result<()>)>,
}

async fn flow() -> Flow {
    let net = pod();
    let (client, a) = pair(&net).await;
    let (server, b) = pair(&net).await;
    let mut between = JoinSet::new();
    between.spawn(async move {
        let (forth, back) = (AtomicU64::new(0), AtomicU64::new(0));
        let count = |n, m| {
            forth.fetch_add(n, Ordering::Relaxed);
            back.fetch_add(m, Ordering::Relaxed);
        };
        let outcome = net.splice(a, b, count).await;
        (forth.into_inner(), back.into_inner(), outcome)
    });
    Flow { client, server, between }
}

impl Flow {
    async fn outcome(&mut self) -> (u64, u64, io::Result<()>) {
        soon(self.between.join_next()).await.unwrap().unwrap()
    }
}

async fn read_all(stream: &mut SimStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    soon(stream.read_to_end(&mut bytes)).await?;
    Ok(bytes)
}

async fn is_reset(stream: &mut SimStream) -> bool {
    matches!(read_all(stream).await, Err(e) if e.kind() == io::ErrorKind::ConnectionReset)
}

/// Writes until nothing has moved for a while.
async fn fill_up(stream: &mut SimStream) {
    while let Ok(n) = timeout(Duration::from_millis(50), stream.write(&[9; 4096])).await {
        n.unwrap();
    }
}

#[tokio::test]
async fn bytes_go_both_ways_at_once_and_are_counted() {
    let mut flow = flow().await;
    let (there, back) = (vec![5; 500_001], vec![7; 300_017]);
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
    let (forth, back, outcome) = flow.outcome().await;
    outcome.unwrap();
    assert_eq!((forth, back), (500_001, 300_017));
}

#[tokio::test]
async fn an_end_is_passed_on_and_the_other_direction_goes_on() {
    let mut flow = flow().await;
    flow.client.write_all(b"question").await.unwrap();
    flow.client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut flow.server).await.unwrap(), b"question");
    flow.server.write_all(b"answer").await.unwrap();
    flow.server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut flow.client).await.unwrap(), b"answer");
    let (forth, back, outcome) = flow.outcome().await;
    outcome.unwrap();
    assert_eq!((forth, back), (8, 6));
}

#[tokio::test]
async fn a_reset_is_passed_on_either_way() {
    let mut f = flow().await;
    f.client.reset();
    assert!(is_reset(&mut f.server).await);
    let mut f = flow().await;
    f.server.reset();
    assert!(is_reset(&mut f.client).await);
    assert!(soon(f.between.join_next()).await.unwrap().unwrap().2.is_err());
}

#[tokio::test]
async fn a_reset_after_an_end_is_passed_on_to_a_silent_side() {
    let mut flow = flow().await;
    flow.client.shutdown().await.unwrap();
    assert!(read_all(&mut flow.server).await.unwrap().is_empty());
    flow.client.reset();
    assert!(soon(flow.between.join_next()).await.unwrap().unwrap().2.is_err());
    assert!(flow.server.write(b"x").await.is_err());
}

#[tokio::test]
async fn a_reset_of_a_blocked_sender_is_passed_on() {
    let mut flow = flow().await;
    fill_up(&mut flow.client).await;
    flow.client.reset();
    assert!(soon(flow.between.join_next()).await.unwrap().unwrap().2.is_err());
    assert!(is_reset(&mut flow.server).await);
}

#[tokio::test]
async fn a_blocked_direction_does_not_hold_up_the_other() {
    let mut flow = flow().await;
    fill_up(&mut flow.client).await;
    for _ in 0..50 {
        flow.server.write_all(b"ping").await.unwrap();
        soon(flow.client.read_exact(&mut [0; 4])).await.unwrap();
    }
}

#[tokio::test]
async fn a_dropped_splice_resets_both_sides() {
    let mut flow = flow().await;
    flow.client.write_all(b"half of it").await.unwrap();
    flow.server.read_exact(&mut [0; 4]).await.unwrap();
    flow.between.shutdown().await;
    assert!(is_reset(&mut flow.client).await && read_all(&mut flow.server).await.is_err());
}
