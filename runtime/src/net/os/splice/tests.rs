use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::*;
use crate::net::os::OsNet;
use crate::net::{Listener, Net};

const SOON: Duration = Duration::from_secs(5);

/// A client and a server, and the code between them.
struct Flow {
    net: OsNet,
    client: OsStream,
    server: OsStream,
    between: JoinSet<(u64, u64, io::Result<()>)>,
}

async fn pair(net: &OsNet) -> (OsStream, OsStream) {
    let listener = net.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (near, far) = tokio::join!(net.connect(&address), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

async fn flow() -> Flow {
    let net = OsNet::new();
    let (client, a) = pair(&net).await;
    let (server, b) = pair(&net).await;
    let mut between = JoinSet::new();
    let spliced = net.clone();
    between.spawn(async move {
        let (forth, back) = (AtomicU64::new(0), AtomicU64::new(0));
        let count = |n, m| {
            forth.fetch_add(n, Ordering::Relaxed);
            back.fetch_add(m, Ordering::Relaxed);
        };
        let outcome = spliced.splice(a, b, count).await;
        (forth.into_inner(), back.into_inner(), outcome)
    });
    Flow { net, client, server, between }
}

impl Flow {
    async fn outcome(&mut self) -> (u64, u64, io::Result<()>) {
        timeout(SOON, self.between.join_next()).await.expect("the splice goes on").unwrap().unwrap()
    }

    fn idle_pipes(&self) -> usize {
        self.net.pipes.0.lock().unwrap().len()
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

async fn read_all(stream: &mut OsStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    timeout(SOON, stream.read_to_end(&mut bytes)).await.expect("no end came")?;
    Ok(bytes)
}

async fn is_reset(stream: &mut OsStream) -> bool {
    matches!(read_all(stream).await, Err(e) if e.kind() == io::ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn bytes_go_both_ways_at_once_and_are_counted() {
    let mut flow = flow().await;
    let (there, back) = (pattern(5_000_001), pattern(3_000_017));
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
    timeout(SOON, both).await.expect("stuck").unwrap();
    assert!(got_there == there && got_back == back);
    let (forth, back, outcome) = flow.outcome().await;
    outcome.unwrap();
    assert_eq!((forth, back), (5_000_001, 3_000_017));
}

#[tokio::test]
async fn an_end_is_passed_on_and_the_other_direction_goes_on() {
    let mut flow = flow().await;
    flow.client.write_all(b"question").await.unwrap();
    flow.client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut flow.server).await.unwrap(), b"question");
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(2)).await;
        flow.server.write_all(b"answer").await.unwrap();
    }
    flow.server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut flow.client).await.unwrap(), b"answer".repeat(10));
    let (forth, back, outcome) = flow.outcome().await;
    outcome.unwrap();
    assert_eq!((forth, back), (8, 60));
}

#[tokio::test]
async fn a_reset_is_passed_on_either_way() {
    let mut f = flow().await;
    f.client.reset();
    assert!(is_reset(&mut f.server).await);

    let mut f = flow().await;
    f.server.reset();
    assert!(is_reset(&mut f.client).await);
    assert!(f.between.join_next().await.unwrap().unwrap().2.is_err());
}

#[tokio::test]
async fn a_reset_after_an_end_is_passed_on_to_a_silent_side() {
    let mut flow = flow().await;
    flow.client.shutdown().await.unwrap();
    assert!(read_all(&mut flow.server).await.unwrap().is_empty());
    flow.client.reset();
    let outcome = timeout(SOON, flow.between.join_next()).await.expect("nobody noticed");
    assert!(outcome.unwrap().unwrap().2.is_err());
    assert!(flow.server.write(b"x").await.is_err());
}

#[tokio::test]
async fn a_reset_of_a_blocked_sender_is_passed_on() {
    let mut flow = flow().await;
    fill_up(&mut flow.client).await;
    flow.client.reset();
    let outcome = timeout(SOON, flow.between.join_next()).await.expect("nobody noticed");
    assert!(outcome.unwrap().unwrap().2.is_err());
    assert!(is_reset(&mut flow.server).await);
}

#[tokio::test]
async fn a_receiver_that_closes_resets_the_sender() {
    let mut flow = flow().await;
    flow.client.write_all(b"x").await.unwrap();
    drop(flow.server);
    let error = async { while flow.client.write_all(&[0; 1000]).await.is_ok() {} };
    timeout(SOON, error).await.expect("the client writes on into nothing");
}

/// Writes until nothing has moved for a while; returns how much went in.
async fn fill_up(stream: &mut OsStream) -> usize {
    let block = pattern(64 << 10);
    let mut written = 0;
    while let Ok(n) = timeout(Duration::from_millis(200), stream.write(&block[written % block.len()..])).await
    {
        written += n.unwrap();
        assert!(written < 200 << 20, "the sender is never stopped");
    }
    written
}

#[tokio::test]
async fn a_slow_reader_stops_the_writer_and_gets_everything() {
    let mut flow = flow().await;
    let written = fill_up(&mut flow.client).await;
    flow.client.shutdown().await.unwrap();
    let got = read_all(&mut flow.server).await.unwrap();
    let block = pattern(64 << 10);
    assert_eq!(got.len(), written);
    assert!(got.chunks(block.len()).all(|chunk| block.starts_with(chunk)));
}

#[tokio::test]
async fn a_blocked_direction_does_not_hold_up_the_other() {
    let mut flow = flow().await;
    fill_up(&mut flow.client).await;
    for _ in 0..100 {
        flow.server.write_all(b"ping").await.unwrap();
        let mut buf = [0; 4];
        timeout(SOON, flow.client.read_exact(&mut buf)).await.expect("held up").unwrap();
    }
}

#[tokio::test]
async fn an_idle_flow_holds_no_pipe() {
    let mut flow = flow().await;
    assert_eq!(flow.idle_pipes(), 0);
    for _ in 0..3 {
        flow.client.write_all(b"x").await.unwrap();
        flow.server.read_exact(&mut [0]).await.unwrap();
        flow.server.write_all(b"y").await.unwrap();
        flow.client.read_exact(&mut [0]).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(flow.idle_pipes(), 1);
}

#[tokio::test]
async fn an_idle_flow_costs_no_time() {
    let flow = flow().await;
    let before = processor_time();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let spent = processor_time() - before;
    drop(flow);
    assert!(spent < Duration::from_millis(150), "{spent:?} of processor time while nothing moved");
}

/// The processor time of this thread.
fn processor_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

#[tokio::test]
async fn a_dropped_splice_resets_both_sides() {
    let mut flow = flow().await;
    flow.client.write_all(b"half of it").await.unwrap();
    flow.server.read_exact(&mut [0; 4]).await.unwrap();
    flow.between.shutdown().await;
    assert!(is_reset(&mut flow.client).await);
    // What came before the reset may still be read.
    let mut rest = Vec::new();
    assert!(flow.server.read_to_end(&mut rest).await.is_err());
}

#[tokio::test]
async fn a_pipe_with_bytes_in_it_is_not_used_again() {
    let pipes = Pipes::default();
    let mut pipe = pipes.take().await;
    pipe.held = 1;
    pipes.put_back(pipe);
    assert!(pipes.0.lock().unwrap().is_empty());
    let many: Vec<Pipe> = (0..STOCK + 3).map(|_| Pipe::open().unwrap()).collect();
    for pipe in many {
        pipes.put_back(pipe);
    }
    assert_eq!(pipes.0.lock().unwrap().len(), STOCK);
}
