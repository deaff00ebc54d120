//! Resets, and what was said before them.

use std::os::fd::OwnedFd;

use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::net::{Listener, Net};
use socket2::{Domain, SockRef, Socket, Type};

use super::*;

#[tokio::test]
async fn a_flow_that_is_dropped_resets_the_application() {
    let (mut a, _b) = channels().await;
    let (mut app, router) = streams().await;
    let carried =
        timeout(Duration::from_millis(50), carry_until(&mut a, router, std::future::pending())).await;
    assert!(carried.is_err());
    assert!(app.read(&mut [0]).await.is_err(), "the router's end looks like the service's");
}

/// Reads until the reset; an end instead of it is none.
async fn until_reset(stream: &mut OsStream) -> Vec<u8> {
    let mut got = Vec::new();
    assert!(stream.read_to_end(&mut got).await.is_err(), "no reset came behind {} bytes", got.len());
    got
}

#[tokio::test]
async fn what_was_said_before_a_reset_arrives_before_it() {
    let (mut a, mut b) = channels().await;
    let mut lost = Vec::new();
    for round in 0..80 {
        let last_words = pattern([1, 600, 200_000, 1_500_000][round / 2 % 4]);
        let says = async |mut stream: OsStream| {
            stream.write_all(b"x").await.unwrap();
            stream.read_exact(&mut [0]).await.unwrap();
            stream.write_all(&last_words).await.unwrap();
            // Its own system has to send them: what it still holds goes with a reset.
            while !stream.is_taken() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            stream.reset();
            Vec::new()
        };
        let hears = async |mut stream: OsStream| {
            stream.write_all(b"x").await.unwrap();
            stream.read_exact(&mut [0]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(round as u64 % 7)).await;
            until_reset(&mut stream).await
        };
        let (near, far, one, other) = if round % 2 == 0 {
            flow(&mut a, &mut b, says, hears).await
        } else {
            flow(&mut a, &mut b, hears, says).await
        };
        if one.len() + other.len() != last_words.len() {
            lost.push((round, last_words.len() - one.len() - other.len()));
        }
        near.end.unwrap();
        far.end.unwrap();
        assert!(a.is_quiet() && b.is_quiet());
    }
    assert!(lost.is_empty(), "of {} of 80 rounds bytes are lost: {lost:?}", lost.len());
}

#[tokio::test]
async fn an_early_answer_arrives_though_the_request_is_never_read() {
    let (mut a, mut b) = channels().await;
    let answer = b"HTTP/1.1 413 Content Too Large\r\n\r\n".repeat(100);
    let mut missing = 0;
    for round in 0..80 {
        let sends = async |stream: OsStream| {
            let (mut reader, mut writer) = tokio::io::split(stream);
            let writes = async { while writer.write_all(&[7; 50_000]).await.is_ok() {} };
            let mut got = Vec::new();
            // The answer, and then the reset.
            let reads = async {
                let mut block = [0; 4096];
                while let Ok(n @ 1..) = reader.read(&mut block).await {
                    got.extend_from_slice(&block[..n]);
                }
            };
            tokio::join!(writes, reads);
            got
        };
        let answers = async |mut stream: OsStream| {
            stream.read_exact(&mut [0; 1000]).await.unwrap();
            stream.write_all(&answer).await.unwrap();
            // With bytes unread this resets (RFC 2525 §2.17).
            drop(stream);
            Vec::new()
        };
        let (near, far, one, other) = if round % 2 == 0 {
            flow(&mut a, &mut b, sends, answers).await
        } else {
            flow(&mut a, &mut b, answers, sends).await
        };
        missing += usize::from([one, other].concat() != answer);
        near.end.unwrap();
        far.end.unwrap();
    }
    assert_eq!(missing, 0, "of 80 answers");
}

/// An application, and the router's stream to it, with hardly a buffer between them.
async fn narrow_streams() -> (std::net::TcpStream, OsStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    SockRef::from(&listener).set_send_buffer_size(1 << 10).unwrap();
    let listener = OsNet::new().adopt_listener(OwnedFd::from(listener).into()).await.unwrap();
    let app = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    app.set_recv_buffer_size(1 << 10).unwrap();
    app.connect(&at.into()).unwrap();
    (app.into(), listener.accept().await.unwrap().0)
}

#[tokio::test]
async fn a_reset_waits_for_one_that_never_reads_no_longer_than_it_may() {
    let (mut a, mut b) = channels().await;
    let (app, router) = narrow_streams().await;
    // All of it comes at once: a reset behind what is not read yet is not seen.
    for i in 0..5 {
        b.send_payload(Kind::Data, i * 10_000, &[7; 10_000]).unwrap();
    }
    b.send_payload(Kind::Reset, 0, &[]).unwrap();
    b.flush().await.unwrap();
    let start = std::time::Instant::now();
    let peer = async { while b.recv().await.unwrap().unwrap().0.kind != Kind::Reset {} };
    let carried = async { tokio::join!(carry_until(&mut a, router, std::future::pending()), peer).0 };
    timeout(Duration::from_secs(9), carried).await.expect("the reset is passed on").end.unwrap();
    assert!(start.elapsed() > Duration::from_secs(4), "it was given no time");
    let mut got = Vec::new();
    assert!(std::io::Read::read_to_end(&mut &app, &mut got).is_err(), "no reset");
    assert!(!got.is_empty() && a.is_quiet() && b.is_quiet());
}

/// Takes 20 s: a blocked sender is looked at every 15 s.
#[tokio::test]
async fn the_reset_of_a_blocked_sender_is_noticed() {
    let (mut a, mut b) = channels().await;
    let (mut app, router) = streams().await;
    let block = async {
        while let Ok(sent) = timeout(Duration::from_millis(500), app.write(&[7; 1 << 16])).await {
            sent.unwrap();
        }
        app.reset();
    };
    // A peer that takes all and acknowledges nothing.
    let peer = async {
        while b.recv().await.unwrap().unwrap().0.kind != Kind::Reset {}
        b.send_payload(Kind::Reset, 0, &[]).unwrap();
        b.flush().await.unwrap();
    };
    let all = async { tokio::join!(carry_until(&mut a, router, std::future::pending()), peer, block).0 };
    timeout(Duration::from_secs(25), all).await.expect("the reset is passed on").end.unwrap();
}

#[tokio::test]
async fn what_came_before_the_loss_of_the_path_is_offered() {
    for size in [1, 100_000] {
        let (mut a, mut b) = channels().await;
        let (mut app, router) = streams().await;
        let bytes = pattern(size);
        let mut offset = 0;
        for part in bytes.chunks(10_000) {
            b.send_payload(Kind::Data, offset, part).unwrap();
            offset += part.len() as u64;
            b.flush().await.unwrap();
        }
        drop(b);
        let (carried, got) =
            tokio::join!(carry_until(&mut a, router, std::future::pending()), until_reset(&mut app));
        assert!(carried.end.is_err() && got == bytes, "{} of {size} bytes", got.len());
    }
}
