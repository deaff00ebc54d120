//! The controller's two ways to work: follow the API, or make one pass.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fmt;
use std::future::{Future, ready};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, Stream, StreamExt};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Namespace, Pod, Service};
use kube::runtime::controller::{self, applier};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Api, Client, Resource, ResourceExt};
use prometheus_client::registry::Registry;
use servicekeel_core::name::Label;
use servicekeel_runtime::admin::{self, Admin};
use servicekeel_runtime::ready::Readiness;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::convert::{trim_namespace, trim_pod, trim_service};
use crate::error;
use crate::reconcile::{Done, Reconciler, printed, step};
use crate::watch::{Mirror, Object, follow, list};

/// A pod is looked at this long after the last change that concerns it, so that changes which come together make one
/// write.
const DEBOUNCE: Duration = Duration::from_millis(200);
/// Writes at once.
const WRITERS: u16 = 4;
/// What writes that are under way get to end, once the program shall.
const GRACE: Duration = Duration::from_millis(1500);
/// The most notes in `/status`.
const MAX_NOTES: usize = 256;

/// Where a dry run prints.
pub type Output = Box<dyn io::Write + Send>;

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The API's address, for what is told of it.
    pub server: String,
    /// The one namespace that is followed; `None`: all.
    pub namespace: Option<Label>,
    /// Make one pass and end.
    pub once: bool,
    /// Print instead of writing.
    pub dry_run: bool,
    /// Where the admin endpoint is served while the API is followed; `None`: nowhere.
    pub admin: Option<SocketAddr>,
}

/// Why the controller ended.
#[derive(Debug)]
pub enum RunError {
    /// One pass: the API at this address did not answer.
    List(String, Box<kube::Error>),
    /// One pass: there is no such namespace.
    NoNamespace(Label),
    /// One pass: so many pods could not be written. The log has the reasons.
    Failed(usize),
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::List(server, error) => {
                write!(f, "cannot list objects at {server}: {}", error::of_call(error))
            }
            Self::NoNamespace(name) => write!(f, "namespace {name} not found"),
            Self::Failed(pods) => write!(f, "failed to write the exports of {pods} pods"),
        }
    }
}

impl std::error::Error for RunError {}

/// Does what `settings` say until it is done or `shutdown` resolves. A dry run prints to `output`.
///
/// While the API is unreachable it waits, and catches up in one pass when the API is back. An admin address that is taken
/// is retried; meanwhile everything else goes on.
///
/// # Errors
/// [`RunError`].
pub async fn run(
    settings: Settings,
    client: Client,
    output: Output,
    shutdown: impl Future<Output = &'static str>,
) -> Result<(), RunError> {
    let output = settings.dry_run.then_some(output);
    if settings.once {
        return tokio::select! {
            biased;
            signal = shutdown => { tracing::info!("shutting down on {signal}"); Ok(()) }
            result = pass(&settings, client, output) => result,
        };
    }
    let (services, namespaces, pods) =
        (Mirror::new(trim_service), Mirror::new(trim_namespace), Mirror::new(trim_pod));
    let stores = (services.store(), namespaces.store(), pods.store());
    let reconciler = Arc::new(Reconciler::new(client.clone(), stores.0.clone(), stores.1.clone(), output));
    let readiness = Readiness::new();
    let known = known(&readiness, stores.clone());
    let serving = settings.admin.map(|addr| serve(addr, readiness, &reconciler, stores.2.clone()));
    let admin = async move {
        if let Some(serving) = serving
            && let Err(error) = serving.await
        {
            tracing::error!(%error, "admin endpoint failed; everything else keeps running");
        }
    };

    let (stop, stopped) = oneshot::channel::<Infallible>();
    let queue = changes(&settings, client, (services, namespaces, pods), &stores.2, &reconciler);
    let passes = applier(
        |pod, reconciler| Box::pin(step(pod, reconciler)),
        |pod, _error, reconciler: Arc<Reconciler>| reconciler.pause(&pod),
        Arc::clone(&reconciler),
        stores.2,
        queue.map(Ok::<_, Infallible>).take_until(stopped),
        controller::Config::default().debounce(DEBOUNCE).concurrency(WRITERS),
    );
    // Whatever there is to say of a pass, the reconciler has said.
    let mut passes = pin!(passes.for_each(|_| ready(())));
    let mut admin = pin!(admin);
    let mut known = pin!(known);
    let (mut all_known, mut admin_ended) = (false, false);
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            biased;
            signal = &mut shutdown => {
                tracing::info!("shutting down on {signal}");
                break;
            }
            () = &mut admin, if !admin_ended => admin_ended = true,
            () = &mut known, if !all_known => all_known = true,
            () = &mut passes => break,
        }
    }
    drop(stop);
    let ended = async {
        tokio::select! {
            biased;
            () = &mut passes => {}
            () = reconciler.idle() => {}
        }
    };
    if timeout(GRACE, ended).await.is_err() {
        tracing::warn!("exiting with a write in progress");
    }
    Ok(())
}

type Stores = (Store<Service>, Store<Namespace>, Store<Pod>);

/// Says that the controller is ready when each kind has been read once.
fn known(readiness: &Readiness, (services, namespaces, pods): Stores) -> impl Future<Output = ()> + use<> {
    let waits = ["the list of Services", "the list of namespaces", "the list of pods"];
    let [services_wait, namespaces_wait, pods_wait] = waits.map(|what| readiness.wait_for(what));
    async move {
        // An error says that the loop is gone, and this with it.
        tokio::join!(
            async { drop((services.wait_until_ready().await, services_wait)) },
            async { drop((namespaces.wait_until_ready().await, namespaces_wait)) },
            async { drop((pods.wait_until_ready().await, pods_wait)) },
        );
        tracing::info!("watching {} Services and {} pods with a sidecar", services.len(), pods.len());
    }
}

fn serve(
    addr: SocketAddr,
    readiness: Readiness,
    reconciler: &Arc<Reconciler>,
    pods: Store<Pod>,
) -> impl Future<Output = io::Result<()>> + use<> {
    let mut registry = Registry::default();
    reconciler.register(&mut registry);
    let reconciler = Arc::clone(reconciler);
    let admin = Admin::new(readiness, registry, move || std::future::ready(status(&reconciler, &pods)));
    admin::serve(addr, admin, "--admin")
}

fn status(reconciler: &Reconciler, pods: &Store<Pod>) -> String {
    let (writes, failures) = reconciler.counts();
    let notes: Vec<String> =
        reconciler.memory().notes().take(MAX_NOTES).map(|note| printed(note).trim_end().to_owned()).collect();
    serde_json::json!({ "pods": pods.len(), "writes": writes, "write_failures": failures, "notes": notes })
        .to_string()
}

/// The pods that are to be looked at, as the API tells of changes.
fn changes(
    settings: &Settings,
    client: Client,
    (services, namespaces, pods): (Mirror<Service>, Mirror<Namespace>, Mirror<Pod>),
    store: &Store<Pod>,
    reconciler: &Arc<Reconciler>,
) -> impl Stream<Item = ObjectRef<Pod>> + Send + use<> {
    let scope = Scope::new(settings, client);
    let by_services = store.clone();
    let services = follow(scope.objects(), None, services, &settings.server).map(move |changed| {
        pods_of(&by_services, changed.into_iter().filter_map(|key| key.namespace).collect())
    });
    let by_namespaces = store.clone();
    let namespaces = follow(scope.namespaces(), scope.fields(), namespaces, &settings.server)
        .map(move |changed| pods_of(&by_namespaces, changed.into_iter().map(|key| key.name).collect()));
    let (store, reconciler) = (store.clone(), Arc::clone(reconciler));
    let pods = follow(scope.objects(), None, pods, &settings.server).map(move |mut changed| {
        changed.retain(|pod| {
            let there = store.get(pod).is_some();
            if !there {
                reconciler.forget(pod);
            }
            there
        });
        changed
    });
    stream::select_all([services.boxed(), namespaces.boxed(), pods.boxed()]).flat_map(stream::iter)
}

/// A Service that changed may concern every pod of its namespace: one that it selects now, or did before.
fn pods_of(pods: &Store<Pod>, namespaces: BTreeSet<String>) -> Vec<ObjectRef<Pod>> {
    let here =
        |pod: &Pod| pod.metadata.namespace.as_ref().is_some_and(|namespace| namespaces.contains(namespace));
    pods.state_filter(here).iter().map(|pod| ObjectRef::from_obj(&**pod)).collect()
}

/// The part of the API that is asked.
struct Scope {
    client: Client,
    namespace: Option<Label>,
    fields: Option<String>,
}

impl Scope {
    fn new(settings: &Settings, client: Client) -> Self {
        let fields = settings.namespace.as_ref().map(|name| format!("metadata.name={name}"));
        Self { client, namespace: settings.namespace.clone(), fields }
    }

    fn objects<K: Object + Resource<Scope = NamespaceResourceScope>>(&self) -> Api<K> {
        match &self.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace.as_str()),
            None => Api::all(self.client.clone()),
        }
    }

    fn namespaces(&self) -> Api<Namespace> {
        Api::all(self.client.clone())
    }

    fn fields(&self) -> Option<&str> {
        self.fields.as_deref()
    }
}

async fn pass(settings: &Settings, client: Client, output: Option<Output>) -> Result<(), RunError> {
    let failed = |error| RunError::List(settings.server.clone(), Box::new(error));
    let scope = Scope::new(settings, client.clone());
    let services = list(scope.objects(), None, Mirror::new(trim_service)).await.map_err(failed)?;
    let namespaces =
        list(scope.namespaces(), scope.fields(), Mirror::new(trim_namespace)).await.map_err(failed)?;
    if let Some(name) = settings.namespace.clone().filter(|_| namespaces.is_empty()) {
        return Err(RunError::NoNamespace(name));
    }
    let pods = list(scope.objects(), None, Mirror::new(trim_pod)).await.map_err(failed)?;
    let reconciler = Reconciler::new(client, services, namespaces, output);
    let mut pods = pods.state();
    pods.sort_unstable_by_key(|pod| (pod.namespace(), pod.name_any()));
    let mut results = Vec::with_capacity(pods.len());
    for pod in &pods {
        results.push(reconciler.reconcile(pod).await);
    }
    let count =
        |wanted| results.iter().filter(|result| matches!(result, Ok(done) if *done == wanted)).count();
    let failed = results.iter().filter(|result| result.is_err()).count();
    tracing::info!(
        "{} pods with a sidecar: {} written, {} to be written, {} skipped, {failed} failed, {} unchanged",
        pods.len(),
        count(Done::Wrote),
        count(Done::WouldWrite),
        count(Done::LeftAlone),
        count(Done::Nothing),
    );
    if failed > 0 { Err(RunError::Failed(failed)) } else { Ok(()) }
}
