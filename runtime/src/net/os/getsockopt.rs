//! Options of a socket that no kept library reads: getsockopt(2).

#![allow(unsafe_code, reason = "getsockopt(2) of options that no library of ours knows")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The bytes of an option, `LEN` at most, and how many of them the kernel wrote.
///
/// # Errors
/// Those of getsockopt(2).
pub(super) fn getsockopt<const LEN: usize>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
) -> io::Result<([u8; LEN], usize)> {
    let mut bytes = [0_u8; LEN];
    let mut len = libc::socklen_t::try_from(LEN).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the descriptor is open, since it is borrowed. The kernel writes at most `len` bytes at the pointer, and
    // `bytes` has as many; it writes to `len` how many those were. Neither pointer is kept.
    let outcome = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, option, bytes.as_mut_ptr().cast(), &raw mut len)
    };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((bytes, len as usize))
}

/// Sets an option that is a number, as a pod may.
///
/// # Errors
/// Those of setsockopt(2).
#[cfg(test)]
pub(super) fn setsockopt(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_uint,
) -> io::Result<()> {
    let len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the descriptor is open, since it is borrowed. The kernel reads `len` bytes at the pointer, which are those of
    // `value`, and keeps no pointer.
    let outcome =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), len) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
