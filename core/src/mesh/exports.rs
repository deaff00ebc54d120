//! The changes of this node's exports, so that what a neighbour does not know yet is found at the cost of what has changed.

use std::collections::{BTreeMap, BTreeSet};

use crate::name::ServicePort;

/// Ports that were exported and are not any more, of which those who ask by difference learn.
pub(super) const MAX_GONE: usize = 16_384;

/// Counts the changes of this node's exports, so that each neighbour is told what has changed since.
#[derive(Debug, Default)]
pub(super) struct Exports {
    revision: u64,
    changed: BTreeMap<u64, ServicePort>,
    revision_of: BTreeMap<ServicePort, u64>,
    /// Those of `changed` that are not exported any more.
    gone: BTreeSet<u64>,
    /// The last revision that is not remembered any more.
    forgotten: u64,
}

impl Exports {
    /// A port has changed, and whether it is exported now.
    pub(super) fn note(&mut self, port: &ServicePort, exported: bool) {
        self.revision += 1;
        if let Some(earlier) = self.revision_of.insert(port.clone(), self.revision) {
            self.changed.remove(&earlier);
            self.gone.remove(&earlier);
        }
        self.changed.insert(self.revision, port.clone());
        if !exported {
            self.gone.insert(self.revision);
        }
        if self.gone.len() > MAX_GONE
            && let Some(oldest) = self.gone.pop_first()
            && let Some(port) = self.changed.remove(&oldest)
        {
            self.revision_of.remove(&port);
            self.forgotten = oldest;
        }
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    /// The ports that have changed since a revision; `None` where some of them are forgotten.
    pub(super) fn since(&self, revision: u64) -> Option<impl Iterator<Item = &ServicePort>> {
        (revision >= self.forgotten).then(|| self.changed.range(revision + 1..).map(|(_, port)| port))
    }

    #[cfg(test)]
    pub(super) fn is_bounded_by(&self, exported: usize) -> bool {
        self.changed.len() == self.revision_of.len() && self.changed.len() <= exported + MAX_GONE
    }
}
