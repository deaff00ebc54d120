use std::sync::Arc;
use std::time::SystemTime;

use servicekeel_core::name::RouterId;
use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::net::{Listener, Net};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::identity::{Client, Identity, Server, server_name};
use crate::pki::Authority;
use servicekeel_core::flow::frame::{HEADER, Header, Kind};

mod rubbish;

pub(crate) fn identities() -> (Identity, Identity) {
    let now = SystemTime::now();
    let authority = |cluster: &str| Authority::generate(&cluster.parse().unwrap(), 2, now).unwrap();
    let (a, b) = (authority("a.local"), authority("b.local"));
    let identity = |own: &Authority, node: &str, other: &Authority| {
        let id = RouterId { cluster: own.cluster().clone(), node: node.parse().unwrap() };
        let material = own.material(&id.node, &[other], now).unwrap();
        Identity::from_pem(id, &material).unwrap()
    };
    (identity(&a, "a-1", &b), identity(&b, "b-1", &a))
}

pub(crate) type OsStream = <OsNet as Net>::TcpStream;

pub(crate) async fn streams() -> (OsStream, OsStream) {
    let net = OsNet::new();
    let listener = net.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let (accepted, connected) = tokio::join!(listener.accept(), net.connect(&addr));
    (connected.unwrap(), accepted.unwrap().0)
}

pub(crate) async fn channels() -> (Channel<OsStream>, Channel<OsStream>) {
    let (a, b) = identities();
    let (near, far) = streams().await;
    let (dialled, accepted) = tokio::join!(
        connect(near, a.client(), BufferPool::new()),
        accept(far, b.server(), BufferPool::new()),
    );
    let ((dialled, far_chain), (accepted, near_chain)) = (dialled.unwrap(), accepted.unwrap());
    assert_eq!(a.peer(&far_chain).unwrap(), *b.id());
    assert_eq!(b.peer(&near_chain).unwrap(), *a.id());
    (dialled, accepted)
}

fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 31 + i / 257) as u8).collect()
}

#[tokio::test]
async fn frames_of_every_size_both_ways_and_an_end() {
    let (mut a, mut b) = channels().await;
    for size in [0, 1, 1000, 16_371, 16_372, 16_373, 40_000, 65_507, 65_535] {
        let bytes = pattern(size);
        a.send_payload(Kind::Datagram, 7, &bytes).unwrap();
        b.send_payload(Kind::Message, 0, &bytes).unwrap();
        let (sent, received) = tokio::join!(a.flush(), b.recv());
        sent.unwrap();
        let (header, payload) = received.unwrap().unwrap();
        assert_eq!((header.kind, header.offset), (Kind::Datagram, 7));
        assert!(payload == bytes, "{size} bytes");
        // recv sent what waited before it read.
        let (header, payload) = a.recv().await.unwrap().unwrap();
        assert_eq!(header.kind, Kind::Message);
        assert!(payload == bytes, "{size} bytes back");
    }
    assert!(a.is_quiet() && b.is_quiet());
    a.close().await.unwrap();
    assert!(b.recv().await.unwrap().is_none());
    assert!(!b.is_quiet());
}

#[tokio::test]
async fn a_stream_that_is_cut_is_no_end() {
    let (a, mut b) = channels().await;
    drop(a);
    assert!(b.recv().await.is_err());
}

#[tokio::test]
async fn a_changed_record_is_refused() {
    let (mut a, mut b) = channels().await;
    a.send_payload(Kind::Datagram, 0, &pattern(100)).unwrap();
    a.flip_a_sealed_bit();
    a.flush().await.unwrap();
    let error = b.recv().await.unwrap_err();
    assert!(matches!(error, ChannelError::Record(RecordError::Sealed)), "{error}");
}

#[tokio::test]
async fn keys_are_updated_on_the_way() {
    let (mut a, mut b) = channels().await;
    a.update_key_every(3);
    for i in 0..50_u64 {
        a.send_payload(Kind::Datagram, i, &pattern(i as usize * 100)).unwrap();
        a.flush().await.unwrap();
        let (header, payload) = b.recv().await.unwrap().unwrap();
        assert!(header.offset == i && payload == pattern(i as usize * 100));
    }
    assert!(a.key_updates() >= 16 && b.key_updates() == a.key_updates());
}

/// The other side is an unmodified rustls: what travels is plain TLS 1.3.
#[tokio::test]
async fn rustls_understands_our_records_and_we_its() {
    let (a, b) = identities();
    for dialler_is_ours in [true, false] {
        let (near, far) = streams().await;
        let frame = |payload: &[u8]| {
            let header = Header { kind: Kind::Message, len: payload.len() as u16, offset: 9 };
            [&header.encode()[..], payload].concat()
        };
        if dialler_is_ours {
            let theirs = tokio_rustls::TlsAcceptor::from(b.server().config);
            let (ours, theirs) =
                tokio::join!(connect(near, a.client(), BufferPool::new()), theirs.accept(far));
            exchange(ours.unwrap().0, theirs.unwrap(), frame, |t| {
                t.get_mut().1.refresh_traffic_keys().unwrap()
            })
            .await;
        } else {
            let theirs = tokio_rustls::TlsConnector::from(a.client().config);
            let (theirs, ours) =
                tokio::join!(theirs.connect(server_name(), near), accept(far, b.server(), BufferPool::new()));
            exchange(ours.unwrap().0, theirs.unwrap(), frame, |t| {
                t.get_mut().1.refresh_traffic_keys().unwrap()
            })
            .await;
        }
    }
}

async fn exchange<T: AsyncReadExt + AsyncWriteExt + Unpin>(
    mut ours: Channel<OsStream>,
    mut theirs: T,
    frame: impl Fn(&[u8]) -> Vec<u8>,
    mut refresh: impl FnMut(&mut T),
) {
    ours.update_key_every(2);
    for round in 0..6 {
        let bytes = pattern(1 + round * 9_000);
        theirs.write_all(&frame(&bytes)).await.unwrap();
        theirs.flush().await.unwrap();
        let (header, payload) = ours.recv().await.unwrap().unwrap();
        assert!(header.offset == 9 && payload == bytes);
        ours.send_payload(Kind::Message, 9, &bytes).unwrap();
        ours.flush().await.unwrap();
        let mut got = vec![0; HEADER + bytes.len()];
        theirs.read_exact(&mut got).await.unwrap();
        assert!(got == frame(&bytes));
        refresh(&mut theirs);
    }
    assert!(ours.key_updates() >= 3);
    theirs.shutdown().await.unwrap();
    assert!(ours.recv().await.unwrap().is_none());
    ours.close().await.unwrap();
    assert_eq!(theirs.read(&mut [0]).await.unwrap(), 0);
}

/// On the way, what was written at different times may become one segment.
#[tokio::test]
async fn what_comes_right_behind_the_handshake_is_heard() {
    let (a, b) = identities();
    let ((near, mut from_near), (mut to_far, far)) = (streams().await, streams().await);
    let dialled = async {
        let (mut channel, _) = connect(near, a.client(), BufferPool::new()).await.unwrap();
        for bytes in [&b"at"[..], b"once"] {
            channel.send_payload(Kind::Message, 0, bytes).unwrap();
            channel.flush().await.unwrap();
        }
        channel
    };
    let accepted = async {
        let (mut channel, _) = accept(far, b.server(), BufferPool::new()).await.unwrap();
        assert_eq!(channel.recv().await.unwrap().unwrap().1, b"at");
        assert_eq!(channel.recv().await.unwrap().unwrap().1, b"once");
    };
    let path = async {
        let (mut held, mut back) = (Vec::new(), Vec::new());
        loop {
            tokio::select! {
                biased;
                read = from_near.read_buf(&mut held) => assert!(read.unwrap() > 0),
                read = to_far.read_buf(&mut back) => {
                    assert!(read.unwrap() > 0);
                    from_near.write_all(&std::mem::take(&mut back)).await.unwrap();
                }
                () = tokio::time::sleep(std::time::Duration::from_millis(50)), if !held.is_empty() => {
                    to_far.write_all(&std::mem::take(&mut held)).await.unwrap();
                }
            }
        }
    };
    tokio::select! {
        biased;
        _ = async { tokio::join!(dialled, accepted) } => {}
        () = path => {}
    }
}

#[tokio::test]
async fn strangers_get_a_clear_error() {
    let (_, b) = identities();
    for (words, want) in [
        (&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], "is a web client connecting to this port?"),
        (&[0, 1, 2, 3, 4, 5, 6, 7][..], "does not speak TLS"),
        (&[0x16, 3, 1, 0xff, 0xff][..], ""),
        (b"", "before sending anything"),
    ] {
        let (mut near, far) = streams().await;
        near.write_all(words).await.unwrap();
        near.shutdown().await.unwrap();
        let error = accept(far, b.server(), BufferPool::new()).await.unwrap_err().to_string();
        assert!(error.contains(want), "{words:?}: {error}");
    }
}

#[tokio::test]
async fn a_web_server_is_known_by_its_answer() {
    let (a, _) = identities();
    let (near, mut far) = streams().await;
    far.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    let error = connect(near, a.client(), BufferPool::new()).await.unwrap_err().to_string();
    assert!(error.contains("is it a web server"), "{error}");
}

#[tokio::test]
async fn another_protocol_is_refused() {
    let (a, b) = identities();
    let other = |mut side: Client| {
        Arc::make_mut(&mut side.config).alpn_protocols = vec![b"h2".to_vec()];
        side
    };
    let (near, far) = streams().await;
    let (dialled, accepted) = tokio::join!(
        connect(near, other(a.client()), BufferPool::new()),
        accept(far, b.server(), BufferPool::new()),
    );
    assert!(dialled.is_err() && accepted.is_err());
    let none = |mut side: Server| {
        Arc::make_mut(&mut side.config).alpn_protocols = Vec::new();
        side
    };
    let (near, far) = streams().await;
    let (dialled, _) = tokio::join!(
        connect(near, a.client(), BufferPool::new()),
        accept(far, none(b.server()), BufferPool::new()),
    );
    assert!(matches!(dialled.unwrap_err(), HandshakeError::Protocol));
}

#[tokio::test]
async fn who_sends_much_that_says_nothing_leaves_others_their_turn() {
    let (mut near, mut far) = channels().await;
    for _ in 0..1000 {
        near.put_sealed(23, &[]);
    }
    near.send_payload(Kind::Close, 1, &[]).unwrap();
    near.flush().await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    let mut turns = 0;
    let frame = std::future::poll_fn(|cx| {
        let polled = far.poll_frame(cx);
        turns += 1;
        polled
    });
    let frame = tokio::time::timeout(std::time::Duration::from_secs(5), frame).await.unwrap();
    assert_eq!(frame.unwrap().unwrap().header.kind, Kind::Close);
    assert!(turns > 3, "all in {turns} turns");
}
