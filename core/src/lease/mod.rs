//! Leases: which imported Service has which address, across reloads and restarts.
//!
//! - A Service keeps its address as long as it is wanted, and gets the same one again after a restart.
//! - A freed address rests before another Service gets it, so that no client holds a DNS answer that now leads
//!   elsewhere. Its own Service may have it back at once.
//! - An address that nobody ever had is given first, the lowest of them; then the one that has rested longest. So
//!   each rests as long as the range allows. The same history gives the same addresses.
//! - Network and broadcast addresses, 127.0.0.1 and those that the caller reserves are never given.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;

use crate::name::ServiceName;

mod snapshot;
#[cfg(test)]
mod tests;

pub use snapshot::{Snapshot, SnapshotEntry};

/// The most addresses of a range that are used, which bounds the table of a range as wide as 127.0.0.0/8: those of
/// a /16.
pub const MAX_ADDRESSES: usize = 65_534;

const LOOPBACK: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8);

/// Why a range can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// Outside of the loopback network, where an address could be another machine's.
    #[error("{0} is not inside 127.0.0.0/8; choose a range there, such as 127.0.66.0/24")]
    NotLoopback(Ipv4Net),
    /// No address is left beside network, broadcast and reserved ones.
    #[error("{0} has no usable address; choose a wider range, such as 127.0.66.0/24")]
    NoAddress(Ipv4Net),
}

/// Why a Service has no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// More Services are wanted than the range has addresses.
    #[error(
        "{range} has no address left for it: {leased} are in use, {resting} rest and go to Services before it; \
         choose a wider range (SIDECAR_IP_RANGE) or import fewer Services"
    )]
    Full {
        /// The range.
        range: Ipv4Net,
        /// Addresses in use.
        leased: usize,
        /// Addresses that were freed a short time ago.
        resting: usize,
    },
    /// There is one for it, which was freed a short time ago.
    #[error(
        "{range} has no free address now: {leased} are in use, and {resting} were freed a short time ago and rest \
         first; nothing is to be done, it will be served by itself"
    )]
    Resting {
        /// The range.
        range: Ipv4Net,
        /// Addresses in use.
        leased: usize,
        /// Addresses that were freed a short time ago.
        resting: usize,
        /// When the one for this Service has rested.
        until: Instant,
    },
}

/// The table of leases of one pod.
#[derive(Debug, Clone)]
pub struct Leases {
    range: Ipv4Net,
    rest: Duration,
    reserved: BTreeSet<Ipv4Addr>,
    /// Every Service that has an address, or had one that nobody else got since.
    by_service: BTreeMap<ServiceName, Lease>,
    /// The same the other way round.
    by_address: BTreeMap<Ipv4Addr, ServiceName>,
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    address: Ipv4Addr,
    /// When the Service was last wanted; `None`: it is.
    freed: Option<Instant>,
}

impl Leases {
    /// An empty table for `range`, which must lie inside 127.0.0.0/8. An address that is freed rests for `rest`
    /// (longer than any TTL that DNS gave out) before another Service gets it. `reserved` ones are never given.
    ///
    /// # Errors
    /// [`RangeError`] where the range is elsewhere, or has no address to give: a /31 and a /32 have none.
    pub fn new(range: Ipv4Net, rest: Duration, reserved: &[Ipv4Addr]) -> Result<Self, RangeError> {
        if !LOOPBACK.contains(&range) {
            return Err(RangeError::NotLoopback(range));
        }
        let reserved = reserved.iter().copied().chain([Ipv4Addr::LOCALHOST]);
        let reserved = reserved.filter(|address| range.contains(address)).collect();
        let leases = Self {
            range: range.trunc(),
            rest,
            reserved,
            by_service: BTreeMap::new(),
            by_address: BTreeMap::new(),
        };
        if leases.usable().next().is_none() {
            return Err(RangeError::NoAddress(range));
        }
        Ok(leases)
    }

    /// Gives each Service of `wanted` an address, keeps those that have one, and frees those that are not wanted any
    /// more. Where addresses are short, the first of `wanted` get theirs. Returns the Services that got none.
    pub fn assign(&mut self, wanted: &[ServiceName], now: Instant) -> Vec<(ServiceName, LeaseError)> {
        let set: BTreeSet<&ServiceName> = wanted.iter().collect();
        for (service, lease) in &mut self.by_service {
            if set.contains(service) {
                lease.freed = None;
            } else {
                lease.freed.get_or_insert(now);
            }
        }
        let fresh: Vec<Ipv4Addr> = {
            let missing = set.iter().filter(|service| !self.by_service.contains_key(**service)).count();
            self.usable().filter(|address| !self.by_address.contains_key(address)).take(missing).collect()
        };
        let mut freed: Vec<(Instant, Ipv4Addr)> =
            self.by_service.values().filter_map(|lease| Some((lease.freed?, lease.address))).collect();
        freed.sort_unstable();
        let (rested, resting) = freed.split_at(freed.partition_point(|(at, _)| *at + self.rest <= now));
        let mut free = fresh.into_iter().chain(rested.iter().map(|(_, address)| *address));
        let mut short = Vec::new();
        let mut asked = BTreeSet::new();
        for service in wanted {
            if self.by_service.contains_key(service) || !asked.insert(service) {
                continue;
            }
            match free.next() {
                Some(address) => self.insert(service.clone(), Lease { address, freed: None }),
                None => short.push(service.clone()),
            }
        }
        let (range, leased) = (self.range, self.iter().count());
        let mut until = resting.iter().map(|(at, _)| *at + self.rest);
        let resting = resting.len();
        let why = |service| match until.next() {
            Some(until) => (service, LeaseError::Resting { range, leased, resting, until }),
            None => (service, LeaseError::Full { range, leased, resting }),
        };
        short.into_iter().map(why).collect()
    }

    /// The address of a Service, where it has one.
    pub fn get(&self, service: &ServiceName) -> Option<Ipv4Addr> {
        self.by_service.get(service).filter(|lease| lease.freed.is_none()).map(|lease| lease.address)
    }

    /// The Service that has an address, where one does.
    pub fn service_at(&self, address: Ipv4Addr) -> Option<&ServiceName> {
        self.by_address.get(&address).filter(|service| self.get(service).is_some())
    }

    /// The Services that have an address, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&ServiceName, Ipv4Addr)> {
        self.by_service
            .iter()
            .filter(|(_, lease)| lease.freed.is_none())
            .map(|(service, lease)| (service, lease.address))
    }

    /// When the next address that was freed may be given to any Service; `None` where none rests.
    pub fn next_rested(&self) -> Option<Instant> {
        self.by_service.values().filter_map(|lease| lease.freed).min().map(|freed| freed + self.rest)
    }

    /// The range, without host bits.
    pub fn range(&self) -> Ipv4Net {
        self.range
    }

    /// Addresses that may be given, lowest first.
    fn usable(&self) -> impl Iterator<Item = Ipv4Addr> {
        let (first, last) = (self.range.network(), self.range.broadcast());
        self.range
            .hosts()
            .filter(move |address| *address != first && *address != last)
            .filter(|address| !self.reserved.contains(address))
            .take(MAX_ADDRESSES)
    }

    fn may_give(&self, address: Ipv4Addr) -> bool {
        // `usable` by arithmetic: a walk for each entry of a large snapshot would take its time squared.
        let network = u32::from(self.range.network());
        let reserved_below = self.reserved.range(..address).count();
        self.range.contains(&address)
            && address != self.range.network()
            && address != self.range.broadcast()
            && !self.reserved.contains(&address)
            && (u32::from(address) - network) as usize <= MAX_ADDRESSES + reserved_below
    }

    /// Gives an address, and forgets who had it before.
    fn insert(&mut self, service: ServiceName, lease: Lease) {
        if let Some(before) = self.by_address.insert(lease.address, service.clone()) {
            self.by_service.remove(&before);
        }
        self.by_service.insert(service, lease);
    }
}
