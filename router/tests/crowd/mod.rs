//! A neighbour's cluster whose authority issues names at will: what its routers hold is its own.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use servicekeel_core::flow::frame::{self, Kind, Open, Preface, Purpose, VERSION};
use servicekeel_core::handoff::{Pod, ToRouter, ToSidecar};
use servicekeel_core::mesh::{LinkMessage, NoLink};
use servicekeel_core::name::{Protocol, RouterId};
use servicekeel_router::identity::Identity;
use servicekeel_router::pki::Authority;
use servicekeel_router::tls::{self, BufferPool, Channel};
use servicekeel_runtime::admin;
use servicekeel_runtime::net::os::{OsNet, OsStream};
use servicekeel_runtime::net::{Handoff, Net};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::program::{Files, Program};
use crate::stand::{self, authority, say_hello, stock, wait_for};

/// What a router answers within, whatever others do.
const SOON: Duration = Duration::from_secs(2);
/// Whoever was refused so often asks no more.
const REFUSED: usize = 32;
const LIMIT: Duration = Duration::from_secs(20);

type Connection = Channel<OsStream>;

/// A router of a.local with so many open files, which exports a port, and trusts m.local.
struct Besieged {
    router: Program,
    files: Files,
    own: Authority,
    hostile: Authority,
    _tasks: JoinSet<()>,
    _dir: tempfile::TempDir,
}

fn pod(name: &str) -> Pod {
    Pod { name: name.into(), namespace: "default".parse().unwrap(), uid: name.into() }
}

impl Besieged {
    async fn start(open_files: u32) -> Self {
        servicekeel_runtime::limit::raise_open_files();
        let dir = tempfile::tempdir().unwrap();
        let (own, hostile) = (authority("a.local"), authority("m.local"));
        let files = Files::write(dir.path(), &own, &hostile, None);
        let mut command = Command::new("prlimit");
        command
            .arg(format!("--nofile={open_files}:{open_files}"))
            .arg(env!("CARGO_BIN_EXE_servicekeel-router"));
        command.arg("--config").arg(&files.config).stdout(Stdio::null());
        let router = Program::start(&mut command);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = listener.local_addr().unwrap().port().try_into().unwrap();
        let server = say_hello(&OsNet::new(), &files.socket, pod("server"), Vec::new()).await;
        let export = ToRouter::Export { id: 1, offered: stand::port(80), target, allow: None };
        server.send(&export.encode(), Vec::new()).await.unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(stock(OsNet::new(), server));
        tasks.spawn(async move {
            let mut accepted = Vec::new();
            while let Ok((stream, _)) = listener.accept().await {
                accepted.push(stream);
            }
        });
        let besieged = Self { router, files, own, hostile, _tasks: tasks, _dir: dir };
        wait_for(LIMIT, async || besieged.is_fine().await.ok()).await;
        besieged
    }

    fn identity(&self, authority: &Authority, node: &str) -> Arc<Identity> {
        let mut material = authority.material(&node.parse().unwrap(), &[], SystemTime::now()).unwrap();
        let both = [&self.own, &self.hostile].map(|one| (one.cluster().clone(), one.certificate().into()));
        material.trust = both.into_iter().filter(|(cluster, _)| cluster != authority.cluster()).collect();
        let id = RouterId { cluster: authority.cluster().clone(), node: node.parse().unwrap() };
        Arc::new(Identity::from_pem(id, &material).unwrap())
    }

    /// Connections of m.local by so many names, until it was refused often: those that were taken.
    async fn besiege(&self, names: usize, per_name: usize, purpose: Purpose) -> Vec<Connection> {
        let (pace, mut dials) = (Arc::new(Semaphore::new(8)), JoinSet::new());
        let refused = Arc::new(AtomicUsize::new(0));
        for name in 0..names {
            let identity = self.identity(&self.hostile, &format!("m-{name}"));
            for _ in 0..per_name {
                let (identity, pace, at) = (identity.clone(), pace.clone(), self.files.peers.to_string());
                let refused = refused.clone();
                dials.spawn(async move {
                    let _turn = pace.acquire_owned().await;
                    if refused.load(Relaxed) >= REFUSED {
                        return None;
                    }
                    let opened = timeout(SOON, open(&identity, &at, purpose)).await.ok().and_then(Result::ok);
                    refused.fetch_add(opened.is_none().into(), Relaxed);
                    opened
                });
            }
        }
        dials.join_all().await.into_iter().flatten().collect()
    }

    /// Whether the admin endpoint answers, a sidecar is welcome, and a router of the own cluster is linked and has a flow.
    async fn is_fine(&self) -> Result<(), String> {
        let late = |what: &str| format!("{what}: nothing within {SOON:?}");
        let admin = timeout(SOON, admin::get(self.files.admin, "/livez")).await;
        let (code, _) = admin.map_err(|_| late("/livez"))?.map_err(|e| format!("/livez: {e}"))?;
        if code != 200 {
            return Err(format!("/livez: {code}"));
        }
        let sidecar = async {
            let sidecar = say_hello(&OsNet::new(), &self.files.socket, pod("next"), Vec::new()).await;
            let (said, _) = sidecar.recv().await.ok()??;
            matches!(ToSidecar::decode(&said), Ok(ToSidecar::Welcome { .. })).then_some(())
        };
        timeout(SOON, sidecar).await.map_err(|_| late("a sidecar"))?.ok_or("a sidecar is not welcome")?;
        let (router, at) = (self.identity(&self.own, "o"), self.files.peers.to_string());
        let flow = async {
            let _link = open(&router, &at, Purpose::Link).await?;
            let mut flow = open(&router, &at, Purpose::Flows).await?;
            let wanted = stand::port(80);
            assert_eq!(wanted.protocol, Protocol::Tcp);
            let open = Open { flow: 1, wanted, namespace: None, consumer: None };
            flow.send_message(Kind::Open, 0, &open).map_err(|e| e.to_string())?;
            flow.flush().await.map_err(|e| e.to_string())?;
            match flow.recv().await {
                Ok(Some((header, _))) if header.kind == Kind::Opened => Ok(()),
                other => {
                    Err(format!("a flow: {:?}", other.map(|frame| frame.map(|(header, _)| header.kind))))
                }
            }
        };
        timeout(SOON, flow).await.map_err(|_| late("the own cluster"))?
    }
}

/// A connection on which both have said who they are.
async fn open(identity: &Identity, at: &str, purpose: Purpose) -> Result<Connection, String> {
    let stream = OsNet::new().connect(at).await.map_err(|e| e.to_string())?;
    let connected = tls::connect(stream, identity.client(), BufferPool::new()).await;
    let (mut channel, _) = connected.map_err(|e| e.to_string())?;
    let preface = Preface { version: VERSION, purpose, sender: identity.id().clone(), boot: 7 };
    channel.send_message(Kind::Preface, 0, &preface).map_err(|e| e.to_string())?;
    channel.flush().await.map_err(|e| e.to_string())?;
    match channel.recv().await {
        Ok(Some((header, _))) if header.kind == Kind::Preface => Ok(channel),
        other => Err(format!("{:?}", other.map(|frame| frame.map(|(header, _)| header.kind)))),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_carry_nothing_are_their_clusters_own() {
    for purpose in [Purpose::Flows, Purpose::FlowsBack, Purpose::Datagrams, Purpose::Link] {
        let besieged = Besieged::start(512).await;
        let held = besieged.besiege(2, 400, purpose).await;
        for _ in 0..3 {
            let fine = besieged.is_fine().await;
            assert!(fine.is_ok(), "{purpose:?}, beside {}: {fine:?}: {}", held.len(), besieged.router.log());
        }
        if purpose == Purpose::Datagrams {
            let (one_more, at) =
                (besieged.identity(&besieged.hostile, "m-0"), besieged.files.peers.to_string());
            let mut link = open(&one_more, &at, Purpose::Link).await.unwrap();
            let (_, word) = timeout(SOON, link.recv()).await.unwrap().unwrap().expect("it is told why");
            let word = frame::decode_payload(word);
            assert_eq!(word, Ok(LinkMessage::Rejected(NoLink::TooManyConnections)), "beside {}", held.len());
        }
    }
}
