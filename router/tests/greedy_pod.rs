//! A pod that asks too much of the router, of memory or of time: it is refused or waits, and nobody else pays.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use servicekeel_core::handoff::{MAX_RULES, MAX_SOCKETS, Pod, ToRouter, ToSidecar};
use servicekeel_core::name::{AllowRule, Protocol, ServiceName, ServicePort};
use servicekeel_router::pki::Authority;
use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::net::{Handoff, Net};
use tokio::runtime::{Builder, Runtime};

/// One at a time: they measure.
static ALONE: Mutex<()> = Mutex::new(());
/// The kernel's unit of /proc/PID/stat (USER_HZ).
const TICK: Duration = Duration::from_millis(10);

type Conversation = <OsNet as Net>::Handoff;

/// A router that is killed with the test.
struct Router {
    process: Child,
    socket: PathBuf,
    peers: SocketAddr,
    admin: SocketAddr,
}

impl Drop for Router {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Router {
    /// A router of `own`'s cluster, which trusts the other's and dials `peer`.
    fn start(dir: &Path, own: &Authority, other: &Authority, peer: Option<SocketAddr>) -> Self {
        let dir = dir.join(own.cluster().as_str());
        std::fs::create_dir(&dir).unwrap();
        let issued = own.issue(&"n".parse().unwrap(), &[], 1, SystemTime::now()).unwrap();
        let put = |file: &str, text: &str| std::fs::write(dir.join(file), text).unwrap();
        put("ca.crt", own.certificate());
        put("other.crt", other.certificate());
        put("node.crt", &issued.certificate);
        put("node.key", &issued.key);
        let socket = dir.join("router.sock");
        let free = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [peers, admin] = free.map(|listener| listener.local_addr().unwrap());
        let dials = peer.map(|at| format!("peers: [ {{ address: \"{at}\" }} ]\n")).unwrap_or_default();
        put(
            "router.yaml",
            &format!(
                "cluster: {}\nnode: n\nlisten: {{ sidecars: {}, peers: \"{peers}\", admin: \"{admin}\" }}\n\
                 identity: {{ ca: ca.crt, cert: node.crt, key: node.key }}\n\
                 trust: [ {{ cluster: {}, ca: other.crt }} ]\n{dials}",
                own.cluster(),
                socket.display(),
                other.cluster()
            ),
        );
        let process = Command::new(env!("CARGO_BIN_EXE_servicekeel-router"))
            .arg("--config")
            .arg(dir.join("router.yaml"))
            .env("TOKIO_WORKER_THREADS", "2")
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { process, socket, peers, admin }
    }

    fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.process.id())).unwrap()
    }

    /// The time that it had of all processors.
    fn cpu(&self) -> Duration {
        let stat = self.proc("stat");
        let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        // User and system: fields 14 and 15, of which the first two are before the name's end (proc_pid_stat(5)).
        TICK * (fields[11].parse::<u32>().unwrap() + fields[12].parse::<u32>().unwrap())
    }

    /// The memory that it has, in KiB.
    fn rss(&self) -> u64 {
        let status = self.proc("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    async fn is_linked(&self) -> bool {
        let metrics = servicekeel_runtime::admin::get(self.admin, "/metrics").await;
        metrics.is_ok_and(|(_, text)| text.contains("servicekeel_router_links_active 1\n"))
    }

    async fn greet(&self, pod: &str) -> Conversation {
        let net = OsNet::new();
        let end = Instant::now() + Duration::from_secs(10);
        let conversation = loop {
            match net.handoff_connect(&self.socket).await {
                Ok(conversation) => break conversation,
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let pod = Pod { name: pod.into(), namespace: "default".parse().unwrap(), uid: pod.into() };
        let hello = ToRouter::Hello { version: 1, pod, addresses: Vec::new() };
        conversation.send(&hello.encode(), Vec::new()).await.unwrap();
        conversation
    }
}

fn export(id: u64, cluster: &str, rules: Option<usize>) -> Vec<u8> {
    let service = ServiceName {
        name: "web".parse().unwrap(),
        namespace: "default".parse().unwrap(),
        cluster: cluster.parse().unwrap(),
    };
    let port = u16::try_from(id % 65_536).unwrap().try_into().unwrap();
    let offered = ServicePort { service, port, protocol: Protocol::Tcp };
    let rule = AllowRule { cluster: "b".parse().unwrap(), namespace: None };
    ToRouter::Export { id, offered, target: port, allow: rules.map(|rules| vec![rule; rules]) }.encode()
}

/// The next refusal.
async fn refusal(conversation: &Conversation) -> (Option<u64>, String) {
    let waiting = async {
        loop {
            let (bytes, _) = conversation.recv().await.unwrap().expect("it closes without a reason");
            if let Ok(ToSidecar::Refused { id, reason }) = ToSidecar::decode(&bytes) {
                return (id, reason);
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("there is no refusal")
}

/// All that was said before is handled.
async fn handled(conversation: &Conversation) {
    handled_at(conversation, 60_000).await;
}

/// The same, by an id that may be in use: its export is offered no more.
async fn handled_at(conversation: &Conversation, id: u64) {
    conversation.send(&export(id, "elsewhere.local", None), Vec::new()).await.unwrap();
    while refusal(conversation).await.0 != Some(id) {}
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

struct Pair {
    a: Router,
    b: Router,
    _dir: tempfile::TempDir,
}

fn pair() -> Pair {
    let dir = tempfile::tempdir().unwrap();
    let [of_a, of_b] = ["a.local", "b.local"]
        .map(|cluster| Authority::generate(&cluster.parse().unwrap(), 2, SystemTime::now()).unwrap());
    let a = Router::start(dir.path(), &of_a, &of_b, None);
    let b = Router::start(dir.path(), &of_b, &of_a, Some(a.peers));
    Pair { a, b, _dir: dir }
}

#[test]
fn the_memory_of_allow_rules_is_its_pods_own() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let pair = pair();
    let a = &pair.a;
    runtime().block_on(async {
        let many = a.greet("many").await;
        many.send(&export(1, "a.local", Some(5_000)), Vec::new()).await.unwrap();
        let (id, reason) = refusal(&many).await;
        assert!(id.is_none() && reason.contains("more than 1024 rules"), "{id:?}: {reason}");

        let before = a.rss();
        let (greedy, next) = (a.greet("greedy").await, a.greet("next").await);
        let sending = async {
            for id in 1..=1000 {
                greedy.send(&export(id, "a.local", Some(MAX_RULES)), Vec::new()).await.unwrap();
            }
        };
        let reading = async {
            let mut refused = Vec::new();
            while refused.last().is_none_or(|(id, _)| *id != Some(1000)) {
                refused.push(refusal(&greedy).await);
            }
            refused
        };
        let ((), refused) = tokio::join!(sending, reading);
        assert!(refused.len() > 700, "{}", refused.len());
        assert!(refused.iter().all(|(id, reason)| id.is_some() && reason.contains("16 MiB")), "{refused:?}");
        let grown = a.rss().saturating_sub(before);
        assert!(grown < 40 << 10, "{grown} KiB");
        // Others have theirs.
        next.send(&export(1, "a.local", Some(MAX_RULES)), Vec::new()).await.unwrap();
        next.send(&export(2, "elsewhere.local", None), Vec::new()).await.unwrap();
        assert_eq!(refusal(&next).await.0, Some(2));
        // And what was taken back may be had again.
        for id in 1..=1000 {
            greedy.send(&ToRouter::Unexport { id }.encode(), Vec::new()).await.unwrap();
        }
        greedy.send(&export(1, "a.local", Some(MAX_RULES)), Vec::new()).await.unwrap();
        handled(&greedy).await;
    });
}

#[test]
fn an_export_that_flips_in_a_loop_costs_next_to_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let pair = pair();
    let (a, b) = (&pair.a, &pair.b);
    runtime().block_on(async {
        let pod = a.greet("flipping").await;
        let start = Instant::now();
        for id in 1..=MAX_SOCKETS as u64 - 1 {
            pod.send(&export(id, "a.local", None), Vec::new()).await.unwrap();
        }
        handled(&pod).await;
        let took = start.elapsed();
        while !b.is_linked().await {
            assert!(start.elapsed() < Duration::from_secs(20), "no link");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(took < Duration::from_secs(5), "a start is slowed: {took:?}");

        let mut flipping = tokio::task::JoinSet::new();
        flipping.spawn(async move {
            let (on, off) = (export(1, "a.local", None), ToRouter::Unexport { id: 1 }.encode());
            let mut flips = 0_u64;
            let end = Instant::now() + Duration::from_secs(8);
            while Instant::now() < end {
                for message in [&off, &on] {
                    let sent = pod.send(message, Vec::new());
                    let _ = tokio::time::timeout(Duration::from_secs(1), sent).await;
                    flips += 1;
                }
            }
            flips
        });
        // What a start may need is used up.
        tokio::task::spawn_blocking(|| thread::sleep(Duration::from_secs(3))).await.unwrap();
        let (began, before) = (Instant::now(), [a.cpu(), b.cpu()]);
        tokio::task::spawn_blocking(|| thread::sleep(Duration::from_secs(4))).await.unwrap();
        let took = began.elapsed();
        let share = |now: Duration, before: Duration| (now - before).as_secs_f64() / took.as_secs_f64();
        let shares = [share(a.cpu(), before[0]), share(b.cpu(), before[1])];
        let flips = flipping.join_next().await.unwrap().unwrap();
        assert!(shares[0] < 0.15 && shares[1] < 0.05, "of a core: {shares:?}, {flips} messages");
    });
}

#[test]
fn pods_with_all_the_exports_that_they_may_have_leave_the_link_up() {
    const PODS: u64 = 5;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let pair = pair();
    let (a, b) = (&pair.a, &pair.b);
    runtime().block_on(async {
        let start = Instant::now();
        while !b.is_linked().await {
            assert!(start.elapsed() < Duration::from_secs(20), "no link");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let linked = Instant::now();
        let mut pods = tokio::task::JoinSet::new();
        for pod in 0..PODS {
            let conversation = a.greet(&format!("greedy-{pod}")).await;
            pods.spawn(async move {
                let first = 1 + pod * MAX_SOCKETS as u64;
                for id in first..first + MAX_SOCKETS as u64 {
                    conversation.send(&export(id, "a.local", None), Vec::new()).await.unwrap();
                }
                handled_at(&conversation, first).await;
                conversation
            });
        }
        let _conversations = pods.join_all().await;
        // As long as a link that is not heard has, twice over.
        tokio::task::spawn_blocking(|| thread::sleep(Duration::from_secs(8))).await.unwrap();
        let passed = linked.elapsed().as_secs();
        for router in [a, b] {
            let (_, status) = servicekeel_runtime::admin::get(router.admin, "/status").await.unwrap();
            let status: serde_json::Value = serde_json::from_str(&status).unwrap();
            let links = status["peers"][0]["links"].as_array().unwrap();
            let [link] = &links[..] else { panic!("not one link: {links:?}") };
            assert!(link["seconds"].as_u64().unwrap() + 1 >= passed, "a new one within {passed} s: {link}");
        }
    });
}
