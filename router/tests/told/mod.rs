//! Why there is no link: what either router's tools say of it.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use servicekeel_router::tls::{self, BufferPool};
use servicekeel_runtime::net::Net;
use servicekeel_runtime::net::os::OsNet;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::stand::{Router, Stand, wait_for};

const LIMIT: Duration = Duration::from_secs(25);

/// Waits until the router's peer is down for this reason, and says what its tool says.
async fn down(router: &Router, reason: &str) -> (i32, String) {
    wait_for(LIMIT, async || {
        let peer = router.status().await["peers"][0].clone();
        let told = peer["reason"].as_str().is_some_and(|told| told.contains(reason));
        (peer["state"] == "down" && told).then_some(())
    })
    .await;
    let (code, said) = router.tool().await;
    let row = said.lines().find(|line| line.contains(" down ")).unwrap();
    assert!(row.contains("none: ") && row.contains(reason), "{said}");
    (code, said)
}

/// Waits until the router's tool says that the address of its config is not reached, for this reason.
async fn unreached(router: &Router, reason: &str) {
    let problem = format!("PROBLEM: the peer {} of the config is not reached: ", router.settings.peers[0]);
    wait_for(LIMIT, async || {
        let (code, said) = router.tool().await;
        let line = said.lines().find(|line| line.starts_with(&problem))?;
        (code == 1 && line.contains(reason)).then_some(())
    })
    .await;
}

async fn well(stand: &Stand) {
    stand.wait_until_it_works().await;
    for router in [&stand.a, &stand.b] {
        wait_for(LIMIT, async || (router.tool().await.0 == 0).then_some(())).await;
        let peer = router.status().await["peers"][0].clone();
        assert!(peer["state"] == "up" && peer["reason"].is_null(), "{peer}");
    }
}

#[tokio::test]
async fn who_is_revoked_or_not_trusted_is_told_why_at_both_ends() {
    let mut stand = Stand::new().await;
    well(&stand).await;
    stand.a.settings.revoked = vec!["b.local/n".into()];
    stand.a.apply();
    let (code, said) = down(&stand.a, "b.local/n is revoked: `revoked` has its name").await;
    assert_eq!(code, 0, "whoever revoked it wants it so: {said}");
    let alert = "TLS alert CertificateRevoked: its `revoked` has this router";
    unreached(&stand.b, alert).await;
    // So do the rows of the peer and of what is imported from it, whatever the link's own end was.
    let (_, said) = down(&stand.b, alert).await;
    let row = said.lines().find(|line| line.starts_with("web.default.a.local:80/TCP")).unwrap();
    assert!(row.contains("no router of a.local is linked: n is down (") && row.contains(alert), "{said}");
    stand.a.settings.revoked.clear();
    stand.a.apply();
    well(&stand).await;

    let trusted = std::mem::take(&mut stand.a.settings.trust);
    stand.a.apply();
    down(&stand.a, "b.local/n is of a cluster that is not trusted").await;
    unreached(&stand.b, "TLS alert UnknownCA: its `trust` has no authority").await;
    down(&stand.b, "TLS alert UnknownCA: its `trust` has no authority").await;
    stand.a.settings.trust = trusted;
    stand.a.apply();
    well(&stand).await;

    // Whoever is dialled by a router that does not trust it can't know which one it is.
    stand.b.settings.trust.clear();
    stand.b.apply();
    wait_for(LIMIT, async || {
        let (_, said) = stand.a.tool().await;
        let told = |line: &&str| line.starts_with("note: a connection from 127.0.0.1 failed ");
        said.lines().find(told).filter(|line| line.contains("TLS alert UnknownCA")).map(drop)
    })
    .await;
}

#[tokio::test]
async fn an_exporter_whose_certificate_has_expired_says_so_to_whoever_dials_it() {
    let mut stand = Stand::new().await;
    stand.a.issue_for(Duration::from_secs(3));
    stand.a.apply();
    wait_for(LIMIT, async || (stand.a.metric("certificate_expires_seconds").await < 0.0).then_some(())).await;
    // Dialled anew.
    let address = stand.b.settings.peers.remove(0);
    stand.b.apply();
    wait_for(LIMIT, async || (stand.b.status().await["peers"][0]["state"] == "down").then_some(())).await;
    stand.b.settings.peers.push(address);
    stand.b.apply();
    unreached(&stand.b, "the certificate of a.local/n expired on ").await;
    down(&stand.b, "the certificate of a.local/n expired on ").await;
    stand.a.issue();
    stand.a.apply();
    well(&stand).await;
}

#[tokio::test]
async fn one_whose_certificate_expired_is_told_while_it_is_refused() {
    let mut stand = Stand::new().await;
    stand.b.issue_for(Duration::from_secs(3));
    stand.b.apply();
    // One that does not know when it ends, such as by a clock that is behind.
    let careless = stand.b.identity();
    stand.connect_often().await;
    wait_for(LIMIT, async || (stand.b.metric("certificate_expires_seconds").await < 0.0).then_some(())).await;
    stand.a.settings.revoked = vec!["b.local/n".into()];
    stand.a.apply();
    down(&stand.a, "is revoked").await;
    stand.a.settings.revoked.clear();
    stand.a.apply();
    wait_for(LIMIT, async || {
        let stream = OsNet::new().connect(&stand.a.peers.to_string()).await.unwrap();
        let shown = tls::connect(stream, careless.client(), BufferPool::new()).await;
        assert!(shown.is_err() || shown.unwrap().0.recv().await.is_err());
        let (code, said) = stand.a.tool().await;
        (code == 1 && said.contains("PROBLEM: the certificate of b.local/n expired on ")).then_some(())
    })
    .await;
    down(&stand.a, "the certificate of b.local/n expired on ").await;
}

#[tokio::test]
async fn a_peer_whose_address_is_wrong_has_its_state_and_reason() {
    // Nobody listens there.
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let wrong = free.local_addr().unwrap().to_string();
    drop(free);
    let mut stand = Stand::apart().await;
    stand.b.settings.peers = vec![wrong.clone()];
    stand.b.apply();
    wait_for(LIMIT, async || {
        let said = stand.b.tool().await.1;
        let why = format!(
            "no router of a.local has ever been linked; the peer {wrong} of the config is not reached: "
        );
        said.lines().any(|line| line.contains(&why) && line.contains("refused")).then_some(())
    })
    .await;
    // The right one, and then the wrong one again.
    stand.b.settings.peers = vec![stand.a.peers.to_string()];
    stand.b.apply();
    stand.wait_until_it_works().await;
    stand.b.settings.peers = vec![wrong];
    stand.b.apply();
    down(&stand.b, "this router closed the link when its address was removed from the config's `peers`")
        .await;
}

/// Waits until the router's tool says this of new connections, while its link is up.
async fn rejects(router: &Router, reason: &str) {
    wait_for(LIMIT, async || {
        let (code, said) = router.tool().await;
        let line = said.lines().find(|line| line.starts_with("PROBLEM: new connections with "))?;
        (code == 1 && line.contains(reason)).then_some(())
    })
    .await;
    let peer = router.status().await["peers"][0].clone();
    assert!(peer["state"] == "rejected" && peer["reason"].as_str().unwrap().contains(reason), "{peer}");
    wait_for(LIMIT, async || (router.metric("links_expired").await == 1.0).then_some(())).await;
}

#[tokio::test]
async fn new_connections_that_are_rejected_while_the_link_lives_are_told_at_both_ends() {
    let mut stand = Stand::new().await;
    // The link was made by a certificate that the other side knows. Those to come show another.
    let trusted = stand.b.authority();
    stand.b.replace_authority(crate::stand::authority("b.local"));
    stand.b.apply();
    let mut flows = Vec::new();
    for _ in 0..20 {
        // More than the pool has. What fails is reset, perhaps before it is connected.
        flows.extend(TcpStream::connect(stand.import_tcp).await.ok());
    }
    rejects(&stand.b, "the peer rejected us with TLS alert ").await;
    let import = stand.b.status().await["imports"][0].clone();
    assert!(
        import["route"].is_null() && import["reason"].as_str().unwrap().contains("TLS alert"),
        "{import}"
    );
    rejects(&stand.a, "was rejected: ").await;
    assert_eq!(stand.b.status().await["peers"][0]["links"].as_array().unwrap().len(), 1);
    // Nobody opens a flow, and it is seen all the same that they are accepted again.
    stand.a.settings.trust = vec![format!("{trusted}{}", stand.b.authority())];
    stand.a.apply();
    for router in [&stand.a, &stand.b] {
        wait_for(LIMIT, async || (router.tool().await.0 == 0).then_some(())).await;
    }
    well(&stand).await;
    drop(flows);
}

/// Passes bytes on between two routers, until it freezes: then nothing is closed, and nothing comes through.
async fn path(listener: TcpListener, to: SocketAddr, frozen: watch::Receiver<bool>) {
    let mut tasks = JoinSet::new();
    while let Ok((mut near, _)) = listener.accept().await {
        let mut frozen = frozen.clone();
        tasks.spawn(async move {
            let mut far = TcpStream::connect(to).await.unwrap();
            let freezes = async {
                drop(frozen.wait_for(|frozen| *frozen).await);
            };
            let ended = tokio::select! {
                biased;
                () = freezes => false,
                _ = tokio::io::copy_bidirectional(&mut near, &mut far) => true,
            };
            if !ended {
                // Until it thaws; what was open is lost then.
                drop(frozen.wait_for(|frozen| !*frozen).await);
            }
        });
    }
}

#[tokio::test]
async fn a_router_that_is_frozen_is_told_at_the_row_of_the_peer() {
    let mut stand = Stand::apart().await;
    let (freeze, frozen) = watch::channel(false);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    stand.b.settings.peers.push(listener.local_addr().unwrap().to_string());
    let to = stand.a.peers;
    stand.spawn(path(listener, to, frozen));
    stand.b.apply();
    well(&stand).await;
    freeze.send_replace(true);
    for router in [&stand.a, &stand.b] {
        down(router, "the link went down: not responding").await;
    }
    let import = stand.b.status().await["imports"][0].clone();
    assert!(import["reason"].as_str().unwrap().contains("not responding"), "{import}");
    freeze.send_replace(false);
    well(&stand).await;
}

#[tokio::test]
async fn the_end_of_a_peers_certificate_is_counted_within_the_second() {
    let mut stand = Stand::new().await;
    let left = Duration::from_secs(4);
    let ends = SystemTime::now() + left;
    stand.b.issue_for(left);
    stand.b.apply();
    stand.connect_often().await;
    assert_eq!(stand.a.metric("links_expired").await, 0.0);
    // It is valid to the end of its last second, and the time of the question counts too.
    let latest = ends + Duration::from_millis(2500);
    wait_for(LIMIT, async || (stand.a.metric("links_expired").await > 0.0).then_some(())).await;
    let late = SystemTime::now().duration_since(latest).unwrap_or_default();
    assert!(late.is_zero(), "{late:?} too late");
    assert!(SystemTime::now() > ends);
}

#[test]
fn an_error_at_the_start_stands_under_the_name_of_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("router.yaml");
    std::fs::write(&config, "cluster: a.local\nlisten: { admin: nowhere }\n").unwrap();
    let start = |filter: &str| {
        let mut router = std::process::Command::new(env!("CARGO_BIN_EXE_servicekeel-router"));
        let output = router.arg("--config").arg(&config).env("SERVICEKEEL_LOG", filter).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let wanted = format!("servicekeel-router: {}:2:18: listen.admin: ", config.display());
    for filter in ["", "info", "servicekeel-router=error"] {
        let said = start(filter);
        assert!(said.contains(&format!(" ERROR {wanted}")), "{filter}: {said}");
    }
    // Nothing of it is logged, and it is said all the same.
    for filter in ["off", "servicekeel_router=info"] {
        let said = start(filter);
        assert!(said.starts_with(&wanted), "{filter}: {said}");
    }
}
