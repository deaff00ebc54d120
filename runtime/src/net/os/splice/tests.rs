use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use super::*;
use crate::net::os::OsNet;
use crate::net::os::getsockopt::setsockopt;
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

/// What a listener accepts inherits SO_TIMESTAMPING (socket(7)): each send then puts something in the error queue, and
/// epoll says for ever that the socket is writable. The thread is that of the other pod.
#[test]
fn a_client_that_seems_to_have_room_for_ever_does_not_hold_up_the_thread() {
    const SENT: usize = 32 << 20;
    let (told, tells) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let net = OsNet::new();
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            stamp_all(&listener);
            let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let accepted = listener.accept().unwrap().0;
            accepted.set_nonblocking(true).unwrap();
            let a = OsStream::own(TcpStream::from_std(accepted).unwrap());
            let (mut server, b) = pair(&net).await;
            let mut tasks = JoinSet::new();
            tasks.spawn(async move { drop(net.splice(a, b, |_, _| ()).await) });
            tasks.spawn(async move { server.write_all(&vec![7; SENT]).await.unwrap() });
            tokio::time::sleep(Duration::from_millis(500)).await;
            let before = processor_time();
            tokio::time::sleep(Duration::from_millis(500)).await;
            told.send(Ok(processor_time() - before)).unwrap();
            // And what it was sent is there once it reads.
            let reader = std::thread::spawn(move || {
                let mut got = 0;
                let mut buf = vec![0; 1 << 20];
                while got < SENT {
                    got += std::io::Read::read(&mut client, &mut buf).unwrap();
                }
                got
            });
            while !reader.is_finished() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            told.send(Err(reader.join().unwrap())).unwrap();
        });
    });
    let spent = tells.recv_timeout(Duration::from_secs(20)).expect("nothing else has its turn").unwrap();
    assert!(spent < Duration::from_millis(250), "{spent:?} of 500 ms for a flow that stands still");
    let got = tells.recv_timeout(Duration::from_secs(60)).expect("it does not go on");
    assert_eq!(got, Err(SENT));
}

/// A stamp for each send, by the kernel itself, when it is queued, sent and acknowledged.
fn stamp_all(socket: &impl AsFd) {
    let flags = libc::SOF_TIMESTAMPING_TX_SOFTWARE
        | libc::SOF_TIMESTAMPING_SOFTWARE
        | libc::SOF_TIMESTAMPING_TX_SCHED
        | libc::SOF_TIMESTAMPING_TX_ACK;
    setsockopt(socket.as_fd(), libc::SOL_SOCKET, libc::SO_TIMESTAMPING, flags).unwrap();
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

/// What comes until the end, and whether that was a reset.
async fn hear(stream: &mut OsStream) -> (Vec<u8>, bool) {
    let (mut got, mut buf) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        match stream.read(&mut buf).await {
            Ok(0) => return (got, false),
            Ok(n) => got.extend_from_slice(&buf[..n]),
            Err(_) => return (got, true),
        }
    }
}

/// A server answers early and closes, with the request unread; and a client says its last word beside what it did not
/// read. Direct TCP gets all of these through, and then a reset.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_said_before_a_reset_arrives_before_it() {
    let mut lost = Vec::new();
    for round in 0..40 {
        let Flow { net: _net, mut client, mut server, _between } = flow().await;
        let answers = async move {
            server.read_exact(&mut [0; 1000]).await.unwrap();
            server.write_all(&[4; 2000]).await.unwrap();
            // Where it closes, the rest is unread: the kernel resets.
        };
        // The rest of the request finds nobody.
        let _ = tokio::join!(answers, client.write_all(&[1; 1_000_000]));
        let (answer, reset) = hear(&mut client).await;
        if answer != [4; 2000] || !reset {
            lost.push((round, "answer", answer.len(), reset));
        }

        let Flow { net: _net, mut client, mut server, _between } = flow().await;
        server.write_all(&[2; 600]).await.unwrap();
        client.read_exact(&mut [0]).await.unwrap();
        client.write_all(&[3; 8000]).await.unwrap();
        drop(client);
        let (word, reset) = hear(&mut server).await;
        if word != [3; 8000] || !reset {
            lost.push((round, "last word", word.len(), reset));
        }
    }
    assert!(lost.is_empty(), "{} of 80: {lost:?}", lost.len());
}

/// One that takes nothing holds up a reset for as long as it may, and no longer.
#[tokio::test]
async fn a_reset_waits_for_one_that_reads_nothing_no_longer_than_it_may() {
    let Flow { net: _net, mut client, server, _between: mut between } = flow().await;
    let filling =
        tokio::time::timeout(Duration::from_millis(500), client.write_all(&vec![1; 64 << 20])).await;
    assert!(filling.is_err(), "the way is full");
    client.reset();
    let ended = tokio::time::timeout(3 * LAST_WORDS, between.join_next()).await;
    assert!(ended.expect("the flow ends").unwrap().unwrap().is_err());
    drop(server);
}
