//! Pods whose sidecar went without a word and has not come back: their new flows wait, or fail.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use servicekeel_core::handoff;
use servicekeel_runtime::net::{NamespaceCookie, Net};
use tokio::time::Instant;

use crate::pods::Pod;

/// The most pods that are remembered. Of the user that has most of them, and of that user's network namespace that has
/// most, the oldest makes room.
const MAX_MISSING: usize = 64;
/// How long one is remembered: a pod that is deleted may go without a word, too.
const MEMORY: Duration = Duration::from_secs(3600);

/// A pod that is missing.
#[derive(Debug, Clone)]
pub(crate) struct Gone {
    pub(crate) claim: handoff::Pod,
    pub(crate) user: u32,
    /// Of its sockets; `None` where it had handed over none, or the kernel does not say it.
    pub(crate) network: Option<NamespaceCookie>,
    pub(crate) since: Instant,
}

impl Gone {
    /// It goes now.
    pub(crate) fn new<N: Net>(pod: &Pod<N>) -> Self {
        Self {
            claim: pod.claim.clone(),
            user: pod.credentials.uid,
            network: pod.namespace.get().copied(),
            since: Instant::now(),
        }
    }

    fn is_of(&self, other: &Self) -> bool {
        (self.user, self.network) == (other.user, other.network)
    }
}

/// The pods that are missing, the one that went first in front.
#[derive(Debug, Default)]
pub(crate) struct Missing(Mutex<Vec<Gone>>);

impl Missing {
    fn lock(&self) -> MutexGuard<'_, Vec<Gone>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A sidecar went.
    pub(crate) fn went(&self, pod: Gone) {
        let mut all = self.lock();
        all.retain(|gone| !(gone.is_of(&pod) && gone.claim == pod.claim));
        if all.len() >= MAX_MISSING {
            let of_user = |one: &Gone| all.iter().filter(|gone| gone.user == one.user).count();
            let held = |one: &Gone| (of_user(one), all.iter().filter(|gone| gone.is_of(one)).count());
            if let Some(most) = all.iter().map(held).max()
                && let Some(at) = all.iter().position(|gone| held(gone) == most)
            {
                all.remove(at);
            }
        }
        all.push(pod);
    }

    /// Forgets those that are there again, as `is_back` says.
    pub(crate) fn came(&self, is_back: impl Fn(&Gone) -> bool) {
        self.lock().retain(|gone| !is_back(gone));
    }

    pub(crate) fn all(&self) -> Vec<Gone> {
        let mut all = self.lock();
        all.retain(|gone| gone.since.elapsed() < MEMORY);
        all.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, user: u32, network: u64) -> Gone {
        let claim =
            handoff::Pod { name: name.into(), namespace: "default".parse().unwrap(), uid: name.into() };
        Gone { claim, user, network: Some(NamespaceCookie(network)), since: Instant::now() }
    }

    #[tokio::test(start_paused = true)]
    async fn who_goes_often_pushes_out_nobody_else() {
        let missing = Missing::default();
        missing.went(pod("honest", 1, 1));
        missing.went(pod("beside", 2, 2));
        for i in 0..3 * MAX_MISSING {
            missing.went(pod(&format!("rogue-{i}"), 2, 3));
        }
        missing.went(pod("late", 3, 4));
        let all = missing.all();
        let names: Vec<_> = all.iter().map(|gone| gone.claim.name.as_str()).collect();
        assert_eq!((all.len(), &names[..2]), (MAX_MISSING, &["honest", "beside"][..]));
        assert_eq!(names[MAX_MISSING - 1], "late");
        missing.came(|gone| gone.claim.name == "honest");
        assert_eq!(missing.all().len(), MAX_MISSING - 1);
        tokio::time::advance(MEMORY).await;
        assert!(missing.all().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_claims_to_be_another_does_not_change_since_when_that_is_missed() {
        let missing = Missing::default();
        missing.went(pod("honest", 1, 1));
        tokio::time::advance(Duration::from_secs(5)).await;
        missing.went(pod("honest", 1, 2));
        let since: Vec<_> = missing.all().iter().map(|gone| gone.since.elapsed().as_secs()).collect();
        assert_eq!(since, [5, 0]);
    }
}
