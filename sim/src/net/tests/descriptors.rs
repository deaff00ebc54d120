use servicekeel_core::handoff::DescriptorKind::{TcpListener, TcpUnconnected, UdpBound, UdpUnconnected};
use servicekeel_runtime::net::{Datagrams, Descriptor};

use super::*;

const KINDS: [DescriptorKind; 4] = [TcpListener, TcpUnconnected, UdpBound, UdpUnconnected];

async fn make(net: &SimNet, kind: DescriptorKind) -> SimDescriptor {
    match kind {
        TcpListener | UdpBound => net.make_bound(kind, loopback()).await.unwrap(),
        TcpUnconnected | UdpUnconnected => net.make_unbound(kind).unwrap(),
    }
}

#[tokio::test]
async fn each_kind_is_itself_and_no_other() {
    let net = pod();
    for made in KINDS {
        let descriptor = make(&net, made).await.share().unwrap();
        for asked in KINDS {
            let checked = descriptor.check(asked);
            assert_eq!(checked.is_ok(), asked == made, "{made:?} as {asked:?}");
            if let Err(error) = checked {
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            }
        }
    }
}

#[tokio::test]
async fn the_wrong_kind_is_not_adopted() {
    let net = pod();
    let udp = || net.make_unbound(UdpUnconnected).unwrap();
    assert!(net.adopt_listener(udp()).await.is_err());
    assert!(net.connect_descriptor(udp(), loopback()).await.is_err());
    assert!(net.adopt_udp(net.make_unbound(TcpUnconnected).unwrap()).await.is_err());
    let used = net.make_unbound(TcpUnconnected).unwrap();
    let again = used.share().unwrap();
    let _ = net.connect_descriptor(used, "127.0.0.1:1".parse().unwrap()).await;
    assert!(again.check(TcpUnconnected).is_err());
}

#[tokio::test]
async fn an_address_goes_with_the_kinds_that_have_one() {
    let net = pod();
    for kind in KINDS {
        let has_one = matches!(kind, TcpListener | UdpBound);
        assert_eq!(net.make_bound(kind, loopback()).await.is_ok(), has_one);
        assert_eq!(net.make_unbound(kind).is_ok(), !has_one);
    }
}

#[tokio::test]
async fn a_restarted_sidecar_binds_beside_its_earlier_socket_and_nobody_else_does() {
    let net = pod();
    for kind in [TcpListener, UdpBound] {
        let held = make(&net, kind).await;
        let addr = held.local_addr().unwrap();
        assert_eq!(net.make_bound(kind, addr).await.unwrap().local_addr().unwrap(), addr);
        let stranger = net.process(7).make_bound(kind, addr).await;
        assert_eq!(stranger.err().unwrap().kind(), io::ErrorKind::AddrInUse);
        let everywhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), addr.port());
        let server = match kind {
            TcpListener => net.listen(everywhere).await.err(),
            _ => net.bind_udp(everywhere).err(),
        };
        assert!(server.unwrap().to_string().contains(&everywhere.to_string()));
    }
}

#[tokio::test]
async fn of_sockets_at_one_address_each_connection_meets_one() {
    let net = pod();
    let addr = "127.0.66.1:80".parse().unwrap();
    let held = net.make_bound(TcpListener, addr).await.unwrap();
    let again = net.make_bound(TcpListener, addr).await.unwrap();
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(net.connect("127.0.66.1:80").await.unwrap());
    }
    let (one, other) = (net.adopt_listener(held).await.unwrap(), net.adopt_listener(again).await.unwrap());
    let mut accepted = [0, 0];
    for (listener, count) in [&one, &other].into_iter().zip(&mut accepted) {
        while timeout(Duration::from_millis(1), listener.accept()).await.is_ok() {
            *count += 1;
        }
    }
    assert_eq!(accepted[0] + accepted[1], 20);
    assert!(accepted.iter().all(|n| *n > 3), "{accepted:?}");
}

#[tokio::test]
async fn what_is_open_is_counted() {
    let kernel = Kernel::new(0);
    let net = SimNet::pod(&kernel, &[]);
    {
        let listener = make(&net, TcpListener).await;
        let _udp = net.adopt_udp(make(&net, UdpBound).await).await.unwrap();
        let _unused = make(&net, TcpUnconnected).await.share().unwrap();
        let _client = net.connect(&listener.local_addr().unwrap().to_string()).await.unwrap();
        let open = kernel.open();
        assert_eq!(open.get("TCP stream"), Some(&2), "{open:?}");
        assert_eq!((open.len(), open.values().sum::<usize>()), (4, 5), "{open:?}");
        let socket = net.bind_udp(loopback()).unwrap();
        assert!(socket.local_addr().unwrap().port() > 0);
    }
    assert!(kernel.open().is_empty(), "{:?}", kernel.open());
}
