use std::time::Duration;

use servicekeel_core::flow::frame::Cause;
use servicekeel_runtime::net::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::*;
use crate::rooms::Rooms;
use crate::tls::tests::{OsStream, channels, streams};

mod resets;

fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 13 + i / 509) as u8).collect()
}

fn request() -> Open {
    let service = servicekeel_core::name::ServiceName {
        name: "web".parse().unwrap(),
        namespace: "default".parse().unwrap(),
        cluster: "a.local".parse().unwrap(),
    };
    let wanted = servicekeel_core::name::ServicePort {
        service,
        port: 80.try_into().unwrap(),
        protocol: servicekeel_core::name::Protocol::Tcp,
    };
    Open { flow: 1, wanted, namespace: None, consumer: None }
}

/// How a flow went, and what was counted meanwhile.
struct Carried {
    sent: u64,
    received: u64,
    end: Result<(), ChannelError>,
}

async fn carry_until(
    channel: &mut Channel<OsStream>,
    app: OsStream,
    lost: impl Future<Output = ()>,
) -> Carried {
    carry_for(&Owner::new(&Rooms::default()), channel, app, lost).await
}

async fn carry_for(
    owner: &Owner,
    channel: &mut Channel<OsStream>,
    app: OsStream,
    lost: impl Future<Output = ()>,
) -> Carried {
    let counted = std::cell::Cell::new((0, 0, 0));
    let count = |sent, received| {
        let before = counted.get();
        counted.set((before.0 + sent, before.1 + received, before.2.max(sent + received)));
    };
    let end = carry(channel, app, owner, lost, count).await;
    let (sent, received, most) = counted.get();
    // The last step may be a whole one each way, and what was read before is counted once it is sealed.
    let bound = (super::carry::SHARE + crate::tls::BUFFER + 4 * super::carry::READ) as u64;
    assert!(most <= bound, "{most} bytes, and no other flow had its turn");
    Carried { sent, received, end }
}

/// Opens a flow and carries it between two applications, each given as what it does with its stream.
async fn flow<A, B>(
    near: &mut Channel<OsStream>,
    far: &mut Channel<OsStream>,
    client: impl FnOnce(OsStream) -> A,
    service: impl FnOnce(OsStream) -> B,
) -> (Carried, Carried, A::Output, B::Output)
where
    A: Future,
    B: Future,
{
    flow_for(&Owner::new(&Rooms::default()), near, far, client, service).await
}

async fn flow_for<A, B>(
    owner: &Owner,
    near: &mut Channel<OsStream>,
    far: &mut Channel<OsStream>,
    client: impl FnOnce(OsStream) -> A,
    service: impl FnOnce(OsStream) -> B,
) -> (Carried, Carried, A::Output, B::Output)
where
    A: Future,
    B: Future,
{
    let ((client_app, router_near), (router_far, service_app)) = (streams().await, streams().await);
    let near = async {
        assert!(matches!(open(near, &request()).await.unwrap(), Answer::Opened));
        carry_for(owner, near, router_near, std::future::pending()).await
    };
    let far = async {
        assert_eq!(next_open(far, owner).await.unwrap(), Some(request()));
        accept(far).await.unwrap();
        carry_for(owner, far, router_far, std::future::pending()).await
    };
    let all = async { tokio::join!(near, far, client(client_app), service(service_app)) };
    timeout(Duration::from_secs(20), all).await.expect("the flow ends")
}

async fn echo(mut stream: OsStream) -> usize {
    let (mut all, mut buf) = (0, vec![0; 50_000]);
    loop {
        let n = stream.read(&mut buf).await.unwrap();
        if n == 0 {
            stream.shutdown().await.unwrap();
            return all;
        }
        all += n;
        stream.write_all(&buf[..n]).await.unwrap();
    }
}

async fn send_all_then_read(stream: OsStream, bytes: Vec<u8>) -> Vec<u8> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let write = async {
        writer.write_all(&bytes).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let (read, ()) = tokio::join!(reader.read_to_end(&mut got), write);
    read.unwrap();
    got
}

/// Reads nothing before all is written.
async fn write_then_read(mut stream: OsStream, bytes: &[u8]) -> Vec<u8> {
    stream.write_all(bytes).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).await.unwrap();
    got
}

/// A flow of more than every window: the client reads nothing before it has written all.
async fn both_write_all(owner: &Owner, near: &mut Channel<OsStream>, far: &mut Channel<OsStream>) {
    let bytes = pattern(10_000_000);
    let client = |s| write_then_read(s, &bytes);
    let service = |s| send_all_then_read(s, bytes.clone());
    let (near, far, got, back) = flow_for(owner, near, far, client, service).await;
    assert!(near.end.is_ok() && far.end.is_ok() && got == bytes && back == bytes);
}

#[tokio::test]
async fn flows_one_after_the_other_on_one_connection() {
    let (mut a, mut b) = channels().await;
    for size in [0, 1, 16_372, 16_373, 100_000, 20_000_000] {
        let bytes = pattern(size);
        let (near, far, got, echoed) =
            flow(&mut a, &mut b, |s| send_all_then_read(s, bytes.clone()), echo).await;
        near.end.unwrap();
        far.end.unwrap();
        assert!(got == bytes, "{size} bytes");
        assert_eq!((near.sent, near.received, echoed), (size as u64, size as u64, size));
        assert!(a.is_quiet() && b.is_quiet());
    }
}

#[tokio::test]
async fn each_side_may_end_first_and_the_other_goes_on() {
    let (mut a, mut b) = channels().await;
    // The service ends at once and still reads all.
    let bytes = pattern(3_000_000);
    let client = async |mut stream: OsStream| {
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        stream.write_all(&bytes).await.unwrap();
        stream.shutdown().await.unwrap();
    };
    let service = async |mut stream: OsStream| {
        stream.shutdown().await.unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).await.unwrap();
        got
    };
    let (near, far, (), got) = flow(&mut a, &mut b, client, service).await;
    assert!(near.end.is_ok() && far.end.is_ok() && got == bytes);
}

#[tokio::test]
async fn a_reset_reaches_the_other_application_and_the_connection_lives_on() {
    let (mut a, mut b) = channels().await;
    for client_resets in [true, false] {
        let resets = async |mut stream: OsStream| {
            stream.write_all(b"x").await.unwrap();
            stream.read_exact(&mut [0]).await.unwrap();
            stream.reset();
            true
        };
        let sees = async |mut stream: OsStream| {
            stream.write_all(b"x").await.unwrap();
            stream.read_exact(&mut [0]).await.unwrap();
            stream.read(&mut [0]).await.is_err()
        };
        let (near, far, one, other) = if client_resets {
            flow(&mut a, &mut b, resets, sees).await
        } else {
            flow(&mut a, &mut b, sees, resets).await
        };
        assert!(one && other, "no reset came through");
        near.end.unwrap();
        far.end.unwrap();
        assert!(a.is_quiet() && b.is_quiet());
    }
    let (near, _, got, _) = flow(&mut a, &mut b, |s| send_all_then_read(s, b"next".to_vec()), echo).await;
    assert!(near.end.is_ok() && got == b"next");
}

#[tokio::test]
async fn a_refusal_leaves_the_connection_free() {
    let (mut a, mut b) = channels().await;
    let refused = Refused { cause: Cause::NotExported, reason: "nothing here".into() };
    let far = async {
        next_open(&mut b, &Owner::new(&Rooms::default())).await.unwrap().unwrap();
        refuse(&mut b, &refused).await.unwrap();
    };
    let near_request = request();
    let (answer, ()) = tokio::join!(open(&mut a, &near_request), far);
    assert!(matches!(answer.unwrap(), Answer::Refused(r) if r == refused));
    let (near, _, got, _) = flow(&mut a, &mut b, |s| send_all_then_read(s, b"next".to_vec()), echo).await;
    assert!(near.end.is_ok() && got == b"next");
}

#[tokio::test]
async fn a_lost_path_resets_the_application() {
    let (mut a, b) = channels().await;
    let (mut app, router) = streams().await;
    app.write_all(b"x").await.unwrap();
    // The other router dies.
    drop(b);
    let carried = carry_until(&mut a, router, std::future::pending()).await;
    assert!(carried.end.is_err());
    assert!(app.read(&mut [0]).await.is_err(), "the loss looks like an end");

    let (mut a, _b) = channels().await;
    let (mut app, router) = streams().await;
    let carried = carry_until(&mut a, router, std::future::ready(())).await;
    assert!(matches!(carried.end, Err(ChannelError::Lost)));
    assert!(app.read(&mut [0]).await.is_err(), "the loss looks like an end");
}

#[tokio::test]
async fn one_that_writes_all_before_it_reads_is_not_stopped_by_what_it_does_not_read() {
    let (mut a, mut b) = channels().await;
    // More than every buffer and window on the way, both ways.
    let (forth, back) = (pattern(30_000_000), pattern(30_000_001));
    let (near, far, got, echoed) =
        flow(&mut a, &mut b, |s| write_then_read(s, &forth), |s| send_all_then_read(s, back.clone())).await;
    assert!(near.end.is_ok() && far.end.is_ok());
    assert!(got == back && echoed == forth);
}

/// A peer whose flows have all on their way that they may.
fn without_room() -> Owner {
    let owner = Owner::new(&Rooms::default());
    while owner.on_way.take(1 << 20) {}
    owner
}

#[tokio::test]
async fn without_room_a_flow_has_little_on_its_way_and_goes_on() {
    let (mut a, mut b) = channels().await;
    let owner = without_room();
    // A peer that reads and acknowledges nothing.
    let (mut app, router) = streams().await;
    let (mut near, mut far) = channels().await;
    let bytes = pattern(30_000_000);
    let writes = async {
        tokio::join!(carry_for(&owner, &mut near, router, std::future::pending()), app.write_all(&bytes))
    };
    let mut came = 0;
    let reads = async {
        while let Ok(Ok(frame)) = timeout(Duration::from_millis(500), far.recv()).await {
            came += frame.expect("the flow goes on").1.len() as u64;
        }
    };
    tokio::select! {
        _ = writes => panic!("all went out"),
        () = reads => {}
    }
    assert!((1..=super::room::OWN).contains(&came), "{came} bytes on their way");
    // Both sides write all before they read: neither waits for the other's room.
    both_write_all(&owner, &mut a, &mut b).await;
}

/// nothing: what is held for it is bounded, and another peer's flows go on.
/// A peer that sends as much as it may, of 200 flows whose applications write and do not read yet, and acknowledges
#[tokio::test]
async fn a_peer_that_never_acknowledges_fills_its_own_part_only() {
    tokio::task::LocalSet::new().run_until(Box::pin(never_acknowledged())).await;
}

async fn never_acknowledged() {
    const FLOWS: usize = 200;
    let rooms = Rooms::default();
    let hostile = Owner::new(&rooms);
    let mut carrying = tokio::task::JoinSet::new();
    let mut peers = tokio::task::JoinSet::new();
    for _ in 0..FLOWS {
        let (mut near, mut far) = channels().await;
        let (mut app, router) = streams().await;
        let hostile = hostile.clone();
        carrying.spawn_local(async move {
            let writes = async {
                while app.write_all(&[7; 1 << 16]).await.is_ok() {}
                app
            };
            tokio::join!(carry_for(&hostile, &mut near, router, std::future::pending()), writes)
        });
        peers.spawn_local(async move {
            let mut offset = 0;
            let block = vec![9; 16_000];
            // Its window, and not a byte more.
            while offset + block.len() as u64 <= servicekeel_core::flow::machine::WINDOW {
                far.send_payload(Kind::Data, offset, &block).unwrap();
                offset += block.len() as u64;
                if timeout(Duration::from_secs(4), far.flush()).await.is_err() {
                    break;
                }
                // It reads what comes, so that this side's window is what stops it.
                while let Ok(Ok(Some(_))) = timeout(Duration::ZERO, far.recv()).await {}
            }
            loop {
                let _ = far.recv().await.unwrap();
            }
        });
    }
    // Until something is held, and then for as long as more would be.
    let (mut most, mut left) = (0, 30);
    for _ in 0..900 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        most = most.max(hostile.held.held());
        left -= usize::from(most > 4 << 20);
        if left == 0 {
            break;
        }
    }
    assert!(left == 0, "{most} bytes: nothing was held, and nothing shown");
    assert!(most < 32 << 20, "{most} bytes are held for one peer");
    // An honest one beside it has its windows.
    let honest = Owner::new(&rooms);
    let (mut a, mut b) = channels().await;
    both_write_all(&honest, &mut a, &mut b).await;
    carrying.shutdown().await;
    assert_eq!(hostile.held.held(), 0);
}

/// A connection on which a frame has begun holds the largest buffers.
#[tokio::test]
async fn frames_that_begin_and_do_not_end_count_against_their_peer() {
    let rooms = Rooms::default();
    let (owner, other) = (Owner::new(&rooms), Owner::new(&rooms));
    let begin = async |owner: &Owner, waiting: &mut JoinSet<_>| {
        let (mut near, mut far) = channels().await;
        far.put_raw(&[23]);
        far.flush().await.unwrap();
        let owner = owner.clone();
        waiting.spawn(async move { next_open(&mut near, &owner).await.unwrap_err() });
        far
    };
    let (mut waiting, mut fars) = (JoinSet::new(), Vec::new());
    for _ in 0..200 {
        fars.push(begin(&owner, &mut waiting).await);
    }
    let mut closed = 0;
    while let Ok(Some(error)) = timeout(Duration::from_secs(1), waiting.join_next()).await {
        assert!(matches!(error.unwrap(), ChannelError::Begun));
        closed += 1;
    }
    assert!((20..180).contains(&closed), "{closed} of 200 closed");
    let mut of_other = JoinSet::new();
    fars.push(begin(&other, &mut of_other).await);
    assert!(
        timeout(Duration::from_millis(300), of_other.join_next()).await.is_err(),
        "another peer's closes"
    );
    waiting.shutdown().await;
    assert_eq!(owner.begun.held(), 0);
}
