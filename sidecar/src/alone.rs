//! One address of a network namespace means one Service.
//!
//! Two sidecars of one namespace, as those of the host's network may be, do not see each other's sockets: SO_REUSEPORT,
//! by which a sidecar that restarts binds beside what the router still holds of its earlier run, would share every
//! connection out among both, whatever Service each means. So a sidecar takes two names for each address that it serves,
//! which are gone with its process and never handed over: one for the address, and one that says the Service too. Where
//! another has the first and not the second, it means another Service there. Where another has both, it is the same
//! one, such as the pod's earlier sidecar that is just ending, and no connection can go wrong.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, Weak};

use servicekeel_core::name::ServiceName;
use servicekeel_runtime::net::Net;

/// Another sidecar means another Service there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "another sidecar on this loopback has the address for another Service: give each of them a range of its own \
     (SIDECAR_IP_RANGE), or end the other one"
)]
pub(crate) struct Taken;

/// The names of one address, until they are dropped.
pub(crate) struct Claim<N: Net> {
    service: ServiceName,
    _names: [Option<N::Reservation>; 2],
}

impl<N: Net> Claim<N> {
    /// Where the system gives no such names, or has no descriptor for them, it does without.
    fn new(net: &N, address: Ipv4Addr, service: &ServiceName) -> Result<Self, Taken> {
        // The Service's own name may be longer than a socket's.
        let mut hasher = DefaultHasher::new();
        service.hash(&mut hasher);
        let address = format!("sidecar/{address}");
        let both = format!("{address}/{:016x}", hasher.finish());
        let names = match net.reserve(&address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => match net.reserve(&both) {
                Ok(_) => return Err(Taken),
                Err(_) => [None, None],
            },
            address => [address.ok(), net.reserve(&both).ok()],
        };
        Ok(Self { service: service.clone(), _names: names })
    }
}

/// The claims of this sidecar: one for all ports of an address.
pub(crate) struct Claims<N: Net>(BTreeMap<Ipv4Addr, Weak<Claim<N>>>);

impl<N: Net> Default for Claims<N> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<N: Net> Claims<N> {
    /// The claim of an address for a Service, to be held for as long as a socket serves it there.
    pub(crate) fn claim(
        &mut self,
        net: &N,
        address: Ipv4Addr,
        service: &ServiceName,
    ) -> Result<Arc<Claim<N>>, Taken> {
        if let Some(claim) = self.0.get(&address).and_then(Weak::upgrade)
            && claim.service == *service
        {
            return Ok(claim);
        }
        self.0.retain(|_, claim| claim.strong_count() > 0);
        let claim = Arc::new(Claim::new(net, address, service)?);
        self.0.insert(address, Arc::downgrade(&claim));
        Ok(claim)
    }
}
