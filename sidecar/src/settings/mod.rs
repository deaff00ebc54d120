//! What a sidecar is started with.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ipnet::Ipv4Net;
use servicekeel_core::handoff::Pod;
use servicekeel_core::name::ClusterName;

pub mod args;
pub mod interfaces;
pub mod resolv;

/// The settings of one sidecar. [`args`] reads them from flags and the environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Addresses for imported Services, inside 127.0.0.0/8.
    pub range: Ipv4Net,
    /// Where DNS is answered; `None`: nowhere.
    pub dns_addr: Option<SocketAddr>,
    /// Where names that are not imported are asked for; never `dns_addr` itself.
    pub upstreams: Vec<SocketAddr>,
    /// The router's socket.
    pub router: PathBuf,
    /// The pod's cluster; `None`: what the router says.
    pub cluster: Option<ClusterName>,
    /// Where leases and the last good state are kept; `None`: nowhere.
    pub state_dir: Option<PathBuf>,
    /// Where `/livez`, `/readyz`, `/metrics` and `/status` are served; `None`: nowhere.
    pub admin: Option<SocketAddr>,
    /// Whether `/status` is answered to this machine only: it names what is imported, and outside of a pod the address
    /// is one of the whole network.
    pub private_status: bool,
    /// The pod.
    pub pod: Pod,
    /// The pod's addresses, where its exports are dialled before its loopback. The router takes the first 16.
    pub addresses: Vec<IpAddr>,
    /// The search domains of the pod's resolver.
    pub search: Vec<ClusterName>,
}
