//! Whom a port has room for that anybody may reach: those who have connected and not yet proven who they are.
//!
//! Whoever connects is let in at once, and at the bound somebody makes room. A stranger has nothing to lose, so the oldest
//! would be the wrong one: who connects faster than an honest handshake takes would keep everybody out. The one that goes is
//! the oldest of the network that holds most, so that a flood makes room for itself. An IPv4 network is a /24 within a /16,
//! an IPv6 network a /64 within a /48, which is what sites are given (RFC 6177): the wider one that holds most first, then
//! the narrower of it. Addresses of peers that have proven themselves lately ([`Known`]) have half of the room for
//! themselves, each for its own.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use crate::name::RouterId;

/// Addresses of one peer that are known at once.
pub const MAX_ADDRESSES: usize = 8;
/// How long an address is known after its peer has proven itself.
pub const MEMORY: Duration = Duration::from_secs(3600);

/// Names one that was let in; chosen by the caller, rising.
pub type GuestId = u64;

/// The addresses that begin alike. Shown as in CIDR notation (RFC 4632 §3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Network {
    base: IpAddr,
    bits: u8,
}

impl Network {
    /// The network of an address with so many bits of its own, in IPv4 and in IPv6.
    fn of(address: IpAddr, bits_v4: u8, bits_v6: u8) -> Self {
        match address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(bits_v4)).unwrap_or(0);
                Self { base: Ipv4Addr::from_bits(address.to_bits() & mask).into(), bits: bits_v4 }
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(bits_v6)).unwrap_or(0);
                Self { base: Ipv6Addr::from_bits(address.to_bits() & mask).into(), bits: bits_v6 }
            }
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.bits)
    }
}

#[derive(Debug, Clone, Copy)]
struct Guest {
    wide: Network,
    narrow: Network,
    known: bool,
}

/// Those that are in.
#[derive(Debug, Default)]
pub struct Admission {
    guests: BTreeMap<GuestId, Guest>,
}

impl Admission {
    /// Lets one in who comes from an address; `known`: of a peer that has proven itself. Says who makes room where there
    /// are more than `most`, at least 2, and from where they came.
    pub fn enter(&mut self, id: GuestId, from: IpAddr, known: bool, most: usize) -> Vec<(GuestId, Network)> {
        let from = from.to_canonical();
        let ((wide_v4, narrow_v4), (wide_v6, narrow_v6)) =
            if known { ((32, 32), (128, 128)) } else { ((16, 24), (48, 64)) };
        let (wide, narrow) = (Network::of(from, wide_v4, wide_v6), Network::of(from, narrow_v4, narrow_v6));
        self.guests.insert(id, Guest { wide, narrow, known });
        let mut gone = Vec::new();
        while self.guests.len() > most.max(2) {
            let Some(next) = self.whose_turn(most.max(2)) else { break };
            let Some(guest) = self.guests.remove(&next) else { break };
            gone.push((next, guest.narrow));
        }
        gone
    }

    /// One has gone, or has proven who he is.
    pub fn leave(&mut self, id: GuestId) {
        self.guests.remove(&id);
    }

    /// How many are in.
    pub fn len(&self) -> usize {
        self.guests.len()
    }

    /// Whether nobody is.
    pub fn is_empty(&self) -> bool {
        self.guests.is_empty()
    }

    fn whose_turn(&self, most: usize) -> Option<GuestId> {
        // Each of the two kinds may use what the other leaves, and has half for itself.
        let known = self.guests.values().filter(|guest| guest.known).count();
        let known_go = known > most / 2;
        let of_kind = || self.guests.iter().filter(|(_, guest)| guest.known == known_go);
        let wide = largest(of_kind().map(|(_, guest)| guest.wide))?;
        let of_wide = || of_kind().filter(|(_, guest)| guest.wide == wide);
        let narrow = largest(of_wide().map(|(_, guest)| guest.narrow))?;
        of_wide().find(|(_, guest)| guest.narrow == narrow).map(|(id, _)| *id)
    }
}

/// The network that occurs most often; among equals the one that occurs first.
fn largest(networks: impl Iterator<Item = Network>) -> Option<Network> {
    let mut count = BTreeMap::new();
    for (number, network) in networks.enumerate() {
        count.entry(network).or_insert((0_usize, number)).0 += 1;
    }
    count.into_iter().max_by_key(|(_, (n, first))| (*n, usize::MAX - first)).map(|(network, _)| network)
}

/// The addresses of peers that have proven themselves.
#[derive(Debug, Default)]
pub struct Known {
    addresses: BTreeMap<IpAddr, (RouterId, Instant)>,
    /// The addresses of each, the one that was seen last at the end.
    of: BTreeMap<RouterId, VecDeque<IpAddr>>,
}

impl Known {
    /// A peer has proven itself from an address. Of one with more addresses than [`MAX_ADDRESSES`] the one that it has not
    /// used for longest is forgotten.
    pub fn handle_proven(&mut self, peer: &RouterId, from: IpAddr, now: Instant) {
        let from = from.to_canonical();
        if let Some((other, _)) = self.addresses.insert(from, (peer.clone(), now))
            && other != *peer
        {
            // Behind one address there may be several: it is of the one that was seen last.
            self.forget(&other, from);
        }
        let own = self.of.entry(peer.clone()).or_default();
        own.retain(|known| *known != from);
        own.push_back(from);
        if own.len() > MAX_ADDRESSES
            && let Some(oldest) = own.pop_front()
        {
            self.addresses.remove(&oldest);
        }
    }

    /// Whether a peer has proven itself from there within [`MEMORY`].
    pub fn contains(&self, from: IpAddr, now: Instant) -> bool {
        self.addresses
            .get(&from.to_canonical())
            .is_some_and(|(_, since)| now.saturating_duration_since(*since) < MEMORY)
    }

    /// Forgets what is older than [`MEMORY`].
    pub fn handle_timeout(&mut self, now: Instant) {
        let is_old = |since: &Instant| now.saturating_duration_since(*since) >= MEMORY;
        let old = self.addresses.iter().filter(|(_, (_, since))| is_old(since));
        let old: Vec<_> = old.map(|(address, (peer, _))| (*address, peer.clone())).collect();
        for (address, peer) in old {
            self.addresses.remove(&address);
            self.forget(&peer, address);
        }
    }

    fn forget(&mut self, peer: &RouterId, address: IpAddr) {
        if let Some(own) = self.of.get_mut(peer) {
            own.retain(|known| *known != address);
            if own.is_empty() {
                self.of.remove(peer);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs a moment to start from")]
mod tests;
