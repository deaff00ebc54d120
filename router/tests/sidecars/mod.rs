//! What a router tells a sidecar, and of one that is gone.

use std::time::{Duration, SystemTime};

use servicekeel_core::handoff::{DescriptorKind, PINGS, Pod, ToRouter, ToSidecar};
use servicekeel_runtime::admin;
use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::net::{Handoff, Net};
use tokio::time::timeout;

use crate::files::started;
use crate::stand::{Conversation, Stand, authority, port, say_hello, tool, wait_for};

const LIMIT: Duration = Duration::from_secs(10);

fn pod(name: &str) -> Pod {
    Pod { name: name.into(), namespace: "default".parse().unwrap(), uid: name.into() }
}

/// The next word of the router that is no question for sockets.
async fn heard(conversation: &Conversation) -> ToSidecar {
    loop {
        let (bytes, _) = timeout(LIMIT, conversation.recv()).await.unwrap().unwrap().expect("no end");
        match ToSidecar::decode(&bytes).unwrap() {
            ToSidecar::More { .. } => {}
            word => return word,
        }
    }
}

#[tokio::test]
async fn whoever_asks_whether_it_lives_is_answered() {
    let stand = Stand::apart().await;
    let sidecar = say_hello(&OsNet::new(), stand.a.sidecars(), pod("asks"), Vec::new()).await;
    let welcome = heard(&sidecar).await;
    assert!(matches!(welcome, ToSidecar::Welcome { version: PINGS.., .. }), "{welcome:?}");
    for _ in 0..2 {
        sidecar.send(&ToRouter::Ping.encode(), Vec::new()).await.unwrap();
        assert_eq!(heard(&sidecar).await, ToSidecar::Pong);
    }
}

#[tokio::test]
async fn a_sidecar_that_is_killed_is_told_counted_and_what_it_means() {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority("a.local");
    let issued = authority.issue(&"n".parse().unwrap(), &[], 1, SystemTime::now()).unwrap();
    let (router, at) = started(dir.path(), &authority, &issued).await;
    let net = OsNet::new();
    let come = async |name: &str| {
        let sidecar = say_hello(&net, &dir.path().join("router.sock"), pod(name), Vec::new()).await;
        let listener = net.make_bound(DescriptorKind::TcpListener, "127.0.0.1:0".parse().unwrap());
        let import = ToRouter::Import { id: 1, wanted: port(80) };
        sidecar.send(&import.encode(), vec![listener.await.unwrap()]).await.unwrap();
        for (id, number) in [(2, 81), (3, 82)] {
            let target = number.try_into().unwrap();
            let export = ToRouter::Export { id, offered: port(number), target, allow: None };
            sidecar.send(&export.encode(), Vec::new()).await.unwrap();
        }
        // Answered behind them.
        sidecar.send(&ToRouter::Ping.encode(), Vec::new()).await.unwrap();
        while heard(&sidecar).await != ToSidecar::Pong {}
        sidecar
    };
    let said = async |what: &str, pod: &str| {
        wait_for(Duration::from_secs(40), async || {
            let log = router.log();
            let mut lines = log.lines().filter(|line| line.contains(what));
            lines.find(|line| line.contains(&format!("pod=default/{pod} "))).map(str::to_owned)
        })
        .await
    };
    // One is killed, one comes back, one was told to end.
    drop(come("killed").await);
    drop(come("back").await);
    let _back = come("back").await;
    let ended = come("ended").await;
    ended.send(&ToRouter::Bye.encode(), Vec::new()).await.unwrap();
    drop(ended);
    let line = said("sidecar disconnected unexpectedly; ", "killed").await;
    for part in [" WARN ", "imports=1", "exports=2", "served for another 30 s"] {
        assert!(line.contains(part), "{part} in {line}");
    }
    let lost = async || {
        let metrics = admin::get(at, "/metrics").await.unwrap().1;
        let value = metrics.lines().find_map(|l| l.strip_prefix("servicekeel_router_sidecars_lost_total "));
        value.unwrap().to_owned()
    };
    assert_eq!(lost().await, "0");
    let line = said("sidecar did not reconnect within 30 s; ", "killed").await;
    for part in [" WARN ", "imports=1", "exports=2", "are refused", "withdrawn"] {
        assert!(line.contains(part), "{part} in {line}");
    }
    assert_eq!(lost().await, "1");
    // The others' time is over, too.
    wait_for(LIMIT, async || {
        let status = admin::get(at, "/status").await.unwrap().1;
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        (status["sidecars"].as_array().unwrap().len() == 1).then_some(())
    })
    .await;
    assert_eq!(lost().await, "1");
    assert_eq!(router.log().matches("did not reconnect").count(), 1, "{}", router.log());
}

#[tokio::test]
async fn a_rule_that_names_a_cluster_nobody_has_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority("a.local");
    let issued = authority.issue(&"n".parse().unwrap(), &[], 1, SystemTime::now()).unwrap();
    let (router, at) = started(dir.path(), &authority, &issued).await;
    let sidecar = say_hello(&OsNet::new(), &dir.path().join("router.sock"), pod("server"), Vec::new()).await;
    let export = async |id, rules: &[&str]| {
        let allow = Some(rules.iter().map(|rule| rule.parse().unwrap()).collect());
        let export = ToRouter::Export { id, offered: port(80), target: 80.try_into().unwrap(), allow };
        sidecar.send(&export.encode(), Vec::new()).await.unwrap();
        sidecar.send(&ToRouter::Ping.encode(), Vec::new()).await.unwrap();
        while heard(&sidecar).await != ToSidecar::Pong {}
    };
    export(1, &["a.local"]).await;
    assert!(!router.log().contains("`allow`") && !tool(at).await.1.contains("note: "), "{}", router.log());
    export(1, &["a.local", "a"]).await;
    let reason =
        "a is not a cluster that the router's `trust` has, so nobody of it gets in; did you mean a.local?";
    let log = router.log();
    let line = log.lines().find(|line| line.contains(reason)).unwrap_or_else(|| panic!("not in {log}"));
    assert!(line.contains(" WARN ") && line.contains("service=web.default.a.local:80/TCP"), "{line}");
    let (code, said) = tool(at).await;
    let note = format!("note: `allow` of the export web.default.a.local:80/TCP: {reason}");
    assert!(code == 0 && said.lines().any(|line| line == note), "{said}");
}
