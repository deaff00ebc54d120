//! What outlives a restart: leases and the last good annotations, in one file of the state directory.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use servicekeel_core::handoff::Pod;
use servicekeel_core::name::Label;
use servicekeel_core::sidecar::Saved;
use servicekeel_runtime::file;

/// The file's name.
pub const STATE_FILE: &str = "state.json";
/// Where a file that can't be used is moved, in the place of an earlier one.
pub const ASIDE_FILE: &str = "state.json.rejected";
/// The version that is written, and the only one that is read.
const VERSION: u32 = 1;
/// The most bytes that are read: two annotations of 256 KiB, escaped, and as many leases as a range can have.
const MAX_BYTES: usize = 32 << 20;

/// The state file of one pod.
#[derive(Debug, Clone)]
pub struct Store {
    directory: PathBuf,
    name: String,
    namespace: Label,
}

#[derive(Serialize)]
struct Written<'a> {
    version: u32,
    pod: &'a str,
    namespace: &'a Label,
    saved: &'a Saved,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Deserialize)]
struct Read {
    pod: String,
    namespace: Label,
    saved: Saved,
}

impl Store {
    /// The state of this pod in a directory, which need not be there yet.
    pub fn new(directory: &Path, pod: &Pod) -> Self {
        Self { directory: directory.to_owned(), name: pod.name.clone(), namespace: pod.namespace.clone() }
    }

    /// The file.
    pub fn path(&self) -> PathBuf {
        self.directory.join(STATE_FILE)
    }

    /// What was saved last, empty where nothing was. A file that can't be used is set aside, with the message.
    pub fn load(&self) -> (Saved, Option<String>) {
        let path = self.path();
        let why = match file::read_bounded(&path, MAX_BYTES) {
            Ok(bytes) => match self.read(&bytes) {
                Ok(saved) => return (saved, None),
                Err(why) => why,
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => return (Saved::default(), None),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => error.to_string(),
            Err(error) => {
                let message = format!("cannot read {}: {error}; starting without it", path.display());
                return (Saved::default(), Some(message));
            }
        };
        let aside = self.directory.join(ASIDE_FILE);
        let moved = match std::fs::rename(&path, &aside) {
            Ok(()) => format!("it was moved to {}", aside.display()),
            Err(error) => format!("it cannot be moved to {}: {error}", aside.display()),
        };
        let message = format!("ignoring {}: {why}; {moved}; starting without it", path.display());
        (Saved::default(), Some(message))
    }

    fn read(&self, bytes: &[u8]) -> Result<Saved, String> {
        let torn = |error: serde_json::Error| format!("truncated, or not the state of a sidecar ({error})");
        let Version { version } = serde_json::from_slice(bytes).map_err(torn)?;
        if version != VERSION {
            return Err(format!("it has version {version}; this sidecar reads {VERSION}"));
        }
        let read: Read = serde_json::from_slice(bytes).map_err(torn)?;
        if (&read.pod, &read.namespace) != (&self.name, &self.namespace) {
            return Err(format!(
                "it belongs to the pod {}/{}; give each pod its own directory (SIDECAR_STATE_DIR)",
                read.namespace, read.pod
            ));
        }
        Ok(read.saved)
    }

    /// Saves, in the place of what was saved before. Blocks until the disk has it.
    ///
    /// # Errors
    /// Where the directory can't be made or written.
    pub fn save(&self, saved: &Saved) -> io::Result<()> {
        let written = Written { version: VERSION, pod: &self.name, namespace: &self.namespace, saved };
        let bytes = serde_json::to_vec(&written)?;
        std::fs::create_dir_all(&self.directory)?;
        file::replace(&self.path(), &bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use servicekeel_core::lease::{Snapshot, SnapshotEntry};
    use servicekeel_core::name::ServiceName;

    fn store(directory: &Path, name: &str) -> Store {
        let pod = Pod { name: name.into(), namespace: "default".parse().unwrap(), uid: String::new() };
        Store::new(directory, &pod)
    }

    fn saved() -> Saved {
        let service = ServiceName {
            name: "web".parse().unwrap(),
            namespace: "default".parse().unwrap(),
            cluster: "a.local".parse().unwrap(),
        };
        let address = [127, 0, 66, 3].into();
        Saved {
            cluster: Some("b.local".parse().unwrap()),
            leases: Snapshot { leases: vec![SnapshotEntry { service, address, freed: true }] },
            exports: Some("services: []\n".into()),
            imports: None,
        }
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(&directory.path().join("not/yet/there"), "web-0");
        assert_eq!(store.load(), (Saved::default(), None));
        store.save(&saved()).unwrap();
        store.save(&saved()).unwrap();
        assert_eq!(store.load(), (saved(), None));
    }

    #[test]
    fn what_cannot_be_used_is_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(directory.path(), "web-0");
        store.save(&saved()).unwrap();
        let good = std::fs::read_to_string(store.path()).unwrap();
        let torn = good[..good.len() / 2].to_owned();
        let newer = good.replace("\"version\":1", "\"version\":2");
        let other = good.replace("web-0", "web-1");
        let damaged = good.replace("127.0.66.3", "127.0.66.300");
        for (bytes, why) in [
            (torn, "truncated"),
            (newer, "version 2"),
            (other, "default/web-1"),
            (damaged, "not the state of a sidecar"),
            (String::new(), "truncated"),
            ("[]".to_owned(), "not the state of a sidecar"),
        ] {
            std::fs::write(store.path(), &bytes).unwrap();
            let (loaded, message) = store.load();
            assert_eq!(loaded, Saved::default());
            let message = message.unwrap();
            assert!(message.contains(why) && message.contains(ASIDE_FILE), "{message}");
            assert_eq!(std::fs::read_to_string(directory.path().join(ASIDE_FILE)).unwrap(), bytes);
            assert_eq!(store.load(), (Saved::default(), None));
        }
    }
}
