//! An API server in memory, as far as the controller asks it: lists in pages, watches, and server-side apply of
//! annotations with its rules of ownership.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::stream;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::watch;

type Reply = Response<UnsyncBoxBody<Bytes, std::io::Error>>;

/// Objects by `services/shop/web`, and namespaces by `namespaces//shop`.
type Objects = BTreeMap<String, Value>;

#[derive(Default)]
struct State {
    objects: Objects,
    version: u64,
    /// What happened, for watches: version, key, ADDED or the like, the object.
    log: Vec<(u64, String, &'static str, Value)>,
    /// Watches from before this version are refused: 410.
    oldest: u64,
    /// Every request, as `LIST pods`, `WATCH services`, `PATCH pods/shop/web-0`.
    requests: Vec<String>,
    down: bool,
    /// Lists and watches of this kind wait until it is another.
    held: Option<&'static str>,
    /// Refuses PATCH with this code.
    refuse_writes: Option<u16>,
}

/// A server; clones are the same one.
#[derive(Clone)]
pub(super) struct FakeApi {
    state: Arc<Mutex<State>>,
    changed: watch::Sender<()>,
}

impl FakeApi {
    pub(super) fn new() -> Self {
        let api = Self { state: Arc::default(), changed: watch::Sender::new(()) };
        api.namespace("shop", json!({}));
        api
    }

    pub(super) fn client(&self) -> Client {
        let api = self.clone();
        Client::new(tower::service_fn(move |request| api.clone().answer(request)), "default")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn change<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        let result = f(&mut self.state());
        self.changed.send_replace(());
        result
    }

    /// Makes or replaces an object. A pod keeps its uid, and the owners of its fields, unless the object says others.
    pub(super) fn put(&self, kind: &str, namespace: &str, name: &str, mut object: Value) {
        let key = format!("{kind}/{namespace}/{name}");
        self.change(|state| {
            state.version += 1;
            let old = state.objects.get(&key).map(|old| old["metadata"].clone());
            let meta = object.as_object_mut().unwrap().entry("metadata").or_insert(json!({}));
            meta["name"] = json!(name);
            if !namespace.is_empty() {
                meta["namespace"] = json!(namespace);
            }
            meta["resourceVersion"] = json!(state.version.to_string());
            if let Some(old) = &old {
                meta["uid"] = old["uid"].clone();
            } else {
                meta["uid"] = json!(format!("uid-{}", state.version));
            }
            let event = if old.is_some() { "MODIFIED" } else { "ADDED" };
            state.log.push((state.version, key.clone(), event, object.clone()));
            state.objects.insert(key, object);
        });
    }

    pub(super) fn delete(&self, kind: &str, namespace: &str, name: &str) {
        let key = format!("{kind}/{namespace}/{name}");
        self.change(|state| {
            state.version += 1;
            let mut object = state.objects.remove(&key).unwrap();
            object["metadata"]["resourceVersion"] = json!(state.version.to_string());
            state.log.push((state.version, key, "DELETED", object));
        });
    }

    pub(super) fn namespace(&self, name: &str, annotations: Value) {
        self.put("namespaces", "", name, json!({ "metadata": { "annotations": annotations } }));
    }

    /// A Service of the pods with `app: web`, 80 to the container port `http`.
    pub(super) fn service(&self, name: &str) {
        let ports = json!([{ "name": "http", "port": 80, "protocol": "TCP", "targetPort": "http" }]);
        self.put(
            "services",
            "shop",
            name,
            json!({ "spec": { "selector": { "app": "web" }, "ports": ports } }),
        );
    }

    /// A pod with `app: web`, a sidecar, and a container port `http`.
    pub(super) fn pod(&self, name: &str) {
        self.put("pods", "shop", name, web_pod());
    }

    /// Changes one object in place.
    pub(super) fn edit(&self, key: &str, f: impl FnOnce(&mut Value)) {
        let mut object = self.state().objects[key].clone();
        f(&mut object);
        let mut parts = key.split('/');
        let (kind, namespace, name) = (parts.next().unwrap(), parts.next().unwrap(), parts.next().unwrap());
        self.put(kind, namespace, name, object);
    }

    /// The annotation of exports of a pod of `shop`.
    pub(super) fn exports(&self, pod: &str) -> Option<String> {
        let state = self.state();
        let meta = &state.objects.get(&format!("pods/shop/{pod}"))?["metadata"];
        Some(meta["annotations"]["servicekeel.io/exported-services"].as_str()?.to_owned())
    }

    /// The requests that begin so.
    pub(super) fn requests(&self, start: &str) -> Vec<String> {
        self.state().requests.iter().filter(|request| request.starts_with(start)).cloned().collect()
    }

    /// Nobody is answered, and watches end, until it is up again.
    pub(super) fn set_down(&self, down: bool) {
        self.change(|state| state.down = down);
    }

    /// Watches from before now are refused, as when the API server has compacted its history.
    pub(super) fn forget_history(&self) {
        self.change(|state| {
            state.log.clear();
            state.oldest = state.version;
        });
    }

    pub(super) fn hold(&self, kind: Option<&'static str>) {
        self.change(|state| state.held = kind);
    }

    pub(super) fn refuse_writes(&self, code: Option<u16>) {
        self.change(|state| state.refuse_writes = code);
    }

    /// Waits until it is so, at most 10 minutes of the tests' own time.
    pub(super) async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let mut changed = self.changed.subscribe();
        let wait = async {
            while !is_so(self) {
                changed.changed().await.unwrap();
            }
        };
        if tokio::time::timeout(Duration::from_secs(600), wait).await.is_err() {
            panic!("not so after 10 minutes: {what}; requests: {:#?}", self.requests(""));
        }
    }

    async fn answer(self, request: Request<Body>) -> Result<Reply, std::io::Error> {
        let (head, body) = request.into_parts();
        let query: BTreeMap<String, String> = head
            .uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.replace("%3D", "=")))
            .collect();
        let path: Vec<&str> = head.uri.path().strip_prefix("/api/v1/").unwrap().split('/').collect();
        let (kind, namespace, name) = match path[..] {
            [kind] => (kind, "", None),
            ["namespaces", namespace, kind] => (kind, namespace, None),
            ["namespaces", namespace, kind, name] => (kind, namespace, Some(name)),
            _ => panic!("no path of ours: {path:?}"),
        };
        let watching = query.get("watch").is_some_and(|watch| watch == "true");
        let what = match (&head.method, name) {
            (&Method::GET, None) if watching => format!("WATCH {kind}"),
            (&Method::GET, None) => format!("LIST {kind}"),
            (&Method::PATCH, Some(name)) => format!("PATCH {kind}/{namespace}/{name}"),
            other => panic!("no request of ours: {other:?}"),
        };
        self.change(|state| state.requests.push(what));
        if self.state().down {
            return Err(std::io::ErrorKind::ConnectionRefused.into());
        }
        let prefix = if namespace.is_empty() { format!("{kind}/") } else { format!("{kind}/{namespace}/") };
        let selected =
            query.get("fieldSelector").map(|text| text.strip_prefix("metadata.name=").unwrap().to_owned());
        let ours = move |key: &str| {
            key.starts_with(&prefix)
                && selected.as_ref().is_none_or(|name| key.ends_with(&format!("/{name}")))
        };
        Ok(match name {
            Some(name) => {
                assert_eq!(head.headers["content-type"], "application/apply-patch+yaml");
                let body = body.collect().await.unwrap().to_bytes();
                let body: Value = serde_json::from_slice(&body).unwrap();
                self.change(|state| apply(state, &format!("{kind}/{namespace}/{name}"), &query, &body))
            }
            None if watching => self.watch(kind.to_owned(), ours, query["resourceVersion"].parse().unwrap()),
            None => {
                let mut changed = self.changed.subscribe();
                while self.state().held == Some(kind) {
                    changed.changed().await.unwrap();
                }
                self.list(ours, &query)
            }
        })
    }

    fn list(&self, ours: impl Fn(&str) -> bool, query: &BTreeMap<String, String>) -> Reply {
        let state = self.state();
        let all: Vec<&Value> =
            state.objects.iter().filter(|(key, _)| ours(key)).map(|(_, object)| object).collect();
        let from: usize = query.get("continue").map_or(0, |token| token.parse().unwrap());
        let limit = query.get("limit").map_or(usize::MAX, |limit| limit.parse().unwrap());
        let to = all.len().min(from.saturating_add(limit));
        let more = if to < all.len() { to.to_string() } else { String::new() };
        let meta = json!({ "resourceVersion": state.version.to_string(), "continue": more });
        response(
            200,
            &json!({ "kind": "List", "apiVersion": "v1", "metadata": meta, "items": all[from..to] }),
        )
    }

    fn watch(&self, kind: String, ours: impl Fn(&str) -> bool + Send + 'static, from: u64) -> Reply {
        if from < self.state().oldest {
            // As the real one: not by the answer's code, but by an event.
            let gone = json!({ "kind": "Status", "code": 410, "reason": "Expired", "message": "too old" });
            return response(200, &json!({ "type": "ERROR", "object": gone }));
        }
        let next = (self.clone(), self.changed.subscribe(), from, ours, kind);
        let events = stream::unfold(next, |(api, mut changed, mut from, ours, watched)| async move {
            loop {
                let event = {
                    let state = api.state();
                    if state.down || from < state.oldest {
                        return None;
                    }
                    let held = state.held.is_some_and(|held| held == watched);
                    let mut later =
                        state.log.iter().filter(|(version, key, ..)| *version > from && ours(key));
                    later.next().filter(|_| !held).cloned()
                };
                if let Some((version, _, kind, object)) = event {
                    from = version;
                    let line = format!("{}\n", json!({ "type": kind, "object": object }));
                    let frame = Ok::<_, std::io::Error>(Frame::data(Bytes::from(line)));
                    return Some((frame, (api, changed, from, ours, watched)));
                }
                changed.changed().await.ok()?;
            }
        });
        Response::new(StreamBody::new(events).boxed_unsync())
    }
}

/// A pod with `app: web`, a sidecar, and a container port `http`.
pub(super) fn web_pod() -> Value {
    json!({
        "metadata": { "labels": { "app": "web" } },
        "spec": {
            "containers": [{ "name": "app", "ports": [{ "name": "http", "containerPort": 8080, "protocol": "TCP" }] }],
            "initContainers": [{ "name": "servicekeel-sidecar", "restartPolicy": "Always" }],
        },
        "status": { "phase": "Running" },
    })
}

/// `metadata.managedFields` of somebody who owns this annotation.
pub(super) fn owned(manager: &str, operation: &str) -> Value {
    let field = json!({ "f:metadata": { "f:annotations": { "f:servicekeel.io/exported-services": {} } } });
    json!([{ "manager": manager, "operation": operation, "apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": field }])
}

/// Server-side apply, for the one annotation.
fn apply(state: &mut State, key: &str, query: &BTreeMap<String, String>, body: &Value) -> Reply {
    let manager = query["fieldManager"].clone();
    assert!(!query.contains_key("force"), "the controller never takes what is not its own");
    if let Some(code) = state.refuse_writes {
        return status(code, "Forbidden", "pods is forbidden", json!([]));
    }
    let Some(mut object) = state.objects.get(key).cloned() else {
        return status(404, "NotFound", "not found", json!([]));
    };
    let meta = &mut object["metadata"];
    if body["metadata"]["uid"] != meta["uid"] {
        return status(409, "Conflict", "another uid", json!([]));
    }
    let named: Vec<&String> = body["metadata"].as_object().unwrap().keys().collect();
    assert!(
        named.iter().all(|field| ["name", "namespace", "uid", "annotations"].contains(&field.as_str())),
        "{named:?}"
    );
    let annotation = "servicekeel.io/exported-services";
    let wanted = &body["metadata"]["annotations"][annotation];
    let owner = meta["managedFields"][0]["manager"].as_str().map(str::to_owned);
    if let Some(owner) = owner.filter(|owner| *owner != manager && !wanted.is_null()) {
        let causes = json!([{
            "reason": "FieldManagerConflict",
            "message": format!("conflict with \"{owner}\" using v1"),
            "field": ".metadata.annotations",
        }]);
        return status(409, "Conflict", "Apply failed with 1 conflict", causes);
    }
    let old = meta.clone();
    if !meta["annotations"].is_object() {
        meta["annotations"] = json!({});
    }
    if wanted.is_null() {
        meta["annotations"].as_object_mut().unwrap().remove(annotation);
        meta["managedFields"] = json!([]);
    } else {
        meta["annotations"][annotation] = wanted.clone();
        meta["managedFields"] = owned(&manager, "Apply");
    }
    if *meta != old {
        state.version += 1;
        meta["resourceVersion"] = json!(state.version.to_string());
        state.log.push((state.version, key.to_owned(), "MODIFIED", object.clone()));
        state.objects.insert(key.to_owned(), object.clone());
    }
    response(200, &object)
}

fn status(code: u16, reason: &str, message: &str, causes: Value) -> Reply {
    let details = json!({ "causes": causes });
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "code": code, "reason": reason, "message": message, "details": details,
    });
    response(code, &body)
}

fn response(code: u16, body: &Value) -> Reply {
    let body = Full::from(serde_json::to_vec(body).unwrap()).map_err(|never| match never {});
    let mut response = Response::new(body.boxed_unsync());
    *response.status_mut() = StatusCode::from_u16(code).unwrap();
    response
}
