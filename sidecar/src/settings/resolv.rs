//! `/etc/resolv.conf` (resolv.conf(5)): the nameservers and search domains of the pod.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
use servicekeel_core::name::{ClusterName, NameError};

/// The port of DNS.
pub const DNS_PORT: u16 = 53;

/// What of the file matters here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolv {
    /// In the order of the file, each once.
    pub nameservers: Vec<SocketAddr>,
    /// The domains of the last `search` or `domain`.
    pub search: Vec<ClusterName>,
    /// The domains of it that can't be used, as they are written, and why.
    pub unused_search: Vec<(String, NameError)>,
    /// The nameservers that can't be used, as they are written, and why.
    pub unused: Vec<(String, UnusableServer)>,
}

/// Why a nameserver can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnusableServer {
    /// Nothing like `10.96.0.10` or `fe80::1%eth0`.
    #[error("is not an IP address")]
    NoAddress,
    /// A link-local address is one of each link (RFC 4007 §6).
    #[error("is link-local without an interface, such as `fe80::1%eth0`")]
    NoZone,
    /// No such interface here, or a zone where none belongs.
    #[error("names interface {0:?}, which does not exist")]
    NoInterface(String),
}

impl Resolv {
    /// Reads the file's text. A line that is not understood is skipped, as the C library does. `index_of` gives the
    /// number of an interface ([`interface`]).
    pub fn parse(text: &str, index_of: impl Fn(&str) -> Option<u32> + Copy) -> Self {
        let mut resolv = Self::default();
        for line in text.lines() {
            let line = line.split(['#', ';']).next().unwrap_or_default();
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let Some(word) = words.next() else { continue };
                    match server(word, index_of) {
                        Ok(server) if resolv.nameservers.contains(&server) => {}
                        Ok(server) => resolv.nameservers.push(server),
                        Err(reason) => resolv.unused.push((word.to_owned(), reason)),
                    }
                }
                Some("search" | "domain") => {
                    (resolv.search, resolv.unused_search) = Default::default();
                    // `.` is the root, under which every name stands anyway.
                    for domain in words.filter(|domain| *domain != ".") {
                        match domain.parse() {
                            Ok(domain) => resolv.search.push(domain),
                            Err(reason) => resolv.unused_search.push((domain.to_owned(), reason)),
                        }
                    }
                }
                _ => {}
            }
        }
        resolv
    }

    /// The nameservers other than our own: a query that we send to ourselves would go round for ever.
    /// `own` is where this sidecar answers, `addresses` those of the pod.
    pub fn upstreams(&self, own: Option<SocketAddr>, addresses: &[IpAddr]) -> Vec<SocketAddr> {
        self.nameservers
            .iter()
            .copied()
            .filter(|server| !own.is_some_and(|own| is_own(*server, own, addresses)))
            .collect()
    }
}

/// Whether a query to `server` would reach DNS at `own`, in a pod of these addresses.
pub fn is_own(server: SocketAddr, own: SocketAddr, addresses: &[IpAddr]) -> bool {
    let here = if own.ip().is_unspecified() {
        server.ip().is_loopback() || server.ip().is_unspecified() || addresses.contains(&server.ip())
    } else {
        server.ip() == own.ip()
    };
    here && server.port() == own.port()
}

/// A nameserver at the port of DNS: an IP address, a link-local one with its zone (`fe80::1%eth0`, `fe80::1%2`;
/// RFC 4007 §11).
///
/// # Errors
/// [`UnusableServer`].
pub fn server(word: &str, index_of: impl Fn(&str) -> Option<u32>) -> Result<SocketAddr, UnusableServer> {
    let (ip, zone) = match word.split_once('%') {
        Some((ip, zone)) => (ip, Some(zone)),
        None => (word, None),
    };
    let ip: IpAddr = ip.parse().map_err(|_| UnusableServer::NoAddress)?;
    match (ip, zone) {
        (IpAddr::V6(ip), Some(zone)) if is_link_local(ip) => {
            let index = zone.parse().ok().filter(|index| *index > 0).or_else(|| index_of(zone));
            let index = index.ok_or_else(|| UnusableServer::NoInterface(zone.to_owned()))?;
            Ok(SocketAddrV6::new(ip, DNS_PORT, 0, index).into())
        }
        (IpAddr::V6(ip), None) if is_link_local(ip) => Err(UnusableServer::NoZone),
        // A zone says nothing about any other address.
        (_, Some(_)) => Err(UnusableServer::NoAddress),
        (_, None) => Ok(SocketAddr::new(ip, DNS_PORT)),
    }
}

/// fe80::/10 (RFC 4291 §2.5.6).
fn is_link_local(ip: Ipv6Addr) -> bool {
    ip.segments()[0] & 0xffc0 == 0xfe80
}

/// The number of an interface of this network namespace.
pub fn interface(name: &str) -> Option<u32> {
    let socket = socket_with(AddressFamily::INET6, SocketType::DGRAM, SocketFlags::CLOEXEC, None).ok()?;
    netdevice::name_to_index(&socket, name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameservers_and_the_last_search() {
        let resolv = Resolv::parse(
            "# made by the kubelet\nnameserver 127.0.0.2\nnameserver 10.96.0.10 ; cluster\nnameserver 10.96.0.10\n\
             nameserver fd00::a\nnameserver nonsense\nnameserver\nsearch old.local\n\
             search default.svc.cluster.local svc.cluster.local . cluster.local\noptions ndots:5\n",
            interface,
        );
        let shown: Vec<String> = resolv.nameservers.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["127.0.0.2:53", "10.96.0.10:53", "[fd00::a]:53"]);
        let search: Vec<&str> = resolv.search.iter().map(ClusterName::as_str).collect();
        assert_eq!(search, ["default.svc.cluster.local", "svc.cluster.local", "cluster.local"]);
    }

    #[test]
    fn link_local_nameservers_and_those_that_are_none() {
        let resolv = Resolv::parse(
            "nameserver fe80::1%eth0\nnameserver fe80::2%7\nnameserver fe80::3\nnameserver fe80::4%wlan9\n\
             nameserver fe80::5%0\nnameserver 10.0.0.1%eth0\nnameserver 10.0.0.256\n",
            |name| (name == "eth0").then_some(3),
        );
        let shown: Vec<String> = resolv.nameservers.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["[fe80::1%3]:53", "[fe80::2%7]:53"]);
        let unused: Vec<String> =
            resolv.unused.iter().map(|(word, reason)| format!("{word} {reason}")).collect();
        assert_eq!(
            unused,
            [
                "fe80::3 is link-local without an interface, such as `fe80::1%eth0`",
                "fe80::4%wlan9 names interface \"wlan9\", which does not exist",
                "fe80::5%0 names interface \"0\", which does not exist",
                "10.0.0.1%eth0 is not an IP address",
                "10.0.0.256 is not an IP address",
            ]
        );
    }

    #[test]
    fn a_search_domain_that_is_not_used_is_told() {
        let resolv = Resolv::parse("search old_one\nsearch . ad_dc.example b.example\n", interface);
        assert_eq!(resolv.search, ["b.example".parse().unwrap()]);
        let [(domain, reason)] = &resolv.unused_search[..] else { panic!("{resolv:?}") };
        assert!(domain == "ad_dc.example" && reason.to_string().contains("the character '_'"), "{reason}");
    }

    #[test]
    fn the_kernel_knows_its_interfaces() {
        assert_eq!(interface("lo"), Some(1));
        assert_eq!(interface("no-such-one"), None);
    }

    #[test]
    fn never_ourselves() {
        let resolv =
            Resolv::parse("nameserver 127.0.0.2\nnameserver 10.0.0.5\nnameserver 10.96.0.10\n", interface);
        let shown = |own: &str| -> Vec<String> {
            let own = own.parse().unwrap();
            resolv
                .upstreams(Some(own), &[IpAddr::from([10, 0, 0, 5])])
                .iter()
                .map(|server| server.ip().to_string())
                .collect()
        };
        assert_eq!(shown("127.0.0.2:53"), ["10.0.0.5", "10.96.0.10"]);
        // Another port is another server.
        assert_eq!(shown("127.0.0.2:5353"), ["127.0.0.2", "10.0.0.5", "10.96.0.10"]);
        assert_eq!(shown("0.0.0.0:53"), ["10.96.0.10"]);
        assert_eq!(resolv.upstreams(None, &[]).len(), 3);
    }
}
