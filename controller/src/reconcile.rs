//! One pod: what it should export, whether that is what stands there, and the write.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Pod, Service};
use kube::api::{Patch, PatchParams};
use kube::core::{ObjectMeta, PartialObjectMetaExt};
use kube::runtime::controller::Action;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Api, Client, ResourceExt};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use servicekeel_core::annotation::Defaults;
use servicekeel_core::name::ClusterName;
use servicekeel_core::plan::{self, EXPORT, EXPORTED_SERVICES, Plan};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::convert::{self, Owner};
use crate::memory::{Memory, Note, PodKey, Written};
use crate::run::Output;
use crate::{FIELD_MANAGER, error};

/// For one write and its answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a pod's annotation is not as it should be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReconcileError {
    #[error("{}", error::of_call(.0))]
    Api(#[from] kube::Error),
    #[error("the API did not answer within {} s", WRITE_TIMEOUT.as_secs())]
    Timeout,
    #[error("watch ended")]
    Ended,
}

/// What a pass over a pod came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    /// It is as it should be, or not known well enough yet.
    Nothing,
    /// The annotation was written, or taken away.
    Wrote,
    /// It would have been, were this not a dry run.
    WouldWrite,
    /// Another field manager's is left alone.
    LeftAlone,
}

/// What should happen to a pod's annotation.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Nothing,
    Write,
    LeaveAlone(String),
}

/// Makes the annotations of pods what their Services say.
pub(crate) struct Reconciler {
    client: Client,
    services: Store<Service>,
    namespaces: Store<Namespace>,
    /// Where a dry run prints; `None`: it is none.
    dry_run: Option<Mutex<Output>>,
    memory: Mutex<Memory>,
    writes: Counter,
    failures: Counter,
    /// Writes that are under way.
    writing: watch::Sender<usize>,
}

/// A write that is under way.
struct Writing<'r>(&'r watch::Sender<usize>);

impl<'r> Writing<'r> {
    fn begin(writing: &'r watch::Sender<usize>) -> Self {
        writing.send_modify(|writes| *writes += 1);
        Self(writing)
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|writes| *writes -= 1);
    }
}

impl Reconciler {
    /// `dry_run`: where to print what would be written.
    pub(crate) fn new(
        client: Client,
        services: Store<Service>,
        namespaces: Store<Namespace>,
        dry_run: Option<Output>,
    ) -> Self {
        let (writes, failures) = (Counter::default(), Counter::default());
        let (dry_run, memory, writing) =
            (dry_run.map(Mutex::new), Mutex::default(), watch::Sender::default());
        Self { client, services, namespaces, dry_run, memory, writes, failures, writing }
    }

    /// Resolves once no write is under way.
    pub(crate) async fn idle(&self) {
        // The sender is here as long as this is.
        let _ = self.writing.subscribe().wait_for(|writes| *writes == 0).await;
    }

    /// Adds the counters to the metrics.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let mut counter = |name: &str, help: &str, counter: &Counter| {
            registry.register(format!("servicekeel_controller_{name}"), help, counter.clone());
        };
        counter("writes", "Annotations written or removed", &self.writes);
        counter("write_failures", "Writes that the API server rejected or did not answer", &self.failures);
    }

    /// Writes that succeeded, and those that failed.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.writes.get(), self.failures.get())
    }

    pub(crate) fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the pod's annotation what it should be: one write at most, none where nothing changed.
    ///
    /// # Errors
    /// The write's. The caller comes back after [`Self::pause`].
    pub(crate) async fn reconcile(&self, pod: &Pod) -> Result<Done, ReconcileError> {
        // Before all is known, a Service that is not there yet would look like one that is gone.
        self.services.wait_until_ready().await.map_err(|_| ReconcileError::Ended)?;
        self.namespaces.wait_until_ready().await.map_err(|_| ReconcileError::Ended)?;

        let key = key(pod);
        let Some(plan) = self.plan(pod, &key.namespace) else { return Ok(Done::Nothing) };
        let wanted = self.defaults(&key.namespace).and_then(|defaults| plan.annotation(&defaults));
        let unwanted = plan.left_out.iter().filter(|left_out| !left_out.is_wanted());
        let mut notes: BTreeSet<Note> = unwanted
            .map(|left_out| Note::LeftOut { namespace: key.namespace.clone(), what: left_out.to_string() })
            .collect();
        let result = match decide(pod, wanted.as_ref()) {
            Decision::Nothing => Ok(Done::Nothing),
            Decision::LeaveAlone(manager) => {
                notes.insert(Note::LeftAlone { pod: key.clone(), manager });
                Ok(Done::LeftAlone)
            }
            Decision::Write if self.dry_run.is_some() => {
                notes.insert(Note::Would { pod: key.clone(), write: wanted });
                Ok(Done::WouldWrite)
            }
            // The copy of the pod is older than the last write, which was this one.
            Decision::Write if self.memory().written(&key) == Some(&written(pod, &wanted)) => {
                Ok(Done::Nothing)
            }
            Decision::Write => self.write(pod, &key, wanted, &mut notes).await,
        };
        let new = self.memory().note(&key, notes);
        new.iter().for_each(|note| self.tell(&key, note));
        result
    }

    /// `None` while the namespace is not known: it may have opted out.
    fn plan(&self, pod: &Pod, namespace: &str) -> Option<Plan> {
        if !convert::runs_sidecar(pod) {
            return Some(Plan::default());
        }
        let known = self.namespaces.get(&ObjectRef::new(namespace))?;
        let export = known.annotations().get(EXPORT).cloned();
        let namespace = plan::Namespace { defaults: self.defaults(namespace)?, export };
        let here = |service: &Service| service.metadata.namespace == pod.metadata.namespace;
        let services: Vec<_> =
            self.services.state_filter(here).iter().map(|service| convert::service(service)).collect();
        Some(plan::plan(&namespace, &services, &convert::pod(pod)))
    }

    /// The cluster's name is for the sidecar to say: the annotation does not name it, so any stands here.
    fn defaults(&self, namespace: &str) -> Option<Defaults> {
        Some(Defaults { namespace: namespace.parse().ok()?, cluster: ClusterName::fallback() })
    }

    async fn write(
        &self,
        pod: &Pod,
        key: &PodKey,
        wanted: Option<String>,
        notes: &mut BTreeSet<Note>,
    ) -> Result<Done, ReconcileError> {
        let _under_way = Writing::begin(&self.writing);
        // What an earlier apply set and this one does not name is taken away.
        let meta = ObjectMeta {
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            // Another pod of this name is another pod.
            uid: pod.metadata.uid.clone(),
            annotations: wanted.clone().map(|text| [(EXPORTED_SERVICES.to_owned(), text)].into()),
            ..ObjectMeta::default()
        };
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &key.namespace);
        let (params, patch) =
            (PatchParams::apply(FIELD_MANAGER), Patch::Apply(meta.into_request_partial::<Pod>()));
        let answer = timeout(WRITE_TIMEOUT, api.patch_metadata(&key.name, &params, &patch)).await;
        let failure = match answer {
            Ok(Ok(_)) => {
                self.writes.inc();
                let text = if wanted.is_some() { "exports written" } else { "exports removed" };
                tracing::info!(parent: None, "{key}: {text}");
                self.memory().wrote(key, written(pod, &wanted));
                return Ok(Done::Wrote);
            }
            Ok(Err(kube::Error::Api(status))) if status.is_not_found() => return Ok(Done::Nothing),
            Ok(Err(error)) => {
                // Somebody took the annotation between the watch and the write.
                if let Some(manager) = conflict(&error) {
                    notes.insert(Note::LeftAlone { pod: key.clone(), manager });
                    return Ok(Done::LeftAlone);
                }
                ReconcileError::Api(error)
            }
            Err(_) => ReconcileError::Timeout,
        };
        self.failures.inc();
        notes.insert(Note::Failed(failure.to_string()));
        Err(failure)
    }

    /// When to come back to the pod after a failed write.
    pub(crate) fn pause(&self, pod: &Pod) -> Action {
        Action::requeue(self.memory().failed(&key(pod)))
    }

    /// The pod is gone, or of no concern any more.
    pub(crate) fn forget(&self, pod: &ObjectRef<Pod>) {
        let namespace = pod.namespace.clone().unwrap_or_default();
        self.memory().forget(&PodKey { namespace, name: pod.name.clone() });
    }

    fn tell(&self, pod: &PodKey, note: &Note) {
        if let Some(output) = &self.dry_run {
            let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = output.write_all(printed(note).as_bytes()).and_then(|()| output.flush()) {
                tracing::warn!(parent: None, "cannot print: {error}");
            }
            return;
        }
        match note {
            Note::LeftOut { .. } => tracing::info!(parent: None, "{}", printed(note).trim_end()),
            Note::LeftAlone { .. } => tracing::warn!(parent: None, "{}", printed(note).trim_end()),
            Note::Failed(why) => {
                tracing::warn!(parent: None, "{pod}: cannot write exports; retrying: {why}")
            }
            Note::Would { .. } => {}
        }
    }
}

fn key(pod: &Pod) -> PodKey {
    PodKey { namespace: pod.namespace().unwrap_or_default(), name: pod.name_any() }
}

fn written(pod: &Pod, text: &Option<String>) -> Written {
    Written { over: pod.resource_version(), text: text.clone() }
}

fn decide(pod: &Pod, wanted: Option<&String>) -> Decision {
    if pod.annotations().get(EXPORTED_SERVICES) == wanted {
        return Decision::Nothing;
    }
    match convert::owner(pod) {
        Owner::Nobody | Owner::Us => Decision::Write,
        // Exports by hand of a pod that no Service selects: nothing that we would have to say.
        Owner::Other(_) if wanted.is_none() => Decision::Nothing,
        Owner::Other(manager) => Decision::LeaveAlone(manager),
    }
}

/// The field manager with which an apply conflicts.
fn conflict(error: &kube::Error) -> Option<String> {
    let kube::Error::Api(status) = error else { return None };
    let causes = &status.details.as_ref()?.causes;
    let cause = causes.iter().find(|cause| cause.reason == "FieldManagerConflict")?;
    // As in: conflict with "kubectl-edit" using v1
    Some(cause.message.split('"').nth(1).unwrap_or("unknown").to_owned())
}

/// A note, as lines of text.
pub(crate) fn printed(note: &Note) -> String {
    match note {
        Note::LeftOut { namespace, what } => format!("{namespace}/{what}; not exported\n"),
        Note::LeftAlone { pod, manager } => format!(
            "{pod}: skipped: {EXPORTED_SERVICES} is owned by field manager {manager}; remove the annotation to let this controller manage it\n"
        ),
        Note::Failed(why) => format!("cannot write exports: {why}\n"),
        Note::Would { pod, write: None } => format!("{pod}: {EXPORTED_SERVICES} would be removed\n"),
        Note::Would { pod, write: Some(text) } => {
            let lines: String = text.lines().map(|line| format!("  {line}\n")).collect();
            format!("{pod}: {EXPORTED_SERVICES} would be\n{lines}")
        }
    }
}

impl std::fmt::Debug for Reconciler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reconciler").field("dry_run", &self.dry_run.is_some()).finish_non_exhaustive()
    }
}

/// As the loop calls it.
pub(crate) async fn step(pod: Arc<Pod>, reconciler: Arc<Reconciler>) -> Result<Action, ReconcileError> {
    reconciler.reconcile(&pod).await.map(|_| Action::await_change())
}
