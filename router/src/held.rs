//! How much memory pods' imports and exports may hold: each conversation has some for sure, and more out of a pool.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use servicekeel_core::name::{AllowRule, ServiceName, ServicePort};

/// What each conversation may hold whatever others do, in bytes.
const SURE: usize = 64 << 10;
/// The most of one.
const MOST: usize = 16 << 20;
/// The most of all, beyond what each may hold for sure.
const POOL: usize = 256 << 20;
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
    #[error(
        "the imports and exports of all pods exceed {} MiB, and those of this pod the {} KiB guaranteed to each",
        POOL >> 20,
        SURE >> 10
    )]
    All,
}

/// What all conversations hold beyond what each may hold for sure.
#[derive(Debug, Default)]
pub(crate) struct Pool(Mutex<usize>);

/// What one conversation holds.
#[derive(Debug)]
pub(crate) struct Held {
    pool: Arc<Pool>,
    bytes: Mutex<usize>,
}

/// A part of it, while it lasts.
#[derive(Debug)]
pub(crate) struct Share {
    held: Arc<Held>,
    bytes: usize,
}

fn lock(bytes: &Mutex<usize>) -> MutexGuard<'_, usize> {
    bytes.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Held {
    pub(crate) fn new(pool: Arc<Pool>) -> Arc<Self> {
        Arc::new(Self { pool, bytes: Mutex::default() })
    }

    /// Holds so many bytes more.
    pub(crate) fn share(self: &Arc<Self>, bytes: usize) -> Result<Share, Full> {
        let mut held = lock(&self.bytes);
        let new = *held + bytes;
        if new > MOST {
            return Err(Full::OfOne);
        }
        let mut pool = lock(&self.pool.0);
        let pooled = *pool + new.saturating_sub(SURE) - held.saturating_sub(SURE);
        if new > SURE && pooled > POOL {
            return Err(Full::All);
        }
        (*held, *pool) = (new, pooled);
        Ok(Share { held: self.clone(), bytes })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut held = lock(&self.held.bytes);
        let new = *held - self.bytes;
        *lock(&self.held.pool.0) -= held.saturating_sub(SURE) - new.saturating_sub(SURE);
        *held = new;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_holds_much_leaves_each_what_is_its_own() {
        let pool = Arc::<Pool>::default();
        let mut greedy = Vec::new();
        for _ in 0..POOL / (MOST - SURE) + 2 {
            let held = Held::new(pool.clone());
            let mut shares: Vec<_> = std::iter::from_fn(|| held.share(SURE).ok()).collect();
            assert!(!shares.is_empty());
            assert!(held.share(SURE).is_err());
            shares.pop();
            greedy.push(shares);
        }
        assert!(*lock(&pool.0) > POOL - 2 * SURE && *lock(&pool.0) <= POOL);
        let honest = Held::new(pool.clone());
        let shares: Vec<_> = std::iter::from_fn(|| honest.share(SURE / 4).ok()).collect();
        assert!(shares.len() >= 4, "{}", shares.len());
        drop((greedy, shares));
        assert_eq!((*lock(&pool.0), *lock(&honest.bytes)), (0, 0));
        assert_eq!(honest.share(MOST + 1).unwrap_err(), Full::OfOne);
        assert!(honest.share(MOST).is_ok());
    }
}
