//! Flags and environment variables, and the settings that they make.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, ValueEnum};
use ipnet::Ipv4Net;
use servicekeel_core::handoff::Pod;
use servicekeel_core::lease::Leases;
use servicekeel_core::name::{ClusterName, Label, NameError};
use servicekeel_core::sidecar::REST;
use servicekeel_runtime::file::read_bounded;
use tracing::warn;

use super::resolv::{self, Resolv, UnusableServer, is_own};
use super::{Settings, interfaces};

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The most bytes of it. Kubernetes allows 2,048 characters of search domains.
const MAX_RESOLV_CONF: usize = 64 << 10;
/// The most bytes of `POD_NAME` and `POD_UID`: a Kubernetes name has 253.
const MAX_POD_TEXT: usize = 253;

const ABOUT: &str = "Makes the Services of other clusters available to the containers of one pod";
const LONG_ABOUT: &str = "\
Makes the Services of other clusters available to the containers of one pod.

It reads the pod's annotations servicekeel.io/imported-services and servicekeel.io/exported-services from files, assigns \
each imported Service an address in 127.0.66.0/24, answers DNS for its names, and hands the pod's sockets to the node's \
router, which carries the traffic. Files may change at any time: whatever a change does not touch keeps running. An \
invalid entry is rejected with its line and the reason, in the log and at /status; all other entries are served.

It does not need root. To serve DNS on port 53 the pod needs the safe sysctl net.ipv4.ip_unprivileged_port_start set to 53 \
or below; other ports need no setting.";
const EXAMPLE: &str = "\
Every flag can also be set as an environment variable; an empty variable counts as unset.

Example, on a machine with a router that listens at /tmp/router.sock:

  mkdir -p /tmp/pod
  printf '%s\\n' 'services:' \\
      '- name: simple-server' \\
      '  cluster: cluster-a.local' \\
      '  ports: [{ port: 8080 }]' > /tmp/pod/imported-services-config.yaml
  servicekeel-sidecar --sidecar-config-dir /tmp/pod --sidecar-state-dir /tmp/pod/state \\
      --sidecar-dns-addr 127.0.0.2:10053 &
  dig @127.0.0.2 -p 10053 simple-server.default
  curl localhost:15020/status

SERVICEKEEL_LOG sets the log level (error, warn, info, debug; default info), SERVICEKEEL_LOG_FORMAT the format (text, json).";

/// The flags. Every one has an environment variable of the same name.
#[derive(Debug, Parser)]
#[command(name = "servicekeel-sidecar", version, about = ABOUT, long_about = LONG_ABOUT, after_long_help = EXAMPLE)]
pub struct Args {
    /// Addresses for imported Services, inside 127.0.0.0/8. A /24 has room for 254. Sidecars that share a loopback,
    /// such as those on the host network, need a range each
    #[arg(long, env = "SIDECAR_IP_RANGE", value_name = "NETWORK", default_value = "127.0.66.0/24", value_parser = range)]
    sidecar_ip_range: Ipv4Net,

    /// Address of the DNS server, UDP and TCP
    #[arg(long, env = "SIDECAR_DNS_ADDR", value_name = "IP:PORT", default_value = "127.0.0.2:53", value_parser = dns)]
    sidecar_dns_addr: SocketAddr,

    /// DNS servers for names that are not imported: `IP` or `IP:PORT`, separated by commas. Default: the nameservers of
    /// /etc/resolv.conf, without this sidecar itself
    #[arg(long, env = "SIDECAR_DNS_UPSTREAM", value_name = "SERVERS", value_parser = listed(server))]
    sidecar_dns_upstream: Option<Vec<Listed<SocketAddr>>>,

    /// Socket of the node's router: `unix:///path`, or a bare path. On a shared machine prefer
    /// unix:///run/servicekeel/router.sock: any user may create a file in /tmp first
    #[arg(
        long,
        env = "SIDECAR_SERVER_LISTEN",
        value_name = "SOCKET",
        default_value = "unix:///tmp/router.sock",
        value_parser = socket
    )]
    sidecar_server_listen: PathBuf,

    /// Where the annotations come from
    #[arg(long, env = "SIDECAR_SOURCE", value_name = "SOURCE", default_value = "auto", value_enum)]
    sidecar_source: SourceKind,

    /// Directory of exported-services-config.yaml and imported-services-config.yaml, the annotations as projected by the
    /// downward API
    #[arg(long, env = "SIDECAR_CONFIG_DIR", value_name = "DIRECTORY", default_value = "/etc/servicekeel")]
    sidecar_config_dir: PathBuf,

    /// Name of the pod's own cluster, unique in the mesh; it need not be the DNS domain of Kubernetes. Default: the
    /// router's cluster, else the one it last had, else cluster.local
    #[arg(long, env = "SIDECAR_CLUSTER", value_name = "DOMAIN", value_parser = cluster)]
    sidecar_cluster: Option<ClusterName>,

    /// Directory for address leases and the last good annotations. If it cannot be written, addresses may change after a
    /// restart
    #[arg(
        long,
        env = "SIDECAR_STATE_DIR",
        value_name = "DIRECTORY",
        default_value = "/var/lib/servicekeel/sidecar"
    )]
    sidecar_state_dir: PathBuf,

    /// Address of /livez, /readyz, /metrics and /status (JSON); `off` disables them. /status lists the imports: outside a
    /// pod (if none of POD_IP, POD_IPS and KUBERNETES_SERVICE_HOST is set) it is available from this machine only
    #[arg(
        long,
        env = "SIDECAR_ADMIN_ADDR",
        value_name = "IP:PORT",
        default_value = "0.0.0.0:15020",
        value_parser = admin
    )]
    sidecar_admin_addr: Admin,

    /// Addresses of the pod at which the router connects to its exports, before its loopback; separated by commas.
    /// Default: POD_IPS, else the IPv4 addresses of the pod's interfaces
    #[arg(long, env = "SIDECAR_POD_ADDRS", value_name = "IPS", value_parser = listed(address))]
    sidecar_pod_addrs: Option<Vec<Listed<IpAddr>>>,

    /// The pod's addresses, from the downward API (status.podIPs)
    #[arg(long, env = "POD_IPS", value_name = "IPS", value_parser = listed(address))]
    pod_ips: Option<Vec<Listed<IpAddr>>>,

    /// The pod's name, from the downward API. Default: the host's name
    #[arg(long, env = "POD_NAME", value_name = "NAME", value_parser = pod_text)]
    pod_name: Option<String>,

    /// The pod's namespace, from the downward API
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAMESPACE", default_value = "default", value_parser = label)]
    pod_namespace: Label,

    /// The pod's uid, from the downward API. By it the router knows a sidecar that restarted
    #[arg(long, env = "POD_UID", value_name = "UID", value_parser = pod_text)]
    pod_uid: Option<String>,
}

/// Where the annotations come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SourceKind {
    /// Files of the config directory
    Files,
    /// A watch on the own pod. Not in this version
    Api,
    /// The same as files in this version. Either waits for a directory that is not there yet
    Auto,
}

/// An admin address, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Admin(Option<SocketAddr>);

/// What one flag lists.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Listed<T>(Vec<T>);

/// A reader of values that are separated by commas. Between two commas, or behind the last, there may be none: a template
/// writes lists so.
fn listed<T>(
    one: fn(&str) -> Result<T, String>,
) -> impl Fn(&str) -> Result<Listed<T>, String> + Clone + Send + Sync + 'static
where
    T: 'static,
{
    move |text| {
        let items = text.split(',').filter(|item| !item.trim().is_empty());
        items.map(one).collect::<Result<_, _>>().map(Listed)
    }
}

/// The values of a flag; `None` where it has none.
fn all<T>(flag: Option<Vec<Listed<T>>>) -> Option<Vec<T>> {
    let values: Vec<T> = flag?.into_iter().flat_map(|listed| listed.0).collect();
    (!values.is_empty()).then_some(values)
}

/// What can't be used, beyond what a single flag says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgsError {
    /// `api` as source.
    #[error(
        "SIDECAR_SOURCE=api is not in this version: project the annotations into files by a downwardAPI volume at \
         {} and set SIDECAR_SOURCE=files, or leave it unset",
        .0.display()
    )]
    NoApi(PathBuf),
    /// An upstream that is this sidecar.
    #[error(
        "SIDECAR_DNS_UPSTREAM has {0}, which is where this sidecar itself answers (SIDECAR_DNS_ADDR): \
         name the cluster's DNS service instead"
    )]
    OwnUpstream(SocketAddr),
    /// A pod's address that an import may get: an export dialled there would lead back into the pod's own import.
    #[error(
        "{setting} has {address}, which is inside SIDECAR_IP_RANGE ({range}), where imports are served: \
         choose another range, or leave the address out"
    )]
    PodInRange {
        /// Who says the address.
        setting: &'static str,
        /// The address.
        address: IpAddr,
        /// The range.
        range: Ipv4Net,
    },
}

impl Args {
    /// Reads these flags, the program's name first, and the process's environment.
    ///
    /// # Errors
    /// As clap tells them.
    pub fn of<T: Into<OsString> + Clone>(words: impl IntoIterator<Item = T>) -> Result<Self, clap::Error> {
        let command = Self::command().mut_args(|arg| {
            // A manifest's `value: ""` means that there is none.
            let empty =
                arg.get_env().is_some_and(|name| std::env::var_os(name).is_some_and(|v| v.is_empty()));
            if empty { arg.env(None::<&str>) } else { arg }
        });
        let words: Vec<OsString> = words.into_iter().map(Into::into).collect();
        let variables: Vec<OsString> =
            command.get_arguments().filter_map(|arg| arg.get_env()).map(OsString::from).collect();
        let matches = command.try_get_matches_from(&words).map_err(|error| match error.kind() {
            ErrorKind::InvalidUtf8 => not_utf8(&words, &variables).unwrap_or(error),
            _ => error,
        })?;
        Self::from_arg_matches(&matches)
    }

    /// The directory of the annotations' files.
    pub fn config_dir(&self) -> &Path {
        &self.sidecar_config_dir
    }

    /// The settings. Reads `/etc/resolv.conf`, the host's name and its addresses where flags leave them open.
    ///
    /// # Errors
    /// [`ArgsError`] where flags do not go together.
    pub fn settings(self) -> Result<Settings, ArgsError> {
        let resolv = read_bounded(Path::new(RESOLV_CONF), MAX_RESOLV_CONF).unwrap_or_else(|error| {
            warn!(%error, "{RESOLV_CONF} cannot be read: no nameservers and search domains of it");
            Vec::new()
        });
        // As the C library, which compares bytes: a comment may be of any encoding.
        let resolv = Resolv::parse(&String::from_utf8_lossy(&resolv), resolv::interface);
        if self.sidecar_dns_upstream.is_none() {
            for (nameserver, reason) in &resolv.unused {
                warn!(nameserver, "ignoring a nameserver of {RESOLV_CONF}: it {reason}");
            }
        }
        for (domain, reason) in &resolv.unused_search {
            warn!(domain, "imports do not resolve under a search domain of {RESOLV_CONF}: it {reason}");
        }
        let in_pod = ["POD_IP", "KUBERNETES_SERVICE_HOST"]
            .iter()
            .any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()));
        self.settings_with(resolv, interfaces::addresses(), hostname(), in_pod)
    }

    fn settings_with(
        self,
        resolv: Resolv,
        interfaces: Vec<IpAddr>,
        hostname: String,
        in_pod: bool,
    ) -> Result<Settings, ArgsError> {
        let (pod_ips, pod_addrs) = (all(self.pod_ips), all(self.sidecar_pod_addrs));
        let in_pod = in_pod || pod_ips.is_some();
        if self.sidecar_source == SourceKind::Api {
            return Err(ArgsError::NoApi(self.sidecar_config_dir));
        }
        let own = self.sidecar_dns_addr;
        let (setting, addresses) = match (pod_addrs, pod_ips) {
            (Some(addresses), _) => ("SIDECAR_POD_ADDRS", addresses),
            (None, addresses) => ("POD_IPS", addresses.unwrap_or(interfaces)),
        };
        let range = self.sidecar_ip_range;
        let in_range = |ip: &&IpAddr| matches!(ip.to_canonical(), IpAddr::V4(ip) if range.contains(&ip));
        if let Some(address) = addresses.iter().find(in_range) {
            return Err(ArgsError::PodInRange { setting, address: *address, range });
        }
        let upstreams = match all(self.sidecar_dns_upstream) {
            Some(servers) => match servers.iter().find(|server| is_own(**server, own, &addresses)) {
                Some(server) => return Err(ArgsError::OwnUpstream(*server)),
                None => servers,
            },
            None => resolv.upstreams(Some(own), &addresses),
        };
        Ok(Settings {
            range,
            dns_addr: Some(own),
            upstreams,
            router: self.sidecar_server_listen,
            cluster: self.sidecar_cluster,
            state_dir: Some(self.sidecar_state_dir),
            admin: self.sidecar_admin_addr.0,
            private_status: !in_pod,
            pod: Pod {
                name: self.pod_name.unwrap_or(hostname),
                namespace: self.pod_namespace,
                uid: self.pod_uid.unwrap_or_default(),
            },
            addresses,
            search: resolv.search,
        })
    }
}

/// clap says that something is not UTF-8, and not what.
fn not_utf8(words: &[OsString], variables: &[OsString]) -> Option<clap::Error> {
    let words = words.iter().filter(|word| word.to_str().is_none()).map(|word| format!("{word:?}"));
    let variables = variables
        .iter()
        .filter(|name| std::env::var_os(name).is_some_and(|value| value.to_str().is_none()))
        .map(|name| name.to_string_lossy().into_owned());
    let found: Vec<String> = words.chain(variables).collect();
    let text = format!("not UTF-8: {}\n", found.join(", "));
    (!found.is_empty()).then(|| clap::Error::raw(ErrorKind::InvalidUtf8, text))
}

/// Kubernetes names the host of a pod as the pod.
fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    pod_text(name.trim()).unwrap_or_default()
}

fn range(text: &str) -> Result<Ipv4Net, String> {
    let range: Ipv4Net = text.parse().map_err(|_| "not a network such as 127.0.66.0/24".to_owned())?;
    Leases::new(range, REST, &[]).map(|leases| leases.range()).map_err(|error| error.to_string())
}

fn dns(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "not an address such as 127.0.0.2:53".to_owned())
}

fn server(text: &str) -> Result<SocketAddr, String> {
    let text = text.trim();
    let with_port = text.parse().or_else(|_| {
        // An interface by its name, `[fe80::1%eth0]:53`, is more than the library reads.
        let (server, port) = text.strip_prefix('[').and_then(|text| text.split_once("]:")).ok_or(())?;
        let port = port.parse().map_err(|_| ())?;
        resolv::server(server, resolv::interface).map_err(|_| ()).map(|mut server| {
            server.set_port(port);
            server
        })
    });
    with_port.or_else(|()| resolv::server(text, resolv::interface)).map_err(|reason| match reason {
        UnusableServer::NoAddress => {
            format!("{text:?} is not an address such as 10.96.0.10 or 10.96.0.10:53")
        }
        reason => format!("{text:?} {reason}"),
    })
}

fn address(text: &str) -> Result<IpAddr, String> {
    text.trim().parse().map_err(|_| format!("{:?} is not an IP address such as 10.244.1.7", text.trim()))
}

fn socket(text: &str) -> Result<PathBuf, String> {
    let path = match text.split_once(':') {
        Some(("unix", path)) => path.strip_prefix("//").unwrap_or(path),
        Some((scheme, _)) if !scheme.contains('/') => {
            return Err(format!(
                "{scheme}: is not understood; a Unix socket belongs here, such as unix:///tmp/router.sock"
            ));
        }
        _ => text,
    };
    if path.is_empty() {
        return Err("has no path; write it as unix:///tmp/router.sock".to_owned());
    }
    Ok(path.into())
}

fn admin(text: &str) -> Result<Admin, String> {
    if text.eq_ignore_ascii_case("off") {
        return Ok(Admin(None));
    }
    let address = text.parse().map_err(|_| "not an address such as 0.0.0.0:15020, nor `off`".to_owned())?;
    Ok(Admin(Some(address)))
}

fn cluster(text: &str) -> Result<ClusterName, String> {
    text.parse().map_err(|error: NameError| error.to_string())
}

fn label(text: &str) -> Result<Label, String> {
    text.parse().map_err(|error: NameError| error.to_string())
}

fn pod_text(text: &str) -> Result<String, String> {
    if text.len() > MAX_POD_TEXT {
        return Err(format!("has {} characters; the limit is {MAX_POD_TEXT}", text.len()));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests;
