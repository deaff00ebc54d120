//! One pass, with and without writes.

use serde_json::json;
use servicekeel_core::name::Label;

use super::api::{FakeApi, owned, web_pod};
use super::{EXPORTS, once, settings};
use crate::{RunError, Settings};

#[tokio::test(start_paused = true)]
async fn writes_what_is_missing_and_then_nothing() {
    let api = FakeApi::new();
    api.service("web");
    api.pod("web-0");
    api.put(
        "pods",
        "shop",
        "no-sidecar",
        json!({ "metadata": { "labels": { "app": "web" } }, "spec": { "containers": [] } }),
    );
    once(&api, settings()).await.0.unwrap();
    assert_eq!(api.exports("web-0").unwrap(), EXPORTS);
    assert_eq!(api.requests("PATCH"), ["PATCH pods/shop/web-0"]);
    once(&api, settings()).await.0.unwrap();
    assert_eq!(api.requests("PATCH").len(), 1);
    assert_eq!(api.requests("WATCH").len(), 0, "as --help says of the rules");
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_prints_and_writes_nothing() {
    let api = FakeApi::new();
    api.service("web");
    api.put("services", "shop", "alias", json!({ "spec": { "type": "ExternalName" } }));
    api.pod("web-0");
    let stale = json!({ "servicekeel.io/exported-services": "services: []\n" });
    let mut other = web_pod();
    other["metadata"] =
        json!({ "annotations": stale, "managedFields": owned("servicekeel-controller", "Apply") });
    api.put("pods", "shop", "web-1", other.clone());
    other["metadata"]["labels"] = json!({ "app": "web" });
    other["metadata"]["managedFields"] = owned("helm", "Apply");
    api.put("pods", "shop", "web-2", other);

    let (result, printed) = once(&api, Settings { dry_run: true, ..settings() }).await;
    result.unwrap();
    let indented: String = EXPORTS.lines().map(|line| format!("  {line}\n")).collect();
    assert_eq!(
        printed,
        format!(
            "shop/alias: type ExternalName has no pods; not exported\n\
             shop/web-0: servicekeel.io/exported-services would be\n{indented}\
             shop/web-1: servicekeel.io/exported-services would be removed\n\
             shop/web-2: skipped: servicekeel.io/exported-services is owned by field manager helm; \
             remove the annotation to let this controller manage it\n"
        )
    );
    assert_eq!(api.requests("PATCH"), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn what_another_owns_is_left_alone() {
    let api = FakeApi::new();
    api.service("web");
    let mut pod = web_pod();
    pod["metadata"]["annotations"] = json!({ "servicekeel.io/exported-services": "services: []\n" });
    pod["metadata"]["managedFields"] = owned("kubectl-client-side-apply", "Update");
    api.put("pods", "shop", "web-0", pod);
    once(&api, settings()).await.0.unwrap();
    assert_eq!(api.exports("web-0").unwrap(), "services: []\n");
    assert_eq!(api.requests("PATCH"), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn one_namespace_is_one_namespace() {
    let api = FakeApi::new();
    api.service("web");
    api.pod("web-0");
    let only = |name: &str| Settings { namespace: Some(name.parse::<Label>().unwrap()), ..settings() };
    api.namespace("other", json!({}));
    once(&api, only("other")).await.0.unwrap();
    assert_eq!(api.exports("web-0"), None);
    assert!(matches!(once(&api, only("nowhere")).await.0, Err(RunError::NoNamespace(_))));
    once(&api, only("shop")).await.0.unwrap();
    assert_eq!(api.exports("web-0").unwrap(), EXPORTS);
}

#[tokio::test(start_paused = true)]
async fn more_pods_than_a_page_holds() {
    let api = FakeApi::new();
    api.service("web");
    (0..600).for_each(|i| api.pod(&format!("web-{i}")));
    once(&api, settings()).await.0.unwrap();
    assert_eq!(api.requests("LIST pods").len(), 2);
    assert_eq!(api.requests("PATCH").len(), 600);
    assert_eq!(api.exports("web-599").unwrap(), EXPORTS);
}

#[tokio::test(start_paused = true)]
async fn failures_are_told() {
    let api = FakeApi::new();
    api.service("web");
    api.pod("web-0");
    api.refuse_writes(Some(403));
    let error = once(&api, settings()).await.0.unwrap_err();
    assert_eq!(error.to_string(), "failed to write the exports of 1 pods");
    api.set_down(true);
    let error = once(&api, settings()).await.0.unwrap_err();
    assert!(
        error.to_string().starts_with("cannot list objects at https://api.example: ServiceError"),
        "{error}"
    );
}
