//! The pod's own IPv4 addresses, as the kernel's routing table has them.

use std::net::{IpAddr, Ipv4Addr};

/// The addresses of the interfaces of this network namespace, loopback ones left out. Empty where the kernel does
/// not say (no /proc, or no IPv4).
pub fn addresses() -> Vec<IpAddr> {
    // This process's namespace: /proc/net is a link to self/net.
    let table = std::fs::read_to_string("/proc/net/fib_trie").unwrap_or_default();
    local(&table)
}

/// Reads `/proc/net/fib_trie`: an address, and below it what it is; a local address of a host is `/32 host LOCAL`.
/// Tables may repeat it.
fn local(table: &str) -> Vec<IpAddr> {
    let mut found = Vec::new();
    let mut last: Option<Ipv4Addr> = None;
    for line in table.lines().map(str::trim_start) {
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.trim_end().parse().ok();
        } else if line.trim_end() == "/32 host LOCAL"
            && let Some(address) = last
            && !address.is_loopback()
            && !found.contains(&IpAddr::V4(address))
        {
            found.push(IpAddr::V4(address));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_addresses_once_and_no_loopback() {
        let table = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     \
                     +-- 127.0.0.0/31 1 0 0\n           |-- 127.0.0.0\n              /8 host LOCAL\n           \
                     |-- 127.0.0.1\n              /32 host LOCAL\n        |-- 127.255.255.255\n           \
                     /32 link BROADCAST\n           |-- 10.244.1.0\n              /24 link UNICAST\n           \
                     |-- 10.244.1.7\n              /32 host LOCAL\nLocal:\n           |-- 10.244.1.7\n              \
                     /32 host LOCAL\n        |-- 192.168.9.3\n           /32 link UNICAST\n           /32 host LOCAL\n";
        assert_eq!(local(table), [IpAddr::from([10, 244, 1, 7]), IpAddr::from([192, 168, 9, 3])]);
        assert_eq!(local(""), [] as [IpAddr; 0]);
        assert_eq!(local("|-- nonsense\n/32 host LOCAL\n"), [] as [IpAddr; 0]);
    }
}
