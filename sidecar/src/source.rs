//! The files of the annotations: watched, read within bounds, and published.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::annotation::{Finding, MAX_TEXT};
use servicekeel_core::sidecar::Annotation;
use servicekeel_runtime::file;
use servicekeel_runtime::watch::FileWatch;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

/// The file of the exports, under the config directory.
pub const EXPORTS_FILE: &str = "exported-services-config.yaml";
/// The file of the imports.
pub const IMPORTS_FILE: &str = "imported-services-config.yaml";
/// A text that becomes empty is believed when it still is after so long: a file that is written in place is empty for a
/// moment, and nothing is withdrawn for that.
const EMPTY: Duration = Duration::from_millis(200);

/// The annotations' texts. With neither file there nothing is said, and the last good state stays in service; with one
/// of them the other has no entries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Annotations {
    /// What the pod exports; `None`: no such file.
    pub exports: Option<String>,
    /// What the pod imports; `None`: no such file.
    pub imports: Option<String>,
    /// Files that are there and can't be used, with the reason. Their texts are `None`.
    pub unusable: Vec<(Annotation, Finding)>,
}

impl Annotations {
    /// Whether there is no file at all.
    pub fn is_absent(&self) -> bool {
        self.exports.is_none() && self.imports.is_none() && self.unusable.is_empty()
    }

    /// The text of one annotation, or why it can't be used. A file that is not there has the empty text.
    ///
    /// # Errors
    /// Where its file is there and can't be read.
    pub fn text(&self, annotation: Annotation) -> Result<&str, Finding> {
        if let Some((_, finding)) = self.unusable.iter().find(|(which, _)| *which == annotation) {
            return Err(finding.clone());
        }
        let text = match annotation {
            Annotation::Exports => &self.exports,
            Annotation::Imports => &self.imports,
        };
        Ok(text.as_deref().unwrap_or_default())
    }

    /// Whether a text is empty here that `before` was not.
    fn is_emptied(&self, before: &Self) -> bool {
        [Annotation::Exports, Annotation::Imports]
            .into_iter()
            .any(|annotation| self.text(annotation) == Ok("") && before.text(annotation) != Ok(""))
    }
}

/// The files of one directory.
#[derive(Debug)]
pub struct Files {
    directory: PathBuf,
    publish: watch::Sender<Arc<Annotations>>,
}

impl Files {
    /// Reads the files of a directory, and gives what they say now and from now on while [`Files::run`] runs. The
    /// directory may appear later.
    pub fn new(directory: &Path) -> (Self, watch::Receiver<Arc<Annotations>>) {
        let (publish, annotations) = watch::channel(Arc::new(read(directory)));
        (Self { directory: directory.to_owned(), publish }, annotations)
    }

    /// Publishes every change, for ever.
    pub async fn run(self) {
        let mut watch =
            FileWatch::new(&[self.directory.join(EXPORTS_FILE), self.directory.join(IMPORTS_FILE)]);
        loop {
            // Read after the watch has begun: what changed before it is not missed.
            let found = self.read(&mut watch).await;
            self.publish.send_if_modified(|published| {
                let changed = **published != found;
                if changed {
                    *published = Arc::new(found);
                }
                changed
            });
            watch.changed().await;
        }
    }

    async fn read(&self, watch: &mut FileWatch) -> Annotations {
        let until = Instant::now() + EMPTY;
        loop {
            let found = read(&self.directory);
            if Instant::now() >= until || !found.is_emptied(&self.publish.borrow()) {
                return found;
            }
            // Late or changed, it is read again.
            let _ = timeout_at(until, watch.changed()).await;
        }
    }
}

fn read(directory: &Path) -> Annotations {
    let mut annotations = Annotations::default();
    for (annotation, name) in [(Annotation::Exports, EXPORTS_FILE), (Annotation::Imports, IMPORTS_FILE)] {
        let text = match read_file(&directory.join(name)) {
            Ok(text) => text,
            Err(finding) => {
                annotations.unusable.push((annotation, finding));
                continue;
            }
        };
        match annotation {
            Annotation::Exports => annotations.exports = text,
            Annotation::Imports => annotations.imports = text,
        }
    }
    annotations
}

/// The text of a file; `None` where it is not there.
fn read_file(path: &Path) -> Result<Option<String>, Finding> {
    let whole = |reason: String| Finding { path: String::new(), line: 1, column: 1, reason };
    let unread = |error: &dyn Display| whole(format!("cannot read {}: {error}", path.display()));
    // Asked before it is opened: the opening of a pipe would wait for a writer.
    let found = match std::fs::metadata(path) {
        Ok(found) => found,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(unread(&error)),
    };
    if !found.is_file() {
        return Err(whole(format!("{} is not a regular file", path.display())));
    }
    if found.len() > MAX_TEXT as u64 {
        return Err(whole(format!("the file has {} bytes; the limit is {MAX_TEXT}", found.len())));
    }
    let bytes = match file::read_bounded(path, MAX_TEXT) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unread(&error)),
    };
    String::from_utf8(bytes).map(Some).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = good.iter().filter(|byte| **byte == b'\n').count() as u64 + 1;
        let column = good.rsplit(|byte| *byte == b'\n').next().unwrap_or_default().len() as u64 + 1;
        Finding { path: String::new(), line, column, reason: "not UTF-8; save the file as UTF-8".to_owned() }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(directory: &Path, name: &str, bytes: &[u8]) {
        std::fs::write(directory.join(name), bytes).unwrap();
    }

    #[test]
    fn what_is_there_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        assert!(read(&directory.join("later")).is_absent());
        assert!(read(directory).is_absent());
        put(directory, IMPORTS_FILE, b"services: []");
        let found = read(directory);
        assert_eq!(found.text(Annotation::Imports), Ok("services: []"));
        assert_eq!(found.text(Annotation::Exports), Ok(""));
        assert!(!found.is_absent());
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        put(directory, IMPORTS_FILE, &vec![b'#'; MAX_TEXT + 1]);
        put(directory, EXPORTS_FILE, b"services:\n  - name: \xff\n");
        let found = read(directory);
        let error = |annotation| found.text(annotation).unwrap_err().to_string();
        assert_eq!(
            error(Annotation::Imports),
            "line 1, column 1: the file has 262145 bytes; the limit is 262144"
        );
        assert_eq!(error(Annotation::Exports), "line 2, column 11: not UTF-8; save the file as UTF-8");
        std::fs::remove_file(directory.join(EXPORTS_FILE)).unwrap();
        std::fs::create_dir(directory.join(EXPORTS_FILE)).unwrap();
        let error = read(directory).text(Annotation::Exports).unwrap_err().to_string();
        assert!(error.ends_with("is not a regular file"), "{error}");
        put(directory, IMPORTS_FILE, &vec![b'#'; MAX_TEXT]);
        assert!(read(directory).text(Annotation::Imports).is_ok());
    }

    /// As the kubelet does: the files are links through `..data`, and one rename swaps them all.
    #[tokio::test]
    async fn a_projected_volume_is_followed() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let project = |version: &str, text: &str| {
            std::fs::create_dir(directory.join(version)).unwrap();
            put(&directory.join(version), IMPORTS_FILE, text.as_bytes());
            std::os::unix::fs::symlink(version, directory.join("..new")).unwrap();
            std::fs::rename(directory.join("..new"), directory.join("..data")).unwrap();
        };
        project("..1", "one");
        std::os::unix::fs::symlink(format!("..data/{IMPORTS_FILE}"), directory.join(IMPORTS_FILE)).unwrap();
        let (files, mut annotations) = Files::new(directory);
        assert_eq!(annotations.borrow_and_update().imports.as_deref(), Some("one"));
        let follow = async {
            project("..2", "two");
            annotations.wait_for(|found| found.imports.as_deref() == Some("two")).await.unwrap();
            std::fs::remove_file(directory.join(IMPORTS_FILE)).unwrap();
            annotations.wait_for(|found| found.is_absent()).await.unwrap();
        };
        let limit = Duration::from_secs(10);
        tokio::select! {
            biased;
            done = tokio::time::timeout(limit, follow) => done.expect("within 10 s"),
            () = files.run() => {}
        }
    }

    #[tokio::test]
    async fn a_file_that_is_written_in_place_is_never_empty() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        put(directory, IMPORTS_FILE, b"one");
        let (files, mut annotations) = Files::new(directory);
        let follow = async {
            put(directory, IMPORTS_FILE, b"");
            tokio::time::sleep(EMPTY / 2).await;
            put(directory, IMPORTS_FILE, b"two");
            for text in ["two", ""] {
                annotations.changed().await.unwrap();
                assert_eq!(annotations.borrow_and_update().imports.as_deref(), Some(text));
                put(directory, IMPORTS_FILE, b"");
            }
        };
        tokio::select! {
            biased;
            done = tokio::time::timeout(Duration::from_secs(10), follow) => done.expect("within 10 s"),
            () = files.run() => {}
        }
    }
}
