//! The file of a listening Unix socket.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::net::os::while_doing;

/// How often a directory that another program has locked is tried again ...
const LOCK_TRIES: u32 = 100;
/// ... at this interval.
const LOCK_INTERVAL: Duration = Duration::from_millis(20);
/// Pods run as any user, so any may connect. That gives nobody anything yet: the router asks the kernel who is there
/// (SO_PEERCRED), and believes no claim of the conversation beyond that. Who reaches the socket at all is a matter of
/// who has its directory mounted.
const MODE: u32 = 0o666;

/// Keeps two routers that start at once from replacing each other's socket. The lock ends with the descriptor.
pub(super) async fn lock_directory(socket: &Path) -> io::Result<OwnedFd> {
    let directory = match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let open = || -> rustix::io::Result<OwnedFd> {
        rustix::fs::open(directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
    };
    let fd = open().map_err(|e| {
        while_doing(format_args!("can't open the directory {}", directory.display()))(e.into())
    })?;
    let mut tries = LOCK_TRIES;
    loop {
        match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(fd),
            Err(Errno::AGAIN) if tries > 0 => {
                tries -= 1;
                tokio::time::sleep(LOCK_INTERVAL).await;
            }
            Err(e) => {
                let what = format_args!("can't lock the directory {}", directory.display());
                return Err(while_doing(what)(e.into()));
            }
        }
    }
}

/// Makes the path free: removes a socket that nobody serves, and nothing else.
pub(super) fn clear(path: &Path) -> io::Result<()> {
    let shown = path.display();
    let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::AddrInUse, format!("{shown}: {why}")));
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(while_doing(format_args!("can't look at {shown}"))(e)),
        Ok(found) if !found.file_type().is_socket() => {
            return refuse("something that is no socket lies there; move it away or choose another path");
        }
        Ok(_) => {}
    }
    match rustix::net::connect(super::socket()?, &super::address(path)?) {
        Err(Errno::CONNREFUSED) => {}
        Err(Errno::NOENT) => return Ok(()),
        Ok(()) | Err(Errno::AGAIN) => {
            return refuse("another router serves there; stop it or choose another path");
        }
        Err(Errno::PROTOTYPE) => {
            return refuse("another program serves there; stop it or choose another path");
        }
        Err(e) => return Err(while_doing(format_args!("can't tell whether {shown} is served"))(e.into())),
    }
    fs::remove_file(path).map_err(while_doing(format_args!("can't remove the dead socket {shown}")))
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
            tracing::warn!(path = %self.path.display(), error = %e, "the socket file stays");
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}
