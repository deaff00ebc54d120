//! The nodes, pods and programs of a simulation, and what a script can do with them.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use servicekeel_core::handoff;
use servicekeel_core::name::RouterId;
use servicekeel_router::settings as router;
use servicekeel_sidecar::settings::Settings;
use servicekeel_sidecar::source::Annotations;
use tokio::sync::{oneshot, watch};
use tokio::time::{sleep, timeout};

use crate::dns::SimDns;
use crate::host::{self, Host, Programs};
use crate::net::wire::{WINDOWS, Wires};
use crate::net::{Kernel, Process, SimNet};
use crate::network::Network;
use crate::oracle::{FORGOTTEN, Oracle, SETTLED};
use crate::random::Random;
use crate::simulation::{Fault, Faults};
use crate::stage::{NodeSpec, PodSpec, Port, Stage, annotation};
use crate::{datagram, flow, identities};

mod jobs;

use jobs::Stranger;

pub(crate) const PEERS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 7443);
pub(crate) const SOCKET: &str = "/run/router.sock";
/// Where a pod's DNS answers.
pub(crate) const DNS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)), 53);
/// How long a program may take to end when it is asked to: its own 2 s, and what comes around them.
const SHUTDOWN: Duration = Duration::from_millis(2500);
/// How long the last ends of connections are under way.
const LINGER: Duration = Duration::from_secs(3);

/// A program that runs.
struct Running {
    process: Process,
    stop: oneshot::Sender<()>,
    ended: oneshot::Receiver<()>,
}

struct Node {
    spec: NodeSpec,
    kernel: Kernel,
    programs: Programs,
    wires: Wires,
    settings: watch::Sender<Arc<router::Settings>>,
    random: Mutex<Random>,
    router: Mutex<Option<Running>>,
}

struct Pod {
    spec: PodSpec,
    net: SimNet,
    settings: Settings,
    annotations: watch::Sender<Arc<Annotations>>,
    sidecar: Mutex<Option<Running>>,
    wanted: Mutex<Wanted>,
}

#[derive(Default)]
struct Wanted {
    exports: BTreeSet<Port>,
    imports: BTreeSet<Port>,
    served: BTreeSet<Port>,
}

/// Everything of one simulation.
pub struct World {
    nodes: BTreeMap<&'static str, Node>,
    pods: BTreeMap<&'static str, Pod>,
    strangers: BTreeMap<&'static str, Stranger>,
    faults: Faults,
    cut: Mutex<BTreeSet<(&'static str, &'static str)>>,
    /// Watches.
    pub oracle: Oracle,
    /// For the script's own decisions.
    pub random: Mutex<Random>,
    jobs: Mutex<u64>,
    /// Removed with the simulation.
    _state: Option<tempfile::TempDir>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    pub(crate) fn new(
        random: &mut Random,
        stage: &Stage,
        network: &Network,
        faults: &Faults,
        oracle: &Oracle,
    ) -> (Self, Vec<(&'static str, Host)>) {
        let id = |spec: &NodeSpec| RouterId {
            cluster: spec.cluster.parse().expect("a cluster's name"),
            node: spec.name.parse().expect("a node's name"),
        };
        let all = stage.nodes.iter().chain(&stage.hostile);
        let identities = identities::make(&all.map(id).collect::<Vec<_>>());
        let state = stage.state.then(|| tempfile::tempdir().expect("a directory"));
        let mut hosts = Vec::new();
        let mut nodes = BTreeMap::new();
        for spec in &stage.nodes {
            let kernel = Kernel::new(1 << random.within(11..19));
            let (programs, host) = host::host();
            hosts.push((spec.name, host));
            let id = id(spec);
            let identity = identities.get(&id).cloned();
            let address = |name: &&str| router::Peer { address: format!("{name}:{}", PEERS.port()) };
            let config = router::Config {
                cluster: id.cluster,
                node: id.node,
                listen: router::Listen {
                    sidecars: SOCKET.into(),
                    peers: spec.listens.then_some(PEERS),
                    admin: None,
                },
                peers: spec.dials.iter().map(address).collect(),
                revoked: Vec::new(),
            };
            let settings = watch::Sender::new(Arc::new(router::Settings {
                config: Arc::new(config),
                identity,
                untimely: None,
                pending: Default::default(),
            }));
            let wires = Wires::new(network.wires(), &kernel, *random.pick(&WINDOWS));
            let (random, router) = (Mutex::new(random.fork()), Mutex::default());
            nodes.insert(spec.name, Node { spec: *spec, kernel, programs, wires, settings, random, router });
        }
        let mut pods = BTreeMap::new();
        for spec in &stage.pods {
            let node: &Node = nodes.get(spec.node).expect("the pod's node");
            let state_dir = state.as_ref().map(|directory| directory.path().join(spec.name));
            let range = if stage.narrow { "127.0.66.0/29" } else { "127.0.66.0/24" };
            let settings = sidecar_settings(spec, node.spec.cluster, range, state_dir);
            let net = SimNet::pod(&node.kernel, &[spec.address.into()]);
            let annotations = watch::Sender::default();
            let (sidecar, wanted) = Default::default();
            pods.insert(spec.name, Pod { spec: *spec, net, settings, annotations, sidecar, wanted });
        }
        let mut strangers = BTreeMap::new();
        for spec in &stage.hostile {
            let (stranger, host) = Stranger::new(&identities[&id(spec)], network);
            hosts.push((spec.name, host));
            strangers.insert(spec.name, stranger);
        }
        let (faults, oracle, random) = (faults.clone(), oracle.clone(), Mutex::new(random.fork()));
        let world = Self {
            nodes,
            pods,
            strangers,
            faults,
            cut: Mutex::default(),
            oracle,
            random,
            jobs: Mutex::default(),
            _state: state,
        };
        (world, hosts)
    }

    fn node(&self, name: &str) -> &Node {
        self.nodes.get(name).expect("a node of the stage")
    }

    fn pod(&self, name: &str) -> &Pod {
        self.pods.get(name).expect("a pod of the stage")
    }

    fn node_of(&self, pod: &str) -> &Node {
        self.node(self.pod(pod).spec.node)
    }

    /// The network of a pod, for its applications.
    pub fn net(&self, pod: &str) -> &SimNet {
        &self.pod(pod).net
    }

    /// How many sockets of each kind are open on a node.
    pub fn open(&self, node: &str) -> BTreeMap<&'static str, usize> {
        self.node(node).kernel.open()
    }

    /// Makes a node's kernel an older one, which does not say of which network namespace a socket is.
    pub fn age_kernel(&self, node: &str) {
        self.oracle.change(format_args!("the kernel of {node} is an older one"));
        self.node(node).kernel.age();
    }

    /// Starts the router of a node.
    pub async fn start_router(&self, name: &'static str) {
        let node = self.node(name);
        self.oracle.change(format_args!("the router of {name} starts"));
        let net = SimNet::node(&node.kernel, node.wires.clone());
        let (running, shutdown, ended) = running(&net);
        let seed = lock(&node.random).draw();
        let (settings, oracle) = (node.settings.subscribe(), self.oracle.clone());
        *lock(&node.router) = Some(running);
        let program = async move {
            if let Err(error) = servicekeel_router::run(settings, net, seed, shutdown).await {
                oracle.violate(format_args!("the router of {name} ends: {error}"));
            }
            let _ = ended.send(());
        };
        node.programs.start("router", program).await;
    }

    /// Kills the router of a node.
    pub async fn kill_router(&self, name: &'static str) {
        let node = self.node(name);
        self.oracle.change(format_args!("the router of {name} is killed"));
        kill(&node.router);
        node.programs.kill("router").await;
    }

    /// Ends the router of a node in good order.
    pub async fn stop_router(&self, name: &'static str) {
        let node = self.node(name);
        self.oracle.change(format_args!("the router of {name} is stopped"));
        let running = lock(&node.router).take();
        self.stopped(running, &format!("the router of {name}")).await;
        node.programs.kill("router").await;
    }

    /// Starts the sidecar of a pod.
    pub async fn start_sidecar(&self, name: &'static str) {
        let pod = self.pod(name);
        self.oracle.change(format_args!("the sidecar of {name} starts"));
        if pod.settings.state_dir.is_none() {
            self.oracle.forget_leases(name);
        }
        let net = pod.net.process(1337);
        let (running, shutdown, ended) = running(&net);
        let (settings, annotations, oracle) =
            (pod.settings.clone(), pod.annotations.subscribe(), self.oracle.clone());
        *lock(&pod.sidecar) = Some(running);
        let program = async move {
            let dns = SimDns(net.clone());
            let run = servicekeel_sidecar::run(settings, net, dns, annotations, shutdown);
            if let Err(error) = run.await {
                oracle.violate(format_args!("the sidecar of {name} ends: {error}"));
            }
            let _ = ended.send(());
        };
        self.node_of(name).programs.start(&sidecar_of(name), program).await;
    }

    /// Kills the sidecar of a pod.
    pub async fn kill_sidecar(&self, name: &'static str) {
        self.oracle.change(format_args!("the sidecar of {name} is killed"));
        kill(&self.pod(name).sidecar);
        self.node_of(name).programs.kill(&sidecar_of(name)).await;
    }

    /// Ends the sidecar of a pod in good order.
    pub async fn stop_sidecar(&self, name: &'static str) {
        self.oracle.change(format_args!("the sidecar of {name} is stopped"));
        let running = lock(&self.pod(name).sidecar).take();
        self.stopped(running, &format!("the sidecar of {name}")).await;
        self.node_of(name).programs.kill(&sidecar_of(name)).await;
    }

    async fn stopped(&self, running: Option<Running>, what: &str) {
        if let Some(Running { stop, ended, .. }) = running {
            let _ = stop.send(());
            if timeout(SHUTDOWN, ended).await.is_err() {
                self.oracle.violate(format_args!("{what} does not end within {SHUTDOWN:?}"));
            }
        }
    }

    /// Starts all routers and all sidecars.
    pub async fn start(&self) {
        self.start_all_but(&[]).await;
    }

    /// Starts all routers, and the sidecars of all pods that have one.
    pub async fn start_all_but(&self, without: &[&str]) {
        for name in self.nodes.keys() {
            self.start_router(name).await;
        }
        for name in self.pods.keys().filter(|pod| !without.contains(pod)) {
            self.start_sidecar(name).await;
        }
    }

    /// Says what a pod exports and imports.
    pub fn annotate(&self, pod: &str, exports: &[Port], imports: &[Port]) {
        let target = self.pod(pod);
        let mut wanted = lock(&target.wanted);
        wanted.exports = exports.iter().copied().collect();
        wanted.imports = imports.iter().copied().collect();
        let annotations = Annotations {
            exports: Some(annotation(&wanted.exports)),
            imports: Some(annotation(&wanted.imports)),
            ..Annotations::default()
        };
        drop(wanted);
        let list = |ports: &[Port]| ports.iter().map(Port::to_string).collect::<Vec<_>>().join(" ");
        self.oracle.change(format_args!("{pod} exports [{}], imports [{}]", list(exports), list(imports)));
        target.annotations.send_replace(Arc::new(annotations));
    }

    /// Gives a pod annotations of any text. What it wants after that is for the script to know.
    pub fn annotate_raw(&self, pod: &str, exports: &str, imports: &str) {
        let annotations = Annotations {
            exports: Some(exports.into()),
            imports: Some(imports.into()),
            ..Annotations::default()
        };
        self.oracle.change(format_args!("{pod} has other annotations"));
        self.pod(pod).annotations.send_replace(Arc::new(annotations));
    }

    /// Starts the application behind a port that a pod exports: at the pod's address, or only at its loopback.
    pub async fn serve(&self, pod: &'static str, port: Port, loopback: bool) {
        let target = self.pod(pod);
        self.oracle.change(format_args!("{pod} serves {port}"));
        lock(&target.wanted).served.insert(port);
        let ip = if loopback { Ipv4Addr::LOCALHOST } else { target.spec.address };
        let at = SocketAddr::new(ip.into(), port.target);
        let (net, oracle) = (target.net.process(1000), self.oracle.clone());
        let service = oracle.service(&port.to_string());
        let program = async move {
            let served = match port.udp {
                true => datagram::serve(net, at, service, oracle.clone()).await,
                false => flow::serve(net, at, service, oracle.clone()).await,
            };
            if let Err(error) = served {
                oracle.violate(format_args!("{pod} cannot serve {port}: {error}"));
            }
        };
        self.node_of(pod).programs.start(&application(pod, &port), program).await;
    }

    /// Kills that application.
    pub async fn unserve(&self, pod: &'static str, port: Port) {
        self.oracle.change(format_args!("{pod} no longer serves {port}"));
        lock(&self.pod(pod).wanted).served.remove(&port);
        self.oracle.kill_application(self.oracle.service(&port.to_string()));
        self.node_of(pod).programs.kill(&application(pod, &port)).await;
    }

    /// Does something to the network.
    pub fn fault(&self, fault: Fault) {
        let settles = if matches!(fault, Fault::Forget(..)) { FORGOTTEN } else { SETTLED };
        self.oracle.change_that_settles_within(settles, format_args!("{fault:?}"));
        match fault {
            Fault::Cut(a, b) => lock(&self.cut).insert(ordered(a, b)),
            Fault::Heal(a, b) => lock(&self.cut).remove(&ordered(a, b)),
            Fault::Forget(..) | Fault::Latency(..) => false,
        };
        self.faults.push(fault);
    }

    /// Whether a pod can reach a port that it wants, as things are now: a name of it should work.
    pub fn reachable(&self, pod: &str, port: &Port) -> bool {
        let client = self.pod(pod);
        let up = |pod: &Pod| lock(&pod.sidecar).is_some() && lock(&self.node(pod.spec.node).router).is_some();
        let offers = |pod: &Pod| {
            let wanted = lock(&pod.wanted);
            wanted.exports.contains(port) && wanted.served.contains(port)
        };
        up(client)
            && lock(&client.wanted).imports.contains(port)
            && self
                .pods
                .values()
                .any(|server| up(server) && offers(server) && self.joined(client.spec.node, server.spec.node))
    }

    fn joined(&self, a: &'static str, b: &'static str) -> bool {
        let dials = |a: &str, b: &str| self.node(a).spec.dials.contains(&b) && self.node(b).spec.listens;
        a == b || ((dials(a, b) || dials(b, a)) && !lock(&self.cut).contains(&ordered(a, b)))
    }

    /// Ends everything in good order, and sees to it that nothing is left.
    pub(crate) async fn end(&self) {
        for (a, b) in lock(&self.cut).clone() {
            self.fault(Fault::Heal(a, b));
        }
        for name in self.pods.keys() {
            self.stop_sidecar(name).await;
        }
        for name in self.nodes.keys() {
            self.stop_router(name).await;
        }
        for (name, pod) in &self.pods {
            let served = lock(&pod.wanted).served.clone();
            for port in served {
                self.unserve(name, port).await;
            }
        }
        sleep(LINGER).await;
        for (name, node) in &self.nodes {
            let open = node.kernel.open();
            if !open.is_empty() {
                self.oracle.violate(format_args!("sockets of {name} are open after the end: {open:?}"));
            }
        }
    }
}

/// SIGKILL: the program gets no chance to do anything more.
fn kill(program: &Mutex<Option<Running>>) {
    if let Some(running) = lock(program).take() {
        running.process.kill();
    }
}

fn running(net: &SimNet) -> (Running, impl Future<Output = ()> + Send + 'static, oneshot::Sender<()>) {
    let (stop, stopped) = oneshot::channel();
    let (done, ended) = oneshot::channel();
    let shutdown = async move {
        if stopped.await.is_err() {
            // It is to be killed, not asked.
            std::future::pending::<()>().await;
        }
    };
    (Running { process: net.process_of(), stop, ended }, shutdown, done)
}

fn sidecar_settings(
    spec: &PodSpec,
    cluster: &str,
    range: &str,
    state_dir: Option<std::path::PathBuf>,
) -> Settings {
    let namespace = spec.namespace;
    let search = [format!("{namespace}.svc.{cluster}"), format!("svc.{cluster}"), cluster.to_owned()];
    Settings {
        range: range.parse().expect("a range"),
        dns_addr: Some(DNS),
        upstreams: Vec::new(),
        router: SOCKET.into(),
        cluster: None,
        state_dir,
        admin: None,
        private_status: true,
        pod: handoff::Pod {
            name: spec.name.into(),
            namespace: namespace.parse().expect("a namespace"),
            uid: format!("uid-of-{}", spec.name),
        },
        addresses: vec![spec.address.into()],
        search: search.iter().map(|domain| domain.parse().expect("a domain")).collect(),
    }
}

fn ordered(a: &'static str, b: &'static str) -> (&'static str, &'static str) {
    if a < b { (a, b) } else { (b, a) }
}

fn sidecar_of(pod: &str) -> String {
    format!("sidecar of {pod}")
}

fn application(pod: &str, port: &Port) -> String {
    format!("{port} of {pod}")
}
