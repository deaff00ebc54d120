//! What a simulation consists of: nodes, pods, and the Services that pods export and import.

use std::collections::BTreeSet;
use std::fmt;
use std::fmt::Write;
use std::net::Ipv4Addr;

use servicekeel_core::name::{Protocol, ServiceName, ServicePort};
use servicekeel_runtime::net::tcp::{BETWEEN_ROUTERS, TcpOptions};

/// A node with its router.
#[derive(Debug, Clone, Copy)]
pub struct NodeSpec {
    /// Its name.
    pub name: &'static str,
    /// Its cluster.
    pub cluster: &'static str,
    /// The nodes whose routers its router dials.
    pub dials: &'static [&'static str],
    /// Whether its router can be dialled.
    pub listens: bool,
}

/// A pod with its sidecar.
#[derive(Debug, Clone, Copy)]
pub struct PodSpec {
    /// Its name.
    pub name: &'static str,
    /// Its namespace.
    pub namespace: &'static str,
    /// Where it runs.
    pub node: &'static str,
    /// Its address, besides its loopback.
    pub address: Ipv4Addr,
}

/// The nodes and pods of a simulation.
#[derive(Debug, Clone)]
pub struct Stage {
    /// The nodes.
    pub nodes: Vec<NodeSpec>,
    /// The pods.
    pub pods: Vec<PodSpec>,
    /// Nodes that run no router: what they do to the others the script says. The others trust their clusters.
    pub hostile: Vec<NodeSpec>,
    /// Whether sidecars keep their leases over a restart.
    pub state: bool,
    /// Whether the pods' imports have six addresses only.
    pub narrow: bool,
    /// What the kernels are asked for of connections between nodes: the routers ask for [`BETWEEN_ROUTERS`].
    pub tcp: TcpOptions,
}

/// One port of a Service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port {
    /// The Service's name.
    pub name: &'static str,
    /// Its namespace.
    pub namespace: &'static str,
    /// Its cluster.
    pub cluster: &'static str,
    /// UDP instead of TCP.
    pub udp: bool,
    /// The port.
    pub port: u16,
    /// The container's port.
    pub target: u16,
}

impl Port {
    /// A TCP port, the same in the container.
    pub const fn tcp(name: &'static str, cluster: &'static str, port: u16) -> Self {
        Self { name, namespace: "default", cluster, udp: false, port, target: port }
    }

    /// A UDP port, the same in the container.
    pub const fn udp(name: &'static str, cluster: &'static str, port: u16) -> Self {
        Self { udp: true, ..Self::tcp(name, cluster, port) }
    }

    /// The name that is good everywhere.
    pub fn long_name(&self) -> String {
        format!("{}.{}.{}", self.name, self.namespace, self.cluster)
    }

    fn protocol(&self) -> &'static str {
        if self.udp { "UDP" } else { "TCP" }
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.long_name(), self.port, self.protocol())
    }
}

/// What the programs call it.
///
/// # Panics
/// Where it has no name that is one.
pub fn service_port(port: &Port) -> ServicePort {
    let service = ServiceName {
        name: port.name.parse().expect("a Service's name"),
        namespace: port.namespace.parse().expect("a namespace"),
        cluster: port.cluster.parse().expect("a cluster's name"),
    };
    let protocol = if port.udp { Protocol::Udp } else { Protocol::Tcp };
    ServicePort { service, port: port.port.try_into().expect("a port's number"), protocol }
}

/// The annotation that has these ports.
pub(crate) fn annotation(ports: &BTreeSet<Port>) -> String {
    let mut text = String::from(if ports.is_empty() { "services: []\n" } else { "services:\n" });
    let mut last = None;
    for port in ports {
        let service = (port.name, port.namespace, port.cluster);
        if last != Some(service) {
            last = Some(service);
            let _ = writeln!(text, "  - name: {}", port.name);
            let _ = writeln!(text, "    namespace: {}", port.namespace);
            let _ = writeln!(text, "    cluster: {}", port.cluster);
            let _ = writeln!(text, "    ports:");
        }
        let (protocol, number, target) = (port.protocol(), port.port, port.target);
        let _ = writeln!(
            text,
            "      - {{ name: p{number}{}, port: {number}, protocol: {protocol}{} }}",
            protocol.to_lowercase(),
            // An import has none.
            if target == number { String::new() } else { format!(", targetport: {target}") }
        );
    }
    text
}

/// The usual stage: two clusters with a node each. The node of cluster B can't be dialled and dials the other one.
///
/// - `server` and `near` are pods of node `a-1` in cluster A.
/// - `client` is a pod of node `b-1` in cluster B.
pub fn two_clusters() -> Stage {
    let node = |name, cluster, dials, listens| NodeSpec { name, cluster, dials, listens };
    let pod = |name, node, address| PodSpec { name, namespace: "default", node, address };
    Stage {
        nodes: vec![node("a-1", CLUSTER_A, &[], true), node("b-1", CLUSTER_B, &["a-1"], false)],
        pods: vec![
            pod("server", "a-1", Ipv4Addr::new(10, 1, 0, 2)),
            pod("near", "a-1", Ipv4Addr::new(10, 1, 0, 3)),
            pod("client", "b-1", Ipv4Addr::new(10, 2, 0, 2)),
        ],
        hostile: Vec::new(),
        state: false,
        narrow: false,
        tcp: BETWEEN_ROUTERS,
    }
}

/// One Service with three endpoints: `server` and `twin` on node `a-1`, `far` on `a-2`, all in cluster A. The router of
/// `b-1`, where `client` is, dials both nodes; that of `a-1`, where `near` is, dials `a-2`.
pub fn three_endpoints() -> Stage {
    let node = |name, cluster, dials, listens| NodeSpec { name, cluster, dials, listens };
    let pod = |name, node, address| PodSpec { name, namespace: "default", node, address };
    Stage {
        nodes: vec![
            node("a-1", CLUSTER_A, &["a-2"], true),
            node("a-2", CLUSTER_A, &[], true),
            node("b-1", CLUSTER_B, &["a-1", "a-2"], false),
        ],
        pods: vec![
            pod("server", "a-1", Ipv4Addr::new(10, 1, 0, 2)),
            pod("twin", "a-1", Ipv4Addr::new(10, 1, 0, 4)),
            pod("far", "a-2", Ipv4Addr::new(10, 3, 0, 2)),
            pod("near", "a-1", Ipv4Addr::new(10, 1, 0, 3)),
            pod("client", "b-1", Ipv4Addr::new(10, 2, 0, 2)),
        ],
        hostile: Vec::new(),
        state: false,
        narrow: false,
        tcp: BETWEEN_ROUTERS,
    }
}

/// The cluster of `a-1`.
pub const CLUSTER_A: &str = "cluster-a.local";
/// The cluster of `b-1`.
pub const CLUSTER_B: &str = "cluster-b.local";
/// What `server` exports.
pub const WEB: Port = Port::tcp("web", CLUSTER_A, 8080);
/// What `server` exports, of another number in the container.
pub const DATABASE: Port = Port { target: 15432, ..Port::tcp("db", CLUSTER_A, 5432) };
/// What `server` exports over UDP.
pub const ECHO: Port = Port::udp("echo", CLUSTER_A, 9000);
/// What `client` exports.
pub const METRICS: Port = Port::tcp("metrics", CLUSTER_B, 9100);
/// What `client` exports over UDP.
pub const SYSLOG: Port = Port::udp("metrics", CLUSTER_B, 514);
