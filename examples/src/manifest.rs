//! Pod manifests, as far as the demo reads them: names, annotations, and the environment of the sidecar.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

/// The annotation of a pod's exports.
pub const EXPORTS: &str = "servicekeel.io/exported-services";
/// The annotation of a pod's imports.
pub const IMPORTS: &str = "servicekeel.io/imported-services";
/// The variable by which the sidecar's container is known.
pub const ROUTER: &str = "SIDECAR_SERVER_LISTEN";

/// What a manifest says of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.namespace`, or `default`.
    pub namespace: String,
    /// The annotation [`EXPORTS`]; empty where there is none.
    pub exports: String,
    /// The annotation [`IMPORTS`]; empty where there is none.
    pub imports: String,
    /// The variables with a plain value of the container that has [`ROUTER`] among them.
    pub variables: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Manifest {
    kind: String,
    metadata: Metadata,
    spec: Spec,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
    namespace: Option<String>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    #[serde(default)]
    init_containers: Vec<Container>,
    containers: Vec<Container>,
}

#[derive(Deserialize)]
struct Container {
    #[serde(default)]
    env: Vec<Variable>,
}

#[derive(Deserialize)]
struct Variable {
    name: String,
    /// Absent where the value comes from elsewhere, such as a field of the pod.
    value: Option<String>,
}

impl Pod {
    /// Reads a file.
    ///
    /// # Errors
    /// Where it is no Pod manifest, or no container of it is a sidecar; with the file's name.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    /// Reads a manifest's text.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn parse(text: &str) -> Result<Self> {
        let Manifest { kind, metadata, spec } = serde_yaml::from_str(text).context("not a Pod manifest")?;
        anyhow::ensure!(kind == "Pod", "a {kind}, not a Pod");
        let sidecar = spec
            .init_containers
            .into_iter()
            .chain(spec.containers)
            .find(|container| container.env.iter().any(|variable| variable.name == ROUTER))
            .with_context(|| format!("no container has {ROUTER} in its env: none is a sidecar"))?;
        let variables = sidecar.env.into_iter().filter_map(|v| v.value.map(|value| (v.name, value)));
        let mut annotations = metadata.annotations;
        Ok(Self {
            name: metadata.name,
            namespace: metadata.namespace.unwrap_or_else(|| "default".to_owned()),
            exports: annotations.remove(EXPORTS).unwrap_or_default(),
            imports: annotations.remove(IMPORTS).unwrap_or_default(),
            variables: variables.collect(),
        })
    }

    /// A variable of the sidecar.
    ///
    /// # Errors
    /// Where the sidecar has no such variable with a plain value.
    pub fn variable(&self, name: &str) -> Result<&str> {
        self.variables
            .get(name)
            .map(String::as_str)
            .with_context(|| format!("the sidecar of {} has no {name} in its env", self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "kind: Pod\nmetadata:\n  name: p\n  annotations:\n    servicekeel.io/exported-services: |\n      services:\n        - name: s\nspec:\n  initContainers:\n    - name: x\n      env: [ { name: SIDECAR_SERVER_LISTEN, value: /r.sock }, { name: POD_NAME, valueFrom: {} } ]\n  containers: [ { name: app } ]\n";

    #[test]
    fn reads_what_the_demo_needs() {
        let pod = Pod::parse(POD).unwrap();
        assert_eq!((pod.name.as_str(), pod.namespace.as_str()), ("p", "default"));
        assert_eq!(pod.exports, "services:\n  - name: s\n");
        assert_eq!(pod.imports, "");
        assert_eq!(pod.variable(ROUTER).unwrap(), "/r.sock");
        assert!(pod.variable("POD_NAME").unwrap_err().to_string().contains("POD_NAME"));
    }

    #[test]
    fn says_what_is_no_pod() {
        let error = |text: &str| format!("{:#}", Pod::parse(text).unwrap_err());
        assert!(error(&POD.replace("kind: Pod", "kind: Service")).contains("a Service, not a Pod"));
        assert!(error(&POD.replace("SIDECAR_SERVER_LISTEN", "OTHER")).contains("none is a sidecar"));
        assert!(error("kind: [").contains("not a Pod manifest"));
    }
}
