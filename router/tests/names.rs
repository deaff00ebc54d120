//! A router whose peer has a name with several addresses. Who names what is its own affair, so it has an /etc/hosts of its
//! own, in a mount namespace: `make test-net` runs this.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

mod program;

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use program::{Files, Program};
use servicekeel_router::pki::Authority;
use servicekeel_runtime::admin;
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// How long what takes no time may take on a busy machine.
const SOON: Duration = Duration::from_secs(3);

/// A listener where a connect waits, for as long as it is there.
fn dead(at: SocketAddr) -> Socket {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&at.into()).unwrap();
    listener.listen(1).unwrap();
    // Two fill it. They end with the process.
    for _ in 0..2 {
        std::mem::forget(std::net::TcpStream::connect(at).unwrap());
    }
    listener
}

/// Takes connections for a router, until they are cut, and counts them.
async fn relay(listener: TcpListener, to: SocketAddr, count: Arc<AtomicUsize>, cut: watch::Receiver<()>) {
    let mut connections = JoinSet::new();
    while let Ok((mut near, _)) = listener.accept().await {
        count.fetch_add(1, Ordering::Relaxed);
        let mut cut = cut.clone();
        cut.mark_unchanged();
        connections.spawn(async move {
            let mut far = TcpStream::connect(to).await.unwrap();
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                _ = cut.changed() => {}
            }
        });
    }
}

async fn is_linked(router: &Files) -> Option<bool> {
    let metrics = admin::get(router.admin, "/metrics").await;
    metrics.ok().map(|(_, text)| text.contains("servicekeel_router_links_active 1\n"))
}

async fn until(what: &str, limit: Duration, mut condition: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + limit;
    while !condition().await {
        assert!(Instant::now() < end, "not within {limit:?}: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
#[ignore = "needs root: make test-net"]
async fn a_router_gets_past_the_dead_addresses_of_a_name_and_remembers_the_live_one() {
    let dir = tempfile::tempdir().unwrap();
    let [of_a, of_b] = ["a.local", "b.local"]
        .map(|cluster| Authority::generate(&cluster.parse().unwrap(), 2, SystemTime::now()).unwrap());
    let [a, b] =
        [(&of_a, &of_b), (&of_b, &of_a)].map(|(own, other)| Files::write(dir.path(), own, other, None));

    // The last address of the name leads to a's router, and nobody answers at the others.
    let addresses = [1, 2, 3, 4].map(|last| Ipv4Addr::new(127, 88, 0, last));
    let live = TcpListener::bind((addresses[3], 0)).await.unwrap();
    let port = live.local_addr().unwrap().port();
    let others = [0, 1, 2].map(|other| SocketAddr::from((addresses[other], port)));
    let silent = others.map(dead);
    let hosts = dir.path().join("hosts");
    std::fs::write(&hosts, addresses.map(|address| format!("{address} hub.test\n")).concat()).unwrap();
    let mut config = std::fs::OpenOptions::new().append(true).open(&b.config).unwrap();
    writeln!(config, "peers: [ {{ address: \"hub.test:{port}\" }} ]").unwrap();

    let (cuts, cut) = watch::channel(());
    let (count, others_count) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let mut tasks = JoinSet::new();
    tasks.spawn(relay(live, a.peers, count.clone(), cut.clone()));
    let program = env!("CARGO_BIN_EXE_servicekeel-router");
    let _a = Program::start(Command::new(program).arg("--config").arg(&a.config));
    let with_hosts = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", with_hosts]).arg(&hosts).arg(program).arg("--config").arg(&b.config);
    let _b = Program::start(&mut command);
    until("both are there", 5 * SOON, async || {
        is_linked(&a).await.is_some() && is_linked(&b).await.is_some()
    })
    .await;
    until("the dead ones are got past", SOON, async || is_linked(&b).await == Some(true)).await;

    // They are alive now, and the one that answered has the next link.
    drop(silent);
    for at in others {
        tasks.spawn(relay(TcpListener::bind(at).await.unwrap(), a.peers, others_count.clone(), cut.clone()));
    }
    let before = count.load(Ordering::Relaxed);
    cuts.send(()).unwrap();
    until("it dials again", 5 * SOON, async || {
        count.load(Ordering::Relaxed) > before || others_count.load(Ordering::Relaxed) > 0
    })
    .await;
    until("it is linked again", SOON, async || is_linked(&b).await == Some(true)).await;
    assert_eq!(others_count.load(Ordering::Relaxed), 0, "another address is tried");
}
