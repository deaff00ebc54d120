//! What must change when an annotation does: as little as possible.
//!
//! Sockets are keyed by (service, port, protocol), so a port's name, the order of entries and of ports, and the way
//! in which the text is written change nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;

use super::{Export, Import};
use crate::name::{AllowRule, ServicePort};

/// One step from the old imports to the new ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImportChange {
    /// The socket of this port is no longer wanted.
    Close(ServicePort),
    /// This port needs a socket.
    Open(ServicePort),
}

/// How a port is offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// The container's port.
    pub target: NonZeroU16,
    /// Who may use it, each rule once; `None`: every member of the mesh.
    pub allow: Option<BTreeSet<AllowRule>>,
}

/// One step from the old exports to the new ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExportChange {
    /// The port is no longer offered.
    Withdraw(ServicePort),
    /// The port is offered in another way. It was offered before, and its flows need not end.
    Alter(ServicePort, Offer),
    /// The port is offered from now on.
    Offer(ServicePort, Offer),
}

/// The ports that imports want.
pub fn wanted(imports: &[Import]) -> BTreeSet<ServicePort> {
    imports.iter().flat_map(Import::sockets).collect()
}

/// The ports that exports offer, and how.
pub fn offered(exports: &[Export]) -> BTreeMap<ServicePort, Offer> {
    let mut offers = BTreeMap::new();
    for export in exports {
        let allow = export.allow.as_ref().map(|rules| rules.iter().cloned().collect::<BTreeSet<_>>());
        for port in &export.ports {
            offers.insert(port.of(&export.service), Offer { target: port.target, allow: allow.clone() });
        }
    }
    offers
}

/// The fewest changes from the `old` imports to the `new` ones; those that free something come first.
pub fn imports(old: &[Import], new: &[Import]) -> Vec<ImportChange> {
    let (old, new) = (wanted(old), wanted(new));
    let close = old.difference(&new).cloned().map(ImportChange::Close);
    let open = new.difference(&old).cloned().map(ImportChange::Open);
    close.chain(open).collect()
}

/// The fewest changes from the `old` exports to the `new` ones; those that free something come first.
pub fn exports(old: &[Export], new: &[Export]) -> Vec<ExportChange> {
    let (old, new) = (offered(old), offered(new));
    let withdraw = old.keys().filter(|port| !new.contains_key(port)).cloned().map(ExportChange::Withdraw);
    let mut changes: Vec<_> = withdraw.collect();
    for (port, offer) in new {
        match old.get(&port) {
            Some(before) if *before == offer => {}
            Some(_) => changes.push(ExportChange::Alter(port, offer)),
            None => changes.push(ExportChange::Offer(port, offer)),
        }
    }
    changes
}
