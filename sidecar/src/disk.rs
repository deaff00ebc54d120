//! Writes the state beside everything else: a slow disk delays no answer.

use std::io;

use servicekeel_core::sidecar::Saved;
use tokio::task::JoinSet;

use crate::state::Store;

/// Writes one state at a time; of those that come meanwhile the last counts.
#[derive(Debug)]
pub(crate) struct Disk {
    store: Option<Store>,
    next: Option<Saved>,
    writing: JoinSet<io::Result<()>>,
}

impl Disk {
    /// Without a store nothing is written.
    pub(crate) fn new(store: Option<Store>) -> Self {
        Self { store, next: None, writing: JoinSet::new() }
    }

    /// Begins to write a state.
    pub(crate) fn save(&mut self, saved: Saved) {
        self.next = Some(saved);
        self.start();
    }

    fn start(&mut self) {
        if self.writing.is_empty()
            && let Some(store) = &self.store
            && let Some(saved) = self.next.take()
        {
            let store = store.clone();
            self.writing.spawn_blocking(move || store.save(&saved));
        }
    }

    /// Whether everything is written, as far as it can be.
    pub(crate) fn is_idle(&self) -> bool {
        self.writing.is_empty()
    }

    /// The next state that is written, or can't be, with the reason; never, where none is being written.
    ///
    /// Cancel safe.
    pub(crate) async fn written(&mut self) -> Result<(), String> {
        let Some(result) = self.writing.join_next().await else { return std::future::pending().await };
        self.start();
        match (result, &self.store) {
            (Ok(Ok(())), _) | (_, None) => Ok(()),
            (Ok(Err(error)), Some(store)) => Err(format!(
                "{} can't be written: {error}; addresses may change with a restart (SIDECAR_STATE_DIR)",
                store.path().display()
            )),
            (Err(error), Some(_)) => Err(format!("the state can't be written: {error}")),
        }
    }

    /// Waits until everything is written.
    pub(crate) async fn finish(&mut self) {
        while !self.writing.is_empty() {
            // There is nobody left to tell but the log, which has it from the first failure.
            let _ = self.written().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use servicekeel_core::handoff::Pod;

    #[tokio::test]
    async fn the_last_state_is_written_and_a_failure_says_where() {
        let directory = tempfile::tempdir().unwrap();
        let pod = Pod { name: "p".into(), namespace: "default".parse().unwrap(), uid: String::new() };
        let store = Store::new(&directory.path().join("state"), &pod);
        let mut disk = Disk::new(Some(store.clone()));
        for n in 0..20 {
            disk.save(Saved { imports: Some(n.to_string()), ..Saved::default() });
        }
        disk.finish().await;
        assert_eq!(store.load().0.imports.as_deref(), Some("19"));

        let blocked = directory.path().join("file");
        std::fs::write(&blocked, "").unwrap();
        let mut disk = Disk::new(Some(Store::new(&blocked, &pod)));
        disk.save(Saved::default());
        let error = disk.written().await.unwrap_err();
        assert!(error.contains("file/state.json can't be written"), "{error}");
        let mut none = Disk::new(None);
        none.save(Saved::default());
        none.finish().await;
    }
}
