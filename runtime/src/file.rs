//! Files: replaced whole, and read within a bound.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// Puts `bytes` at `path`, for the owner only (0600). Whoever reads there, also after a loss of power, finds the old
/// content or the new one, whole. A symbolic link at `path` is replaced, not followed.
///
/// The bytes are first in `.NAME.new` beside it; one that a crash left behind is removed. One writer at a time: of two
/// at once, one gets an error.
///
/// # Errors
/// Those of the file system. `path` is then as it was, unless the error came from making the change last, after it
/// was made.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let (directory, temporary) = beside(path)?;
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    let written =
        file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        drop(fs::remove_file(&temporary));
        return Err(error);
    }
    // A rename lasts when the directory that records it does.
    File::open(directory)?.sync_all()
}

/// The directory of `path`, and the name beside it under which the new content is written.
fn beside(path: &Path) -> io::Result<(&Path, PathBuf)> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(ErrorKind::InvalidInput, format!("{} names no file", path.display())));
    };
    let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(".new");
    Ok((directory, directory.join(temporary)))
}

/// Reads a regular file of at most `max` bytes.
///
/// # Errors
/// [`ErrorKind::InvalidData`] for a longer one, with the limit in its text; [`ErrorKind::InvalidInput`] for what is no
/// regular file; those of the file system. None names the path: the caller knows what the file is for.
pub fn read_bounded(path: &Path, max: usize) -> io::Result<Vec<u8>> {
    // Not to wait for a writer where somebody put a FIFO.
    let nonblock = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = OpenOptions::new().read(true).custom_flags(nonblock).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    bounded(file, max)
}

/// Reads what comes to its end, at most `max` bytes.
///
/// # Errors
/// [`ErrorKind::InvalidData`] for more, with the limit in its text; those of the reader.
pub fn bounded(input: impl Read, max: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.take((max as u64).saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() > max {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("longer than the limit of {max} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn replaces_whole_and_for_the_owner_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("leases");
        replace(&path, b"first").unwrap();
        let held = File::open(&path).unwrap();
        replace(&path, b"2nd").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"2nd");
        // A file of its own, not the old one rewritten.
        assert_eq!(io::read_to_string(held).unwrap(), "first");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(names(directory.path()), ["leases"]);
    }

    #[test]
    fn survives_what_a_crash_left_and_follows_no_link() {
        let directory = tempfile::tempdir().unwrap();
        let foreign = directory.path().join("foreign");
        fs::write(&foreign, "untouched").unwrap();
        symlink(&foreign, directory.path().join(".leases.new")).unwrap();
        symlink(&foreign, directory.path().join("leases")).unwrap();
        replace(&directory.path().join("leases"), b"ours").unwrap();
        assert_eq!(fs::read(directory.path().join("leases")).unwrap(), b"ours");
        assert_eq!(fs::read_to_string(&foreign).unwrap(), "untouched");
        assert_eq!(names(directory.path()), ["foreign", "leases"]);
    }

    #[test]
    fn leaves_nothing_behind_when_it_fails() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("leases");
        fs::create_dir(&path).unwrap();
        assert!(replace(&path, b"bytes").is_err());
        assert_eq!(names(directory.path()), ["leases"]);
        assert_eq!(replace(Path::new("/"), b"").unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(
            replace(&directory.path().join("absent/leases"), b"").unwrap_err().kind(),
            ErrorKind::NotFound
        );
    }

    #[test]
    fn reads_up_to_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("annotation");
        fs::write(&path, "12345").unwrap();
        assert_eq!(read_bounded(&path, 5).unwrap(), b"12345");
        let error = read_bounded(&path, 4).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        assert_eq!(error.to_string(), "longer than the limit of 4 bytes");
        assert_eq!(read_bounded(&path, usize::MAX).unwrap(), b"12345");
    }

    #[test]
    fn reads_regular_files_only_and_never_waits() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).unwrap();
        for path in [directory.path(), fifo.as_path(), Path::new("/dev/zero")] {
            assert_eq!(read_bounded(path, 10).unwrap_err().kind(), ErrorKind::InvalidInput, "{path:?}");
        }
        assert_eq!(
            read_bounded(&directory.path().join("absent"), 10).unwrap_err().kind(),
            ErrorKind::NotFound
        );
    }
}
