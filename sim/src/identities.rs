//! The routers' certificates. Their keys are random, so the bytes on the wire differ from run to run; nothing that is
//! decided or traced depends on them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::pki_types::UnixTime;
use rustls::time_provider::TimeProvider;
use servicekeel_core::name::{ClusterName, RouterId};
use servicekeel_router::identity::Identity;
use servicekeel_router::pki::Authority;

use crate::simulation::EPOCH;

/// How long the authorities are valid, in days.
const DAYS: u32 = 365;

/// The simulated time of day.
#[derive(Debug)]
struct Clock;

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(turmoil::since_epoch().unwrap_or(EPOCH)))
    }
}

/// An authority for each cluster, and an identity for each router that trusts them all.
///
/// # Panics
/// Where one can't be made.
pub(crate) fn make(routers: &[RouterId]) -> BTreeMap<RouterId, Arc<Identity>> {
    let start = SystemTime::UNIX_EPOCH + EPOCH;
    let mut authorities: BTreeMap<ClusterName, Authority> = BTreeMap::new();
    for router in routers {
        authorities
            .entry(router.cluster.clone())
            .or_insert_with(|| Authority::generate(&router.cluster, DAYS, start).expect("an authority"));
    }
    let identity = |router: &RouterId| {
        let others: Vec<_> = authorities.values().filter(|a| *a.cluster() != router.cluster).collect();
        let material =
            authorities[&router.cluster].material(&router.node, &others, start).expect("a certificate");
        Identity::with_clock(router.clone(), &material, Arc::new(Clock)).expect("an identity")
    };
    routers.iter().map(|router| (router.clone(), Arc::new(identity(router)))).collect()
}
