//! Exports: which ports the router is told of.

use std::collections::BTreeMap;

use super::Unserved;
use crate::annotation::Export;
use crate::annotation::diff::{self, ExportChange, Offer};
use crate::handoff::{MAX_MESSAGE, MAX_SOCKETS, SocketId, ToRouter};
use crate::name::{ServiceName, ServicePort};

/// What a new set of exports needs.
#[derive(Debug, Default)]
pub(super) struct Steps {
    /// Ports that the router is to hear of, the first time or anew.
    pub(super) tell: Vec<SocketId>,
    /// Ports that are no longer offered.
    pub(super) over: Vec<SocketId>,
}

#[derive(Debug, Default)]
pub(super) struct Exports {
    served: Vec<Export>,
    unserved: Vec<(ServiceName, Unserved)>,
    offers: BTreeMap<ServicePort, (SocketId, Offer)>,
    by_id: BTreeMap<SocketId, ServicePort>,
}

impl Exports {
    /// Offers these entries from now on.
    pub(super) fn apply(&mut self, entries: &[Export], next_id: &mut SocketId) -> Steps {
        let mut room = MAX_SOCKETS;
        let mut unserved = Vec::new();
        let mut served: Vec<Export> = Vec::with_capacity(entries.len());
        for export in entries {
            let bytes = longest_message(export);
            match room.checked_sub(export.ports.len()) {
                _ if bytes > MAX_MESSAGE => {
                    unserved.push((export.service.clone(), Unserved::TooLong { bytes }));
                }
                None => unserved.push((export.service.clone(), Unserved::TooManyPorts)),
                Some(left) => {
                    room = left;
                    served.push(export.clone());
                }
            }
        }
        let mut steps = Steps::default();
        for change in diff::exports(&self.served, &served) {
            match change {
                ExportChange::Withdraw(port) => {
                    if let Some((id, _)) = self.offers.remove(&port) {
                        self.by_id.remove(&id);
                        steps.over.push(id);
                    }
                }
                ExportChange::Alter(port, offer) => {
                    if let Some((id, old)) = self.offers.get_mut(&port) {
                        *old = offer;
                        steps.tell.push(*id);
                    }
                }
                ExportChange::Offer(port, offer) => {
                    let id = *next_id;
                    *next_id += 1;
                    self.by_id.insert(id, port.clone());
                    self.offers.insert(port, (id, offer));
                    steps.tell.push(id);
                }
            }
        }
        self.served = served;
        self.unserved = unserved;
        steps
    }

    /// What the router is told of an export.
    pub(super) fn message(&self, id: SocketId) -> Option<ToRouter> {
        let port = self.by_id.get(&id)?;
        let (_, offer) = self.offers.get(port)?;
        Some(message(id, port, offer))
    }

    /// The port of an export.
    pub(super) fn port(&self, id: SocketId) -> Option<&ServicePort> {
        self.by_id.get(&id)
    }

    pub(super) fn id(&self, port: &ServicePort) -> Option<SocketId> {
        self.offers.get(port).map(|(id, _)| *id)
    }

    pub(super) fn len(&self) -> usize {
        self.offers.len()
    }

    /// The exports that are offered, in their order.
    pub(super) fn served(&self) -> &[Export] {
        &self.served
    }

    pub(super) fn unserved(&self) -> &[(ServiceName, Unserved)] {
        &self.unserved
    }
}

fn message(id: SocketId, port: &ServicePort, offer: &Offer) -> ToRouter {
    let allow = offer.allow.as_ref().map(|rules| rules.iter().cloned().collect());
    ToRouter::Export { id, offered: port.clone(), target: offer.target, allow }
}

/// How long the longest message of this export can be: the many rules of `allow` may be too long for any.
fn longest_message(export: &Export) -> usize {
    let offers = diff::offered(std::slice::from_ref(export));
    offers.iter().map(|(port, offer)| message(SocketId::MAX, port, offer).encode().len()).max().unwrap_or(0)
}
