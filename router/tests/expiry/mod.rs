//! Certificates that expire: what the tools say of it.

use std::time::{Duration, SystemTime};

use servicekeel_runtime::admin;

use crate::files::{put, started};
use crate::stand::{Router, Stand, authority, tool, wait_for};

const LIMIT: Duration = Duration::from_secs(25);

async fn looks_expired(router: &Router, of: &str) {
    let said = wait_for(LIMIT, async || Some(router.tool().await).filter(|(code, _)| *code == 1)).await.1;
    let status = router.status().await;
    assert!(said.contains("PROBLEM: ") && said.contains(of), "{said}");
    assert_eq!(status["peers"][0]["state"], "expired", "{status}");
    assert!(status["peers"][0]["reason"].as_str().unwrap().contains(" expired on "), "{status}");
    wait_for(LIMIT, async || (router.metric("links_active").await == 0.0).then_some(())).await;
    assert_eq!(router.metric("links_expired").await, 1.0);
}

async fn looks_well(router: &Router) {
    wait_for(LIMIT, async || Some(router.tool().await).filter(|(code, _)| *code == 0)).await;
    wait_for(LIMIT, async || (router.metric("links_active").await >= 1.0).then_some(())).await;
    assert_eq!(router.status().await["peers"][0]["state"], "up");
    assert_eq!(router.metric("links_expired").await, 0.0);
}

#[tokio::test]
async fn a_certificate_that_expires_while_its_router_runs_is_told_at_both_ends() {
    let mut stand = Stand::new().await;
    looks_well(&stand.b).await;
    stand.b.issue_for(Duration::from_secs(5));
    stand.b.apply();
    let left = stand.b.metric("certificate_expires_seconds").await;
    assert!((0.0..=5.0).contains(&left), "{left}");
    // The other side learns of the new certificate by a new connection.
    stand.connect_often().await;

    looks_expired(&stand.b, "this router's certificate expired on ").await;
    assert_eq!(stand.b.asks("/readyz").await.0, 503);
    assert!(stand.b.metric("certificate_expires_seconds").await < 0.0);
    let status = stand.b.status().await;
    let import = &status["imports"][0];
    assert!(import["route"].is_null(), "{status}");
    assert!(import["reason"].as_str().unwrap().contains("this router's certificate expired"), "{status}");
    looks_expired(&stand.a, "the certificate of b.local/n expired on ").await;
    assert_eq!(stand.a.asks("/readyz").await.0, 200);

    stand.b.issue();
    stand.b.apply();
    looks_well(&stand.b).await;
    assert_eq!(stand.b.asks("/readyz").await.0, 200);
    stand.wait_until_it_works().await;
    looks_well(&stand.a).await;
}

#[tokio::test]
async fn a_router_that_starts_with_an_expired_certificate_says_so_until_it_has_another() {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority("a.local");
    let node = "n".parse().unwrap();
    let long_ago = SystemTime::now() - Duration::from_secs(86_400 + 3600);
    let expired = authority.issue(&node, &[], 1, long_ago).unwrap();
    let (_process, at) = started(dir.path(), &authority, &expired).await;
    let (code, said) =
        wait_for(LIMIT, async || Some(tool(at).await).filter(|(_, said)| !said.is_empty())).await;
    assert!(code == 1 && said.contains("PROBLEM: this router's certificate expired on "), "{said}");
    assert!(said.contains("certificate EXPIRED on ") && !said.contains("no identity"), "{said}");
    let (code, said) = admin::get(at, "/readyz").await.unwrap();
    assert_eq!(
        (code, said.as_str()),
        (503, "waiting for a new certificate: this router's own has expired\n")
    );
    let metrics = admin::get(at, "/metrics").await.unwrap().1;
    let left =
        metrics.lines().find_map(|l| l.strip_prefix("servicekeel_router_certificate_expires_seconds "));
    assert!(left.unwrap().parse::<f64>().unwrap() < -3000.0, "{left:?}");

    put(dir.path(), &authority.issue(&node, &[], 1, SystemTime::now()).unwrap());
    wait_for(LIMIT, async || Some(tool(at).await).filter(|(code, _)| *code == 0)).await;
    assert_eq!(admin::get(at, "/readyz").await.unwrap().0, 200);

    // Nothing that does not prove this router takes the place of what does.
    let other = "m".parse().unwrap();
    let stranger = crate::stand::authority("a.local");
    let now = SystemTime::now();
    for wrong in [
        expired,
        authority.issue(&other, &[], 1, now).unwrap(),
        stranger.issue(&node, &[], 1, now).unwrap(),
        authority.issue(&node, &[], 1, now + Duration::from_secs(7200)).unwrap(),
    ] {
        put(dir.path(), &wrong);
        tokio::time::sleep(Duration::from_millis(700)).await;
        let (code, said) = tool(at).await;
        assert!(code == 1 && said.contains("PROBLEM: the config is refused since "), "{said}");
        assert!(said.contains("certificate valid until"), "{said}");
    }
}
