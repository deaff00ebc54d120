//! Each way in which a watched file changes, on a real file system.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;

use tempfile::TempDir;
use tokio::time::timeout;

use super::*;

/// Much longer than any change takes to be seen, and shorter than [`SWEEP`]: what only the sweep sees fails.
const SOON: Duration = Duration::from_secs(5);

struct Room {
    directory: TempDir,
    watch: FileWatch,
}

impl Room {
    /// A directory, prepared, and a watch of `name` in it.
    fn new(name: &str, prepare: impl FnOnce(&Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        prepare(directory.path());
        let watch = FileWatch::new(&[directory.path().join(name)]);
        Self { directory, watch }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// As a program does: reads after each change, until it finds what it should.
    async fn sees(&mut self, content: Option<&str>) {
        let path = self.watch.files[0].clone();
        let seeing = async {
            loop {
                self.watch.changed().await;
                if fs::read_to_string(&path).ok().as_deref() == content {
                    return;
                }
            }
        };
        if timeout(SOON, seeing).await.is_err() {
            panic!("{content:?} was not seen; there is {:?}", fs::read_to_string(&path));
        }
    }

    /// By the kernel's word alone: no look is due.
    async fn is_told(&mut self, content: Option<&str>) {
        assert!(self.watch.directories.complete(), "{:?}", self.watch.directories);
        self.watch.next_look = Instant::now() + Duration::from_secs(3600);
        self.sees(content).await;
    }

    /// Without the kernel's word.
    fn deafen(&mut self) {
        self.watch.signs = Arc::default();
    }
}

#[tokio::test]
async fn a_file_rewritten_in_place() {
    let mut room = Room::new("a", |dir| fs::write(dir.join("a"), "old").unwrap());
    fs::write(room.path("a"), "new").unwrap();
    room.is_told(Some("new")).await;
}

/// The same inode and length and, within a tick of the file system's clock, the same time: the kernel's word counts.
#[tokio::test]
async fn a_file_that_looks_the_same() {
    let mut room = Room::new("a", |dir| fs::write(dir.join("a"), "old").unwrap());
    let mut file = File::options().write(true).open(room.path("a")).unwrap();
    file.write_all(b"new").unwrap();
    room.watch.found = vec![Found::at(&room.path("a"))];
    room.is_told(Some("new")).await;
}

#[tokio::test]
async fn a_file_replaced_by_a_rename() {
    let mut room = Room::new("a", |dir| fs::write(dir.join("a"), "old").unwrap());
    crate::file::replace(&room.path("a"), b"new").unwrap();
    room.is_told(Some("new")).await;
    fs::write(room.path("b"), "moved here").unwrap();
    fs::rename(room.path("b"), room.path("a")).unwrap();
    room.is_told(Some("moved here")).await;
}

#[tokio::test]
async fn a_file_that_appears_and_goes() {
    let mut room = Room::new("a", |_| {});
    fs::write(room.path("a"), "new").unwrap();
    room.is_told(Some("new")).await;
    fs::remove_file(room.path("a")).unwrap();
    room.is_told(None).await;
    fs::write(room.path("a"), "again").unwrap();
    room.is_told(Some("again")).await;
    fs::rename(room.path("a"), room.path("elsewhere")).unwrap();
    room.is_told(None).await;
}

/// What the kubelet does to a projected volume (pkg/volume/util/atomic_writer.go): a new directory, a link to it
/// renamed over `..data`, the old directory removed.
fn project(directory: &Path, version: &str, content: &str) {
    let data = directory.join("..data");
    let old = fs::read_link(&data).ok();
    fs::create_dir(directory.join(version)).unwrap();
    fs::write(directory.join(version).join("a"), content).unwrap();
    symlink(version, directory.join("..data_tmp")).unwrap();
    fs::rename(directory.join("..data_tmp"), &data).unwrap();
    match old {
        Some(old) => fs::remove_dir_all(directory.join(old)).unwrap(),
        None => symlink("..data/a", directory.join("a")).unwrap(),
    }
}

#[tokio::test]
async fn a_projected_volume_swapped_again_and_again() {
    let mut room = Room::new("a", |dir| project(dir, "..1", "first"));
    for (version, content) in [("..2", "other"), ("..3", "third"), ("..4", "final")] {
        project(room.directory.path(), version, content);
        room.is_told(Some(content)).await;
    }
}

#[tokio::test]
async fn the_target_of_a_link_rewritten_where_it_lies() {
    let mut room = Room::new("a", |dir| {
        fs::create_dir(dir.join("real")).unwrap();
        fs::write(dir.join("real/b"), "old").unwrap();
        symlink("real/b", dir.join("a")).unwrap();
    });
    fs::write(room.path("real/b"), "new").unwrap();
    room.is_told(Some("new")).await;
}

#[tokio::test]
async fn a_directory_that_is_not_there_yet() {
    let mut room = Room::new("x/y/a", |_| {});
    assert!(!room.watch.directories.complete());
    fs::create_dir_all(room.path("x/y")).unwrap();
    fs::write(room.path("x/y/a"), "new").unwrap();
    room.sees(Some("new")).await;
    // From here on it is watched like any other.
    fs::write(room.path("x/y/a"), "newer").unwrap();
    room.is_told(Some("newer")).await;
}

#[tokio::test]
async fn a_directory_that_goes_and_comes_back() {
    let mut room = Room::new("x/a", |dir| {
        fs::create_dir(dir.join("x")).unwrap();
        fs::write(dir.join("x/a"), "old").unwrap();
    });
    for (gone, back) in [("first", "1"), ("second", "2")] {
        fs::remove_dir_all(room.path("x")).unwrap();
        room.is_told(None).await;
        fs::create_dir(room.path("x")).unwrap();
        fs::write(room.path("x/a"), back).unwrap();
        room.sees(Some(back)).await;
        fs::write(room.path("x/a"), gone).unwrap();
        room.is_told(Some(gone)).await;
    }
}

/// Gone and back before anybody looked, with the same inode number where the file system reuses it.
#[tokio::test]
async fn a_directory_replaced_between_two_looks() {
    let mut room = Room::new("x/a", |dir| {
        fs::create_dir(dir.join("x")).unwrap();
        fs::write(dir.join("x/a"), "old").unwrap();
    });
    for round in 0..5 {
        fs::remove_dir_all(room.path("x")).unwrap();
        fs::create_dir(room.path("x")).unwrap();
        room.is_told(None).await;
        let content = format!("{round}");
        fs::write(room.path("x/a"), &content).unwrap();
        room.is_told(Some(&content)).await;
    }
}

#[tokio::test]
async fn a_directory_renamed_away_and_another_in_its_place() {
    let mut room = Room::new("x/a", |dir| {
        for (name, content) in [("x", "old"), ("next", "new")] {
            fs::create_dir(dir.join(name)).unwrap();
            fs::write(dir.join(name).join("a"), content).unwrap();
        }
    });
    fs::rename(room.path("x"), room.path("was")).unwrap();
    fs::rename(room.path("next"), room.path("x")).unwrap();
    room.sees(Some("new")).await;
    fs::write(room.path("x/a"), "newer").unwrap();
    room.is_told(Some("newer")).await;
}

/// Where inotify says nothing, looking finds the change too.
#[tokio::test]
async fn by_looking_alone() {
    let mut room = Room::new("a", |dir| fs::write(dir.join("a"), "old").unwrap());
    room.deafen();
    crate::file::replace(&room.path("a"), b"new").unwrap();
    room.watch.next_look = Instant::now() + POLL;
    room.sees(Some("new")).await;
}

#[tokio::test]
async fn what_changed_before_anybody_waited() {
    let mut room = Room::new("a", |_| {});
    fs::write(room.path("a"), "early").unwrap();
    room.sees(Some("early")).await;
}

/// A select that drops the future over and over loses nothing.
#[tokio::test]
async fn a_waiting_that_is_cancelled() {
    let mut room = Room::new("a", |_| {});
    fs::write(room.path("a"), "new").unwrap();
    let start = Instant::now();
    while timeout(Duration::from_millis(1), room.watch.changed()).await.is_err() {
        if room.watch.changed.is_some() {
            break;
        }
        assert!(start.elapsed() < SOON, "not seen: {:?}", room.watch);
    }
    room.sees(Some("new")).await;
}

/// Neighbours and readers are no change; the test waits for a change that comes after them, and counts.
#[tokio::test]
async fn neighbours_and_readers_are_no_change() {
    let mut room = Room::new("a", |dir| fs::write(dir.join("a"), "old").unwrap());
    room.watch.next_look = Instant::now() + Duration::from_secs(3600);
    for round in 0..50 {
        fs::write(room.path("neighbour"), format!("{round}")).unwrap();
        let mut text = String::new();
        File::open(room.path("a")).unwrap().read_to_string(&mut text).unwrap();
        let waited = timeout(Duration::from_millis(2), room.watch.changed()).await;
        assert!(waited.is_err() && room.watch.changed.is_none(), "round {round}: {:?}", room.watch);
    }
    fs::write(room.path("a"), "new").unwrap();
    room.is_told(Some("new")).await;
}

#[tokio::test]
async fn a_burst_is_one_change() {
    let mut room = Room::new("a", |_| {});
    for round in 0..100 {
        fs::write(room.path("a"), format!("{round}")).unwrap();
    }
    room.is_told(Some("99")).await;
    let again = timeout(SETTLE * 8, room.watch.changed()).await;
    assert!(again.is_err(), "the burst was told twice");
}

/// What is changed in several steps is told when it rests, not at each step.
#[tokio::test]
async fn a_long_burst_is_told_seldom() {
    let mut room = Room::new("a", |_| {});
    let path = room.path("a");
    let writing = std::thread::spawn(move || {
        let start = Instant::now();
        while start.elapsed() < SETTLE * 16 {
            fs::write(&path, format!("{:?}", start.elapsed())).unwrap();
        }
        fs::write(&path, "last").unwrap();
    });
    let path = room.path("a");
    let mut told = 0;
    while fs::read_to_string(&path).ok().as_deref() != Some("last") {
        timeout(SOON, room.watch.changed()).await.unwrap();
        told += 1;
    }
    writing.join().unwrap();
    assert!(told <= 4, "told {told} times");
}

/// A file that is written without an end is told of, over and over.
#[tokio::test]
async fn a_file_that_never_rests() {
    let mut room = Room::new("a", |_| {});
    let path = room.path("a");
    let writing = async {
        for round in 0_u64.. {
            fs::write(&path, format!("{round}")).unwrap();
            sleep(SETTLE / 5).await;
        }
    };
    let told = async {
        for _ in 0..3 {
            timeout(SOON, room.watch.changed()).await.unwrap();
        }
    };
    tokio::select! {
        biased;
        () = told => {}
        () = writing => {}
    }
}

#[tokio::test]
async fn other_files_from_now_on() {
    let mut room = Room::new("a", |dir| fs::create_dir(dir.join("other")).unwrap());
    let files = [room.path("other/b")];
    room.watch.set(&files);
    fs::write(room.path("other/b"), "new").unwrap();
    room.is_told(Some("new")).await;
    room.watch.next_look = Instant::now() + Duration::from_secs(3600);
    fs::write(room.path("a"), "no longer ours").unwrap();
    let told = timeout(SETTLE * 8, room.watch.changed()).await;
    assert!(told.is_err() && room.watch.changed.is_none(), "{:?}", room.watch);
}

#[tokio::test]
async fn a_relative_path_and_one_that_is_none() {
    let here = PathBuf::from("a-file-that-is-not-here");
    let watch = FileWatch::new(&[here, PathBuf::from("/"), PathBuf::new()]);
    assert_eq!(watch.found[0], Found::Not(ErrorKind::NotFound));
    assert_eq!(watch.found[2], Found::Not(ErrorKind::NotFound));
}
