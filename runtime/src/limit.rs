//! The limit of open files (RLIMIT_NOFILE of getrlimit(2)), raised as far as a process may without a privilege.

use std::os::fd::AsRawFd;

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

/// Descriptors that are kept free for what must go on, such as the admin endpoint, at a low limit a quarter of it.
const RESERVE: u64 = 32;

/// The limit in force; `None`: there is none.
pub(crate) fn open_files() -> Option<u64> {
    getrlimit(Resource::Nofile).current
}

/// Whether only the reserve is free. The kernel gives the lowest number that is free (open(2)), so all below it are
/// taken.
pub(crate) fn is_short() -> bool {
    let Some(limit) = open_files() else { return false };
    let Ok(lowest) = eventfd(0, EventfdFlags::CLOEXEC) else { return true };
    leaves_too_few(lowest.as_raw_fd(), limit)
}

/// Whether a descriptor is of the last half of the reserve, which what can wait leaves too.
pub(crate) fn is_of_the_last(descriptor: &impl AsRawFd) -> bool {
    let number = u64::from(descriptor.as_raw_fd().unsigned_abs());
    open_files().is_some_and(|limit| number >= limit - RESERVE.min(limit / 4) / 2)
}

fn leaves_too_few(lowest: i32, limit: u64) -> bool {
    u64::from(lowest.unsigned_abs()) >= limit - RESERVE.min(limit / 4)
}

/// Lets this process have as many descriptors as the system allows it: 1,024, which is usual at first, are few where
/// each flow or imported port takes some. A limit that can't be raised stays, with a warning.
pub fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, raised)
    {
        warn!(%error, current = ?limit.current, "the limit of open files can't be raised");
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
