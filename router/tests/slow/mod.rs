//! An application that is slow to accept.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use servicekeel_core::handoff::{DescriptorKind, Pod, ToRouter};
use servicekeel_core::name::ServicePort;
use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::net::{Descriptor, Handoff, Net};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::stand::{Conversation, Router, Stand, port, say_hello, stock, wait_for};

/// A server with a backlog of 1 that takes so long for each request. Ends with the process.
fn serve_slowly(each: Duration) -> SocketAddr {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(1).unwrap();
    let listener = std::net::TcpListener::from(listener);
    let at = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::sleep(each);
            let mut word = [0; 4];
            let _ = stream.read_exact(&mut word).and_then(|()| stream.write_all(&word));
        }
    });
    at
}

/// Clients that come at once: how many of them are served within 90 s, and how long that took.
async fn burst(at: SocketAddr, clients: usize) -> (usize, Duration) {
    let start = Instant::now();
    let mut asking = JoinSet::new();
    for _ in 0..clients {
        asking.spawn(timeout(Duration::from_secs(90), async move {
            let mut stream = TcpStream::connect(at).await?;
            stream.write_all(b"word").await?;
            stream.read_exact(&mut [0; 4]).await
        }));
    }
    let served = asking.join_all().await.into_iter().filter(|asked| matches!(asked, Ok(Ok(_)))).count();
    (served, start.elapsed())
}

/// A pod that imports.
async fn import(socket: &Path, wanted: &ServicePort) -> (Conversation, SocketAddr) {
    let net = OsNet::new();
    let listener = net.make_bound(DescriptorKind::TcpListener, ([127, 0, 0, 1], 0).into()).await.unwrap();
    let at = listener.local_addr().unwrap();
    let pod = Pod { name: "asks".into(), namespace: "default".parse().unwrap(), uid: "asks".into() };
    let conversation = say_hello(&net, socket, pod, Vec::new()).await;
    let import = ToRouter::Import { id: 1, wanted: wanted.clone() };
    conversation.send(&import.encode(), vec![listener]).await.unwrap();
    (conversation, at)
}

async fn until_routed(router: &Router, wanted: &ServicePort) {
    wait_for(Duration::from_secs(20), async || {
        let imports = router.status().await["imports"].as_array().unwrap().clone();
        imports.iter().any(|i| i["service"] == wanted.to_string() && !i["route"].is_null()).then_some(())
    })
    .await;
}

/// What direct TCP serves is served: the kernel asks again while the backlog is full.
#[tokio::test]
async fn a_burst_on_a_small_backlog_waits_as_tcp_would() {
    const CLIENTS: usize = 10;
    let mut stand = Stand::new().await;
    let wanted = port(83);
    stand.export(wanted.clone(), serve_slowly(Duration::from_millis(600)).port()).await;
    let (_importer, at) = import(stand.b.sidecars(), &wanted).await;
    until_routed(&stand.b, &wanted).await;
    let (served, took) = burst(at, CLIENTS).await;
    assert_eq!(served, CLIENTS, "served of {CLIENTS}, within {took:?}");
    assert!(took > Duration::from_secs(4), "nobody had to wait");
}

/// The same with twice as many, beside direct TCP, on one node and across.
#[tokio::test]
#[ignore = "takes 90 s: make test-slow"]
async fn of_a_long_burst_as_many_are_served_as_by_direct_tcp() {
    const CLIENTS: usize = 20;
    let each = Duration::from_secs(1);
    let mut stand = Stand::new().await;
    let (across, near) = (port(84), port(85));
    stand.export(across.clone(), serve_slowly(each).port()).await;
    let (_importer, across_at) = import(stand.b.sidecars(), &across).await;
    until_routed(&stand.b, &across).await;
    stand.export(near.clone(), serve_slowly(each).port()).await;
    let (_neighbour, near_at) = import(stand.a.sidecars(), &near).await;
    until_routed(&stand.a, &near).await;
    let (direct, here, there) =
        tokio::join!(burst(serve_slowly(each), CLIENTS), burst(near_at, CLIENTS), burst(across_at, CLIENTS));
    println!("served of {CLIENTS}: direct {direct:?}, on one node {here:?}, across {there:?}");
    // Who gets the place that becomes free is chance, for the last one too.
    assert!(here.0 + 1 >= direct.0 && there.0 + 1 >= direct.0, "{direct:?} {here:?} {there:?}");
    assert!(2 * direct.0 > CLIENTS, "direct TCP serves {direct:?}");
}

/// A client that gives up ends the wait: its place at the application is another's.
#[tokio::test]
async fn who_gives_up_waits_no_more() {
    let mut stand = Stand::new().await;
    let wanted = port(86);
    // It never accepts, and two fill it.
    let at = serve_slowly(Duration::from_secs(600));
    let _full = (TcpStream::connect(at).await.unwrap(), TcpStream::connect(at).await.unwrap());
    stand.export(wanted.clone(), at.port()).await;
    let (_importer, import_at) = import(stand.b.sidecars(), &wanted).await;
    until_routed(&stand.b, &wanted).await;
    let _third = TcpStream::connect(import_at).await.unwrap();
    let waiting = async |n: f64| {
        wait_for(Duration::from_secs(10), async || {
            let flows = stand.b.status().await["peers"][0]["flows"].as_f64().unwrap();
            (flows == n).then_some(())
        })
        .await;
    };
    let reset = |client: TcpStream| socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    let early = TcpStream::connect(import_at).await.unwrap();
    waiting(2.0).await;
    let begun = Instant::now();
    reset(early);
    waiting(1.0).await;
    assert!(begun.elapsed() < Duration::from_millis(2800), "{:?}", begun.elapsed());
    let mut client = TcpStream::connect(import_at).await.unwrap();
    client.write_all(b"a word that nobody reads").await.unwrap();
    waiting(2.0).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    waiting(2.0).await;
    reset(client);
    waiting(1.0).await;
}

/// A pod of a.local whose application accepts nothing until `accept`; then it answers whoever has said all.
struct Late {
    full: Socket,
    wanted: ServicePort,
}

impl Late {
    async fn start(stand: &mut Stand, number: u16) -> Self {
        let full = with_a_full_backlog(([127, 0, 0, 1], 0).into());
        let target = full.local_addr().unwrap().as_socket().unwrap().port();
        let wanted = port(number);
        export(stand, "late", &[], (&wanted, target)).await;
        Self { full, wanted }
    }

    /// Until the process ends.
    fn accept(self) {
        let listener = std::net::TcpListener::from(self.full);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                std::thread::spawn(move || {
                    let mut said = Vec::new();
                    let _ = stream.read_to_end(&mut said).and_then(|_| stream.write_all(b"over"));
                });
            }
        });
    }
}

async fn is_answered(client: &mut TcpStream) -> bool {
    let mut answer = Vec::new();
    let read = timeout(Duration::from_secs(60), client.read_to_end(&mut answer)).await;
    matches!(read, Ok(Ok(4))) && answer == b"over"
}

/// Whoever ends without a word waits for as long as others do: it may be the service that speaks.
#[tokio::test]
async fn a_client_that_has_ended_before_its_service_accepts_is_answered() {
    let mut stand = Stand::new().await;
    let late = Late::start(&mut stand, 90).await;
    let mut clients = Vec::new();
    for router in [&stand.a, &stand.b] {
        let (importer, at) = import(router.sidecars(), &late.wanted).await;
        until_routed(router, &late.wanted).await;
        let mut client = TcpStream::connect(at).await.unwrap();
        client.shutdown().await.unwrap();
        clients.push((importer, client));
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    late.accept();
    for (_, client) in &mut clients {
        assert!(is_answered(client).await);
    }
}

/// As many clients of a pod as may wait have closed, behind a word or without: one of them makes room for the next that has
/// not.
#[tokio::test]
async fn clients_that_have_closed_make_room_for_one_that_waits() {
    const MORE_THAN_MAY_WAIT: usize = 160;
    let mut stand = Stand::new().await;
    let mut waiting = Vec::new();
    for (number, is_here) in [(91, true), (92, false)] {
        let late = Late::start(&mut stand, number).await;
        let router = if is_here { &stand.a } else { &stand.b };
        let (importer, at) = import(router.sidecars(), &late.wanted).await;
        until_routed(router, &late.wanted).await;
        for client in 0..MORE_THAN_MAY_WAIT {
            let mut client_stream = TcpStream::connect(at).await.unwrap();
            if client % 8 != 0 {
                client_stream.write_all(b"word").await.unwrap();
            }
        }
        waiting.push((late, importer, at));
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut clients = Vec::new();
    for (late, importer, at) in waiting {
        let mut client = TcpStream::connect(at).await.unwrap();
        client.write_all(b"word").await.unwrap();
        clients.push((late, importer, client));
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    for (late, importer, mut client) in clients {
        late.accept();
        client.shutdown().await.unwrap();
        assert!(is_answered(&mut client).await);
        drop(importer);
    }
}

/// One address of an endpoint has the flow; another, which was tried before it, refuses after that.
#[tokio::test]
async fn an_address_that_refuses_late_has_no_further_one_tried() {
    let mut stand = Stand::new().await;
    let wanted = port(87);
    let further = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = further.local_addr().unwrap().port();
    let (silent, serving) = (Ipv4Addr::new(127, 77, 1, 1), Ipv4Addr::new(127, 77, 1, 2));
    let full = std::net::TcpListener::from(with_a_full_backlog((silent, target).into()));
    let echo = TcpListener::bind((serving, target)).await.unwrap();
    stand.spawn(async move {
        let (mut stream, _) = echo.accept().await.unwrap();
        let (mut reader, mut writer) = stream.split();
        let _ = tokio::io::copy(&mut reader, &mut writer).await;
    });
    export(&mut stand, "many", &[silent, serving], (&wanted, target)).await;
    let (_importer, at) = import(stand.a.sidecars(), &wanted).await;
    until_routed(&stand.a, &wanted).await;

    let mut client = TcpStream::connect(at).await.unwrap();
    let mut says = async || {
        client.write_all(b"word").await.unwrap();
        client.read_exact(&mut [0; 4]).await.unwrap();
    };
    says().await;
    let is_dialled = || {
        // tcp(5): in hexadecimal the remote address, and 02 for SYN_SENT.
        let row = format!(" {:08X}:{target:04X} 02 ", u32::from_ne_bytes(silent.octets()));
        std::fs::read_to_string("/proc/net/tcp").unwrap().contains(&row)
    };
    assert!(is_dialled(), "the silent one is tried still");
    drop(full);
    wait_for(Duration::from_secs(10), async || (!is_dialled()).then_some(())).await;
    let tried = timeout(Duration::from_millis(500), further.accept()).await;
    assert!(tried.is_err(), "a further one is tried: {tried:?}");
    says().await;
}

/// The pod of one endpoint takes nothing at its address, and refuses at its loopback.
#[tokio::test]
async fn the_next_endpoint_has_the_flow_where_one_does_not_answer_for_2_s() {
    let mut stand = Stand::new().await;
    for (number, silent) in [(88, Ipv4Addr::new(127, 77, 2, 1)), (89, Ipv4Addr::new(127, 77, 2, 2))] {
        let wanted = port(number);
        let loopback = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        loopback.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        let target = loopback.local_addr().unwrap().as_socket().unwrap().port();
        let _full = with_a_full_backlog((silent, target).into());
        export(&mut stand, "silent", &[silent], (&wanted, target)).await;
        let serving = serve_slowly(Duration::ZERO).port();
        export(&mut stand, "serves", &[], (&wanted, serving)).await;
        let router = if number == 88 { &stand.a } else { &stand.b };
        let (_importer, at) = import(router.sidecars(), &wanted).await;
        until_routed(router, &wanted).await;
        // Which one is tried first is chance.
        let took = wait_for(Duration::from_secs(60), async || {
            let start = Instant::now();
            let mut stream = TcpStream::connect(at).await.unwrap();
            stream.write_all(b"word").await.unwrap();
            stream.read_exact(&mut [0; 4]).await.unwrap();
            (start.elapsed() > Duration::from_millis(1900)).then(|| start.elapsed())
        })
        .await;
        assert!(took < Duration::from_millis(3900), "{took:?}");
    }
}

/// A pod of a.local that exports a port, with addresses of its own beside its loopback.
async fn export(
    stand: &mut Stand,
    pod: &str,
    addresses: &[Ipv4Addr],
    (offered, target): (&ServicePort, u16),
) {
    let net = OsNet::new();
    let name =
        Pod { name: pod.into(), namespace: "default".parse().unwrap(), uid: format!("{pod} {offered}") };
    let addresses = addresses.iter().copied().map(IpAddr::V4).collect();
    let exporter = say_hello(&net, stand.a.sidecars(), name, addresses).await;
    let target = target.try_into().unwrap();
    let export = ToRouter::Export { id: 1, offered: offered.clone(), target, allow: None };
    exporter.send(&export.encode(), Vec::new()).await.unwrap();
    stand.spawn(stock(net, exporter));
}

/// A listener where a connect waits, for as long as it is there.
fn with_a_full_backlog(at: SocketAddr) -> Socket {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&at.into()).unwrap();
    listener.listen(1).unwrap();
    let at = listener.local_addr().unwrap().as_socket().unwrap();
    // Two fill it. They end with the process.
    for _ in 0..2 {
        std::mem::forget(std::net::TcpStream::connect(at).unwrap());
    }
    listener
}
