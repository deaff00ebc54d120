use servicekeel_runtime::net::{Datagrams, Descriptor, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

#[tokio::test]
async fn a_handed_over_socket_connects_and_a_handed_over_listener_accepts() {
    let net = pod();
    let made = net.make_bound(DescriptorKind::TcpListener, loopback()).await.unwrap();
    let listener = net.adopt_listener(made.share().unwrap()).unwrap();
    let addr = listener.local_addr().unwrap();
    let stock = net.make_unbound(DescriptorKind::TcpUnconnected).unwrap();
    let (client, server) = tokio::join!(net.connect_descriptor(stock, addr), listener.accept());
    let (mut client, (mut server, peer)) = (client.unwrap(), server.unwrap());
    assert!(peer.ip().is_loopback() && peer != addr);
    assert_eq!(client.peer_addr().unwrap(), addr);
    client.write_all(b"hello").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    server.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "hello");
}

#[tokio::test]
async fn connections_wait_while_nobody_polls_the_listener() {
    let net = pod();
    let made = net.make_bound(DescriptorKind::TcpListener, loopback()).await.unwrap();
    let addr = made.local_addr().unwrap();
    drop(net.adopt_listener(made.share().unwrap()).unwrap());
    let mut client = net.connect(&addr.to_string()).await.unwrap();
    client.write_all(b"waiting").await.unwrap();
    let second = net.adopt_listener(made.share().unwrap()).unwrap();
    let (mut server, _) = second.accept().await.unwrap();
    let mut buf = [0; 7];
    server.read_exact(&mut buf).await.unwrap();
    assert_eq!(&buf, b"waiting");
}

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
    let listener = net.adopt_listener(made).unwrap();
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
async fn an_end_goes_behind_the_bytes_and_the_other_direction_goes_on() {
    let net = pod();
    let (mut client, mut server) = pair(&net).await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(client.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    let mut question = Vec::new();
    server.read_to_end(&mut question).await.unwrap();
    assert_eq!(question, b"question");
    server.write_all(b"answer").await.unwrap();
    drop(server);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"answer");
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
async fn an_applications_stream_resets_when_it_is_dropped_and_ends_when_it_is_closed() {
    let net = pod();
    for closes in [true, false] {
        let made = net.make_bound(DescriptorKind::TcpListener, loopback()).await.unwrap();
        let listener = net.adopt_listener(made).unwrap();
        let service = net.listen(loopback()).await.unwrap();
        let mut client = net.connect(&listener.local_addr().unwrap().to_string()).await.unwrap();
        let stock = net.make_unbound(DescriptorKind::TcpUnconnected).unwrap();
        let connected = net.connect_descriptor(stock, service.local_addr().unwrap()).await.unwrap();
        let (accepted, mut server) = (listener.accept().await.unwrap().0, service.accept().await.unwrap().0);
        for (app, router) in [(&mut client, accepted), (&mut server, connected)] {
            if closes {
                router.close();
                assert_eq!(app.read(&mut [0]).await.unwrap(), 0);
            } else {
                drop(router);
                assert_eq!(app.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
            }
        }
    }
}

#[tokio::test]
async fn a_close_with_unread_bytes_resets() {
    let net = pod();
    let (mut client, server) = pair(&net).await;
    client.write_all(b"unread").await.unwrap();
    drop(server);
    assert_eq!(client.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
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
async fn refusals_say_where() {
    let net = pod();
    let closed = net.listen(loopback()).await.unwrap().local_addr().unwrap().to_string();
    let error = net.connect(&closed).await.err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    assert!(error.to_string().contains(&closed), "{error}");
    assert!(net.connect("no-port").await.is_err());
    // 192.0.2.0/24 is nobody's (RFC 5737).
    let elsewhere = "192.0.2.1:80".parse().unwrap();
    assert!(net.listen(elsewhere).await.err().unwrap().to_string().contains("192.0.2.1"));
    assert_eq!(net.connect("192.0.2.1:80").await.err().unwrap().kind(), io::ErrorKind::NetworkUnreachable);
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
async fn datagrams_keep_their_boundaries_and_report_refusals() {
    let net = pod();
    let bound = net.make_bound(DescriptorKind::UdpBound, "127.0.66.1:53".parse().unwrap()).await.unwrap();
    let server = net.adopt_udp(bound).unwrap();
    let at = server.local_addr().unwrap();
    let client = net.adopt_udp(net.make_unbound(DescriptorKind::UdpUnconnected).unwrap()).unwrap();
    client.connect(at).await.unwrap();
    let mut buf = vec![0; 65_535];
    for len in [0, 1, 1_500, 65_507] {
        client.send_to(&vec![3; len], at).await.unwrap();
        let (n, from) = soon(server.recv_from(&mut buf)).await.unwrap();
        assert_eq!(n, len);
        server.send_to(&buf[..n], from).await.unwrap();
        assert_eq!(soon(client.recv_from(&mut buf)).await.unwrap(), (len, at));
    }
    assert!(client.send_to(&[0; 65_508], at).await.is_err());
    let stranger = net.bind_udp(loopback()).unwrap();
    stranger.send_to(b"not for you", client.local_addr().unwrap()).await.unwrap();
    drop(server);
    client.send_to(b"x", at).await.unwrap();
    let error = soon(client.recv_from(&mut buf)).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
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
