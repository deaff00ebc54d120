//! Strangers that connect without a pause, and an honest router beside them whose path is slow.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

use crate::says;
use crate::stand::Stand;

/// One way of the slow path: a handshake takes three of them from its first byte on.
const DELAY: Duration = Duration::from_millis(100);

async fn connect(from: &str, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(from.parse().unwrap(), 0))?;
    socket.connect(to).await
}

async fn delay(mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
    let (queue, mut queued) = mpsc::channel::<(Instant, Vec<u8>)>(1024);
    let receive = async move {
        loop {
            let mut bytes = Vec::with_capacity(16 << 10);
            match from.read_buf(&mut bytes).await {
                Ok(n) if n > 0 => drop(queue.send((Instant::now() + DELAY, bytes)).await),
                _ => return,
            }
        }
    };
    let send = async move {
        while let Some((when, bytes)) = queued.recv().await {
            sleep_until(when).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(receive, send);
}

/// A path to `to` of 200 ms there and back, whose far end is at `from`.
async fn slow_path(tasks: &mut JoinSet<()>, from: &'static str, to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tasks.spawn(async move {
        let mut paths = JoinSet::new();
        while let Ok((near, _)) = listener.accept().await {
            paths.spawn(async move {
                let Ok(far) = connect(from, to).await else { return };
                let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                tokio::join!(delay(near_in, far_out), delay(far_in, near_out));
            });
        }
    });
    at
}

/// 1,300 connections a second that say nothing. It tells when more are open than a router has room for.
async fn flood(from: &'static str, to: SocketAddr, full: oneshot::Sender<()>) {
    let mut full = Some(full);
    let mut ticks = interval(Duration::from_millis(10));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut silent = VecDeque::new();
    loop {
        ticks.tick().await;
        for _ in 0..13 {
            silent.extend(connect(from, to).await.ok());
        }
        // Those that were closed meanwhile.
        while silent.len() > 300 {
            silent.pop_front();
            full.take().map(|full| full.send(()));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_strangers_keeps_no_router_out() {
    for (honest, stranger) in [("127.0.1.1", "127.0.0.1"), ("127.0.1.1", "127.0.1.2")] {
        let mut tasks = JoinSet::new();
        let mut stand = Stand::apart().await;
        let slow = slow_path(&mut tasks, honest, stand.a.peers).await;
        // From the same network as the flood it gets in as one that is known there.
        let known = stranger.starts_with("127.0.1.");
        if known {
            stand.b.settings.peers.push(slow.to_string());
            stand.b.apply();
            stand.wait_until_it_works().await;
        }
        let (full, is_full) = oneshot::channel();
        tasks.spawn(flood(stranger, stand.a.peers, full));
        timeout(crate::LIMIT, is_full).await.unwrap().unwrap();
        if !known {
            stand.b.settings.peers.push(slow.to_string());
            stand.b.apply();
            stand.wait_until_it_works().await;
        }
        let mut flows = JoinSet::new();
        for _ in 0..29 {
            let at = stand.import_tcp;
            flows.spawn(async move {
                let mut stream = TcpStream::connect(at).await?;
                says(&mut stream, b"let me in").await
            });
        }
        let started = Instant::now();
        let mut through = 0;
        while let Ok(Some(flow)) = timeout(Duration::from_secs(5), flows.join_next()).await {
            through += usize::from(flow.unwrap().is_ok_and(|got| got == b"let me in"));
        }
        let took = started.elapsed();
        assert_eq!(through, 29, "{honest} beside {stranger}, within {took:?}");
        assert!(took < Duration::from_secs(3), "{honest} beside {stranger}: {took:?}");
        tasks.abort_all();
    }
}
