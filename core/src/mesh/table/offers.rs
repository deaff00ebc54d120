//! What neighbours offer: by port for the flows, by link for when one ends, and bounded by whoever offers it.

#[cfg(test)]
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};

use super::{LinkId, OfferError};
use crate::name::{ClusterName, RouterId, ServiceName, ServicePort};
use crate::shares::Shares;
use crate::shares::ledger::{Ledger, Owner};

/// The most ports that one neighbour may offer on one link; further offers are refused.
pub const MAX_OFFERS: usize = 16_384;
/// The most bytes that the offers of one link hold in memory, by estimate ...
pub const MAX_LINK_BYTES: usize = 8 << 20;
/// ... and those of all links of one neighbour.
pub const MAX_PEER_BYTES: usize = 16 << 20;
/// What the routers of this router's own cluster hold, beside the least of each ...
const OWN: Shares = Shares { budget: 64 << 20, least: 256 << 10, part: 1 };
/// ... and with it: whoever may make names of this cluster is as many routers as it likes.
const MOST_OWN: u64 = 128 << 20;
/// What other clusters hold, beside the least of each. How many routers one has is its own affair: they share its part,
/// which is 16.5 MiB where no other cluster offers much.
const FOREIGN: Shares = Shares { budget: 32 << 20, least: 1 << 20, part: 1 };
/// What an offer holds beside its names: its places here, with room to grow.
const OFFER_BYTES: usize = 256;
/// The most links that are looked at for one flow. Where more offer a port, each flow looks at others.
const MAX_LOOKED_AT: usize = 64;
/// The most offers that are looked through for what was perhaps meant, of a cluster or of a name.
const MAX_SOUGHT: usize = 1024;

/// The name of its cluster is one text for all offers of a router.
fn bytes_of(port: &ServicePort) -> usize {
    OFFER_BYTES + port.service.name.as_str().len() + port.service.namespace.as_str().len()
}

/// What was offered on a link.
#[derive(Debug)]
struct Link {
    from: RouterId,
    ports: BTreeSet<ServicePort>,
    bytes: usize,
    /// It is down, and what it offered is on its way out.
    down: bool,
}

/// What one neighbour offers on a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkOffers {
    /// The link.
    pub link: LinkId,
    /// The neighbour.
    pub from: RouterId,
    /// How many ports.
    pub ports: usize,
}

/// All offers.
#[derive(Debug)]
pub(super) struct Offers {
    home: ClusterName,
    /// The links on which a port is offered, rising.
    by_port: BTreeMap<ServicePort, Vec<LinkId>>,
    links: BTreeMap<LinkId, Link>,
    own: Ledger,
    foreign: Ledger,
    /// Offers that were looked at, for the tests: work that is done under a lock which every flow takes.
    #[cfg(test)]
    pub(super) looks: Cell<usize>,
}

impl Offers {
    pub(super) fn new(home: ClusterName) -> Self {
        Self {
            home,
            by_port: BTreeMap::new(),
            links: BTreeMap::new(),
            own: Ledger::with_most(OWN, MOST_OWN),
            foreign: Ledger::new(FOREIGN),
            #[cfg(test)]
            looks: Cell::new(0),
        }
    }

    fn looked(&self, _at: usize) {
        #[cfg(test)]
        self.looks.set(self.looks.get() + _at);
    }

    fn owner(&self, from: &RouterId) -> Owner {
        Owner::peer(from, &self.home)
    }

    fn ledger(&mut self, owner: &Owner) -> &mut Ledger {
        if matches!(owner, Owner::Foreign(..)) { &mut self.foreign } else { &mut self.own }
    }

    pub(super) fn offer(
        &mut self,
        from: &RouterId,
        link: LinkId,
        mut port: ServicePort,
    ) -> Result<(), OfferError> {
        let owner = self.owner(from);
        let of_peer = self.held_bytes(from);
        let of_link = self.links.entry(link).or_insert_with(|| Link {
            from: from.clone(),
            ports: BTreeSet::new(),
            bytes: 0,
            down: false,
        });
        if of_link.down || of_link.ports.contains(&port) {
            return Ok(());
        }
        let bytes = bytes_of(&port);
        let full = if of_link.ports.len() >= MAX_OFFERS {
            Some(OfferError::TooMany(from.clone()))
        } else if of_link.bytes + bytes > MAX_LINK_BYTES || of_peer + bytes > MAX_PEER_BYTES {
            Some(OfferError::TooLarge(from.clone()))
        } else if !self.ledger(&owner).take(&owner, bytes as u64) {
            let foreign = matches!(owner, Owner::Foreign(..));
            Some(if foreign {
                OfferError::ClusterFull(from.cluster.clone())
            } else {
                OfferError::Full(from.clone())
            })
        } else {
            None
        };
        if let Some(error) = full {
            self.forget_empty(link);
            return Err(error);
        }
        match self.by_port.get_key_value(&port) {
            // One text for all that offer it.
            Some((known, _)) => port = known.clone(),
            None => port.service.cluster = from.cluster.clone(),
        }
        if let Some(of_link) = self.links.get_mut(&link) {
            of_link.bytes += bytes;
            of_link.ports.insert(port.clone());
        }
        let links = self.by_port.entry(port).or_default();
        if let Err(at) = links.binary_search(&link) {
            links.insert(at, link);
        }
        Ok(())
    }

    fn forget_empty(&mut self, link: LinkId) {
        if self.links.get(&link).is_some_and(|of_link| of_link.ports.is_empty()) {
            self.links.remove(&link);
        }
    }

    /// An estimate of the bytes that are held for a neighbour's offers.
    pub(super) fn held_bytes(&self, from: &RouterId) -> usize {
        let owner = self.owner(from);
        let ledger = if matches!(owner, Owner::Foreign(..)) { &self.foreign } else { &self.own };
        ledger.held(&owner) as usize
    }

    /// Takes an offer back; whether there was one.
    pub(super) fn withdraw(&mut self, link: LinkId, port: &ServicePort) -> bool {
        let Some(of_link) = self.links.get_mut(&link) else { return false };
        if !of_link.ports.remove(port) {
            return false;
        }
        let bytes = bytes_of(port);
        of_link.bytes -= bytes;
        let owner = Owner::peer(&of_link.from, &self.home);
        self.ledger(&owner).give(&owner, bytes as u64);
        self.forget_empty(link);
        self.looked(1);
        if let Some(links) = self.by_port.get_mut(port) {
            if let Ok(at) = links.binary_search(&link) {
                links.remove(at);
            }
            if links.is_empty() {
                self.by_port.remove(port);
            }
        }
        true
    }

    /// Nothing that was offered on a link is used any more. Who offered it; `None` where nothing was.
    pub(super) fn close(&mut self, link: LinkId) -> Option<RouterId> {
        let of_link = self.links.get_mut(&link)?;
        of_link.down = true;
        Some(of_link.from.clone())
    }

    /// The first of the ports that are offered on a link.
    pub(super) fn on(&self, link: LinkId, most: usize) -> impl Iterator<Item = &ServicePort> {
        self.links.get(&link).into_iter().flat_map(|of_link| &of_link.ports).take(most)
    }

    /// What is offered on each link.
    pub(super) fn links(&self) -> impl Iterator<Item = LinkOffers> {
        let up = self.links.iter().filter(|(_, of_link)| !of_link.down);
        up.map(|(link, Link { from, ports, .. })| LinkOffers {
            link: *link,
            from: from.clone(),
            ports: ports.len(),
        })
    }

    /// The links that offer a port and are up.
    fn at(&self, port: &ServicePort) -> impl Iterator<Item = &RouterId> + Clone {
        let links = self.by_port.get(port).map(Vec::as_slice).unwrap_or_default();
        links
            .iter()
            .filter_map(|link| self.links.get(link))
            .inspect(|_| self.looked(1))
            .filter(|of_link| !of_link.down)
            .map(|of_link| &of_link.from)
    }

    /// The neighbours that offer a port; where they are very many, those of a few links that `seed` draws.
    pub(super) fn routers(&self, port: &ServicePort, seed: u64) -> Vec<&RouterId> {
        let links = self.by_port.get(port).map(Vec::as_slice).unwrap_or_default();
        let start = seed.checked_rem(links.len() as u64).unwrap_or(0) as usize;
        let start = if links.len() > MAX_LOOKED_AT { start } else { 0 };
        let drawn = links[start..].iter().chain(&links[..start]).take(MAX_LOOKED_AT);
        let drawn = drawn.filter_map(|link| self.links.get(link)).inspect(|_| self.looked(1));
        let mut routers: Vec<_> =
            drawn.filter(|of_link| !of_link.down).map(|of_link| &of_link.from).collect();
        routers.sort_unstable();
        routers.dedup();
        routers
    }

    pub(super) fn is_offered(&self, port: &ServicePort) -> bool {
        self.at(port).next().is_some()
    }

    pub(super) fn is_offered_by(&self, port: &ServicePort, router: &RouterId) -> bool {
        self.at(port).any(|from| from == router)
    }

    /// The ports from one on, in order.
    pub(super) fn ports_from(&self, first: &ServicePort) -> impl Iterator<Item = &ServicePort> {
        self.by_port.range(first..).map(|(port, _)| port)
    }

    /// What was perhaps meant by a name: some offers of its cluster, and some of that name elsewhere.
    pub(super) fn like(&self, wanted: &ServicePort) -> impl Iterator<Item = &ServiceName> {
        let named = |port: &&ServicePort| port.service.name == wanted.service.name;
        let after = self.by_port.range(wanted..).map(|(port, _)| port).take_while(named);
        let before = self.by_port.range(..wanted).rev().map(|(port, _)| port).take_while(named);
        let cluster = self.links.values().filter(|of_link| of_link.from.cluster == wanted.service.cluster);
        let cluster = cluster.flat_map(|of_link| &of_link.ports);
        let all = after.take(MAX_SOUGHT).chain(before.take(MAX_SOUGHT)).chain(cluster.take(MAX_SOUGHT));
        all.inspect(|_| self.looked(1)).map(|port| &port.service)
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.by_port.is_empty() && self.links.is_empty() && self.own.total() + self.foreign.total() == 0
    }
}
