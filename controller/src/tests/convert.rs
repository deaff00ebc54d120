//! Objects as the API gives them, and what is read of them.

use k8s_openapi::api::core::v1::{Pod, Service};
use serde_json::{Value, json};
use servicekeel_core::plan::{self, Role, Target};

use super::api::{owned, web_pod};
use crate::convert::{Owner, owner, pod, runs_sidecar, service, trim_pod, trim_service};

fn from<K: serde::de::DeserializeOwned>(object: Value) -> K {
    serde_json::from_value(object).unwrap()
}

fn with(change: impl FnOnce(&mut Value)) -> Pod {
    let mut object = web_pod();
    object["metadata"]["name"] = json!("web-0");
    change(&mut object);
    from(object)
}

#[test]
fn a_service() {
    let object: Service = from(json!({
        "metadata": { "name": "dns", "namespace": "shop", "annotations": {
            "servicekeel.io/export": "true", "servicekeel.io/allow": "b.local", "other": "x",
        } },
        "spec": { "clusterIP": "None", "type": "ClusterIP", "selector": { "app": "dns" }, "ports": [
            { "name": "dns", "port": 53, "protocol": "UDP", "targetPort": "dns" },
            { "name": "web", "port": 80, "targetPort": 8080 },
            { "name": "plain", "port": 81 },
        ] },
    }));
    let port = |name: &str, port, protocol: &str, target| plan::ServicePort {
        port,
        protocol: protocol.into(),
        name: Some(name.into()),
        target,
    };
    let expected = plan::Service {
        name: "dns".into(),
        external_name: false,
        selector: [("app".into(), "dns".into())].into(),
        ports: vec![
            port("dns", 53, "UDP", Some(Target::Name("dns".into()))),
            port("web", 80, "TCP", Some(Target::Number(8080))),
            port("plain", 81, "TCP", None),
        ],
        export: Some("true".into()),
        allow: Some("b.local".into()),
    };
    assert_eq!(service(&object), expected);
    let mut trimmed = object;
    assert!(trim_service(&mut trimmed));
    assert_eq!(service(&trimmed), expected, "nothing that is read is dropped");
    assert_eq!(trimmed.metadata.annotations.unwrap().len(), 2);

    let alias: Service = from(json!({ "metadata": { "name": "a" }, "spec": { "type": "ExternalName" } }));
    assert!(service(&alias).external_name);
}

#[test]
fn a_pod() {
    let object = with(|pod| {
        pod["spec"]["initContainers"] = json!([
            { "name": "migrate", "ports": [{ "containerPort": 1 }] },
            { "name": "servicekeel-sidecar", "restartPolicy": "Always", "ports": [{ "name": "admin", "containerPort": 15020 }] },
        ]);
        pod["metadata"]["managedFields"] = owned("servicekeel-controller", "Apply");
        pod["metadata"]["annotations"] = json!({ "servicekeel.io/exported-services": "x", "other": "y" });
    });
    let read = pod(&object);
    let seen: Vec<_> = read
        .containers
        .iter()
        .flat_map(|container| {
            container.ports.iter().map(|port| (container.role, port.name.clone(), port.number))
        })
        .collect();
    assert_eq!(
        seen,
        [
            (Role::Application, Some("http".into()), 8080),
            (Role::Init, None, 1),
            (Role::Sidecar, Some("admin".into()), 15020),
        ]
    );
    assert_eq!(read.containers[1].ports[0].protocol, "TCP");
    assert_eq!(read.labels, [("app".to_owned(), "web".to_owned())].into());

    let mut trimmed = object;
    assert!(trim_pod(&mut trimmed));
    assert_eq!((pod(&trimmed), owner(&trimmed)), (read, Owner::Us), "nothing that is read is dropped");
    assert_eq!(trimmed.metadata.annotations.as_ref().unwrap().len(), 1);
    let again = trimmed.clone();
    assert!(trim_pod(&mut trimmed));
    assert_eq!(trimmed, again);
}

#[test]
fn which_pods_concern_us() {
    let kept = |change: fn(&mut Value)| trim_pod(&mut with(change));
    assert!(kept(|_| {}));
    assert!(!kept(|pod| pod["status"]["phase"] = json!("Succeeded")));
    assert!(!kept(|pod| pod["status"]["phase"] = json!("Failed")));
    assert!(!kept(|pod| pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z")));
    assert!(!kept(|pod| pod["spec"]["initContainers"] = json!([])));
    assert!(kept(|pod| {
        pod["spec"]["initContainers"] = json!([]);
        pod["metadata"]["annotations"] = json!({ "servicekeel.io/sidecar": "true" });
    }));
    assert!(kept(|pod| {
        pod["spec"] = json!({ "containers": [{ "name": "servicekeel-sidecar" }] });
    }));
    // It has ended to be one, and what we wrote is still there.
    let mut left = with(|pod| {
        pod["spec"]["initContainers"] = json!([]);
        pod["metadata"]["annotations"] = json!({ "servicekeel.io/exported-services": "" });
        pod["metadata"]["managedFields"] = owned("servicekeel-controller", "Apply");
    });
    assert!(trim_pod(&mut left));
    assert!(!runs_sidecar(&left));
}

#[test]
fn whose_an_annotation_is() {
    let of = |managed: Value| {
        owner(&with(|pod| {
            pod["metadata"]["annotations"] = json!({ "servicekeel.io/exported-services": "services: []" });
            pod["metadata"]["managedFields"] = managed;
        }))
    };
    let join = |a: Value, b: Value| json!([a[0], b[0]]);
    let ours = || owned("servicekeel-controller", "Apply");
    assert_eq!(owner(&with(|_| {})), Owner::Nobody);
    assert_eq!(of(ours()), Owner::Us);
    assert_eq!(of(owned("kubectl-edit", "Update")), Owner::Other("kubectl-edit".into()));
    assert_eq!(of(join(ours(), owned("helm", "Apply"))), Owner::Other("helm".into()));
    assert_eq!(of(owned("servicekeel-controller", "Update")), Owner::Other("servicekeel-controller".into()));
    assert_eq!(of(json!([])), Owner::Other("unknown".into()));
    // One who owns other fields only.
    let labels = json!([{ "manager": "kubectl", "operation": "Update", "fieldsV1": { "f:metadata": { "f:labels": {} } } }]);
    assert_eq!(of(join(labels, ours())), Owner::Us);
}
