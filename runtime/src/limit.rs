//! The limit of open files (RLIMIT_NOFILE of getrlimit(2)), raised as far as a process may without a privilege.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

/// The limit in force; `None`: there is none.
pub(crate) fn open_files() -> Option<u64> {
    getrlimit(Resource::Nofile).current
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
