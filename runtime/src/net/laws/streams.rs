//! Streams, listeners and datagrams: what is made, handed over, connected, ended and reset.

use std::io;

use servicekeel_core::handoff::DescriptorKind;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::sleep;

use super::*;
use crate::net::{Datagrams, Descriptor, Stream};

pub async fn a_handed_over_socket_connects_and_a_handed_over_listener_accepts(net: impl Net) {
    let made = net.make_bound(DescriptorKind::TcpListener, loopback()).await.unwrap();
    let listener = net.adopt_listener(made.share().unwrap()).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let stock = net.make_unbound(DescriptorKind::TcpUnconnected).unwrap();
    let (client, server) = tokio::join!(net.connect_descriptor(stock, addr), listener.accept());
    let (mut client, (mut server, peer)) = (client.unwrap(), server.unwrap());
    assert!(peer.ip().is_loopback() && peer != addr);
    assert_eq!((server.peer_addr().unwrap(), client.peer_addr().unwrap()), (peer, addr));
    client.write_all(b"hello").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    soon(server.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "hello");
}

pub async fn a_socket_says_where_it_was_made_whoever_holds_it(net: impl Net) {
    let made = [
        net.make_bound(DescriptorKind::TcpListener, loopback()).await.unwrap(),
        net.make_bound(DescriptorKind::UdpBound, loopback()).await.unwrap(),
        net.make_unbound(DescriptorKind::TcpUnconnected).unwrap(),
        net.make_unbound(DescriptorKind::UdpUnconnected).unwrap(),
    ];
    // Tests run where the kernel says it.
    let here = made[0].namespace().unwrap().unwrap();
    for socket in made {
        assert_eq!(socket.share().unwrap().namespace().unwrap(), Some(here));
    }
}

pub async fn connections_wait_while_nobody_polls_the_listener(net: impl Net) {
    let made = net.make_bound(DescriptorKind::TcpListener, loopback()).await.unwrap();
    let addr = made.local_addr().unwrap();
    drop(net.adopt_listener(made.share().unwrap()).await.unwrap());
    let mut client = net.connect(&addr.to_string()).await.unwrap();
    client.write_all(b"waiting").await.unwrap();
    let second = net.adopt_listener(made.share().unwrap()).await.unwrap();
    let (mut server, _) = soon(second.accept()).await.unwrap();
    let mut buf = [0; 7];
    soon(server.read_exact(&mut buf)).await.unwrap();
    assert_eq!(&buf, b"waiting");
}

pub async fn an_end_goes_behind_the_bytes_and_the_other_direction_goes_on(net: impl Net) {
    let (mut client, mut server) = pair(&net).await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(client.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    let mut question = Vec::new();
    soon(server.read_to_end(&mut question)).await.unwrap();
    assert_eq!(question, b"question");
    server.write_all(b"answer").await.unwrap();
    drop(server);
    let mut answer = Vec::new();
    soon(client.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(answer, b"answer");
}

pub async fn reset_is_seen_as_a_reset(net: impl Net) {
    let (client, mut server) = pair(&net).await;
    client.reset();
    let error = soon(server.read(&mut [0])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(soon(server.read(&mut [0])).await.unwrap(), 0, "a reset is told once");
}

/// An application and what the router holds of it: a stream that it accepted, or one that it connected.
async fn applications<N: Net>(net: &N) -> [(N::TcpStream, N::TcpStream); 2] {
    let made = net.make_bound(DescriptorKind::TcpListener, loopback()).await.unwrap();
    let listener = net.adopt_listener(made).await.unwrap();
    let service = net.listen(loopback()).await.unwrap();
    let stock = net.make_unbound(DescriptorKind::TcpUnconnected).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (client, accepted) = tokio::join!(net.connect(&address), listener.accept());
    let addr = service.local_addr().unwrap();
    let (connected, server) = tokio::join!(net.connect_descriptor(stock, addr), service.accept());
    [(client.unwrap(), accepted.unwrap().0), (server.unwrap().0, connected.unwrap())]
}

pub async fn an_applications_stream_resets_when_it_is_dropped(net: impl Net) {
    for (mut app, router) in applications(&net).await {
        drop(router);
        let error = soon(app.read(&mut [0])).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}

pub async fn an_applications_stream_that_is_closed_ends_after_all_that_was_written(net: impl Net) {
    for (mut app, mut router) in applications(&net).await {
        // More than the application's window holds.
        let written = fill_up(&mut router).await;
        app.shutdown().await.unwrap();
        assert_eq!(soon(router.read(&mut [0])).await.unwrap(), 0);
        router.shutdown().await.unwrap();
        router.close();
        let mut got = Vec::new();
        soon(app.read_to_end(&mut got)).await.unwrap();
        assert_eq!(got.len(), written);
    }
}

pub async fn a_close_with_unread_bytes_resets(net: impl Net) {
    let (mut client, server) = pair(&net).await;
    client.write_all(b"unread").await.unwrap();
    drop(server);
    let error = soon(client.read(&mut [0])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

pub async fn refusals_say_where(net: impl Net) {
    let closed = net.listen(loopback()).await.unwrap().local_addr().unwrap().to_string();
    let error = net.connect(&closed).await.err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    assert!(error.to_string().contains(&closed), "{error}");
    assert!(net.connect("no-port").await.is_err());
    // 192.0.2.0/24 is nobody's (RFC 5737).
    let error = net.listen(SocketAddr::from(([192, 0, 2, 1], 80))).await.err().unwrap();
    assert!(error.to_string().contains("192.0.2.1"), "{error}");
}

pub async fn datagrams_keep_their_boundaries_and_report_refusals(net: impl Net) {
    let bound = net.make_bound(DescriptorKind::UdpBound, loopback()).await.unwrap();
    let server = net.adopt_udp(bound).await.unwrap();
    let at = server.local_addr().unwrap();
    let client = net.adopt_udp(net.make_unbound(DescriptorKind::UdpUnconnected).unwrap()).await.unwrap();
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
    drop(server);
    client.send_to(b"x", at).await.unwrap();
    let error = soon(client.recv_from(&mut buf)).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
}

pub async fn a_refusal_is_told_without_another_datagram(net: impl Net) {
    let bound = async || {
        let socket = net.make_bound(DescriptorKind::UdpBound, loopback()).await.unwrap();
        net.adopt_udp(socket).await.unwrap()
    };
    let closed = bound().await.local_addr().unwrap();
    let server = bound().await;
    let open = server.local_addr().unwrap();
    let client = net.adopt_udp(net.make_unbound(DescriptorKind::UdpUnconnected).unwrap()).await.unwrap();
    client.connect(closed).await.unwrap();
    for _ in 0..3 {
        let mut buf = [0; 9];
        // Who waits is woken, and a refusal is told once.
        let (refused, ()) = tokio::join!(soon(client.recv_from(&mut buf)), async {
            sleep(STILL).await;
            client.send_to(b"one", closed).await.unwrap();
        });
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert!(timeout(STILL, client.recv_from(&mut buf)).await.is_err(), "it is told twice");
    }
    // One that nobody took is none of the address that it is connected to next.
    client.send_to(b"two", closed).await.unwrap();
    sleep(STILL).await;
    client.connect(open).await.unwrap();
    client.send_to(b"three", open).await.unwrap();
    assert_eq!(soon(server.recv_from(&mut [0; 9])).await.unwrap().0, 5);
}

pub async fn a_reserved_name_is_one_programs_at_a_time(net: impl Net) {
    let name = format!("a law of process {}", std::process::id());
    let first = net.reserve(&name).unwrap();
    let refused = net.clone().reserve(&name).err().expect("both have it");
    assert_eq!(refused.kind(), io::ErrorKind::AddrInUse, "{refused}");
    let other = net.reserve(&format!("another {name}")).unwrap();
    drop(first);
    net.reserve(&name).unwrap();
    drop(other);
}
