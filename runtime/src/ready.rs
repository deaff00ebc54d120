//! Readiness: what a program still waits for before it can do its work.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// What is waited for. Clones share it. Nothing is waited for at first: ask before the endpoint is served.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<Mutex<Waits>>);

#[derive(Debug, Default)]
struct Waits {
    next: u64,
    pending: BTreeMap<u64, &'static str>,
}

impl Readiness {
    /// Nothing is waited for.
    pub fn new() -> Self {
        Self::default()
    }

    /// Not ready until the guard is dropped. `what` reads as the thing that is missing: `the router`.
    pub fn wait_for(&self, what: &'static str) -> Pending {
        let number = self.with(|waits| {
            let number = waits.next;
            waits.next += 1;
            waits.pending.insert(number, what);
            number
        });
        Pending { readiness: self.clone(), number }
    }

    /// What is missing, in the order in which it was asked for. Empty: ready.
    pub fn pending(&self) -> Vec<&'static str> {
        self.with(|waits| waits.pending.values().copied().collect())
    }

    fn with<T>(&self, f: impl FnOnce(&mut Waits) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Something is missing. Dropping it says that it is there now.
#[derive(Debug)]
#[must_use = "dropping it says that what is waited for is there"]
pub struct Pending {
    readiness: Readiness,
    number: u64,
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.readiness.with(|waits| waits.pending.remove(&self.number));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_ready_when_the_last_guard_is_gone() {
        let readiness = Readiness::new();
        assert!(readiness.pending().is_empty());
        let router = readiness.wait_for("the router");
        let dns = readiness.clone().wait_for("DNS");
        let again = readiness.wait_for("DNS");
        assert_eq!(readiness.pending(), ["the router", "DNS", "DNS"]);
        drop(dns);
        assert_eq!(readiness.pending(), ["the router", "DNS"]);
        drop(router);
        drop(again);
        assert!(readiness.pending().is_empty());
    }
}
