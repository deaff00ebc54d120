use std::future::poll_fn;

use servicekeel_core::handoff::DescriptorKind;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use super::*;
use crate::net::{Listener, Net, os::OsNet};

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

#[tokio::test]
async fn streams_between_routers_find_dead_paths() {
    let net = OsNet::new();
    let listener = net.listen(loopback()).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (client, server) = tokio::join!(net.connect(&address), listener.accept());
    for mut stream in [client.unwrap(), server.unwrap().0] {
        let socket = SockRef::from(&*stream.polled().unwrap());
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), BETWEEN_ROUTERS.keepalive_idle);
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), BETWEEN_ROUTERS.keepalive_interval);
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), BETWEEN_ROUTERS.keepalive_probes);
        // It would end a connection whose reader pauses.
        assert_eq!(socket.tcp_user_timeout().unwrap(), None);
        assert!(stream.is_write_vectored());
    }
}

/// Takes 75 s by the kernel's clock.
#[tokio::test]
#[ignore = "takes 75 s: make test-slow"]
async fn a_reader_that_pauses_for_longer_than_a_minute_gets_everything() {
    let net = OsNet::new();
    let listener = net.listen(loopback()).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (client, server) = tokio::join!(net.connect(&address), listener.accept());
    let (client, server) = (client.unwrap(), server.unwrap().0);
    let pass = async |mut writer: OsStream, mut reader: OsStream| {
        let mut written = 0;
        while let Ok(n) = timeout(Duration::from_millis(500), writer.write(&[7; 64 << 10])).await {
            written += n.unwrap();
        }
        sleep(Duration::from_secs(75)).await;
        let rest = async {
            writer.write_all(b"and the rest").await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let mut got = Vec::new();
        let (read, ()) = tokio::join!(reader.read_to_end(&mut got), rest);
        read.unwrap();
        assert_eq!(got.len(), written + b"and the rest".len());
    };
    let (other_client, other_server) = tokio::join!(net.connect(&address), listener.accept());
    let (other_client, other_server) = (other_client.unwrap(), other_server.unwrap().0);
    tokio::join!(pass(client, server), pass(other_server, other_client));
}

#[tokio::test]
async fn streams_of_applications_send_at_once() {
    let net = OsNet::new();
    let made = net.make_bound(DescriptorKind::TcpListener, loopback()).await.unwrap();
    let listener = net.adopt_listener(made).await.unwrap();
    let stock = net.make_unbound(DescriptorKind::TcpUnconnected).unwrap();
    let at = listener.local_addr().unwrap();
    let (connected, accepted) = tokio::join!(net.connect_descriptor(stock, at), listener.accept());
    let mut accepted = accepted.unwrap().0;
    // A client that is gone is found by probes.
    let client = SockRef::from(&*accepted.polled().unwrap());
    assert!(client.keepalive().unwrap() && client.tcp_keepalive_time().unwrap() == Duration::from_secs(75));
    for mut stream in [connected.unwrap(), accepted] {
        assert!(stream.polled().unwrap().nodelay().unwrap());
    }
}

/// Behind a word and without.
#[tokio::test]
async fn who_has_ended_is_not_gone_and_who_has_reset_is() {
    let gone = async |stream: &mut OsStream| {
        let gone = poll_fn(|cx| stream.poll_gone(cx));
        timeout(Duration::from_millis(100), gone).await.is_ok()
    };
    for word in [&b""[..], b"word"] {
        let listener = OsNet::new().listen(loopback()).await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut stream = listener.accept().await.unwrap().0;
        client.write_all(word).await.unwrap();
        assert!(!gone(&mut stream).await && !stream.has_ended());
        client.shutdown().await.unwrap();
        assert!(!gone(&mut stream).await && stream.has_ended());
        SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        assert!(gone(&mut stream).await);
    }
}

#[tokio::test]
async fn the_wrong_kind_is_not_adopted() {
    let net = OsNet::new();
    let udp = || net.make_unbound(DescriptorKind::UdpUnconnected).unwrap();
    assert!(net.adopt_listener(udp()).await.is_err());
    assert!(net.connect_descriptor(udp(), loopback()).await.is_err());
    assert!(net.adopt_udp(net.make_unbound(DescriptorKind::TcpUnconnected).unwrap()).await.is_err());
}

#[tokio::test]
async fn a_blocking_socket_that_was_handed_over_does_not_block() {
    let net = OsNet::new();
    let made = net.make_bound(DescriptorKind::TcpListener, loopback()).await.unwrap();
    SockRef::from(&made).set_nonblocking(false).unwrap();
    let listener = net.adopt_listener(made).await.unwrap();
    let Listening::OfPod(listener) = &listener.0 else { panic!("its own") };
    assert!(SockRef::from(&**listener).nonblocking().unwrap());
}

#[tokio::test]
async fn a_stream_goes_on_where_it_comes_to_also_when_its_first_runtime_has_ended() {
    let (listener, peer) = {
        let listener = std::net::TcpListener::bind(loopback()).unwrap();
        let at = listener.local_addr().unwrap();
        (listener, at)
    };
    let first = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let dialled = first.spawn(async move { OsNet::new().connect(&peer.to_string()).await });
    let mut stream = dialled.await.unwrap().unwrap();
    let (mut other, _) = listener.accept().unwrap();
    first.shutdown_background();
    assert!(stream.is_idle());
    stream.come_here().unwrap();
    // The first write waits for no event.
    stream.write_all(b"ping").await.unwrap();
    let mut got = [0; 4];
    std::io::Read::read_exact(&mut other, &mut got).unwrap();
    let mut read = tokio::task::JoinSet::new();
    read.spawn(async move {
        let mut got = [0; 4];
        stream.read_exact(&mut got).await.unwrap();
        (stream, got)
    });
    std::io::Write::write_all(&mut other, b"pong!").unwrap();
    let (mut stream, pong) =
        timeout(Duration::from_secs(5), read.join_next()).await.unwrap().unwrap().unwrap();
    assert_eq!((&got, &pong), (b"ping", b"pong"));
    assert!(!stream.is_idle(), "a byte is unread");
    // It stays where it is.
    stream.come_here().unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'!');
    drop(other);
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    assert!(!stream.is_idle(), "its end is news");
}
