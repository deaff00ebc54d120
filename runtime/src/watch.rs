//! Files that are watched: rewritten, replaced, appeared, gone, or reached by another link.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use directories::{Directories, Signs};

mod directories;
#[cfg(test)]
mod tests;

/// Between a sign of change and a look, and again until a look sees nothing new: what is changed in several steps is
/// reported once.
const SETTLE: Duration = Duration::from_millis(25);
/// A file that never comes to rest is reported nevertheless.
const SETTLE_AT_MOST: Duration = Duration::from_millis(500);
/// Between two looks where the kernel can't tell: a directory is not there, or inotify is not.
const POLL: Duration = Duration::from_secs(1);
/// Between two looks where it can. It tells nothing of a parent that was moved away, of a file system mounted above,
/// of the other writers of a network file system.
const SWEEP: Duration = Duration::from_secs(10);

/// Watches files, which need not be there, nor their directories.
///
/// The kernel's word (inotify(7), on the directories of the files and of what their links lead to) says when to look;
/// what is found says whether there is a change. So a swap of the `..data` link of a projected volume is seen, and a
/// directory that goes and comes back.
#[derive(Debug)]
pub struct FileWatch {
    files: Vec<PathBuf>,
    found: Vec<Found>,
    directories: Directories,
    signs: Arc<Signs>,
    next_look: Instant,
    /// When a change was seen that is not reported yet.
    changed: Option<Instant>,
}

impl FileWatch {
    /// Watches from now on: read the files after this, and again whenever [`FileWatch::changed`] resolves.
    pub fn new(files: &[PathBuf]) -> Self {
        let mut watch = Self {
            files: files.to_vec(),
            found: Vec::new(),
            directories: Directories::default(),
            signs: Arc::default(),
            next_look: Instant::now(),
            changed: None,
        };
        watch.look();
        watch
    }

    /// Watches these files instead, from now on. A change that was seen before it is still reported.
    pub fn set(&mut self, files: &[PathBuf]) {
        if files != self.files {
            self.files = files.to_vec();
            self.look();
        }
    }

    /// Resolves when any of the files may have changed, appeared or gone since the last time. Now and then nothing has.
    ///
    /// Cancel safe.
    pub async fn changed(&mut self) {
        let since = loop {
            if let Some(since) = self.changed {
                break since;
            }
            tokio::select! {
                biased;
                () = sleep_until(self.next_look) => {
                    if self.look() {
                        self.changed = Some(Instant::now());
                    }
                }
                () = self.signs.wait() => self.next_look = self.next_look.min(Instant::now() + SETTLE),
            }
        };
        loop {
            sleep(SETTLE).await;
            if !self.look() || since.elapsed() >= SETTLE_AT_MOST {
                break;
            }
        }
        self.changed = None;
    }

    /// Whether there is something new.
    fn look(&mut self) -> bool {
        // First the watch, then the look: what happens between the two is seen twice, not missed.
        self.directories.watch(&self.files, &self.signs);
        let written = self.signs.take_written();
        let found: Vec<Found> = self.files.iter().map(|file| Found::at(file)).collect();
        let new = written || found != self.found;
        self.found = found;
        self.next_look = Instant::now() + if self.directories.complete() { SWEEP } else { POLL };
        new
    }
}

/// What a look finds at a path, links followed.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    File { device: u64, inode: u64, length: u64, modified: (i64, i64), changed: (i64, i64) },
    Not(ErrorKind),
}

impl Found {
    fn at(path: &Path) -> Self {
        match fs::metadata(path) {
            Ok(metadata) => Self::File {
                device: metadata.dev(),
                inode: metadata.ino(),
                length: metadata.len(),
                modified: (metadata.mtime(), metadata.mtime_nsec()),
                changed: (metadata.ctime(), metadata.ctime_nsec()),
            },
            Err(error) => Self::Not(error.kind()),
        }
    }
}
