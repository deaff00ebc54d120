//! The limit of open files (RLIMIT_NOFILE of getrlimit(2)) and those of threads, raised as far as a process may without a
//! privilege.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

pub(crate) mod threads;

/// Descriptors that are kept free for what must go on, such as reading, being asked and mending itself. What can wait
/// leaves a quarter of a low limit.
pub(crate) const RESERVE: u64 = 32;
/// Of them, those that what is soon handed on leaves.
pub(crate) const LAST_RESERVE: u64 = RESERVE / 2;
/// In so many milliseconds ...
const ASKED: u64 = 2;
/// ... fewer descriptors than this are taken.
const MANY: u64 = 2048;

/// The limit in force; `None`: there is none.
pub(crate) fn open_files() -> Option<u64> {
    getrlimit(Resource::Nofile).current
}

/// Whether a descriptor of this number leaves fewer than `reserve` free. The kernel gives the lowest number that is free
/// (open(2)), so all below it are taken.
fn reaches(number: RawFd, reserve: u64, limit: u64) -> bool {
    u64::from(number.unsigned_abs()) >= limit.saturating_sub(reserve)
}

/// Sees to it that beside this descriptor so many are free.
///
/// # Errors
/// Where fewer are, in words for whoever sets the limit.
pub(crate) fn leaves(descriptor: &impl AsRawFd, reserve: u64, limit: Option<u64>) -> io::Result<()> {
    match limit {
        Some(limit) if reaches(descriptor.as_raw_fd(), reserve, limit) => Err(io::Error::other(format!(
            "the limit of {limit} open files is reached ({reserve} are kept free): raise it (ulimit -n)"
        ))),
        _ => Ok(()),
    }
}

/// Whether only the reserve is free. Asks the kernel at most once in [`ASKED`] while there is plenty.
pub(crate) fn is_short() -> bool {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    /// Until how many milliseconds from the start there is.
    static PLENTY: AtomicU64 = AtomicU64::new(0);
    let now = START.elapsed().as_millis() as u64;
    if now < PLENTY.load(Relaxed) {
        return false;
    }
    let Some(limit) = open_files() else { return false };
    let Ok(lowest) = eventfd(0, EventfdFlags::CLOEXEC) else { return true };
    if !reaches(lowest.as_raw_fd(), RESERVE + MANY, limit) {
        PLENTY.store(now + ASKED, Relaxed);
    }
    leaves_too_few(lowest.as_raw_fd(), limit)
}

/// Whether a descriptor is of the last half of the reserve, which what can wait leaves too.
pub(crate) fn is_of_the_last(descriptor: &impl AsRawFd) -> bool {
    open_files().is_some_and(|limit| reaches(descriptor.as_raw_fd(), RESERVE.min(limit / 4) / 2, limit))
}

fn leaves_too_few(lowest: RawFd, limit: u64) -> bool {
    reaches(lowest, RESERVE.min(limit / 4), limit)
}

/// Lets this process have as many descriptors as the system allows it: 1,024, which is usual at first, are few where
/// each flow or imported port takes some. A limit that can't be raised stays, with a warning.
pub fn raise_open_files() {
    raise(Resource::Nofile, "cannot raise the open file limit");
}

/// Lets the user of this process have as many threads as the system allows it: each sidecar takes one in its router.
pub fn raise_threads() {
    raise(Resource::Nproc, "cannot raise the user's limit of threads");
}

fn raise(resource: Resource, problem: &str) {
    let limit = getrlimit(resource);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(resource, raised)
    {
        warn!(%error, current = ?limit.current, "{problem}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserve_is_kept_and_a_low_limit_is_no_reserve_alone() {
        for (lowest, limit, few) in [
            (0, 0, true),
            (0, 4, false),
            (3, 4, true),
            (59, 80, false),
            (60, 80, true),
            (991, 1024, false),
            (992, 1024, true),
        ] {
            assert_eq!(leaves_too_few(lowest, limit), few, "{lowest} of {limit}");
        }
    }
}
