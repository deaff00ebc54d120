use std::os::fd::AsFd;

use servicekeel_core::handoff::DescriptorKind;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::net::{Datagrams, Net, os::OsNet};

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

#[tokio::test]
async fn a_handed_over_socket_connects_and_a_handed_over_listener_accepts() {
    let net = OsNet::new();
    let made = net.make_bound(DescriptorKind::TcpListener, loopback()).await.unwrap();
    let listener = net.adopt_listener(made.share().unwrap()).unwrap();
    let addr = listener.local_addr().unwrap();
    let stock = net.make_unbound(DescriptorKind::TcpUnconnected).unwrap();
    let (client, server) = tokio::join!(net.connect_descriptor(stock, addr), listener.accept());
    let (mut client, (mut server, peer)) = (client.unwrap(), server.unwrap());
    assert_eq!(peer, client.0.local_addr().unwrap());
    assert_eq!(client.peer_addr().unwrap(), addr);
    assert!(client.0.nodelay().unwrap() && server.0.nodelay().unwrap());
    client.write_all(b"hello").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    server.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "hello");
}

#[tokio::test]
async fn connections_wait_while_nobody_polls_the_listener() {
    let net = OsNet::new();
    let made = net.make_bound(DescriptorKind::TcpListener, loopback()).await.unwrap();
    let addr = made.local_addr().unwrap();
    let first = net.adopt_listener(made.share().unwrap()).unwrap();
    drop(first);
    let mut client = net.connect(&addr.to_string()).await.unwrap();
    client.write_all(b"waiting").await.unwrap();
    let second = net.adopt_listener(made.share().unwrap()).unwrap();
    let (mut server, _) = second.accept().await.unwrap();
    let mut buf = [0; 7];
    server.read_exact(&mut buf).await.unwrap();
    assert_eq!(&buf, b"waiting");
}

#[tokio::test]
async fn streams_between_routers_find_dead_paths() {
    let net = OsNet::new();
    let listener = net.listen(loopback()).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (client, server) = tokio::join!(net.connect(&address), listener.accept());
    for stream in [client.unwrap(), server.unwrap().0] {
        let socket = SockRef::from(&stream.0);
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(15));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(5));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 3);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(60)));
        assert!(stream.is_write_vectored());
    }
}

#[tokio::test]
async fn reset_is_seen_as_a_reset() {
    let net = OsNet::new();
    let listener = net.listen(loopback()).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (client, server) = tokio::join!(net.connect(&address), listener.accept());
    client.unwrap().reset();
    let e = server.unwrap().0.read(&mut [0]).await.unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::ConnectionReset);
}

/// An application and what the router holds of it: a stream that it accepted, or one that it connected.
async fn applications(net: &OsNet) -> [(OsStream, OsStream); 2] {
    let made = net.make_bound(DescriptorKind::TcpListener, loopback()).await.unwrap();
    let listener = net.adopt_listener(made).unwrap();
    let service = net.listen(loopback()).await.unwrap();
    let stock = net.make_unbound(DescriptorKind::TcpUnconnected).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (client, accepted) = tokio::join!(net.connect(&address), listener.accept());
    let addr = service.local_addr().unwrap();
    let (connected, server) = tokio::join!(net.connect_descriptor(stock, addr), service.accept());
    [(client.unwrap(), accepted.unwrap().0), (server.unwrap().0, connected.unwrap())]
}

#[tokio::test]
async fn an_applications_stream_resets_when_it_is_dropped() {
    for (mut app, router) in applications(&OsNet::new()).await {
        drop(router);
        let e = app.read(&mut [0]).await.unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn an_applications_stream_that_is_closed_ends_after_all_that_was_written() {
    for (mut app, mut router) in applications(&OsNet::new()).await {
        let mut written = 0;
        // More than the application's window holds.
        while let Ok(n) = tokio::time::timeout(Duration::from_millis(100), router.write(&[7; 65_536])).await {
            written += n.unwrap();
        }
        app.shutdown().await.unwrap();
        assert_eq!(router.read(&mut [0]).await.unwrap(), 0);
        router.shutdown().await.unwrap();
        router.close();
        let mut got = Vec::new();
        app.read_to_end(&mut got).await.unwrap();
        assert_eq!(got.len(), written);
    }
}

#[tokio::test]
async fn refusals_say_where() {
    let net = OsNet::new();
    let closed = {
        let listener = net.listen(loopback()).await.unwrap();
        listener.local_addr().unwrap().to_string()
    };
    let e = net.connect(&closed).await.unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::ConnectionRefused);
    assert!(e.to_string().contains(&closed), "{e}");
    assert!(net.connect("no-port").await.is_err());
    // 192.0.2.0/24 is nobody's (RFC 5737).
    assert!(net.listen("192.0.2.1:0".parse().unwrap()).await.unwrap_err().to_string().contains("192.0.2.1"));
}

#[tokio::test]
async fn the_wrong_kind_is_not_adopted() {
    let net = OsNet::new();
    let udp = || net.make_unbound(DescriptorKind::UdpUnconnected).unwrap();
    assert!(net.adopt_listener(udp()).is_err());
    assert!(net.connect_descriptor(udp(), loopback()).await.is_err());
    assert!(net.adopt_udp(net.make_unbound(DescriptorKind::TcpUnconnected).unwrap()).is_err());
}

#[tokio::test]
async fn a_blocking_socket_that_was_handed_over_does_not_block() {
    let net = OsNet::new();
    let made = net.make_bound(DescriptorKind::TcpListener, loopback()).await.unwrap();
    SockRef::from(&made).set_nonblocking(false).unwrap();
    let listener = net.adopt_listener(made).unwrap();
    assert!(SockRef::from(&listener.0.as_fd()).nonblocking().unwrap());
}

#[tokio::test]
async fn datagrams_keep_their_boundaries_and_report_refusals() {
    let net = OsNet::new();
    let bound = net.make_bound(DescriptorKind::UdpBound, loopback()).await.unwrap();
    let server = net.adopt_udp(bound).unwrap();
    let client = net.adopt_udp(net.make_unbound(DescriptorKind::UdpUnconnected).unwrap()).unwrap();
    client.connect(server.local_addr().unwrap()).await.unwrap();
    let mut buf = vec![0; 65_535];
    for len in [0, 1, 1_500, 65_507] {
        client.send_to(&vec![3; len], server.local_addr().unwrap()).await.unwrap();
        let (n, from) = server.recv_from(&mut buf).await.unwrap();
        assert_eq!(n, len);
        server.send_to(&buf[..n], from).await.unwrap();
        assert_eq!(client.recv_from(&mut buf).await.unwrap(), (len, server.local_addr().unwrap()));
    }
    let gone = server.local_addr().unwrap();
    drop(server);
    client.send_to(b"x", gone).await.unwrap();
    let e = client.recv_from(&mut buf).await.unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::ConnectionRefused);
}
