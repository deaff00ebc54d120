//! The config: what the file means, checked.

use std::collections::BTreeSet;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use servicekeel_core::name::ClusterName;

use super::problem::{Problem, Problems};
use super::text::{File, ListenText, Placed};
use crate::identity::Revocation;

/// Where the config is where nobody says.
pub const DEFAULT_PATH: &str = "/etc/servicekeel/router.yaml";
const SIDECARS: &str = "/tmp/router.sock";
const PEERS: &str = "0.0.0.0:7443";
/// Where the admin endpoint listens where nobody says.
pub const DEFAULT_ADMIN: &str = "127.0.0.1:7480";
/// The most peers to dial, and the most clusters to trust.
pub const MAX_PEERS: usize = 1024;
/// The most entries of `revoked`.
const MAX_REVOKED: usize = 4096;
/// What a Unix socket's address holds (unix(7)), less the final zero.
const MAX_SOCKET_PATH: usize = 107;

/// What the router runs by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The own cluster.
    pub cluster: ClusterName,
    /// The own node.
    pub node: ClusterName,
    /// Where it listens.
    pub listen: Listen,
    /// Whom it dials.
    pub peers: Vec<Peer>,
    /// Whom it refuses whatever it shows.
    pub revoked: Vec<Revocation>,
}

/// Where the router listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// The socket for sidecars.
    pub sidecars: PathBuf,
    /// For other routers; `None`: off.
    pub peers: Option<SocketAddr>,
    /// For people and probes; `None`: off.
    pub admin: Option<SocketAddr>,
}

/// A router to dial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// `host:port`.
    pub address: String,
}

/// A file that the config names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) path: PathBuf,
    /// Where the config names it.
    pub(super) place: (u64, u64),
}

/// The files of the own identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct IdentityFiles {
    pub(super) ca: Named,
    pub(super) cert: Named,
    pub(super) key: Named,
}

/// A config with the files that it names.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) config: Config,
    pub(super) identity: Option<IdentityFiles>,
    pub(super) trust: Vec<(ClusterName, Named)>,
    /// What works and is hardly meant.
    pub(super) warnings: Vec<Problem>,
}

impl Parsed {
    /// The files beside the config itself.
    pub(super) fn files(&self) -> impl Iterator<Item = &Named> {
        let own = self.identity.iter().flat_map(|identity| [&identity.ca, &identity.cert, &identity.key]);
        own.chain(self.trust.iter().map(|(_, ca)| ca))
    }
}

/// Reads the text of a config. `file` is its name, to which relative paths belong; `host` the node's name where
/// the text says none.
///
/// # Errors
/// All that is wrong with it, as far as it can be told at once.
pub(super) fn parse(text: &str, file: &Path, host: &str) -> Result<Parsed, Problems> {
    let read = File::read(text, file)?;
    let mut reader = Reader { file, problems: Vec::new(), warnings: Vec::new() };
    let cluster = match &read.cluster {
        Some(cluster) => reader.name(cluster, "cluster"),
        None => {
            reader.whole(
                "the key \"cluster\" is missing: the name of this router's cluster, such as cluster-a.local",
            );
            None
        }
    };
    let node = match &read.node {
        Some(node) => reader.name(node, "node"),
        None => host
            .parse()
            .map_err(|e| reader.whole(format!("node: the host's name {host:?} {e}; set \"node\"")))
            .ok(),
    };
    let listen = reader.listen(&read.listen.unwrap_or_default());
    let peers = read.peers.unwrap_or_default();
    if peers.len() > MAX_PEERS {
        reader.whole(format!("peers: {} addresses; the limit is {MAX_PEERS}", peers.len()));
    }
    let peers: Vec<_> = peers.iter().take(MAX_PEERS).filter_map(|peer| reader.peer(&peer.address)).collect();

    let identity = read.identity.map(|identity| IdentityFiles {
        ca: reader.named(&identity.ca, "identity.ca"),
        cert: reader.named(&identity.cert, "identity.cert"),
        key: reader.named(&identity.key, "identity.key"),
    });
    let trusted = read.trust.unwrap_or_default();
    if trusted.len() > MAX_PEERS {
        reader.whole(format!("trust: {} clusters; the limit is {MAX_PEERS}", trusted.len()));
    }
    let mut trust = Vec::new();
    let mut seen = BTreeSet::new();
    for entry in trusted.iter().take(MAX_PEERS) {
        let ca = reader.named(&entry.ca, "trust.ca");
        let Some(name) = reader.name(&entry.cluster, "trust.cluster") else { continue };
        if Some(&name) == cluster.as_ref() {
            reader.at(
                &entry.cluster,
                format!("trust: {name} is this router's own cluster; its authorities belong in identity.ca (one file may hold several)"),
            );
        } else if !seen.insert(name.clone()) {
            reader.at(
                &entry.cluster,
                format!("trust: {name} is listed twice; put all its authorities into one file"),
            );
        }
        trust.push((name, ca));
    }
    let entries = read.revoked.unwrap_or_default();
    if entries.len() > MAX_REVOKED {
        reader.whole(format!("revoked: {} entries; the limit is {MAX_REVOKED}", entries.len()));
    }
    let revoked: Vec<_> =
        entries.iter().take(MAX_REVOKED).filter_map(|entry| reader.revocation(entry)).collect();
    if identity.is_none() && !(peers.is_empty() && trust.is_empty() && revoked.is_empty()) {
        let text = "without \"identity\" this router serves only its own node: \"peers\", \"trust\" and \"revoked\" have no effect";
        reader.warnings.push(Problem::of_file(file, text));
    }
    match (cluster, node, listen) {
        (Some(cluster), Some(node), Some(listen)) if reader.problems.is_empty() => Ok(Parsed {
            config: Config { cluster, node, listen, peers, revoked },
            identity,
            trust,
            warnings: reader.warnings,
        }),
        _ => Err(Problems(reader.problems)),
    }
}

/// Collects what is wrong.
struct Reader<'f> {
    file: &'f Path,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
}

fn place(value: &Placed) -> (u64, u64) {
    (value.referenced.line().max(1), value.referenced.column().max(1))
}

impl Reader<'_> {
    fn whole(&mut self, text: impl Into<String>) {
        self.problems.push(Problem::of_file(self.file, text));
    }

    fn at(&mut self, value: &Placed, text: String) {
        self.problems.push(Problem { file: self.file.to_owned(), place: Some(place(value)), text });
    }

    fn name(&mut self, value: &Placed, key: &str) -> Option<ClusterName> {
        value.value.parse().map_err(|e| self.at(value, format!("{key}: {:?} {e}", value.value))).ok()
    }

    fn named(&mut self, value: &Placed, key: &str) -> Named {
        if value.value.is_empty() {
            self.at(value, format!("{key}: is empty; expected the path of a PEM file"));
        }
        let base = self.file.parent().unwrap_or(Path::new(""));
        Named { path: base.join(&value.value), place: place(value) }
    }

    fn listen(&mut self, listen: &ListenText) -> Option<Listen> {
        let sidecars = match &listen.sidecars {
            None => Some(PathBuf::from(SIDECARS)),
            Some(value) => self.socket(value),
        };
        let peers = self.addr(listen.peers.as_ref(), "listen.peers", PEERS);
        let admin = self.addr(listen.admin.as_ref(), "listen.admin", DEFAULT_ADMIN);
        Some(Listen { sidecars: sidecars?, peers: peers?, admin: admin? })
    }

    fn socket(&mut self, value: &Placed) -> Option<PathBuf> {
        let text = &value.value;
        let path = ["unix://", "unix:"].iter().find_map(|scheme| text.strip_prefix(scheme)).unwrap_or(text);
        let wrong = if !path.starts_with('/') {
            format!("{:?} is not an absolute path, such as unix://{SIDECARS}", value.value)
        } else if path.len() > MAX_SOCKET_PATH {
            format!("a path of {} bytes; the limit is {MAX_SOCKET_PATH} for a Unix socket", path.len())
        } else {
            return Some(path.into());
        };
        self.at(value, format!("listen.sidecars: {wrong}"));
        None
    }

    /// An address to listen at; `Some(None)` where it is off.
    fn addr(&mut self, value: Option<&Placed>, key: &str, default: &str) -> Option<Option<SocketAddr>> {
        let text = value.map_or(default, |value| value.value.as_str());
        if text == "off" {
            return Some(None);
        }
        match text.parse() {
            Ok(addr) => Some(Some(addr)),
            Err(_) => {
                let wrong = format!(
                    "{key}: {text:?} is neither an IP address with a port, such as {default}, nor off"
                );
                match value {
                    Some(value) => self.at(value, wrong),
                    None => self.whole(wrong),
                }
                None
            }
        }
    }

    fn revocation(&mut self, value: &Placed) -> Option<Revocation> {
        let parsed = value.value.parse();
        parsed.map_err(|wrong| self.at(value, format!("revoked: {:?} {wrong}", value.value))).ok()
    }

    fn peer(&mut self, value: &Placed) -> Option<Peer> {
        let text = &value.value;
        match check_address(text) {
            Ok(()) => Some(Peer { address: text.clone() }),
            Err(wrong) => {
                self.at(value, format!("peers.address: {text:?} {wrong}"));
                None
            }
        }
    }
}

/// Whether a text is `host:port`, where the host is a DNS name or an IP address.
fn check_address(text: &str) -> Result<(), String> {
    if text.parse::<SocketAddr>().is_ok_and(|addr| addr.port() > 0) {
        return Ok(());
    }
    let is_ipv6 = text.parse::<Ipv6Addr>().is_ok();
    // `::1:7443` is an address too, of which hardly anybody thinks.
    if let Some((host, port)) = text.rsplit_once(':')
        && host.parse::<Ipv6Addr>().is_ok()
        && port.parse::<u16>().is_ok_and(|port| port > 999 || (port > 0 && !is_ipv6))
    {
        return Err(format!("has an IPv6 address without brackets; write [{host}]:{port}"));
    }
    if is_ipv6 {
        return Err(format!("has no port; write [{text}]:7443"));
    }
    if text.contains("://") {
        return Err("is a URL; expected a host and a port, such as hub.example:7443".into());
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        return Err(format!("has no port; write {text}:7443"));
    };
    if !port.parse::<u16>().is_ok_and(|port| port > 0) {
        return Err(format!("has the port {port:?}; a port is a number from 1 to 65535"));
    }
    // Underscores occur in names that are resolved by /etc/hosts or Docker.
    let name = host.replace('_', "-");
    name.parse::<ClusterName>().map(|_| ()).map_err(|e| format!("has a host that {e}"))
}

#[cfg(test)]
mod tests;
