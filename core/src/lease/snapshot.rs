//! Leases as they are kept on disk.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use super::{Lease, Leases, RangeError};
use crate::name::ServiceName;

/// The leases at one moment, for the next start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// In the order of the Services' names.
    pub leases: Vec<SnapshotEntry>,
}

/// One lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotEntry {
    /// Whose it is.
    pub service: ServiceName,
    /// Its address.
    pub address: Ipv4Addr,
    /// Whether the Service was no longer wanted. How long ago is not kept: a clock may jump across a restart.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub freed: bool,
}

impl Leases {
    /// What [`Leases::restore`] needs.
    pub fn snapshot(&self) -> Snapshot {
        let entries = self.by_service.iter().map(|(service, lease)| SnapshotEntry {
            service: service.clone(),
            address: lease.address,
            freed: lease.freed.is_some(),
        });
        Snapshot { leases: entries.collect() }
    }

    /// The leases of an earlier run, with a message for each that can't be kept: its address is outside of the range
    /// or not to be given, or the snapshot is damaged and holds an address or a Service twice. Freed addresses rest
    /// anew from `now`.
    ///
    /// # Errors
    /// As [`Leases::new`].
    pub fn restore(
        range: Ipv4Net,
        rest: Duration,
        reserved: &[Ipv4Addr],
        snapshot: &Snapshot,
        now: Instant,
    ) -> Result<(Self, Vec<String>), RangeError> {
        let mut leases = Self::new(range, rest, reserved)?;
        let mut dropped = Vec::new();
        for SnapshotEntry { service, address, freed } in &snapshot.leases {
            let why = if !leases.range.contains(address) {
                format!("which is outside of {}", leases.range)
            } else if !leases.may_give(*address) {
                "which is reserved".to_owned()
            } else if let Some(other) = leases.by_address.get(address) {
                format!("which {other} has")
            } else if let Some(lease) = leases.by_service.get(service) {
                format!("but it also has {}", lease.address)
            } else {
                let lease = Lease { address: *address, freed: freed.then_some(now) };
                leases.insert(service.clone(), lease);
                continue;
            };
            dropped.push(format!("the lease of {service} is dropped: it was {address}, {why}"));
        }
        Ok((leases, dropped))
    }
}
