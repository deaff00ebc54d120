//! A fault is induced, and only the tools are asked what it is.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};

use crate::stand::{Stand, port, wait_for};

const LIMIT: Duration = Duration::from_secs(20);

/// An import or an export of a status, by the beginning of its name.
fn of(status: &serde_json::Value, list: &str, service: &str) -> Option<serde_json::Value> {
    let all = status[list].as_array().unwrap();
    all.iter().find(|it| it["service"].as_str().unwrap().starts_with(service)).cloned()
}

#[tokio::test]
async fn a_target_that_is_down_is_told_counted_and_shown_by_the_router_that_dials() {
    let mut stand = Stand::new().await;
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = free.local_addr().unwrap().port();
    drop(free);
    stand.export(port(82), target).await;
    let (_importer, at) = stand.nameless(port(82), "127.0.0.1:0".parse().unwrap()).await;
    wait_for(LIMIT, async || {
        of(&stand.b.status().await, "imports", "web.default.a.local:82")
            .filter(|import| !import["route"].is_null())
    })
    .await;
    assert!(of(&stand.a.status().await, "exports", "web.default.a.local:82").unwrap()["failing"].is_null());
    for _ in 0..2 {
        if let Ok(mut flow) = TcpStream::connect(at).await {
            let _ = flow.read(&mut [0]).await;
        }
    }

    let failing =
        of(&stand.a.status().await, "exports", "web.default.a.local:82").unwrap()["failing"].clone();
    assert_eq!(failing["times"], 2, "{failing}");
    let reason = failing["reason"].as_str().unwrap();
    assert!(reason.contains(&format!("127.0.0.1:{target}")) && reason.contains("refused"), "{failing}");
    assert!(failing["last_seconds_ago"].as_u64().unwrap() < 20, "{failing}");
    assert_eq!(stand.a.metric("endpoint_failures_total").await, 2.0);
    let (_, said) = stand.a.tool().await;
    let line = said.lines().find(|line| line.starts_with("web.default.a.local:82/TCP")).unwrap();
    assert!(line.contains("(FAILING 2 times, last ") && line.contains("refused"), "{said}");
    // The other side names it, too.
    let import = of(&stand.b.status().await, "imports", "web.default.a.local:82").unwrap();
    assert!(import["failing"]["reason"].as_str().unwrap().contains("refused"), "{import}");

    // The application is back.
    let _application = TcpListener::bind(("127.0.0.1", target)).await.unwrap();
    wait_for(LIMIT, async || {
        let _flow = TcpStream::connect(at).await.unwrap();
        let export = of(&stand.a.status().await, "exports", "web.default.a.local:82").unwrap();
        export["failing"].is_null().then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_wrong_namespace_gets_what_was_meant() {
    let stand = Stand::new().await;
    let mut wanted = port(80);
    wanted.service.namespace = "prod".parse().unwrap();
    let (_importer, _) = stand.nameless(wanted.clone(), "127.0.0.1:0".parse().unwrap()).await;
    let import = wait_for(LIMIT, async || of(&stand.b.status().await, "imports", "web.prod.")).await;
    assert_eq!(import["reason"], "no linked router of a.local offers it; did you mean web.default.a.local?");
    let said = stand.b.tool().await.1;
    assert!(said.contains("did you mean web.default.a.local?"), "{said}");
    // A slip of the finger, and what is not near at all.
    for (name, end) in [("wbe", "; did you mean web.default.a.local?"), ("database", "offers it")] {
        wanted.service.name = name.parse().unwrap();
        let (_importer, _) = stand.nameless(wanted.clone(), "127.0.0.1:0".parse().unwrap()).await;
        let import = wait_for(LIMIT, async || of(&stand.b.status().await, "imports", name)).await;
        let reason = import["reason"].as_str().unwrap();
        if name == "wbe" {
            assert!(reason.contains(end), "{reason}");
        } else {
            assert!(reason.ends_with(end), "{reason}");
        }
    }
}

#[tokio::test]
async fn a_pod_whose_sidecar_went_is_missed_until_it_is_back() {
    let stand = Stand::new().await;
    let (importer, at) = stand.nameless(port(80), "127.0.0.1:0".parse().unwrap()).await;
    assert_eq!(stand.b.status().await["missing"].as_array().unwrap().len(), 0);
    drop(importer);
    let missing = wait_for(LIMIT, async || {
        let missing = stand.b.status().await["missing"].clone();
        (missing.as_array().unwrap().len() == 1).then(|| missing[0].clone())
    })
    .await;
    assert_eq!((missing["pod"].as_str(), missing["namespace"].as_str()), (Some("bare"), Some("default")));
    assert!((1..=30).contains(&missing["sockets_kept_seconds"].as_u64().unwrap()), "{missing}");
    let (code, said) = stand.b.tool().await;
    assert!(code == 0 && said.contains(" ago; its sockets are kept for "), "{said}");
    // The page has a row for it, with all that the status says of it.
    let (code, page) = stand.b.asks("/").await;
    let rows = page.split_once("s.missing.map(m => [").and_then(|(_, rest)| rest.split_once("])"));
    let (rows, _) = rows.unwrap_or_else(|| panic!("{code}: {page}"));
    let shown = rows.split(|c: char| !(c.is_alphanumeric() || "_.".contains(c)));
    let shown: BTreeSet<_> = shown.filter_map(|word| word.strip_prefix("m.")).collect();
    assert_eq!(shown, missing.as_object().unwrap().keys().map(String::as_str).collect());
    let (_importer, _) = stand.nameless(port(80), at).await;
    // Its first socket shows that it is the same pod's.
    wait_for(LIMIT, async || stand.b.status().await["missing"].as_array().unwrap().is_empty().then_some(()))
        .await;
}
