//! `/etc/resolv.conf` (resolv.conf(5)): the nameservers and search domains of the pod.

use std::net::{IpAddr, SocketAddr};

use servicekeel_core::name::ClusterName;

/// The port of DNS.
pub const DNS_PORT: u16 = 53;

/// What of the file matters here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolv {
    /// In the order of the file, each once.
    pub nameservers: Vec<SocketAddr>,
    /// The domains of the last `search` or `domain`.
    pub search: Vec<ClusterName>,
}

impl Resolv {
    /// Reads the file's text. A line that is not understood is skipped, as the C library does.
    pub fn parse(text: &str) -> Self {
        let mut resolv = Self::default();
        for line in text.lines() {
            let line = line.split(['#', ';']).next().unwrap_or_default();
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let server = words.next().and_then(nameserver);
                    resolv.nameservers.extend(server.filter(|server| !resolv.nameservers.contains(server)));
                }
                Some("search" | "domain") => {
                    // `.` is the root, under which every name stands anyway.
                    resolv.search = words.filter_map(|domain| domain.parse().ok()).collect();
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

/// One with a zone (`fe80::1%eth0`) is skipped: the zone's number is not known here.
fn nameserver(word: &str) -> Option<SocketAddr> {
    let ip: IpAddr = word.parse().ok()?;
    Some(SocketAddr::new(ip, DNS_PORT))
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
        );
        let shown: Vec<String> = resolv.nameservers.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["127.0.0.2:53", "10.96.0.10:53", "[fd00::a]:53"]);
        let search: Vec<&str> = resolv.search.iter().map(ClusterName::as_str).collect();
        assert_eq!(search, ["default.svc.cluster.local", "svc.cluster.local", "cluster.local"]);
    }

    #[test]
    fn never_ourselves() {
        let resolv = Resolv::parse("nameserver 127.0.0.2\nnameserver 10.0.0.5\nnameserver 10.96.0.10\n");
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
