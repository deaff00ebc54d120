//! The pods of the manifests on one machine: what a pod has for itself and must share here, and what that changes.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use e2e::SidecarOptions;
use servicekeel_core::annotation::{self, Defaults, Export, Import, Parsed};
use servicekeel_core::name::ServicePort;

use crate::manifest::Pod;

/// The cluster of the server pod.
pub const SERVER_CLUSTER: &str = "cluster-a.local";
/// The cluster of the client pod.
pub const CLIENT_CLUSTER: &str = "cluster-b.local";
/// Stands for the server pod's address. A pod has one of its own.
pub const SERVER_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 68, 1);
/// The port of DNS where 53 is not to be had.
const DNS_PORT: u16 = 10_053;

/// A setting of a manifest that is another one here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// The pod.
    pub pod: String,
    /// The variable.
    pub variable: &'static str,
    /// What the manifest says.
    pub from: String,
    /// What it is here.
    pub to: String,
    /// Why.
    pub why: String,
}

/// The two pods, as they run here.
pub struct Pods {
    /// The manifest of the server.
    pub server: Pod,
    /// The manifest of the client.
    pub client: Pod,
    /// What the server exports.
    pub exports: Vec<Export>,
    /// What the client imports.
    pub imports: Vec<Import>,
    /// What is other than in the manifests.
    pub changed: Vec<Changed>,
    server_range: String,
    server_dns: SocketAddr,
    client_dns: SocketAddr,
}

/// The defaults of a pod's annotations.
///
/// # Errors
/// Where the namespace or the cluster is no name.
pub fn defaults(pod: &Pod, cluster: &str) -> Result<Defaults> {
    let namespace = pod.namespace.parse().with_context(|| format!("the namespace {:?}", pod.namespace))?;
    Ok(Defaults { namespace, cluster: cluster.parse().with_context(|| format!("the cluster {cluster:?}"))? })
}

/// The entries of an annotation of which nothing is refused.
fn sound<T>(parsed: Result<Parsed<T>, annotation::Finding>, pod: &Pod) -> Result<Vec<T>> {
    let parsed = parsed.map_err(|finding| anyhow::anyhow!("the annotation of {}: {finding}", pod.name))?;
    if let Some(finding) = parsed.refused.first() {
        bail!("the annotation of {}: {finding}", pod.name);
    }
    ensure!(!parsed.entries.is_empty(), "the annotation of {} has no services", pod.name);
    Ok(parsed.entries)
}

impl Pods {
    /// Reads `server-pod.yaml` and `client-pod.yaml` of a directory and says what this machine lets them have.
    ///
    /// # Errors
    /// Where a manifest can't be used, or an address that can't be another one is taken.
    pub fn read(dir: &Path) -> Result<Self> {
        let (server, client) =
            (Pod::read(&dir.join("server-pod.yaml"))?, Pod::read(&dir.join("client-pod.yaml"))?);
        let exports =
            sound(annotation::parse_exports(&server.exports, &defaults(&server, SERVER_CLUSTER)?), &server)?;
        let imports =
            sound(annotation::parse_imports(&client.imports, &defaults(&client, CLIENT_CLUSTER)?), &client)?;

        first_address_is_free(client.variable("SIDECAR_IP_RANGE")?, &imports)?;
        let mut changed = Vec::new();
        let mut change = |pod: &Pod, variable, to: &dyn ToString, why: &str| -> Result<()> {
            let from = pod.variable(variable)?.to_owned();
            let (pod, to, why) = (pod.name.clone(), to.to_string(), why.to_owned());
            if from != to {
                changed.push(Changed { pod, variable, from, to, why });
            }
            Ok(())
        };
        let dns = |pod: &Pod| -> Result<SocketAddr> {
            let text = pod.variable("SIDECAR_DNS_ADDR")?;
            text.parse().with_context(|| format!("SIDECAR_DNS_ADDR of {}: {text:?}", pod.name))
        };
        let (client_dns, why) = port_53(dns(&client)?)?;
        change(&client, "SIDECAR_DNS_ADDR", &client_dns, &why)?;
        let mut server_dns = dns(&server)?;
        if server_dns.ip() == client_dns.ip() {
            server_dns.set_ip(next(server_dns.ip()));
        }
        let (server_dns, _) = port_53(server_dns)?;
        change(&server, "SIDECAR_DNS_ADDR", &server_dns, "the client's sidecar has the address")?;
        let mut server_range = server.variable("SIDECAR_IP_RANGE")?.to_owned();
        if server_range == client.variable("SIDECAR_IP_RANGE")? {
            server_range = "127.0.67.0/24".to_owned();
        }
        change(&server, "SIDECAR_IP_RANGE", &server_range, "the client's sidecar has the range")?;
        Ok(Self { server, client, exports, imports, changed, server_range, server_dns, client_dns })
    }

    /// How the server's sidecar is started.
    pub fn server(&self) -> SidecarOptions<'_> {
        let addresses = vec![SERVER_ADDRESS.into()];
        options(&self.server, &self.server_range, self.server_dns, addresses)
    }

    /// How the client's sidecar is started.
    ///
    /// # Errors
    /// Where its manifest has no range.
    pub fn client(&self) -> Result<SidecarOptions<'_>> {
        let range = self.client.variable("SIDECAR_IP_RANGE")?;
        Ok(options(&self.client, range, self.client_dns, Vec::new()))
    }

    /// The first port that the server exports and the client imports, over TCP or over UDP.
    ///
    /// # Errors
    /// Where there is none.
    pub fn shared(&self, protocol: servicekeel_core::name::Protocol) -> Result<(ServicePort, SocketAddr)> {
        let wanted: Vec<ServicePort> = self.imports.iter().flat_map(Import::sockets).collect();
        let shared = self.exports.iter().find_map(|export| {
            let port = export
                .ports
                .iter()
                .find(|port| port.protocol == protocol && wanted.contains(&port.of(&export.service)))?;
            Some((port.of(&export.service), SocketAddr::from((SERVER_ADDRESS, port.target.get()))))
        });
        shared.with_context(|| format!("the client imports no {protocol} port that the server exports"))
    }
}

fn options<'a>(pod: &'a Pod, range: &'a str, dns: SocketAddr, addresses: Vec<IpAddr>) -> SidecarOptions<'a> {
    SidecarOptions {
        place: e2e::Place::default(),
        pod: &pod.name,
        namespace: &pod.namespace,
        range,
        dns,
        addresses,
        exports: pod.exports.clone(),
        imports: pod.imports.clone(),
    }
}

/// Two sidecars of one user can listen at one address, and the kernel shares connections out between them.
fn first_address_is_free(range: &str, imports: &[Import]) -> Result<()> {
    let first = range.split('/').next().unwrap_or(range).parse().map(next);
    let first = first.with_context(|| format!("the range {range}"))?;
    for port in imports.first().into_iter().flat_map(Import::sockets) {
        let addr = SocketAddr::new(first, port.port.get());
        TcpListener::bind(addr).with_context(|| {
            format!("{addr} is taken: end what listens there, such as another demo or sidecar, and try again")
        })?;
    }
    Ok(())
}

fn next(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits().wrapping_add(1)).into(),
        v6 => v6,
    }
}

/// The address, if DNS can be served there; else the same with another port, and why.
fn port_53(wanted: SocketAddr) -> Result<(SocketAddr, String)> {
    let bind = |addr: SocketAddr| {
        let _udp = UdpSocket::bind(addr)?;
        TcpListener::bind(addr).map(|_| ())
    };
    let Err(refused) = bind(wanted) else { return Ok((wanted, String::new())) };
    let why = match refused.kind() {
        std::io::ErrorKind::PermissionDenied => {
            format!("port {} takes root on this machine", wanted.port())
        }
        _ => format!("{wanted}: {refused}"),
    };
    let other = SocketAddr::new(wanted.ip(), DNS_PORT);
    bind(other).with_context(|| {
        format!("{other} is taken: end what listens there, or another demo, and try again")
    })?;
    Ok((other, why))
}

#[cfg(test)]
mod tests {
    use servicekeel_core::name::Protocol;

    use super::*;

    #[test]
    fn the_manifests_fit_together() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("simple");
        let pods = Pods::read(&dir).unwrap();
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let (port, at) = pods.shared(protocol).unwrap();
            assert_eq!(port.service.to_string(), "simple-server.default.cluster-a.local");
            assert_eq!(at.ip(), SERVER_ADDRESS);
        }
        let (server, client) = (pods.server(), pods.client().unwrap());
        assert_ne!(server.range, client.range);
        assert_ne!(server.dns, client.dns);
        assert_eq!(client.range, "127.0.66.0/24");
    }

    #[test]
    fn another_sidecar_at_the_address_is_told() {
        let import = "services: [{name: web, cluster: b.local, ports: [{port: 28080}]}]";
        let defaults =
            Defaults { namespace: "default".parse().unwrap(), cluster: "a.local".parse().unwrap() };
        let imports = annotation::parse_imports(import, &defaults).unwrap().entries;
        first_address_is_free("127.0.69.0/24", &imports).unwrap();
        let _other = TcpListener::bind("127.0.69.1:28080").unwrap();
        let told = format!("{:#}", first_address_is_free("127.0.69.0/24", &imports).unwrap_err());
        assert!(told.contains("127.0.69.1:28080 is taken"), "{told}");
    }

    #[test]
    fn a_taken_port_of_dns_is_another_one_and_says_why() {
        let taken = UdpSocket::bind("127.0.69.1:0").unwrap().local_addr().unwrap();
        let held = TcpListener::bind(taken).unwrap();
        let (addr, why) = port_53(taken).unwrap();
        assert_eq!((addr.ip(), addr.port()), (taken.ip(), DNS_PORT));
        assert!(why.contains(&taken.to_string()), "{why}");
        drop(held);
        assert_eq!(port_53(taken).unwrap(), (taken, String::new()));
    }
}
