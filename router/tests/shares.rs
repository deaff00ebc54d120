//! A pod or a peer that takes all that it can get: of flows, sessions, conversations, sockets, patience. Another's new
//! flow is there within a second nevertheless. A pod is whose sockets are of its network namespace, so the hostile one has
//! a real one: `make test-net` runs these.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

mod lingering;
mod owners;
mod program;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use lingering::lingering;
use owners::{
    Conversation, FEW, Honest, Hostile, LIMIT, MANY, Most, Pair, Router, SOON, echo, greet, idle_flows,
    import, is_served, port, stock, until, user,
};
use servicekeel_core::handoff::{DescriptorKind, MAX_DESCRIPTORS, Pod, ToRouter, ToSidecar};
use servicekeel_core::name::Protocol;
use servicekeel_runtime::admin;
use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::net::{Descriptor, Handoff, Net};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

#[tokio::test]
#[ignore = "needs root: make test-net"]
async fn datagrams_from_many_ports_are_their_pods_own() {
    let pair = Pair::start(FEW, MANY).await;
    let honest = Honest::new(&pair.a, "honest").await;
    until("the honest pod is served", async || honest.is_served().await).await;
    let socket = pair.a.socket.clone();
    let _hostile = Hostile::does(|| async move {
        let conversation = greet(&socket, "hostile").await;
        let at = import(&conversation, 1, &port(80, Protocol::Udp)).await;
        let mut clients = Vec::new();
        for _ in 0..600 {
            let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            client.connect(at).await.unwrap();
            clients.push(client);
        }
        let mut tasks = JoinSet::new();
        // Ever again, so that none of its sessions is idle for long.
        tasks.spawn(async move {
            loop {
                for client in &clients {
                    let _ = client.send(b"x").await;
                }
                sleep(Duration::from_millis(50)).await;
            }
        });
        sleep(SOON).await;
        (conversation, tasks)
    })
    .await;
    for number in 0..20 {
        assert!(honest.is_served().await, "flow {number}: {}", pair.a.log());
    }
    assert!(pair.a.log().contains("as many flows and UDP sessions as it may"), "{}", pair.a.log());
    let (_, status) = admin::get(pair.a.admin, "/status").await.unwrap();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let notes = status["notes"].as_array().unwrap();
    let of_hostile = |note: &&serde_json::Value| note.as_str().unwrap().starts_with("default/hostile: ");
    let note = notes.iter().find(of_hostile).expect("no note of its sessions").to_string();
    assert!(note.contains("UDP sessions") && note.contains("dropped") && notes.len() == 1, "{status:#}");
}

#[tokio::test]
#[ignore = "needs root: make test-net"]
async fn flows_of_a_peer_that_stand_still_are_its_own() {
    let pair = Pair::start(FEW, MANY).await;
    let honest = Honest::new(&pair.a, "honest").await;
    let of_peer = Honest::new(&pair.b, "of-peer").await;
    until("the pods are served", async || honest.is_served().await && of_peer.is_served().await).await;
    let (served, flows) = idle_flows(of_peer.tcp, 400).await;
    for number in 0..20 {
        assert!(honest.is_served().await, "flow {number} beside {served} of the peer: {}", pair.a.log());
    }
    assert!((20..192).contains(&served), "{served}");
    assert!(pair.a.log().contains("sessions of the peer are rejected"), "{}", pair.a.log());
    // Whose share is used up stands at both ends for whoever looks there.
    for (router, note) in [
        (&pair.a, "note: further flows and UDP sessions of b.local/n were rejected "),
        (&pair.b, "note: a.local/n rejected a flow "),
    ] {
        let said = router.status();
        assert!(said.contains(note), "{said}");
    }
    // The peer is told why.
    until("it says so", async || pair.b.log().contains("as many as it may beside others")).await;
    drop(flows);
    until("the peer is served", async || of_peer.is_served().await).await;
}

/// A hostile pod asks for so many flows that stand still, and the honest one is served so often beside them: says how many
/// the hostile one has.
async fn idle_beside(router: &Router, honest: &Honest, asked: usize, rounds: usize) -> (usize, Hostile) {
    until("the honest pod is served", async || honest.is_served().await).await;
    let socket = router.socket.clone();
    let (told, served) = oneshot::channel();
    let hostile = Hostile::does(move || async move {
        let conversation = greet(&socket, "hostile").await;
        let at = import(&conversation, 1, &port(80, Protocol::Tcp)).await;
        let (served, flows) = idle_flows(at, asked).await;
        let _ = told.send(served);
        (conversation, flows)
    })
    .await;
    let served = served.await.unwrap();
    for number in 0..rounds {
        let beside = format!("flow {number} beside {served} of the hostile pod");
        assert!(honest.is_served().await, "{beside}: {}", router.log());
    }
    (served, hostile)
}

/// Two pods behind one router, both at the other, which knows the one router as a peer.
#[tokio::test]
#[ignore = "needs root: make test-net"]
async fn flows_across_that_stand_still_are_their_pods_own() {
    let pair = Pair::start(FEW, MANY).await;
    let honest = Honest::new(&pair.b, "honest").await;
    let (served, _hostile) = idle_beside(&pair.b, &honest, 400, 10).await;
    assert!((20..100).contains(&served), "{served}");
}

/// Each conversation stands still in the close of one socket, and what came with it is open meanwhile.
#[tokio::test]
#[ignore = "needs root: make test-net"]
async fn descriptors_that_wait_to_be_closed_are_their_pods_own() {
    let pair = Pair::start(FEW, MANY).await;
    let honest = Honest::new(&pair.a, "honest").await;
    until("the honest pod is served", async || honest.is_served().await).await;
    let before = pair.a.open_files();
    let socket = pair.a.socket.clone();
    let _hostile = Hostile::does(|| async move {
        let mut kept = Vec::new();
        for number in 0..60 {
            let conversation = greet(&socket, &format!("hostile-{number}")).await;
            let first = lingering();
            let of_pod = || OsNet::new().make_unbound(DescriptorKind::TcpUnconnected).unwrap();
            // Each of them is none that a stock has.
            let most = MAX_DESCRIPTORS as u16;
            let shared = std::iter::once(first.share().unwrap());
            let sockets = shared.chain(std::iter::repeat_with(of_pod)).take(most.into()).collect();
            let stock = ToRouter::Stock { tcp: most, udp: 0 };
            let _ = conversation.send(&stock.encode(), sockets).await;
            // Whoever closes it last waits.
            thread::spawn(move || drop(first));
            kept.push(conversation);
        }
        sleep(SOON).await;
        kept
    })
    .await;
    // Beside what the conversations take by themselves.
    let (open, most) = (pair.a.open_files(), before + 60 * 4 + FEW as usize / 4 + 16);
    assert!(open <= most, "{open} descriptors are open in the router, {before} of them before");
    assert!(honest.is_served().await, "{}", pair.a.log());
    let newcomer = Honest::new(&pair.a, "newcomer").await;
    until("another pod is served", async || newcomer.is_served().await).await;
}

/// By its first socket the kernel says that it is the next one.
#[tokio::test]
async fn a_sidecar_that_restarts_where_its_pod_has_all_it_may_takes_its_place() {
    let mut pair = Pair::start(MANY, FEW).await;
    let first = greet(&pair.b.socket, "pod").await;
    let is_rejected = async || {
        let said = timeout(Duration::from_millis(20), first.recv()).await;
        let Ok(Ok(Some((bytes, _)))) = said else { return false };
        matches!(ToSidecar::decode(&bytes), Ok(ToSidecar::Refused { .. }))
    };
    let mut number = 0;
    while !is_rejected().await {
        number += 1;
        assert!(number < u64::from(FEW), "nothing is rejected");
        import(&first, number, &port(80, Protocol::Tcp)).await;
    }
    drop(first);
    until("its end is seen", async || pair.b.log().contains("sidecar disconnected unexpectedly")).await;
    let next = greet(&pair.b.socket, "pod").await;
    let mut imports = Vec::new();
    for number in 1..=3 {
        imports.push(import(&next, number, &port(80, Protocol::Tcp)).await);
    }
    pair.tasks.spawn(stock(next));
    for at in imports {
        until("it is served", async || is_served(at).await).await;
    }
}

/// A pod that begins 1,000 conversations.
async fn many_conversations(socket: PathBuf, told: Option<mpsc::Sender<String>>) -> Hostile {
    Hostile::does(|| async move {
        let mut tasks = JoinSet::new();
        for process in 0..5 {
            let socket = socket.clone();
            tasks.spawn(async move {
                let mut conversations = Vec::new();
                for number in 0..200 {
                    let Ok(conversation) = OsNet::new().handoff_connect(&socket).await else { continue };
                    let name = format!("hostile-{process}-{number}");
                    let pod = Pod { name: name.clone(), namespace: "default".parse().unwrap(), uid: name };
                    let hello = ToRouter::Hello { version: 1, pod, addresses: Vec::new() };
                    let _ = conversation.send(&hello.encode(), Vec::new()).await;
                    conversations.push(conversation);
                }
                conversations
            });
        }
        let conversations = tasks.join_all().await;
        for conversation in conversations.iter().flatten() {
            let Some(told) = &told else { break };
            let said = timeout(SOON, conversation.recv()).await;
            let said = said.ok().and_then(Result::ok).flatten().map(|(said, _)| ToSidecar::decode(&said));
            if let Some(Ok(ToSidecar::Refused { id: None, reason })) = said {
                let _ = told.send(reason).await;
                break;
            }
        }
        conversations
    })
    .await
}

#[tokio::test]
#[ignore = "needs root: make test-net"]
async fn conversations_are_their_pods_own() {
    let pair = Pair::start(FEW, MANY).await;
    conversations_are_shared(&pair.a).await;
}

/// Where threads are short and open files are not.
#[tokio::test]
#[ignore = "needs root: make test-net"]
async fn threads_are_their_pods_own() {
    let [a, b] = [Some((user(), 200)), None].map(|threads| Most { files: MANY, threads });
    let pair = Pair::of(a, b).await;
    conversations_are_shared(&pair.a).await;
    assert!(pair.a.log().contains("allow few sidecars"), "{}", pair.a.log());
    assert!(!pair.a.log().contains("no thread for a sidecar"), "{}", pair.a.log());
}

/// Processes of a user, which end when they are dropped.
struct Processes(Vec<Child>);

impl Processes {
    fn start(user: u32, number: usize) -> Self {
        let sleep = || Command::new("sleep").arg("600").uid(user).spawn().unwrap();
        Self(std::iter::repeat_with(sleep).take(number).collect())
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for process in &mut self.0 {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// As where a router does not see the limit that it is under: others have a part of what it thinks is there.
#[tokio::test]
#[ignore = "needs root: make test-net"]
async fn pods_are_served_where_another_has_taken_the_last_thread() {
    let user = user();
    let [a, b] = [Some((user, 200)), None].map(|threads| Most { files: MANY, threads });
    let pair = Pair::of(a, b).await;
    let first = Honest::new(&pair.a, "first").await;
    until("the honest pod is served", async || first.is_served().await).await;
    let _others = Processes::start(user, 170);
    let _hostile = many_conversations(pair.a.socket.clone(), None).await;
    let refused = "no thread for a sidecar: cannot serve it";
    until("the threads are gone", async || pair.a.log().contains(refused)).await;
    assert!(first.is_served().await, "{}", pair.a.log());
    for number in 0..3 {
        let (socket, (told, served)) = (pair.a.socket.clone(), oneshot::channel());
        let _next = Hostile::does(move || async move {
            let honest = Honest::of(&socket, &format!("next-{number}")).await;
            let begun = Instant::now();
            let _ = told.send(honest.is_served().await && begun.elapsed() < 2 * SOON);
            honest
        })
        .await;
        assert!(served.await.unwrap(), "pod {number}: {}", pair.a.log());
    }
}

async fn conversations_are_shared(router: &Router) {
    let first = Honest::new(router, "first").await;
    until("the honest pod is served", async || first.is_served().await).await;
    let (told, mut refusals) = mpsc::channel(1);
    let _hostile = many_conversations(router.socket.clone(), Some(told)).await;
    let reason = timeout(LIMIT, refusals.recv()).await.expect("whoever is rejected is told").unwrap();
    assert!(reason.contains("conversations with this router, as many as it may"), "{reason}");
    assert!(first.is_served().await, "{}", router.log());
    for number in 0..10 {
        let begun = Instant::now();
        let next = Honest::new(router, &format!("next-{number}")).await;
        assert!(next.is_served().await && begun.elapsed() < 2 * SOON, "pod {number}: {}", router.log());
    }
    assert!(router.log().contains("conversations with this router, as many as it may"), "{}", router.log());
}

#[tokio::test]
#[ignore = "needs root: make test-net"]
async fn listeners_are_their_pods_own() {
    let pair = Pair::start(FEW, MANY).await;
    let first = Honest::new(&pair.a, "first").await;
    until("the honest pod is served", async || first.is_served().await).await;
    let socket = pair.a.socket.clone();
    let (told, mut refusals) = mpsc::channel(8);
    let _hostile = Hostile::does(|| async move {
        let mut tasks = JoinSet::new();
        for number in 0..5 {
            let conversation = Arc::new(greet(&socket, &format!("hostile-{number}")).await);
            let (reads, told) = (conversation.clone(), told.clone());
            // Whoever reads nothing is cut off.
            tasks.spawn(async move {
                while let Ok(Some((bytes, _))) = reads.recv().await {
                    if let Ok(ToSidecar::Refused { id: Some(400), reason }) = ToSidecar::decode(&bytes) {
                        let _ = told.send(reason).await;
                    }
                }
            });
            for id in 1..=400 {
                let (wanted, at) = (port(80, Protocol::Tcp), "127.0.0.1:0".parse().unwrap());
                let listener = OsNet::new().make_bound(DescriptorKind::TcpListener, at).await.unwrap();
                let _ = conversation.send(&ToRouter::Import { id, wanted }.encode(), vec![listener]).await;
            }
        }
        tasks
    })
    .await;
    for number in 0..3 {
        assert!(first.is_served().await, "{}", pair.a.log());
        let begun = Instant::now();
        let next = Honest::new(&pair.a, &format!("next-{number}")).await;
        assert!(next.is_served().await && begun.elapsed() < SOON, "pod {number}: {}", pair.a.log());
    }
    let reason = timeout(LIMIT, refusals.recv()).await.expect("nothing is rejected").unwrap();
    assert!(reason.contains("sockets of this network namespace, as many as it may"), "{reason}");
}

/// What another router takes on a link is bounded.
#[tokio::test]
#[ignore = "needs root: make test-net"]
async fn exports_are_their_pods_own() {
    let mut pair = Pair::start(MANY, MANY).await;
    let consumer = Honest::new(&pair.b, "consumer").await;
    until("the routers are linked", async || consumer.is_served().await).await;
    let socket = pair.a.socket.clone();
    let (told, refused) = oneshot::channel();
    // Half of what a link carries, of which it gets less.
    let _hostile = Hostile::does(|| async move {
        let (mut tasks, (refusals, mut reasons)) = (JoinSet::new(), mpsc::channel(16));
        for number in 0..2 {
            let conversation = Arc::new(greet(&socket, &format!("hostile-{number}")).await);
            let (refusals, reads) = (refusals.clone(), conversation.clone());
            tasks.spawn(async move {
                while let Ok(Some((bytes, _))) = reads.recv().await {
                    if let Ok(ToSidecar::Refused { id: Some(_), reason }) = ToSidecar::decode(&bytes) {
                        let _ = refusals.send(reason).await;
                    }
                }
            });
            tasks.spawn(async move {
                for id in 1..=4096_u16 {
                    let mut offered = port(id, Protocol::Tcp);
                    offered.service.name = format!("hostile-{number}").parse().unwrap();
                    let target = id.try_into().unwrap();
                    let export = ToRouter::Export { id: id.into(), offered, target, allow: None };
                    conversation.send(&export.encode(), Vec::new()).await.unwrap();
                }
                std::future::pending().await
            });
        }
        let mut counts = (0, 0);
        let all = async {
            while counts.0 < 4096 - 64 {
                let reason = reasons.recv().await.unwrap();
                let known = reason.contains("exports of this network namespace, as many as it may");
                counts = (counts.0 + 1, counts.1 + usize::from(known));
            }
        };
        let _ = timeout(LIMIT, all).await;
        let _ = told.send(counts);
        (tasks, reasons)
    })
    .await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap().port().try_into().unwrap();
    pair.tasks.spawn(echo(listener));
    let (last, server) = (port(82, Protocol::Tcp), greet(&pair.a.socket, "last").await);
    let export = ToRouter::Export { id: 1, offered: last.clone(), target, allow: None };
    server.send(&export.encode(), Vec::new()).await.unwrap();
    pair.tasks.spawn(stock(server));
    let conversation = greet(&pair.b.socket, "of-last").await;
    let at = import(&conversation, 1, &last).await;
    until("the last export is served", async || is_served(at).await).await;
    assert_eq!(refused.await.unwrap(), (4096 - 64, 4096 - 64));
}

/// A conversation of a sidecar with imports that are more than half of its share, the last of which is served.
async fn of_restarting(socket: &Path) -> Conversation {
    let conversation = greet(socket, "restarts").await;
    let mut last = None;
    for id in 1..=90 {
        last = Some(import(&conversation, id, &port(80, Protocol::Tcp)).await);
    }
    until("its last import is served", async || is_served(last.unwrap()).await).await;
    conversation
}

#[tokio::test]
#[ignore = "needs root: make test-net"]
async fn a_sidecar_that_restarts_has_room_for_its_imports_beside_those_of_before() {
    let pair = Pair::start(FEW, MANY).await;
    let other = Honest::new(&pair.a, "other").await;
    until("the router serves", async || other.is_served().await).await;
    let socket = pair.a.socket.clone();
    let (told, seen) = oneshot::channel();
    let restarts = Hostile::does(|| async move {
        let of_before = of_restarting(&socket).await;
        drop(of_before);
        // A sidecar asks again for what was rejected meanwhile.
        seen.await.unwrap();
        of_restarting(&socket).await
    });
    let end_is_seen = async {
        let is_told = async || pair.a.log().contains("sidecar disconnected unexpectedly");
        until("the end of the first is seen", is_told).await;
        told.send(()).unwrap();
    };
    let (_pod, ()) = tokio::join!(restarts, end_is_seen);
    assert!(!pair.a.log().contains("as many as it may"), "{}", pair.a.log());
}

#[tokio::test]
#[ignore = "needs root: make test-net"]
async fn the_patience_of_an_endpoint_is_shared() {
    let mut pair = Pair::start(MANY, MANY).await;
    // An application that accepts nothing until it is told to.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let target = listener.local_addr().unwrap().port().try_into().unwrap();
    let (slow, server) = (port(81, Protocol::Tcp), greet(&pair.a.socket, "slow").await);
    let export = ToRouter::Export { id: 1, offered: slow.clone(), target, allow: None };
    server.send(&export.encode(), Vec::new()).await.unwrap();
    pair.tasks.spawn(stock(server));

    let honest = greet(&pair.a.socket, "honest").await;
    let at = import(&honest, 1, &slow).await;
    let other = Honest::new(&pair.a, "other").await;
    until("the router serves", async || other.is_served().await).await;
    let (socket, wanted) = (pair.a.socket.clone(), slow.clone());
    let _hostile = Hostile::does(|| async move {
        let conversation = greet(&socket, "hostile").await;
        let at = import(&conversation, 1, &wanted).await;
        let mut flows = Vec::new();
        for _ in 0..300 {
            flows.push(TcpStream::connect(at).await.unwrap());
        }
        (conversation, flows)
    })
    .await;
    // Those of the hostile pod wait by now.
    until("the endpoint fails", async || pair.a.log().contains("exported endpoint is failing")).await;
    let mut flow = TcpStream::connect(at).await.unwrap();
    // Twice as long as an endpoint has that has no time.
    let early = timeout(Duration::from_secs(5), flow.read(&mut [0])).await;
    assert!(early.is_err(), "its patience is another's: {early:?}: {}", pair.a.log());
    pair.tasks.spawn(echo(listener));
    flow.write_all(b"x").await.unwrap();
    timeout(LIMIT, flow.read_exact(&mut [0])).await.expect("it is served").unwrap();
}

#[tokio::test]
#[ignore = "needs root: make test-net"]
async fn flows_that_stand_still_are_their_pods_own() {
    let pair = Pair::start(FEW, MANY).await;
    let honest = Honest::new(&pair.a, "honest").await;
    let (served, hostile) = idle_beside(&pair.a, &honest, 600, 20).await;
    assert!((20..192).contains(&served), "{served}");
    assert!(pair.a.log().contains("as many flows and UDP sessions as it may"), "{}", pair.a.log());
    // What it gives back it may have again.
    drop(hostile);
    assert!(honest.is_served().await);
}

/// Who uses up the local ports of a pod waits, and looks to its application like any other client: not like the pod's
/// own loopback, which some applications trust.
#[tokio::test]
#[ignore = "needs root: make test-net"]
async fn a_pod_without_local_ports_is_not_reached_by_its_loopback() {
    let pair = Pair::start(MANY, MANY).await;
    let (met, mut clients) = mpsc::channel(256);
    let socket = pair.a.socket.clone();
    let _server = Hostile::does(|| async move {
        std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "30000 30009").unwrap();
        let address = Command::new("ip").args("addr add 10.99.0.1/32 dev lo".split(' ')).status().unwrap();
        assert!(address.success());
        let listener = tokio::net::TcpListener::bind("0.0.0.0:8081").await.unwrap();
        let conversation = OsNet::new().handoff_connect(&socket).await.unwrap();
        let pod = Pod { name: "server".into(), namespace: "default".parse().unwrap(), uid: "narrow".into() };
        let addresses = vec!["10.99.0.1".parse().unwrap()];
        let hello = ToRouter::Hello { version: 1, pod, addresses };
        let offered = port(81, Protocol::Tcp);
        let target = 8081.try_into().unwrap();
        let export = ToRouter::Export { id: 1, offered, target, allow: None };
        for word in [hello, export] {
            conversation.send(&word.encode(), Vec::new()).await.unwrap();
        }
        let mut tasks = JoinSet::new();
        tasks.spawn(stock(conversation));
        tasks.spawn(async move {
            let mut flows = JoinSet::new();
            while let Ok((mut stream, from)) = listener.accept().await {
                let _ = met.try_send(from.ip());
                flows.spawn(async move {
                    let (mut reader, mut writer) = stream.split();
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                });
            }
        });
        tasks
    })
    .await;
    let client = greet(&pair.a.socket, "client").await;
    let at = import(&client, 1, &port(81, Protocol::Tcp)).await;
    let mut tasks = JoinSet::new();
    tasks.spawn(stock(client));
    until("it is served", async || is_served(at).await).await;
    let mut served = 1;
    while is_served(at).await {
        served += 1;
        assert!(served < 100, "its ports do not run out");
    }
    let told = "default/server: connections to what it exports found no local port left in it";
    until("the status says so", async || pair.a.status().contains(told)).await;
    let _ = timeout(SOON, TcpStream::connect(at)).await;
    sleep(2 * SOON).await;
    clients.close();
    let mut seen = Vec::new();
    while let Some(client) = clients.recv().await {
        seen.push(client.to_string());
    }
    assert!(seen.len() >= served && seen.iter().all(|client| client == "10.99.0.1"), "{seen:?}");
}

/// A session lasts long after its last datagram.
#[tokio::test]
async fn many_udp_clients_of_a_pod_leave_its_flows_room() {
    for across in [false, true] {
        let pair = Pair::start(FEW, FEW).await;
        let pod = Honest::new(if across { &pair.b } else { &pair.a }, "asked").await;
        until("the pod is served", async || pod.is_served().await).await;
        let mut clients = Vec::new();
        for _ in 0..300 {
            // Where no application listens, whose port one of so many might have.
            let client = UdpSocket::bind("127.0.0.9:0").await.unwrap();
            client.send_to(b"x", pod.udp).await.unwrap();
            clients.push(client);
        }
        let full = if across {
            "of which three quarters may be sessions"
        } else {
            "as many flows and UDP sessions as it may"
        };
        until("they are more than it may have", async || pair.a.log().contains(full)).await;
        assert!(is_served(pod.tcp).await, "{}", pair.a.log());
        let mut answered = 0;
        until("the others are answered", async || {
            answered += clients.iter().filter(|client| client.try_recv(&mut [0]).is_ok()).count();
            answered > 20
        })
        .await;
    }
}
