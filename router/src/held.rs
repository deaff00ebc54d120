//! How much memory pods' imports and exports may hold: each pod has some for sure, and a part of what is left.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use servicekeel_core::name::{AllowRule, ServiceName, ServicePort};

use crate::rooms::{Account, Lease};

/// The most of one conversation.
const MOST: usize = 16 << 20;
/// What an import holds beside its names: a task, a socket, its places in maps.
const IMPORT: usize = 2048;
/// What an export holds beside its names and rules.
const EXPORT: usize = 1024;
/// What a name holds beside its bytes: the counts of its Arc and the allocator's own.
const NAME: usize = 32;

/// An estimate of the bytes that an import holds.
pub(crate) fn of_import(wanted: &ServicePort) -> usize {
    IMPORT + of_names(wanted)
}

/// An estimate of the bytes that an export holds.
pub(crate) fn of_export(offered: &ServicePort, allow: Option<&[AllowRule]>) -> usize {
    let rules = allow.unwrap_or_default().iter().map(|rule| {
        let namespace = rule.namespace.as_ref().map_or(0, |namespace| NAME + namespace.as_str().len());
        size_of::<AllowRule>() + NAME + rule.cluster.as_str().len() + namespace
    });
    EXPORT + of_names(offered) + rules.sum::<usize>()
}

fn of_names(port: &ServicePort) -> usize {
    let ServiceName { name, namespace, cluster } = &port.service;
    3 * NAME + name.as_str().len() + namespace.as_str().len() + cluster.as_str().len()
}

/// Which bound is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Full {
    #[error("this pod's imports and exports, with their `allow` rules, exceed {} MiB, the limit for one pod", MOST >> 20)]
    OfOne,
    #[error("the imports and exports of this network namespace hold {} KiB, as much as they may beside those of others", .0 >> 10)]
    OfOwner(u64),
}

/// What one conversation holds.
#[derive(Debug)]
pub(crate) struct Held {
    /// Of its owner.
    account: Arc<Account>,
    bytes: Mutex<usize>,
}

/// A part of it, while it lasts.
#[derive(Debug)]
pub(crate) struct Share {
    held: Arc<Held>,
    bytes: usize,
    _lease: Lease,
}

fn lock(bytes: &Mutex<usize>) -> MutexGuard<'_, usize> {
    bytes.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Held {
    pub(crate) fn new(account: Arc<Account>) -> Arc<Self> {
        Arc::new(Self { account, bytes: Mutex::default() })
    }

    /// Holds so many bytes more.
    pub(crate) fn share(self: &Arc<Self>, bytes: usize) -> Result<Share, Full> {
        let mut held = lock(&self.bytes);
        if *held + bytes > MOST {
            return Err(Full::OfOne);
        }
        let lease = self.account.lease(bytes as u64).ok_or_else(|| Full::OfOwner(self.account.held()))?;
        *held += bytes;
        Ok(Share { held: self.clone(), bytes, _lease: lease })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        *lock(&self.held.bytes) -= self.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bounds::Owner;
    use crate::rooms::Rooms;

    #[test]
    fn who_holds_much_leaves_each_what_is_its_own() {
        let rooms = Rooms::default();
        let of = |pod| Held::new(rooms.offers.account_of_pod(&Owner::Namespace(pod)));
        let all = |held: &Arc<Held>| std::iter::from_fn(|| held.share(64 << 10).ok()).collect::<Vec<_>>();
        let one = of(1);
        assert_eq!(one.share(MOST + 1).unwrap_err(), Full::OfOne);
        drop(one.share(MOST).unwrap());
        // However many conversations it has.
        let greedy: Vec<_> = (0..32).map(|_| of(1)).map(|held| all(&held)).collect();
        assert!(matches!(one.share(1 << 20), Err(Full::OfOwner(_))));
        let honest = of(2);
        assert_eq!(all(&honest).len(), MOST / (64 << 10));
        drop(greedy);
        assert_eq!(one.account.held(), 0);
    }
}
