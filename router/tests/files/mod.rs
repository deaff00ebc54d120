//! A router as it is started, of files: what it says of those that can't be used, and of an address that is taken.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use servicekeel_router::pki::{Authority, Issued};
use servicekeel_runtime::admin;

use crate::stand::{authority, tool, wait_for};

const LIMIT: Duration = Duration::from_secs(15);

/// A router's process.
pub(crate) struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn put(dir: &Path, issued: &Issued) {
    for (name, text) in [("node.key", &issued.key), ("node.crt", &issued.certificate)] {
        servicekeel_runtime::file::replace(&dir.join(name), text.as_bytes()).unwrap();
    }
}

/// A router of files, as it is started.
pub(crate) async fn started(dir: &Path, authority: &Authority, issued: &Issued) -> (Process, SocketAddr) {
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = free.local_addr().unwrap();
    drop(free);
    (started_at(at, dir, authority, issued), at)
}

fn started_at(at: SocketAddr, dir: &Path, authority: &Authority, issued: &Issued) -> Process {
    put(dir, issued);
    std::fs::write(dir.join("ca.crt"), authority.certificate()).unwrap();
    let socket = dir.join("router.sock");
    let config = format!(
        "cluster: a.local\nnode: n\nlisten: {{ sidecars: {}, peers: off, admin: {at} }}\nidentity: {{ ca: ca.crt, cert: node.crt, key: node.key }}\n",
        socket.display()
    );
    std::fs::write(dir.join("router.yaml"), config).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_servicekeel-router"));
    command.arg("--config").arg(dir.join("router.yaml")).stderr(Stdio::null());
    Process(command.spawn().unwrap())
}

async fn refused(at: SocketAddr) -> String {
    let metrics = admin::get(at, "/metrics").await.unwrap().1;
    let value = metrics.lines().find_map(|l| l.strip_prefix("servicekeel_router_config_refused "));
    value.unwrap().to_owned()
}

#[tokio::test]
async fn a_config_that_is_refused_while_its_router_runs_is_a_problem_until_it_is_mended() {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority("a.local");
    let issued = authority.issue(&"n".parse().unwrap(), &[], 1, SystemTime::now()).unwrap();
    let (_process, at) = started(dir.path(), &authority, &issued).await;
    wait_for(LIMIT, async || Some(tool(at).await).filter(|(code, said)| *code == 0 && !said.is_empty()))
        .await;
    assert_eq!(refused(at).await, "0");
    let path = dir.path().join("router.yaml");
    let good = std::fs::read_to_string(&path).unwrap();
    let write = |text: &str| servicekeel_runtime::file::replace(&path, text.as_bytes()).unwrap();

    // Somebody is to be cut off, and is not.
    write(&format!("{good}revoked: [ nonsense ]\n"));
    let said = wait_for(LIMIT, async || Some(tool(at).await).filter(|(code, _)| *code == 1)).await.1;
    let problem = said.lines().find(|line| line.starts_with("PROBLEM: ")).unwrap();
    assert!(problem.starts_with("PROBLEM: the config is refused since 2"), "{problem}");
    assert!(problem.contains("router.yaml:5:") && problem.contains("nonsense"), "{problem}");
    assert!(problem.ends_with(" UTC is in use"), "{problem}");
    assert_eq!(refused(at).await, "1");

    write(&good.replace("peers: off", "peers: \"127.0.0.1:1\""));
    let said = wait_for(LIMIT, async || Some(tool(at).await).filter(|(code, _)| *code == 0)).await.1;
    let note = "note: listen.peers has changed in the config: takes effect at the next start";
    assert!(said.lines().any(|line| line == note), "{said}");
    assert_eq!(refused(at).await, "0");
}

#[tokio::test]
async fn an_admin_port_that_is_taken_keeps_no_router_from_its_node() {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority("a.local");
    let issued = authority.issue(&"n".parse().unwrap(), &[], 1, SystemTime::now()).unwrap();
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = taken.local_addr().unwrap();
    let mut process = started_at(at, dir.path(), &authority, &issued);
    let socket = dir.path().join("router.sock");
    wait_for(LIMIT, async || socket.exists().then_some(())).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(process.0.try_wait().unwrap(), None);
    drop(taken);
    wait_for(LIMIT, async || admin::get(at, "/readyz").await.ok().filter(|(code, _)| *code == 200)).await;
}
