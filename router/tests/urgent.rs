//! Urgent bytes (MSG_OOB, tcp(7)), which clients of telnet and Oracle send: they travel in line, and what stands behind
//! them comes.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

#[allow(dead_code, reason = "each file takes what it needs")]
mod stand;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use servicekeel_core::handoff::{DescriptorKind, Pod, ToRouter};
use servicekeel_runtime::net::os::{OsDescriptor, OsNet};
use servicekeel_runtime::net::{Descriptor, Handoff, Net};
use socket2::SockRef;
use stand::{Conversation, Stand, port, say_hello, stock};

const BEFORE: &[u8] = b"before";
const BEHIND: [u8; 1000] = [7; 1000];

/// Bytes, an urgent one, bytes, and an end.
fn speak(mut stream: &TcpStream, pause: Duration) {
    stream.write_all(BEFORE).unwrap();
    thread::sleep(pause);
    assert_eq!(SockRef::from(stream).send_out_of_band(b"!").unwrap(), 1);
    thread::sleep(pause);
    stream.write_all(&BEHIND).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
}

fn hear(mut stream: &TcpStream, who: &str) {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap_or_else(|e| panic!("{who}: {e} after {} bytes", got.len()));
    assert!(
        got == [BEFORE, b"!", &BEHIND].concat(),
        "{who} got {} bytes: {:?}",
        got.len(),
        &got[..got.len().min(16)]
    );
}

async fn import(net: &OsNet, conversation: &Conversation) -> (OsDescriptor, SocketAddr) {
    let listener = net.make_bound(DescriptorKind::TcpListener, "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let at = listener.local_addr().unwrap();
    let message = ToRouter::Import { id: 9, wanted: port(99) }.encode();
    conversation.send(&message, vec![listener.share().unwrap()]).await.unwrap();
    (listener, at)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_urgent_byte_travels_in_line_both_ways_on_a_node_and_across() {
    let mut stand = Stand::new().await;
    let net = OsNet::new();
    let pod = |name: &str| Pod { name: name.into(), namespace: "default".parse().unwrap(), uid: name.into() };
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = service.local_addr().unwrap().port().try_into().unwrap();
    let near = say_hello(&net, stand.a.sidecars(), pod("urgent"), Vec::new()).await;
    let far = say_hello(&net, stand.b.sidecars(), pod("urgent-far"), Vec::new()).await;
    let (_own, on_the_node) = import(&net, &near).await;
    let (_other, across) = import(&net, &far).await;
    let export = ToRouter::Export { id: 2, offered: port(99), target, allow: None };
    near.send(&export.encode(), Vec::new()).await.unwrap();
    stand.spawn(stock(net, near));
    let ways = [(on_the_node, "on the node"), (across, "across")];
    let flows = move || {
        for (at, way) in ways {
            for pause in [Duration::ZERO, Duration::from_millis(30)] {
                // The first ones may come before the offer.
                let (client, server) = (0..100).find_map(|_| meet(at, &service)).expect("no flow");
                thread::scope(|scope| {
                    scope.spawn(|| speak(&client, pause));
                    scope.spawn(|| speak(&server, pause));
                    scope.spawn(|| hear(&server, &format!("the service {way}")));
                    hear(&client, &format!("the client {way}"));
                });
            }
        }
    };
    tokio::task::spawn_blocking(flows).await.unwrap();
    drop(far);
}

/// Both ends of a flow.
fn meet(at: SocketAddr, service: &TcpListener) -> Option<(TcpStream, TcpStream)> {
    let client = TcpStream::connect(at).unwrap();
    service.set_nonblocking(true).unwrap();
    for _ in 0..20 {
        if let Ok((server, _)) = service.accept() {
            server.set_nonblocking(false).unwrap();
            return Some((client, server));
        }
        thread::sleep(Duration::from_millis(10));
    }
    None
}
