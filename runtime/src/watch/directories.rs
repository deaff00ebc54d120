//! The directories of watched files, by inotify, and what it tells of them.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;

/// What inotify told.
#[derive(Debug, Default)]
pub(super) struct Signs {
    wake: Notify,
    written: AtomicBool,
    lost: AtomicBool,
}

impl Signs {
    /// Waits for the next sign. Cancel safe.
    pub(super) async fn wait(&self) {
        self.wake.notified().await;
    }

    /// Whether a file of a watched name was touched since the last call: it may have changed within the file system's
    /// clock tick, and look the same.
    pub(super) fn take_written(&self) -> bool {
        self.written.swap(false, Ordering::AcqRel)
    }
}

/// Watches the directories where something may happen to the files.
#[derive(Debug, Default)]
pub(super) struct Directories {
    wanted: Wanted,
    watcher: Option<RecommendedWatcher>,
    complete: bool,
    refused: bool,
}

impl Directories {
    /// Whether every directory is there and watched.
    pub(super) fn complete(&self) -> bool {
        self.complete
    }

    /// Watches the directories that are there now.
    pub(super) fn watch(&mut self, files: &[PathBuf], signs: &Arc<Signs>) {
        let wanted = Wanted::of(files);
        let lost = signs.lost.swap(false, Ordering::AcqRel);
        if wanted == self.wanted && !lost {
            return;
        }
        // A new watcher, and no change of the old one: it knows directories by their paths, and what it still has to
        // say of a directory that is gone would concern the one that took its place.
        self.watcher = None;
        let watched = match begin(&wanted, signs) {
            Ok(watcher) => {
                self.watcher = Some(watcher);
                true
            }
            Err(error) => {
                if !self.refused {
                    tracing::warn!(%error, "inotify unavailable; polling watched files every second");
                }
                self.refused = true;
                false
            }
        };
        self.complete = watched && wanted.absent == 0 && Wanted::of(files) == wanted;
        self.wanted = wanted;
    }
}

fn begin(wanted: &Wanted, signs: &Arc<Signs>) -> notify::Result<RecommendedWatcher> {
    let directories: BTreeSet<PathBuf> = wanted.directories.iter().map(|(path, _)| path.clone()).collect();
    let names = wanted.names.clone();
    let signs = Arc::clone(signs);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        let Ok(event) = event else {
            signs.written.store(true, Ordering::Release);
            return signs.wake.notify_one();
        };
        if reads(event.kind) {
            return;
        }
        let named = |path: &PathBuf| path.file_name().is_some_and(|name| names.contains(name));
        if event.need_rescan() || event.paths.iter().any(named) {
            signs.written.store(true, Ordering::Release);
        }
        if event.paths.iter().any(|path| directories.contains(path)) {
            signs.lost.store(true, Ordering::Release);
        }
        signs.wake.notify_one();
    })?;
    for (directory, _) in &wanted.directories {
        watcher.watch(directory, RecursiveMode::NonRecursive)?;
    }
    Ok(watcher)
}

/// Whether an event is of a reader: we are one ourselves.
fn reads(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => false,
        EventKind::Access(_) => true,
        _ => false,
    }
}

/// Where something may happen to the files, as far as it is there.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wanted {
    /// By path, with device and inode: another directory in its place is another one to watch.
    directories: BTreeSet<(PathBuf, (u64, u64))>,
    names: BTreeSet<OsString>,
    absent: usize,
}

impl Wanted {
    fn of(files: &[PathBuf]) -> Self {
        let mut wanted = Self::default();
        for file in files {
            wanted.add(file);
            // What a link leads to may be rewritten where it lies.
            if let Ok(real) = fs::canonicalize(file) {
                wanted.add(&real);
            }
        }
        wanted
    }

    fn add(&mut self, file: &Path) {
        self.names.extend(file.file_name().map(OsString::from));
        let directory = std::path::absolute(file).ok().and_then(|file| file.parent().map(Path::to_owned));
        let Some(directory) = directory else { return };
        match fs::metadata(&directory) {
            Ok(metadata) if metadata.is_dir() => {
                self.directories.insert((directory, (metadata.dev(), metadata.ino())));
            }
            _ => self.absent += 1,
        }
    }
}
