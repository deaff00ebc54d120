//! The file of a listening Unix socket.

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;

use crate::net::os::while_doing;

/// How long a router that took the place of a dead socket waits before it believes that the place is its own. Another
/// that started at the same moment has put its own socket there by then.
const SETTLE: Duration = Duration::from_millis(100);
/// Names that are tried for a socket on its way to its path.
const NAMES: u32 = 16;
/// Pods run as any user, so any may connect. That gives nobody anything yet: the router asks the kernel who is there
/// (SO_PEERCRED), and believes no claim of the conversation beyond that. Who reaches the socket at all is a matter of
/// who has its directory mounted.
const MODE: u32 = 0o666;

/// Binds `socket` and puts its file at `path`, where nobody serves; it listens before it can be found there.
///
/// No lock is taken: pods have the directory mounted, and flock(2) asks for no more than a descriptor that can read. A
/// free path is taken by link(2), which one of many gets. A dead socket is replaced by rename(2), where the last one
/// stays: so each looks after [`SETTLE`] whether it is still there.
pub(super) async fn serve(
    path: &Path,
    socket: &OwnedFd,
    listen: impl FnOnce() -> io::Result<()>,
) -> io::Result<SocketFile> {
    let found = look(path)?;
    let own = bind_beside(path, socket)?;
    own.open_to_all()?;
    listen()?;
    if let Found::Nothing = found {
        return match fs::hard_link(&own.path, path) {
            Ok(()) => SocketFile::at(path),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(taken(ANOTHER)),
            Err(e) => Err(e),
        };
    }
    // Nothing else may have come meanwhile.
    look(path)?;
    fs::rename(&own.path, path)?;
    let file = SocketFile { path: path.to_owned(), identity: own.identity };
    tokio::time::sleep(SETTLE).await;
    match identity(path) {
        Ok(identity) if identity == file.identity => Ok(file),
        _ => Err(taken(ANOTHER)),
    }
}

const ANOTHER: &str = "another router is listening there; stop it or choose another path";

fn taken(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::AddrInUse, why)
}

/// What lies at the path of a socket.
enum Found {
    Nothing,
    /// A socket that nobody serves.
    Dead,
}

/// # Errors
/// Where the path is not to be had: something is served there, or it is no socket at all.
fn look(path: &Path) -> io::Result<Found> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(e) => return Err(while_doing("cannot stat it")(e)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(taken("a file that is not a socket is there; move it or choose another path"));
        }
        Ok(_) => {}
    }
    match rustix::net::connect(super::socket()?, &super::address(path)?) {
        Err(Errno::CONNREFUSED) => Ok(Found::Dead),
        Err(Errno::NOENT) => Ok(Found::Nothing),
        Ok(()) | Err(Errno::AGAIN) => Err(taken(ANOTHER)),
        Err(Errno::PROTOTYPE) => {
            Err(taken("another program is listening there; stop it or choose another path"))
        }
        Err(e) => Err(while_doing("cannot tell whether it is in use")(e.into())),
    }
}

/// Binds the socket at a name of its own in the directory of `path`.
fn bind_beside(path: &Path, socket: &OwnedFd) -> io::Result<SocketFile> {
    let mut tries = 0;
    loop {
        // Drawn: numbers of processes mean nothing between their namespaces.
        let number = RandomState::new().hash_one(tries) as u32;
        let own = path.with_file_name(format!(".rk{number:08x}"));
        match rustix::net::bind(socket, &super::address(&own)?) {
            Ok(()) => return SocketFile::at(&own),
            Err(Errno::ADDRINUSE) if tries < NAMES => tries += 1,
            Err(e) => return Err(e.into()),
        }
    }
}

/// A socket file of ours. Dropped, it is removed if it is still ours.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    pub(super) fn at(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }

    pub(super) fn open_to_all(&self) -> io::Result<()> {
        fs::set_permissions(&self.path, fs::Permissions::from_mode(MODE))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity)
            && let Err(e) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), error = %e, "cannot remove the socket file");
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}
