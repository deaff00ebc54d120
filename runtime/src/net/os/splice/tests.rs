use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use super::*;
use crate::net::os::OsNet;
use crate::net::{Listener, Net};

/// A client and a server, and the splice between them.
struct Flow {
    net: OsNet,
    client: OsStream,
    server: OsStream,
    _between: JoinSet<io::Result<()>>,
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
    between.spawn(async move { spliced.splice(a, b, |_, _| ()).await });
    Flow { net, client, server, _between: between }
}

impl Flow {
    fn idle_pipes(&self) -> usize {
        self.net.pipes.stock.lock().unwrap().len()
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
async fn a_pipe_with_bytes_in_it_is_not_used_again() {
    let pipes = Pipes::default();
    let mut pipe = pipes.take().await;
    pipe.held = 1;
    pipes.put_back(pipe);
    assert!(pipes.stock.lock().unwrap().is_empty());
    let many: Vec<Pipe> = (0..STOCK + 3).map(|_| Pipe::open().unwrap()).collect();
    for pipe in many {
        pipes.put_back(pipe);
    }
    assert_eq!(pipes.stock.lock().unwrap().len(), STOCK);
}
