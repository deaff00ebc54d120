//! Writes the state beside everything else: a slow disk delays no answer, and a full one is tried again.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::sidecar::Saved;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::state::Store;

/// Before the first retry of a write that failed; each further one waits twice as long.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// The longest wait between two retries.
const MAX_RETRY: Duration = Duration::from_secs(60);

/// Writes one state at a time; of those that come meanwhile the last counts.
#[derive(Debug)]
pub(crate) struct Disk {
    store: Option<Store>,
    next: Option<Arc<Saved>>,
    /// What is being written.
    current: Option<Arc<Saved>>,
    writing: JoinSet<io::Result<()>>,
    /// Since writing failed: the wait before the next retry, and when it ends.
    retry: Option<(Duration, Instant)>,
}

impl Disk {
    /// Without a store nothing is written.
    pub(crate) fn new(store: Option<Store>) -> Self {
        Self { store, next: None, current: None, writing: JoinSet::new(), retry: None }
    }

    /// Begins to write a state, however long the wait before a retry of the one before would have been.
    pub(crate) fn save(&mut self, saved: Saved) {
        if self.store.is_some() {
            self.next = Some(Arc::new(saved));
            self.start();
        }
    }

    fn start(&mut self) {
        if self.writing.is_empty()
            && let Some(store) = &self.store
            && let Some(saved) = self.next.take()
        {
            let store = store.clone();
            self.current = Some(saved.clone());
            self.writing.spawn_blocking(move || store.save(&saved));
        }
    }

    /// Whether nothing is being written: everything is on disk, or waits for a retry.
    pub(crate) fn is_idle(&self) -> bool {
        self.writing.is_empty()
    }

    /// The outcome of the next write, with the reason where it failed: then it is retried until it succeeds or a newer
    /// state takes its place. Never, where nothing is to be written.
    ///
    /// Cancel safe.
    pub(crate) async fn written(&mut self) -> Result<(), String> {
        loop {
            if let Some(result) = self.writing.join_next().await {
                return self.ended(result.unwrap_or_else(|panic| Err(io::Error::other(panic))));
            }
            match self.retry {
                Some((_, at)) if self.next.is_some() => sleep_until(at).await,
                _ => return std::future::pending().await,
            }
            self.start();
        }
    }

    fn ended(&mut self, result: io::Result<()>) -> Result<(), String> {
        let current = self.current.take();
        let result = match result {
            Ok(()) => {
                self.retry = None;
                Ok(())
            }
            Err(error) => {
                let wait = self.retry.map_or(FIRST_RETRY, |(wait, _)| MAX_RETRY.min(2 * wait));
                self.retry = Some((wait, Instant::now() + wait));
                let path = self.store.as_ref().map(Store::path).unwrap_or_default();
                Err(format!(
                    "cannot write {}: {error}; retrying; addresses may change after a restart (SIDECAR_STATE_DIR)",
                    path.display()
                ))
            }
        };
        match self.next {
            // It came meanwhile, and is tried at once.
            Some(_) => self.start(),
            None if result.is_err() => self.next = current,
            None => {}
        }
        result
    }

    /// Waits until everything is written; what could not be written is tried once more.
    pub(crate) async fn finish(&mut self) {
        self.start();
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
        assert!(error.starts_with("cannot write ") && error.contains("file/state.json: "), "{error}");
        let mut none = Disk::new(None);
        none.save(Saved::default());
        none.finish().await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_could_not_be_written_is_tried_again_with_growing_pauses() {
        let directory = tempfile::tempdir().unwrap();
        let pod = Pod { name: "p".into(), namespace: "default".parse().unwrap(), uid: String::new() };
        let path = directory.path().join("state");
        std::fs::write(&path, "").unwrap();
        let store = Store::new(&path, &pod);
        let mut disk = Disk::new(Some(store.clone()));
        let state = |n: &str| Saved { imports: Some(n.into()), ..Saved::default() };
        let start = Instant::now();
        disk.save(state("first"));
        let mut tried = Vec::new();
        for _ in 0..9 {
            disk.written().await.unwrap_err();
            tried.push(start.elapsed().as_secs());
        }
        assert_eq!(tried, [0, 1, 3, 7, 15, 31, 63, 123, 183]);
        // A newer state is tried at once, and is the one that is retried.
        disk.save(state("second"));
        disk.written().await.unwrap_err();
        assert_eq!(start.elapsed().as_secs(), 183);
        std::fs::remove_file(&path).unwrap();
        disk.written().await.unwrap();
        assert_eq!(start.elapsed().as_secs(), 243);
        assert_eq!(store.load().0, state("second"));
        assert!(disk.next.is_none() && disk.current.is_none(), "nothing is left to write");

        // The end does not wait for a retry, and tries once.
        std::fs::remove_dir_all(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        disk.save(state("third"));
        disk.written().await.unwrap_err();
        std::fs::remove_file(&path).unwrap();
        disk.finish().await;
        assert_eq!(store.load().0, state("third"));
    }
}
