//! The loop: what follows when something changes, and what does not when nothing does.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;
use servicekeel_runtime::admin::get;
use tokio::time::{Instant, sleep, timeout};

use super::api::{FakeApi, owned};
use super::{EXPORTS, settings, start};
use crate::Settings;

const HOUR: Duration = Duration::from_secs(3600);

/// What `web-0` gets is what `web` says.
async fn served(api: &FakeApi) {
    api.until("web-0 has its exports", |api| api.exports("web-0").as_deref() == Some(EXPORTS)).await;
}

#[tokio::test(start_paused = true)]
async fn the_annotation_follows_service_pod_and_namespace() {
    let api = FakeApi::new();
    let running = start(&api, settings());
    api.pod("web-0");
    sleep(HOUR).await;
    assert_eq!(api.requests("PATCH"), [""; 0], "there is nothing to export");

    api.service("web");
    served(&api).await;
    api.edit("services/shop/web", |service| service["spec"]["ports"][0]["port"] = json!(81));
    api.until("the port is the new one", |api| {
        api.exports("web-0").is_some_and(|text| text.contains("port: 81"))
    })
    .await;
    api.edit("services/shop/web", |service| service["spec"]["selector"]["app"] = json!("other"));
    api.until("no Service selects it", |api| api.exports("web-0").is_none()).await;
    api.edit("pods/shop/web-0", |pod| pod["metadata"]["labels"]["app"] = json!("other"));
    api.until("one does again", |api| api.exports("web-0").is_some()).await;
    api.namespace("shop", json!({ "servicekeel.io/export": "false" }));
    api.until("the namespace opted out", |api| api.exports("web-0").is_none()).await;
    api.namespace("shop", json!({}));
    api.until("and in again", |api| api.exports("web-0").is_some()).await;
    api.delete("services", "shop", "web");
    api.until("the Service is gone", |api| api.exports("web-0").is_none()).await;
    assert_eq!(api.requests("PATCH").len(), 7, "one write for each change");
    running.end().await;
}

#[tokio::test(start_paused = true)]
async fn where_nothing_changes_nothing_is_written() {
    let api = FakeApi::new();
    api.service("web");
    api.pod("web-0");
    let running = start(&api, settings());
    served(&api).await;
    for round in 0..50 {
        api.edit("pods/shop/web-0", |pod| pod["status"]["podIP"] = json!(format!("10.0.0.{round}")));
        api.edit("services/shop/web", |service| {
            service["spec"]["clusterIP"] = json!(format!("10.1.0.{round}"))
        });
        sleep(Duration::from_secs(1)).await;
    }
    sleep(HOUR).await;
    assert_eq!(api.requests("PATCH").len(), 1);
    running.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_lags_makes_no_second_write() {
    let api = FakeApi::new();
    api.pod("web-0");
    let running = start(&api, settings());
    sleep(HOUR).await;
    api.hold(Some("pods"));
    api.service("web");
    served(&api).await;
    api.put(
        "services",
        "shop",
        "other",
        json!({ "spec": { "selector": { "app": "x" }, "ports": [{ "port": 1 }] } }),
    );
    sleep(Duration::from_secs(60)).await;
    assert_eq!(api.requests("PATCH").len(), 1);
    // What another change asks for is written, however old the copy.
    api.edit("services/shop/web", |service| service["spec"]["ports"][0]["port"] = json!(81));
    api.until("the port is the new one", |api| {
        api.exports("web-0").is_some_and(|text| text.contains("port: 81"))
    })
    .await;
    api.hold(None);
    sleep(HOUR).await;
    assert_eq!(api.requests("PATCH").len(), 2);
    running.end().await;
}

#[tokio::test(start_paused = true)]
async fn changes_that_come_together_make_one_write_a_pod() {
    let api = FakeApi::new();
    (0..20).for_each(|i| api.pod(&format!("web-{i}")));
    let running = start(&api, settings());
    sleep(HOUR).await;
    for i in 0..10 {
        api.service(&format!("web-{i}"));
        sleep(Duration::from_millis(20)).await;
    }
    api.until("all are written", |api| (0..20).all(|i| api.exports(&format!("web-{i}")).is_some())).await;
    sleep(HOUR).await;
    assert_eq!(api.requests("PATCH").len(), 20);
    assert_eq!(api.exports("web-7").unwrap().matches("name: web-").count(), 10);
    running.end().await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_taken_away_before_all_is_known() {
    for kind in ["services", "namespaces"] {
        let api = FakeApi::new();
        api.service("web");
        (0..20).for_each(|i| api.pod(&format!("web-{i}")));
        let running = start(&api, settings());
        served(&api).await;
        api.until("all are written", |api| api.requests("PATCH").len() == 20).await;
        running.end().await;
        api.hold(Some(kind));
        let running = start(&api, settings());
        sleep(HOUR).await;
        assert_eq!(api.requests("PATCH").len(), 20, "the list of {kind} is not there yet");
        api.delete("services", "shop", "web");
        api.hold(None);
        api.until("all are taken away", |api| (0..20).all(|i| api.exports(&format!("web-{i}")).is_none()))
            .await;
        assert_eq!(api.requests("PATCH").len(), 40);
        running.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_api_goes_away_and_comes_back() {
    let api = FakeApi::new();
    api.set_down(true);
    api.service("web");
    api.pod("web-0");
    let running = start(&api, settings());
    sleep(HOUR).await;
    let tries = api.requests("LIST pods").len();
    assert!((40..200).contains(&tries), "it tries on, with pauses: {tries} in an hour");
    api.set_down(false);
    served(&api).await;

    // What comes to pass meanwhile is caught up with, also where the API has no history of it.
    for forgets in [false, true] {
        let writes = api.requests("PATCH").len();
        api.set_down(true);
        sleep(Duration::from_secs(600)).await;
        api.delete("services", "shop", "web");
        api.service("other");
        if forgets {
            api.forget_history();
        }
        api.set_down(false);
        let other = |api: &FakeApi| api.exports("web-0").is_some_and(|text| text.contains("name: other"));
        api.until("the other Service is exported alone", |api| {
            other(api) && !api.exports("web-0").unwrap().contains("name: web")
        })
        .await;
        api.delete("services", "shop", "other");
        api.service("web");
        served(&api).await;
        assert_eq!(api.requests("PATCH").len(), writes + 2);
    }
    running.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_refused_write_is_tried_again_with_growing_pauses() {
    let api = FakeApi::new();
    api.service("web");
    api.pod("web-0");
    api.refuse_writes(Some(403));
    let running = start(&api, settings());
    sleep(HOUR).await;
    let tries = api.requests("PATCH").len();
    assert!((50..80).contains(&tries), "{tries} in an hour");
    api.refuse_writes(None);
    served(&api).await;
    running.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_annotation_that_somebody_takes_stays_his() {
    let api = FakeApi::new();
    api.service("web");
    api.pod("web-0");
    let running = start(&api, settings());
    served(&api).await;
    let take = |pod: &mut serde_json::Value| {
        pod["metadata"]["annotations"]["servicekeel.io/exported-services"] = json!("services: []\n");
        pod["metadata"]["managedFields"] = owned("kubectl-edit", "Update");
    };
    api.edit("pods/shop/web-0", take);
    sleep(HOUR).await;
    api.service("other");
    sleep(HOUR).await;
    assert_eq!((api.exports("web-0").as_deref(), api.requests("PATCH").len()), (Some("services: []\n"), 1));
    // Its owner takes it away: it is nobody's, and ours again.
    api.edit("pods/shop/web-0", |pod| {
        pod["metadata"]["annotations"] = json!({});
        pod["metadata"]["managedFields"] = json!([]);
    });
    api.delete("services", "shop", "other");
    served(&api).await;
    assert_eq!(api.requests("PATCH").len(), 2);
    running.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_comes_again_under_its_name_is_another() {
    let api = FakeApi::new();
    api.service("web");
    api.pod("web-0");
    let running = start(&api, settings());
    served(&api).await;
    api.delete("pods", "shop", "web-0");
    api.pod("web-0");
    served(&api).await;
    assert_eq!(api.requests("PATCH").len(), 2);
    running.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_says_each_thing_once() {
    let api = FakeApi::new();
    api.service("web");
    api.pod("web-0");
    let running = start(&api, Settings { dry_run: true, ..settings() });
    sleep(HOUR).await;
    // Of no influence on this pod.
    api.put(
        "services",
        "shop",
        "other",
        json!({ "spec": { "selector": { "app": "x" }, "ports": [{ "port": 1 }] } }),
    );
    sleep(HOUR).await;
    assert_eq!(running.printed.text().matches("would be").count(), 1, "{}", running.printed.text());
    api.edit("services/shop/web", |service| service["spec"]["ports"][0]["port"] = json!(81));
    sleep(HOUR).await;
    assert_eq!(running.printed.text().matches("would be").count(), 2, "{}", running.printed.text());
    assert_eq!(api.requests("PATCH"), [""; 0]);
    running.end().await;
}

/// Waits for this answer, at most 10 s.
async fn answers(addr: SocketAddr, path: &str, wanted: (u16, &str)) {
    let asked = Instant::now();
    loop {
        let answer = get(addr, path).await.ok();
        let answer = answer.as_ref().map(|(code, text)| (*code, text.as_str()));
        if answer == Some(wanted) {
            return;
        }
        assert!(asked.elapsed() < Duration::from_secs(10), "{path}: {answer:?}, and not {wanted:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn the_admin_endpoint_says_what_is_so() {
    let api = FakeApi::new();
    api.service("web");
    api.put("services", "shop", "alias", json!({ "spec": { "type": "ExternalName" } }));
    api.pod("web-0");
    api.hold(Some("services"));
    let addr = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let running = start(&api, Settings { admin: Some(addr), ..settings() });
    answers(addr, "/readyz", (503, "waiting for the list of Services\n")).await;
    api.hold(None);
    answers(addr, "/readyz", (200, "ok\n")).await;
    let alias = "shop/alias: type ExternalName has no pods; not exported";
    let status = json!({ "pods": 1, "writes": 1, "write_failures": 0, "notes": [alias] });
    answers(addr, "/status", (200, &status.to_string())).await;
    let metrics = get(addr, "/metrics").await.unwrap().1;
    assert!(metrics.contains("servicekeel_controller_writes_total 1\n"), "{metrics}");
    running.end().await;
}

#[tokio::test]
async fn an_admin_port_that_is_taken_keeps_no_export_from_being_written() {
    let api = FakeApi::new();
    api.service("web");
    api.pod("web-0");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap();
    let running = start(&api, Settings { admin: Some(addr), ..settings() });
    served(&api).await;
    assert!(!running.task.is_finished());
    drop(taken);
    answers(addr, "/readyz", (200, "ok\n")).await;
    running.end().await;
}

#[tokio::test(start_paused = true)]
async fn it_ends_at_once_in_every_state() {
    let api = FakeApi::new();
    api.service("web");
    api.pod("web-0");
    for state in ["up", "down", "refusing"] {
        api.set_down(state == "down");
        api.refuse_writes((state == "refusing").then_some(500));
        let running = start(&api, settings());
        sleep(Duration::from_secs(100)).await;
        let asked = Instant::now();
        timeout(HOUR, running.end()).await.unwrap();
        assert!(asked.elapsed() < Duration::from_millis(100), "{state}: {:?}", asked.elapsed());
    }
}
