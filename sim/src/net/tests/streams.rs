use servicekeel_runtime::net::{Datagrams, Descriptor, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

#[tokio::test(start_paused = true)]
async fn a_full_backlog_holds_connects_and_refuses_none() {
    let net = pod();
    let made = net.make_bound(DescriptorKind::TcpListener, loopback()).await.unwrap();
    let addr = made.local_addr().unwrap().to_string();
    let mut waiting = Vec::new();
    while let Ok(client) = timeout(Duration::from_millis(100), net.connect(&addr)).await {
        waiting.push(client.unwrap());
        assert!(waiting.len() < 100_000);
    }
    let listener = net.adopt_listener(made).await.unwrap();
    let late = net.connect(&addr);
    let (late, accepted) = tokio::join!(late, listener.accept());
    late.unwrap();
    accepted.unwrap();
}

#[tokio::test]
async fn what_nobody_accepts_is_reset_with_the_last_handle_of_the_listener() {
    let net = pod();
    let made = net.make_bound(DescriptorKind::TcpListener, loopback()).await.unwrap();
    let addr = made.local_addr().unwrap().to_string();
    let (held, mut client) = (made.share().unwrap(), net.connect(&addr).await.unwrap());
    drop(made);
    assert!(timeout(Duration::from_millis(10), client.read(&mut [0])).await.is_err());
    drop(held);
    assert_eq!(soon(client.read(&mut [0])).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(net.connect(&addr).await.err().unwrap().kind(), io::ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn reset_is_seen_as_a_reset_after_what_came_before_it_and_once() {
    let net = pod();
    let (mut client, mut server) = pair(&net).await;
    client.write_all(b"before").await.unwrap();
    client.reset();
    let mut buf = [0; 6];
    server.read_exact(&mut buf).await.unwrap();
    assert_eq!(server.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(server.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    assert_eq!(server.shutdown().await.unwrap_err().kind(), io::ErrorKind::NotConnected);
}

#[tokio::test]
async fn a_write_to_one_that_has_closed_is_taken_and_then_breaks() {
    let net = pod();
    let (mut client, server) = pair(&net).await;
    drop(server);
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    client.write_all(b"taken").await.unwrap();
    assert_eq!(client.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn a_slow_reader_stops_the_writer_and_a_close_frees_it() {
    let net = pod();
    let (mut client, server) = pair(&net).await;
    let mut written = 0;
    while let Ok(n) = timeout(Duration::from_millis(10), client.write(&[1; 1000])).await {
        written += n.unwrap();
    }
    assert_eq!(written, 64 << 10);
    let (outcome, ()) = tokio::join!(client.write(b"x"), async {
        tokio::task::yield_now().await;
        drop(server);
    });
    assert!(outcome.is_err());
}

#[tokio::test]
async fn nobody_is_elsewhere() {
    // 192.0.2.0/24 is nobody's (RFC 5737).
    let error = pod().connect("192.0.2.1:80").await.err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::NetworkUnreachable);
}

#[tokio::test]
async fn a_connected_socket_hears_one_sender_alone() {
    let net = pod();
    let (server, client) = (net.bind_udp(loopback()).unwrap(), net.bind_udp(loopback()).unwrap());
    let (at, own) = (server.local_addr().unwrap(), client.local_addr().unwrap());
    client.connect(at).await.unwrap();
    net.bind_udp(loopback()).unwrap().send_to(b"not for you", own).await.unwrap();
    server.send_to(b"for you", own).await.unwrap();
    let mut buf = [0; 20];
    assert_eq!(soon(client.recv_from(&mut buf)).await.unwrap(), (7, at));
}

#[tokio::test]
async fn pods_have_networks_of_their_own() {
    let kernel = Kernel::new(0);
    let (one, other) = (SimNet::pod(&kernel, &[]), SimNet::pod(&kernel, &[]));
    let addr = "127.0.66.1:80".parse().unwrap();
    let (_one, _other) = (one.listen(addr).await.unwrap(), other.listen(addr).await.unwrap());
    let apart = "127.0.66.2:80";
    let _third = one.listen(apart.parse().unwrap()).await.unwrap();
    assert!(one.connect(apart).await.is_ok());
    assert_eq!(other.connect(apart).await.err().unwrap().kind(), io::ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn a_slow_receiver_loses_whole_datagrams() {
    let net = pod();
    let server = net.bind_udp("127.0.0.1:9".parse().unwrap()).unwrap();
    let client = net.bind_udp(loopback()).unwrap();
    for i in 0..=255_u8 {
        client.send_to(&[i; 2000], "127.0.0.1:9".parse().unwrap()).await.unwrap();
    }
    let mut buf = [0; 4000];
    let mut received = 0;
    while let Ok(outcome) = timeout(Duration::from_millis(1), server.recv_from(&mut buf)).await {
        let n = outcome.unwrap().0;
        assert!(n == 2000 && buf[..n].iter().all(|byte| usize::from(*byte) == received));
        received += 1;
    }
    assert!((50..255).contains(&received), "{received}");
}
