//! The production `run` on the kernel's sockets, beside a router that is only its end of the conversation.
#![allow(clippy::unwrap_used, clippy::panic, reason = "whatever fails here is a test that fails")]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use servicekeel_core::handoff::{self, Pod, ToRouter, ToSidecar};
use servicekeel_core::sidecar::{PING_AFTER, PONG_WITHIN};
use servicekeel_runtime::admin;
use servicekeel_runtime::net::os::{OsDescriptor, OsHandoff, OsHandoffListener, OsNet};
use servicekeel_runtime::net::{Descriptor, Handoff, HandoffListener, Listener, Net};
use servicekeel_sidecar::RunError;
use servicekeel_sidecar::dns::OsDns;
use servicekeel_sidecar::settings::Settings;
use servicekeel_sidecar::source::Annotations;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(10);

const IMPORTS: &str = "services:\n  - name: web\n    ports: [{ name: http, port: 8080 }]\n  \
                       - name: log\n    ports: [{ name: syslog, port: 8514, protocol: UDP }]\n";
const EXPORTS: &str =
    "services: [{ name: own, ports: [{ port: 9000, targetport: 9001 }], allow: [b.local] }]";

/// A sidecar that runs, and where it can be reached.
struct Running {
    annotations: watch::Sender<Arc<Annotations>>,
    shutdown: oneshot::Sender<()>,
    task: JoinHandle<Result<(), RunError>>,
    admin: SocketAddr,
}

/// The files of a test, and addresses of its own.
struct Stage {
    directory: TempDir,
    number: u8,
}

impl Stage {
    fn new() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(0);
        let number = (std::process::id() % 25) as u8 * 10 + NEXT.fetch_add(1, Ordering::SeqCst);
        Self { directory: tempfile::tempdir().unwrap(), number }
    }

    fn settings(&self) -> Settings {
        let free = |ip: Ipv4Addr| std::net::TcpListener::bind((ip, 0)).unwrap().local_addr().unwrap();
        Settings {
            range: format!("127.113.{}.0/24", self.number).parse().unwrap(),
            dns_addr: Some(free(Ipv4Addr::new(127, 114, self.number, 1))),
            upstreams: vec![],
            router: self.directory.path().join("router.sock"),
            cluster: None,
            state_dir: Some(self.directory.path().join("state")),
            admin: Some(free(Ipv4Addr::LOCALHOST)),
            private_status: true,
            pod: Pod { name: "p".into(), namespace: "default".parse().unwrap(), uid: "u".into() },
            addresses: vec![[10, 0, 0, 7].into()],
            search: vec![],
        }
    }

    fn start(&self, settings: Settings, annotations: Annotations) -> Running {
        let admin = settings.admin.unwrap();
        let (annotations, receiver) = watch::channel(Arc::new(annotations));
        let (shutdown, ended) = oneshot::channel();
        #[expect(clippy::disallowed_methods, reason = "the test joins it")]
        let task = tokio::spawn(servicekeel_sidecar::run(settings, OsNet::new(), OsDns, receiver, async {
            // A sender that was dropped is an order to end, too.
            let _ = ended.await;
        }));
        Running { annotations, shutdown, task, admin }
    }

    async fn router(&self) -> OsHandoffListener {
        OsNet::new().handoff_listen(&self.directory.path().join("router.sock")).await.unwrap()
    }
}

impl Running {
    async fn page(&self, path: &str) -> (u16, String) {
        admin::get(self.admin, path).await.unwrap()
    }

    async fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.page("/status").await.1).unwrap()
    }

    /// Waits until the status is as wanted.
    async fn wait(&self, what: &str, wanted: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
        let end = Instant::now() + LIMIT;
        loop {
            let status = self.status().await;
            if wanted(&status) {
                return status;
            }
            assert!(Instant::now() < end, "{what}: not within {LIMIT:?}: {status:#}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn wait_ready(&self) {
        let end = Instant::now() + LIMIT;
        while admin::get(self.admin, "/readyz").await.map(|(code, _)| code).unwrap_or(0) != 200 {
            assert!(Instant::now() < end, "not ready");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn set(&self, imports: &str) {
        let imports = Some(imports.to_owned());
        self.annotations.send_modify(|now| *now = Arc::new(Annotations { imports, ..(**now).clone() }));
    }

    async fn end(self) -> Duration {
        let start = Instant::now();
        self.shutdown.send(()).unwrap();
        timeout(LIMIT, self.task).await.unwrap().unwrap().unwrap();
        start.elapsed()
    }
}

fn both() -> Annotations {
    Annotations { exports: Some(EXPORTS.into()), imports: Some(IMPORTS.into()), ..Annotations::default() }
}

/// The router's end of a conversation.
struct Peer(OsHandoff);

impl Peer {
    /// Accepts a sidecar and welcomes it.
    async fn accept(router: &OsHandoffListener) -> Self {
        Self::accept_as(1, router).await
    }

    /// As [`Self::accept`], as a router of this version.
    async fn accept_as(version: u32, router: &OsHandoffListener) -> Self {
        let (handoff, _) = timeout(LIMIT, router.accept()).await.expect("nobody dials").unwrap();
        let peer = Self(handoff);
        let (hello, _) = peer.next().await;
        assert!(matches!(&hello, ToRouter::Hello { version: 1, pod, .. } if pod.name == "p"), "{hello:?}");
        let welcome =
            ToSidecar::Welcome { version, cluster: "a.local".parse().unwrap(), node: "a-1".parse().unwrap() };
        peer.say(&welcome).await;
        peer
    }

    async fn say(&self, message: &ToSidecar) {
        self.0.send(&message.encode(), vec![]).await.unwrap();
    }

    async fn next(&self) -> (ToRouter, Vec<OsDescriptor>) {
        let (bytes, descriptors) =
            timeout(LIMIT, self.0.recv()).await.expect("silence").unwrap().expect("closed");
        let message = ToRouter::decode(&bytes).unwrap();
        assert_eq!(message.descriptors().count(), descriptors.len());
        for (kind, descriptor) in message.descriptors().zip(&descriptors) {
            descriptor.check(kind).unwrap();
        }
        (message, descriptors)
    }

    /// The sockets of the three ports of [`both`], the TCP one first.
    async fn sockets(&self) -> Vec<OsDescriptor> {
        let mut sockets = Vec::new();
        for _ in 0..3 {
            match self.next().await {
                (ToRouter::Import { wanted, .. }, mut socket) => {
                    let wanted = wanted.to_string();
                    let first = wanted == "web.default.a.local:8080/TCP";
                    assert!(first || wanted == "log.default.a.local:8514/UDP", "{wanted}");
                    sockets.insert(if first { 0 } else { sockets.len() }, socket.pop().unwrap());
                }
                (ToRouter::Export { offered, target, .. }, _) => {
                    assert_eq!(offered.to_string(), "own.default.a.local:9000/TCP");
                    assert_eq!(target.get(), 9001);
                }
                (other, _) => panic!("{other:?}"),
            }
        }
        sockets
    }
}

#[tokio::test]
async fn sockets_are_handed_over_again_and_their_backlog_is_kept() {
    let stage = Stage::new();
    let router = stage.router().await;
    let running = stage.start(stage.settings(), both());
    let peer = Peer::accept(&router).await;
    let sockets = peer.sockets().await;
    let web = sockets[0].local_addr().unwrap();
    running.wait_ready().await;
    let status =
        running.wait("all is handed over", |s| s["imports"][0]["ports"][0]["state"] == "handed-over").await;
    assert_eq!(status["cluster"], "a.local");
    assert_eq!(status["cluster_from"], "router");
    assert_eq!(status["router"]["node"], "a-1");
    assert_eq!(status["exports"][0]["allow"][0], "b.local");
    assert_eq!(status["imports"][0]["address"], web.ip().to_string());

    peer.say(&ToSidecar::More { tcp: 40, udp: 30 }).await;
    let (stock, given) = peer.next().await;
    assert_eq!((stock, given.len()), (ToRouter::Stock { tcp: 40, udp: 24 }, 64));
    assert_eq!(peer.next().await.0, ToRouter::Stock { tcp: 0, udp: 6 });

    // The router dies. Who connects now waits, and is served by the next one.
    drop((peer, sockets, router));
    running.wait("the loss is seen", |s| s["router"]["connected"] == false).await;
    assert_eq!(running.page("/readyz").await.0, 200, "a router that is away concerns no probe");
    let mut client = TcpStream::connect(web).await.unwrap();
    client.write_all(b"while nobody was there").await.unwrap();
    let router = stage.router().await;
    let peer = Peer::accept(&router).await;
    let mut sockets = peer.sockets().await;
    let listener = OsNet::new().adopt_listener(sockets.swap_remove(0)).await.unwrap();
    let (mut accepted, _) = timeout(LIMIT, listener.accept()).await.unwrap().unwrap();
    let mut bytes = [0; 22];
    accepted.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"while nobody was there");

    let took = running.end().await;
    assert_eq!(peer.next().await.0, ToRouter::Bye);
    assert!(took < Duration::from_millis(200), "{took:?}");
    // A flow that lives is not the sidecar's.
    accepted.write_all(b"on").await.unwrap();
    client.read_exact(&mut bytes[..2]).await.unwrap();
}

#[tokio::test]
async fn edits_reach_the_router_and_a_bad_text_does_not() {
    let stage = Stage::new();
    let router = stage.router().await;
    let running = stage.start(stage.settings(), both());
    let peer = Peer::accept(&router).await;
    peer.sockets().await;
    running.set("services: [");
    let status = running.wait("the error is told", |s| s["refused"][0]["line"] == 1).await;
    assert_eq!(status["imports"].as_array().unwrap().len(), 2);
    let more = format!("{IMPORTS}  - name: bad\n    ports: [{{ port: 99999 }}]\n");
    running.set(&more.replace("name: http", "name: renamed"));
    let status = running.wait("the entry is refused", |s| s["refused"][0]["line"] == 7).await;
    assert_eq!(status["refused"][0]["path"], "services[2].ports[0].port");
    // Neither of the two was a change for the router: the next thing it hears is this.
    running.set("services: [{ name: web, ports: [{ port: 8080 }] }]");
    assert!(matches!(peer.next().await.0, ToRouter::Unimport { .. }));
    let (_, metrics) = running.page("/metrics").await;
    assert!(metrics.contains("servicekeel_sidecar_imports 1\n"), "{metrics}");
    assert!(metrics.contains("servicekeel_sidecar_sockets_made_total 2\n"), "{metrics}");
    running.end().await;
}

#[tokio::test]
async fn a_restart_without_router_and_annotations_serves_the_last_good_state() {
    let stage = Stage::new();
    let router = stage.router().await;
    let running = stage.start(stage.settings(), both());
    let peer = Peer::accept(&router).await;
    let web = peer.sockets().await[0].local_addr().unwrap();
    running.wait_ready().await;
    running.task.abort();
    assert!(running.task.await.unwrap_err().is_cancelled());
    drop((peer, router));
    assert!(TcpStream::connect(web).await.is_err(), "a dropped sidecar holds sockets");

    let running = stage.start(stage.settings(), Annotations::default());
    running.wait_ready().await;
    let status = running.status().await;
    assert_eq!(status["cluster_from"], "state");
    assert_eq!(status["imports"][0]["address"], web.ip().to_string());
    assert_eq!(status["imports"][0]["ports"][0]["state"], "held");
    assert!(status["router"]["error"].as_str().unwrap().contains("router.sock"), "{status:#}");
    assert!(status["warnings"].to_string().contains("no annotations"), "{status:#}");
    TcpStream::connect(web).await.expect("the backlog takes it");
    running.end().await;
}

#[tokio::test]
async fn one_address_means_one_service_of_one_sidecar() {
    let stage = Stage::new();
    let cluster = Some("a.local".parse().unwrap());
    let settings = || Settings { state_dir: None, cluster: cluster.clone(), ..stage.settings() };
    let port = |status: &serde_json::Value| status["imports"][0]["ports"][0].clone();
    let first = stage.start(settings(), both());
    first.wait_ready().await;
    let same = stage.start(settings(), both());
    same.wait_ready().await;
    same.wait("the same Service", |status| port(status)["state"] == "held").await;
    same.end().await;

    let imports = Some(IMPORTS.replace("web", "another"));
    let other = stage.start(settings(), Annotations { imports, ..Annotations::default() });
    other.wait_ready().await;
    let status = other.wait("another Service", |status| port(status)["state"] == "failed").await;
    assert!(port(&status).to_string().contains("SIDECAR_IP_RANGE"), "{status:#}");
    assert_eq!(status["imports"][1]["ports"][0]["state"], "held", "what both mean is served: {status:#}");
    // Where the other one ends it is served, though its sockets may live on in a router.
    first.end().await;
    other.wait("the address is free", |status| port(status)["state"] == "held").await;
    other.end().await;
}

#[tokio::test]
async fn a_pod_that_is_not_dialled_over_ipv6_is_told() {
    let stage = Stage::new();
    let settings = |addresses: &[&str]| {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        Settings { addresses, ..stage.settings() }
    };
    for (addresses, told) in [(&["fd00::5"][..], true), (&["fd00::5", "10.0.0.5"], false), (&[], false)] {
        let running = stage.start(settings(addresses), both());
        running.wait_ready().await;
        let is_told = |status: &serde_json::Value| {
            let warnings = status["warnings"].to_string();
            warnings.contains("fd00::5") && warnings.contains("127.0.0.1")
        };
        running.wait("the warning", |status| is_told(status) == told).await;
        running.end().await;
    }
}

#[tokio::test]
async fn a_first_start_without_annotations_is_not_ready() {
    let stage = Stage::new();
    let mut settings = stage.settings();
    settings.cluster = Some("a.local".parse().unwrap());
    // A file in the directory's place: nothing can be kept, and that stops nothing.
    settings.state_dir = Some(stage.directory.path().join("file"));
    std::fs::write(stage.directory.path().join("file"), "").unwrap();
    let running = stage.start(settings, Annotations::default());
    let end = Instant::now() + Duration::from_millis(300);
    while Instant::now() < end {
        if let Ok((code, text)) = admin::get(running.admin, "/readyz").await {
            assert_eq!(code, 503);
            assert!(text.contains("annotations"), "{text}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    running.set(IMPORTS);
    running.wait_ready().await;
    let status =
        running.wait("the disk's error", |s| s["warnings"].to_string().contains("cannot write ")).await;
    assert_eq!(status["imports"].as_array().unwrap().len(), 2);
    // The disk is mended, and nothing else happens.
    std::fs::remove_file(stage.directory.path().join("file")).unwrap();
    running.wait("the state is written", |s| !s["warnings"].to_string().contains("cannot write ")).await;
    let written = std::fs::read(stage.directory.path().join("file/state.json")).unwrap();
    let written: serde_json::Value = serde_json::from_slice(&written).unwrap();
    assert_eq!(written["saved"]["imports"], IMPORTS, "{written:#}");
    running.end().await;
}

#[tokio::test]
async fn a_port_that_is_taken_is_told_and_tried_again() {
    let stage = Stage::new();
    let mut settings = stage.settings();
    settings.cluster = Some("a.local".parse().unwrap());
    let taken = std::net::TcpListener::bind((Ipv4Addr::new(127, 113, stage.number, 1), 8080)).unwrap();
    let running = stage.start(settings, both());
    running.wait_ready().await;
    let status = running.status().await;
    let port = &status["imports"][0]["ports"][0];
    assert_eq!(port["state"], "failed");
    assert!(
        port["reason"].as_str().unwrap().contains("port 8080 is in use by another program of the pod"),
        "{port}"
    );
    assert_eq!(status["imports"][1]["ports"][0]["state"], "held");
    drop(taken);
    running.wait("it is made after all", |s| s["imports"][0]["ports"][0]["state"] == "held").await;
    running.end().await;
}

#[tokio::test]
async fn what_cannot_be_started_says_which_setting() {
    let stage = Stage::new();
    let taken = std::net::UdpSocket::bind((Ipv4Addr::new(127, 114, stage.number, 2), 0)).unwrap();
    let fails = async |settings: Settings| {
        let running = stage.start(settings, both());
        timeout(LIMIT, running.task).await.unwrap().unwrap().unwrap_err().to_string()
    };
    let error = fails(Settings { dns_addr: Some(taken.local_addr().unwrap()), ..stage.settings() }).await;
    assert!(error.contains("SIDECAR_DNS_ADDR") && error.contains("127.114."), "{error}");
    let range = "127.0.0.1/32".parse().unwrap();
    let error = fails(Settings { range, ..stage.settings() }).await;
    assert!(error.contains("SIDECAR_IP_RANGE"), "{error}");
}

#[tokio::test]
async fn an_admin_port_that_is_taken_keeps_nothing_else_from_being_served() {
    let stage = Stage::new();
    let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let settings = Settings {
        admin: Some(taken.local_addr().unwrap()),
        cluster: Some("a.local".parse().unwrap()),
        ..stage.settings()
    };
    let dns = settings.dns_addr.unwrap();
    let running = stage.start(settings, both());
    // `web`, A, IN.
    let query = b"\x00\x07\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03web\x00\x00\x01\x00\x01";
    let answered = async {
        let client = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        client.connect(dns).await.unwrap();
        let mut answer = [0; 512];
        loop {
            // Refused, or SERVFAIL, until it is served.
            let received = async {
                client.send(query).await?;
                client.recv(&mut answer).await
            };
            if let Ok(Ok(_)) = timeout(Duration::from_millis(100), received).await
                && answer[7] == 1
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LIMIT, answered).await.unwrap();
    assert!(!running.task.is_finished());
    drop(taken);
    running.wait_ready().await;
    running.end().await;
}

#[tokio::test]
async fn a_router_that_hangs_delays_the_end_by_a_second_at_most() {
    let stage = Stage::new();
    let router = stage.router().await;
    let many: String = (0..40)
        .map(|n| {
            let ports: Vec<String> =
                (1..=60).map(|p| format!("{{ name: p{p}, port: {} }}", 20_000 + p)).collect();
            format!("  - {{ name: s{n}, ports: [{}] }}\n", ports.join(", "))
        })
        .collect();
    let exports = Some(format!("services:\n{many}"));
    let running = stage.start(stage.settings(), Annotations { exports, ..Annotations::default() });
    // It welcomes, and reads nothing more: its socket's buffer fills.
    let peer = Peer::accept(&router).await;
    running.wait("it is stuck", |s| s["router"]["connected"] == true).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(running.page("/livez").await.0, 200);
    let took = running.end().await;
    assert!((Duration::from_millis(900)..Duration::from_millis(1800)).contains(&took), "{took:?}");
    drop(peer);
}

#[tokio::test]
async fn a_router_that_hangs_is_told() {
    let stage = Stage::new();
    let router = stage.router().await;
    let running = stage.start(stage.settings(), both());
    let peer = Peer::accept_as(handoff::PINGS, &router).await;
    peer.sockets().await;
    let metric = async |wanted: u8| {
        let (_, metrics) = running.page("/metrics").await;
        assert!(metrics.contains(&format!("servicekeel_sidecar_router_connected {wanted}\n")), "{metrics}");
    };
    running.wait("it is connected", |status| status["router"]["connected"] == true).await;
    // What was said last is taken in before time jumps.
    elapse(PING_AFTER).await;
    assert_eq!(peer.next().await.0, ToRouter::Ping);
    metric(1).await;
    elapse(PONG_WITHIN).await;
    let status = running.wait("it hangs", |status| status["router"]["connected"] == false).await;
    assert!(status["router"]["silent_seconds"].as_u64().unwrap() >= 15, "{status:#}");
    assert!(status["warnings"][0].as_str().unwrap().contains("has not responded for 1"), "{status:#}");
    assert_eq!((&status["router"]["node"], &status["router"]["retrying"]), (&"a-1".into(), &false.into()));
    metric(0).await;
    peer.say(&ToSidecar::Pong).await;
    let status = running.wait("it is back", |status| status["router"]["connected"] == true).await;
    assert_eq!(status["warnings"], serde_json::json!([]));
    metric(1).await;
    running.end().await;
    assert_eq!(peer.next().await.0, ToRouter::Bye);
}

/// Lets so much time go by at once.
async fn elapse(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}
