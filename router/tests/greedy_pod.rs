//! A pod that asks too much of the router, of memory or of time: it is refused or waits, and nobody else pays.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

mod program;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use program::{Files, Program};
use servicekeel_core::handoff::{MAX_RULES, MAX_SOCKETS, Pod, ToRouter, ToSidecar};
use servicekeel_core::name::{AllowRule, Protocol, ServiceName, ServicePort};
use servicekeel_router::pki::Authority;
use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::net::{Handoff, Net};
use tokio::runtime::{Builder, Runtime};

/// One at a time: they measure.
static ALONE: Mutex<()> = Mutex::new(());
/// Messages of the pod that flips.
static FLIPS: AtomicU64 = AtomicU64::new(0);
/// The kernel's unit of /proc/PID/stat (USER_HZ).
const TICK: Duration = Duration::from_millis(10);

type Conversation = <OsNet as Net>::Handoff;

/// A router that is killed with the test.
struct Router {
    process: Program,
    socket: PathBuf,
    peers: SocketAddr,
    admin: SocketAddr,
}

impl Router {
    fn start(dir: &Path, own: &Authority, other: &Authority, peer: Option<SocketAddr>) -> Self {
        let Files { config, socket, peers, admin } = Files::write(dir, own, other, peer);
        let mut command = Command::new(env!("CARGO_BIN_EXE_servicekeel-router"));
        command.arg("--config").arg(config).env("TOKIO_WORKER_THREADS", "2");
        let process = Program::start(&mut command);
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

    async fn status(&self) -> serde_json::Value {
        let (_, status) = servicekeel_runtime::admin::get(self.admin, "/status").await.unwrap();
        serde_json::from_str(&status).unwrap()
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
            loop {
                for message in [&off, &on] {
                    let sent = pod.send(message, Vec::new());
                    let _ = tokio::time::timeout(Duration::from_secs(1), sent).await;
                    FLIPS.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        // What a start may need is used up by the third second.
        let end = Instant::now() + Duration::from_secs(12);
        loop {
            let (began, before, flips) = (Instant::now(), [a.cpu(), b.cpu()], FLIPS.load(Ordering::Relaxed));
            tokio::time::sleep(Duration::from_secs(2)).await;
            let took = began.elapsed();
            let share = |now: Duration, before: Duration| (now - before).as_secs_f64() / took.as_secs_f64();
            let shares = [share(a.cpu(), before[0]), share(b.cpu(), before[1])];
            let flips = FLIPS.load(Ordering::Relaxed) - flips;
            assert!(flips > 0, "it flips no more");
            if shares[0] < 0.15 && shares[1] < 0.05 {
                break;
            }
            assert!(Instant::now() < end, "of a core: {shares:?}, for {flips} messages in {took:?}");
        }
    });
}

/// How many offers of other routers a router knows: those that it lists, and those of which it says that it does not.
fn known(status: &serde_json::Value) -> usize {
    let notes = status["notes"].as_array().unwrap().iter().filter_map(|note| note.as_str());
    let unlisted =
        |note: &str| note.split_once(" offers of other routers are not listed")?.0.parse::<usize>().ok();
    status["offers"].as_array().unwrap().len() + notes.filter_map(unlisted).sum::<usize>()
}

#[test]
fn pods_with_all_the_exports_that_they_may_have_leave_the_link_up() {
    const PODS: usize = 5;
    /// What conversations of one network namespace may export together.
    const MAY: usize = 4160;
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
                let first = (1 + pod * MAX_SOCKETS) as u64;
                let asks = async {
                    for id in first..first + MAX_SOCKETS as u64 {
                        conversation.send(&export(id, "a.local", None), Vec::new()).await.unwrap();
                    }
                    conversation.send(&export(first, "elsewhere.local", None), Vec::new()).await.unwrap();
                };
                let answers = async {
                    let mut rejected = 0;
                    while !refusal(&conversation).await.1.contains("elsewhere.local") {
                        rejected += 1;
                    }
                    rejected
                };
                let ((), rejected) = tokio::join!(asks, answers);
                (conversation, rejected)
            });
        }
        let (_conversations, rejected): (Vec<_>, Vec<usize>) = pods.join_all().await.into_iter().unzip();
        let most = PODS * MAX_SOCKETS - MAY;
        assert!((most - PODS..=most).contains(&rejected.iter().sum()), "{rejected:?}");
        // The one of each that it took back may have been among those that were accepted.
        let all = MAY - PODS..=MAY;
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let known = known(&b.status().await);
            if all.contains(&known) {
                break;
            }
            assert!(Instant::now() < end, "{known} of {all:?} are known at the other router");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let passed = linked.elapsed().as_secs();
        for router in [a, b] {
            let status = router.status().await;
            let links = status["peers"][0]["links"].as_array().unwrap();
            let [link] = &links[..] else { panic!("not one link: {links:?}") };
            assert!(link["seconds"].as_u64().unwrap() + 1 >= passed, "a new one within {passed} s: {link}");
        }
    });
}
