//! Pods whose sidecar went without a word and has not come back: their new flows wait, or fail.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use servicekeel_core::handoff;
use tokio::time::Instant;

/// The most pods that are remembered. Of the user that has most of them the oldest makes room.
const MAX_MISSING: usize = 64;
/// How long one is remembered: a pod that is deleted may go without a word, too.
const MEMORY: Duration = Duration::from_secs(3600);

/// A pod that is missing.
#[derive(Debug, Clone)]
pub(crate) struct Gone {
    pub(crate) claim: handoff::Pod,
    pub(crate) user: u32,
    pub(crate) since: Instant,
}

/// The pods that are missing, the one that went first in front.
#[derive(Debug, Default)]
pub(crate) struct Missing(Mutex<Vec<Gone>>);

impl Missing {
    fn lock(&self) -> MutexGuard<'_, Vec<Gone>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A sidecar went.
    pub(crate) fn went(&self, claim: &handoff::Pod, user: u32) {
        let mut all = self.lock();
        all.retain(|gone| !(gone.user == user && gone.claim == *claim));
        if all.len() >= MAX_MISSING {
            let held = |user: u32| all.iter().filter(|gone| gone.user == user).count();
            let most = all.iter().map(|gone| gone.user).max_by_key(|user| held(*user));
            if let Some(at) = all.iter().position(|gone| Some(gone.user) == most) {
                all.remove(at);
            }
        }
        all.push(Gone { claim: claim.clone(), user, since: Instant::now() });
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

    fn pod(name: &str) -> handoff::Pod {
        handoff::Pod { name: name.into(), namespace: "default".parse().unwrap(), uid: name.into() }
    }

    #[tokio::test(start_paused = true)]
    async fn who_goes_often_pushes_out_nobody_else() {
        let missing = Missing::default();
        missing.went(&pod("honest"), 1);
        for i in 0..3 * MAX_MISSING {
            missing.went(&pod(&format!("rogue-{i}")), 2);
        }
        missing.went(&pod("late"), 3);
        let all = missing.all();
        assert_eq!((all.len(), all[0].claim.name.as_str()), (MAX_MISSING, "honest"));
        assert_eq!(all[MAX_MISSING - 1].claim.name, "late");
        missing.came(|gone| gone.claim.name == "honest");
        assert_eq!(missing.all().len(), MAX_MISSING - 1);
        tokio::time::advance(MEMORY).await;
        assert!(missing.all().is_empty());
    }
}
