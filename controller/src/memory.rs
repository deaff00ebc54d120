//! What is remembered of each pod from one pass to the next: what was told, what was written, what failed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

/// The first pause after a failed write. It doubles with each.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// A pod, as `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PodKey {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl fmt::Display for PodKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Something to tell once. Two pods that have the same note have it told once.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Note {
    /// A Service, or a port of it, is not exported.
    LeftOut { namespace: String, what: String },
    /// Another field manager owns the annotation, which would be another one.
    LeftAlone { pod: PodKey, manager: String },
    /// Writes fail, and why.
    Failed(String),
    /// The annotation that would be written, or none.
    Would { pod: PodKey, write: Option<String> },
}

/// What was written, and over which version of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) over: Option<String>,
    pub(crate) text: Option<String>,
}

#[derive(Debug, Default)]
struct Remembered {
    notes: BTreeSet<Note>,
    written: Option<Written>,
    failures: u32,
}

/// The memory, bounded by what the pods and Services of the cluster are.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pods: BTreeMap<PodKey, Remembered>,
    /// How many pods have this note.
    holders: BTreeMap<Note, usize>,
}

impl Memory {
    /// These are the pod's notes now. Returns those that no pod had before. Without [`Note::Failed`] the pauses start
    /// anew.
    pub(crate) fn note(&mut self, pod: &PodKey, notes: BTreeSet<Note>) -> Vec<Note> {
        let remembered = self.pods.entry(pod.clone()).or_default();
        if !notes.iter().any(|note| matches!(note, Note::Failed(_))) {
            remembered.failures = 0;
        }
        let before = std::mem::replace(&mut remembered.notes, notes.clone());
        let mut new = Vec::new();
        for note in notes.difference(&before) {
            let holders = self.holders.entry(note.clone()).or_default();
            *holders += 1;
            if *holders == 1 {
                new.push(note.clone());
            }
        }
        for note in before.difference(&notes) {
            self.release(note);
        }
        new
    }

    fn release(&mut self, note: &Note) {
        if let Some(holders) = self.holders.get_mut(note) {
            *holders -= 1;
            if *holders == 0 {
                self.holders.remove(note);
            }
        }
    }

    /// What was last written to the pod.
    pub(crate) fn written(&self, pod: &PodKey) -> Option<&Written> {
        self.pods.get(pod)?.written.as_ref()
    }

    /// A write succeeded.
    pub(crate) fn wrote(&mut self, pod: &PodKey, written: Written) {
        self.pods.entry(pod.clone()).or_default().written = Some(written);
    }

    /// A write failed. Returns how long to wait before the next.
    pub(crate) fn failed(&mut self, pod: &PodKey) -> Duration {
        let remembered = self.pods.entry(pod.clone()).or_default();
        let pause = PAUSE.saturating_mul(1 << remembered.failures.min(6)).min(LONGEST_PAUSE);
        remembered.failures = remembered.failures.saturating_add(1);
        pause
    }

    /// The pod is gone.
    pub(crate) fn forget(&mut self, pod: &PodKey) {
        for note in self.pods.remove(pod).unwrap_or_default().notes {
            self.release(&note);
        }
    }

    /// All notes, in order.
    pub(crate) fn notes(&self) -> impl Iterator<Item = &Note> {
        self.holders.keys()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str) -> PodKey {
        PodKey { namespace: "shop".into(), name: name.into() }
    }

    fn notes(reasons: &[&str]) -> BTreeSet<Note> {
        reasons.iter().map(|reason| Note::Failed((*reason).to_owned())).collect()
    }

    #[test]
    fn each_note_is_told_once_and_again_when_it_comes_back() {
        let mut memory = Memory::default();
        let mut told = |pod_name: &str, reasons: &[&str]| memory.note(&pod(pod_name), notes(reasons)).len();
        assert_eq!(told("a", &["x", "y"]), 2);
        assert_eq!(told("a", &["x", "y"]), 0);
        assert_eq!(told("b", &["x"]), 0);
        assert_eq!(told("a", &["y"]), 0);
        assert_eq!(told("a", &["x", "y"]), 0, "b has had it all the time");
        assert_eq!(told("a", &[]), 0);
        assert_eq!(told("b", &[]), 0);
        assert_eq!(told("b", &["x"]), 1);
        memory.forget(&pod("b"));
        assert_eq!(memory.notes().count(), 0);
        assert!(memory.pods.keys().eq([&pod("a")]));
    }

    #[test]
    fn pauses_grow_to_a_bound_and_start_anew_after_a_success() {
        let mut memory = Memory::default();
        let pauses: Vec<u64> = (0..9).map(|_| memory.failed(&pod("a")).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(memory.failed(&pod("b")).as_secs(), 1);
        memory.note(&pod("a"), notes(&["the same"]));
        assert_eq!(memory.failed(&pod("a")).as_secs(), 60);
        memory.note(&pod("a"), BTreeSet::new());
        assert_eq!(memory.failed(&pod("a")).as_secs(), 1);
    }
}
