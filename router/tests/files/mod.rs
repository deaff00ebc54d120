//! A router as it is started, of files: what it says of those that can't be used, and of an address that is taken.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use servicekeel_core::handoff::{Pod, ToSidecar};
use servicekeel_router::pki::{Authority, Issued};
use servicekeel_runtime::admin;
use servicekeel_runtime::net::Handoff;
use servicekeel_runtime::net::os::OsNet;
use tokio::time::timeout;

use crate::program::Program;
use crate::stand::{authority, say_hello, tool, wait_for};

const LIMIT: Duration = Duration::from_secs(15);

pub(crate) fn put(dir: &Path, issued: &Issued) {
    for (name, text) in [("node.key", &issued.key), ("node.crt", &issued.certificate)] {
        servicekeel_runtime::file::replace(&dir.join(name), text.as_bytes()).unwrap();
    }
}

/// A router of files, as it is started.
pub(crate) async fn started(dir: &Path, authority: &Authority, issued: &Issued) -> (Program, SocketAddr) {
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = free.local_addr().unwrap();
    drop(free);
    (started_at(at, dir, authority, issued), at)
}

fn started_at(at: SocketAddr, dir: &Path, authority: &Authority, issued: &Issued) -> Program {
    put(dir, issued);
    std::fs::write(dir.join("ca.crt"), authority.certificate()).unwrap();
    let socket = dir.join("router.sock");
    let config = format!(
        "cluster: a.local\nnode: n\nlisten: {{ sidecars: {}, peers: off, admin: {at} }}\nidentity: {{ ca: ca.crt, cert: node.crt, key: node.key }}\n",
        socket.display()
    );
    std::fs::write(dir.join("router.yaml"), config).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_servicekeel-router"));
    command.arg("--config").arg(dir.join("router.yaml"));
    Program::start(&mut command)
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
    assert!(problem.starts_with("PROBLEM: config rejected since 2"), "{problem}");
    assert!(problem.contains("router.yaml:5:") && problem.contains("nonsense"), "{problem}");
    assert!(problem.ends_with(" UTC is in use"), "{problem}");
    assert_eq!(refused(at).await, "1");

    write(&good.replace("peers: off", "peers: \"127.0.0.1:1\""));
    let said = wait_for(LIMIT, async || Some(tool(at).await).filter(|(code, _)| *code == 0)).await.1;
    let note = "note: listen.peers changed in the config: takes effect after a restart";
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
    let pod = Pod { name: "p".into(), namespace: "default".parse().unwrap(), uid: String::new() };
    let (net, socket) = (OsNet::new(), dir.path().join("router.sock"));
    let sidecar = timeout(LIMIT, say_hello(&net, &socket, pod, Vec::new()));
    let sidecar = sidecar.await.expect("a router");
    let (welcome, _) = timeout(LIMIT, sidecar.recv()).await.unwrap().unwrap().expect("no end");
    assert!(matches!(ToSidecar::decode(&welcome), Ok(ToSidecar::Welcome { .. })));
    assert_eq!(process.try_wait().unwrap(), None);
    drop(taken);
    wait_for(LIMIT, async || admin::get(at, "/readyz").await.ok().filter(|(code, _)| *code == 200)).await;
}

#[tokio::test]
async fn a_config_that_is_broken_does_not_keep_its_router_from_being_asked() {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority("a.local");
    let issued = authority.issue(&"n".parse().unwrap(), &[], 1, SystemTime::now()).unwrap();
    let (_process, at) = started(dir.path(), &authority, &issued).await;
    wait_for(LIMIT, async || Some(tool(at).await).filter(|(code, _)| *code == 0)).await;
    let path = dir.path().join("router.yaml");
    let good = std::fs::read_to_string(&path).unwrap();
    let ask = async |path: &Path| {
        let mut tool = Command::new(env!("CARGO_BIN_EXE_servicekeel-router"));
        tool.args(["status", "--config"]).arg(path);
        let output = tokio::task::spawn_blocking(move || tool.output().unwrap()).await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    assert_eq!(ask(&path).await.0, Some(0));
    let broken = dir.path().join("broken.yaml");
    for (wrong, why) in [
        (good.replace("node: n", "node: [n]"), "broken.yaml:2:"),
        (good.replace("listen: {", "listen: { peer: off,"), "broken.yaml:3:"),
        (format!("{good}peers: [\n"), "not YAML"),
    ] {
        std::fs::write(&broken, wrong).unwrap();
        let (code, said, errors) = ask(&broken).await;
        assert!(errors.contains(why), "{why} in {errors}");
        assert!(
            errors.ends_with(&format!("The config is invalid; asking {at} for the router that runs:\n")),
            "{errors}"
        );
        assert!(said.starts_with("router a.local/n\n"), "{said}");
        assert_eq!(code, Some(1), "what is invalid is a problem");
    }
    // Nor is it said of another router that it is this one.
    std::fs::write(&broken, good.replace(&at.to_string(), "[x]")).unwrap();
    let (_, _, errors) = ask(&broken).await;
    assert!(
        errors.contains("asking 127.0.0.1:7480, the default, since its listen.admin cannot be read"),
        "{errors}"
    );
    // Where there is none to ask, both are told.
    std::fs::write(&broken, good.replace("node: n", "node: [n]").replace(&at.to_string(), "127.0.0.1:1"))
        .unwrap();
    let (code, said, errors) = ask(&broken).await;
    assert_eq!((code, said.as_str()), (Some(1), ""));
    assert!(
        errors.contains("broken.yaml:2:") && errors.contains("no router responded at 127.0.0.1:1"),
        "{errors}"
    );
    let (_, _, errors) = ask(&dir.path().join("nowhere.yaml")).await;
    assert!(errors.contains("cannot be read") && errors.contains("use --admin"), "{errors}");
}
