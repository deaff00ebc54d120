use servicekeel_core::handoff::{MAX_DESCRIPTORS, MAX_MESSAGE};
use servicekeel_runtime::net::{Descriptor, Handoff, HandoffListener};

use super::*;

const PATH: &str = "/run/router.sock";

async fn conversation(kernel: &Kernel) -> (SimHandoff, SimHandoff) {
    let net = SimNet::pod(kernel, &[]);
    let router = net.handoff_listen(Path::new(PATH)).await.unwrap();
    let sidecar = net.process(1337).handoff_connect(Path::new(PATH)).await.unwrap();
    let (accepted, peer) = router.accept().await.unwrap();
    assert_eq!(peer.uid, 1337);
    (sidecar, accepted)
}

#[tokio::test]
async fn messages_come_whole_with_live_sockets() {
    let kernel = Kernel::new(0);
    let (sidecar, router) = conversation(&kernel).await;
    let net = SimNet::pod(&kernel, &[]);
    let listener = net.make_bound(DescriptorKind::TcpListener, loopback()).await.unwrap();
    sidecar.send(b"one", vec![listener.share().unwrap()]).await.unwrap();
    sidecar.send(&[7; MAX_MESSAGE], vec![]).await.unwrap();
    router.send(b"back", vec![]).await.unwrap();
    let (message, descriptors) = soon(router.recv()).await.unwrap().unwrap();
    assert_eq!(message, b"one");
    assert_eq!(descriptors[0].local_addr().unwrap(), listener.local_addr().unwrap());
    descriptors[0].check(DescriptorKind::TcpListener).unwrap();
    assert_eq!(soon(router.recv()).await.unwrap().unwrap().0.len(), MAX_MESSAGE);
    assert_eq!(soon(sidecar.recv()).await.unwrap().unwrap().0, b"back");
    drop(sidecar);
    assert!(soon(router.recv()).await.unwrap().is_none());
    assert_eq!(router.send(b"x", vec![]).await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn what_a_peer_sent_before_it_died_still_comes_and_what_it_had_unread_is_closed() {
    let kernel = Kernel::new(0);
    let (sidecar, router) = conversation(&kernel).await;
    let net = SimNet::pod(&kernel, &[]);
    let socket = net.make_unbound(DescriptorKind::TcpUnconnected).unwrap();
    router.send(b"unread", vec![socket]).await.unwrap();
    sidecar.send(b"last words", vec![]).await.unwrap();
    assert!(kernel.open().contains_key("unconnected TCP socket"));
    drop(sidecar);
    assert!(!kernel.open().contains_key("unconnected TCP socket"));
    assert_eq!(soon(router.recv()).await.unwrap().unwrap().0, b"last words");
    assert!(soon(router.recv()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_cancelled_recv_loses_nothing() {
    let (sidecar, router) = conversation(&Kernel::new(0)).await;
    for i in 0..50_u8 {
        tokio::select! {
            biased;
            _ = router.recv() => panic!("nothing was sent"),
            () = tokio::task::yield_now() => {}
        }
        sidecar.send(&[i], vec![]).await.unwrap();
        assert_eq!(soon(router.recv()).await.unwrap().unwrap().0, [i]);
    }
}

#[tokio::test]
async fn a_slow_receiver_stops_the_sender_and_loses_nothing() {
    let (sidecar, router) = conversation(&Kernel::new(0)).await;
    let message = |i: u32| [&i.to_be_bytes()[..], &[0; 8000]].concat();
    let mut sent = 0_u32;
    while let Ok(outcome) = timeout(Duration::from_millis(10), sidecar.send(&message(sent), vec![])).await {
        outcome.unwrap();
        sent += 1;
        assert!(sent < 10_000, "the sender is never stopped");
    }
    let last = message(sent);
    let (outcome, ()) = tokio::join!(sidecar.send(&last, vec![]), async {
        for i in 0..=sent {
            assert_eq!(soon(router.recv()).await.unwrap().unwrap().0[..4], i.to_be_bytes());
        }
    });
    outcome.unwrap();
}

#[tokio::test]
async fn what_is_too_large_is_not_sent() {
    let kernel = Kernel::new(0);
    let (sidecar, _router) = conversation(&kernel).await;
    let socket = SimNet::pod(&kernel, &[]).make_unbound(DescriptorKind::TcpUnconnected).unwrap();
    let many = (0..=MAX_DESCRIPTORS).map(|_| socket.share().unwrap()).collect();
    for (message, descriptors) in [(vec![], vec![]), (vec![0; MAX_MESSAGE + 1], vec![]), (vec![0], many)] {
        let error = sidecar.send(&message, descriptors).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}

#[tokio::test]
async fn a_live_router_is_not_replaced_and_a_dead_one_is() {
    let net = SimNet::pod(&Kernel::new(0), &[]);
    let path = Path::new(PATH);
    let error = net.handoff_connect(path).await.err().unwrap();
    assert!(error.kind() == io::ErrorKind::NotFound && error.to_string().contains(PATH), "{error}");
    let router = net.handoff_listen(path).await.unwrap();
    let error = net.handoff_listen(path).await.err().unwrap();
    assert!(error.kind() == io::ErrorKind::AddrInUse, "{error}");
    let waiting = net.handoff_connect(path).await.unwrap();
    drop(router);
    assert!(soon(waiting.recv()).await.unwrap().is_none());
    net.handoff_listen(path).await.unwrap();
}
