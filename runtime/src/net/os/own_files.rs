//! Threads that have descriptors of their own, by close_range(2).

#![allow(unsafe_code, reason = "close_range(2), and a descriptor by its number, have no safe call")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};

/// What such a thread does takes little.
const STACK: usize = 64 << 10;

/// Starts a thread that has a copy of `kept` and of the standard three, and no other descriptor of this process. What it
/// opens is its own, and closed when it ends.
///
/// # Errors
/// There is no thread to be had, or the system has no close_range(2): before Linux 5.9, or where a filter of system calls
/// is older.
pub(super) fn spawn<T: Send + 'static>(
    name: &str,
    kept: BorrowedFd<'_>,
    run: fn(BorrowedFd<'_>) -> T,
) -> io::Result<JoinHandle<Option<T>>> {
    let (number, (ready, is_ready)) = (kept.as_raw_fd(), mpsc::channel());
    let thread = Builder::new().name(name.into()).stack_size(STACK).spawn(move || {
        let own = keep_only(number);
        let failed = own.is_err();
        // The caller waits for it.
        let _ = ready.send(own);
        if failed {
            return None;
        }
        // SAFETY: the thread's own table has this descriptor, since the caller borrows it until it has heard from here.
        // Nothing closes it: a function without captures has no other owner of it.
        Some(run(unsafe { BorrowedFd::borrow_raw(number) }))
    })?;
    is_ready.recv().map_err(io::Error::other)??;
    Ok(thread)
}

/// Gives the calling thread a table of its own, with `kept` and the standard three.
fn keep_only(kept: RawFd) -> io::Result<()> {
    let kept = libc::c_uint::try_from(kept).map_err(|_| io::ErrorKind::InvalidInput)?;
    let close = |first: libc::c_uint, last: libc::c_uint, flags: libc::c_uint| {
        // SAFETY: it takes three numbers and no pointer. The first call leaves this thread with a table that no other
        // has, so what is closed, by it and by the second, is closed here alone: a thread that has just begun and runs a
        // function without captures owns none of it.
        let outcome = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
        if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    close(kept + 1, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE)?;
    if kept > 3 { close(3, kept - 1, 0) } else { Ok(()) }
}
