//! What the kernel says of a TCP connection: TCP_INFO.

use std::io;
use std::os::fd::BorrowedFd;

use super::getsockopt::getsockopt;
use crate::net::tcp::{INFO_LEN, TcpInfo};

/// # Errors
/// Those of getsockopt(2), and [`io::ErrorKind::Unsupported`] on a kernel that says less.
pub(super) fn read(socket: BorrowedFd<'_>) -> io::Result<TcpInfo> {
    let (bytes, len) = getsockopt::<INFO_LEN>(socket, libc::IPPROTO_TCP, libc::TCP_INFO)?;
    if len < INFO_LEN {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(TcpInfo::decode(&bytes))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn the_kernel_tells_what_is_not_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut far = listener.accept().unwrap().0;
        near.set_nonblocking(true).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        // Until both buffers are full, and what is beyond them waits here.
        let full = loop {
            while near.write(&[0; 64 << 10]).is_ok() {}
            let info = read(near.as_fd()).unwrap();
            if info.not_sent > 0 && info.last_ack > Duration::from_millis(100) {
                break info;
            }
            assert!(Instant::now() < deadline, "it is never full: {info:?}");
            thread::sleep(Duration::from_millis(10));
        };
        assert!(!full.is_taken() && !full.is_dead() && !full.is_closed(), "{full:?}");
        far.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let start = Instant::now();
        let empty = loop {
            while far.read(&mut [0; 64 << 10]).is_ok() {}
            let info = read(near.as_fd()).unwrap();
            if info.is_taken() {
                break info;
            }
            assert!(Instant::now() < deadline, "it is never empty: {info:?}");
        };
        // The kernel's clock has ticks of up to 10 ms.
        assert!(empty.last_ack <= start.elapsed() + Duration::from_millis(20), "{empty:?}");
        assert!(!empty.is_dead() && !empty.is_closed(), "{empty:?}");
        near.write_all(b"unread").unwrap();
        drop(far);
        while !read(near.as_fd()).unwrap().is_closed() {
            assert!(Instant::now() < deadline, "the reset is not seen");
        }
    }
}
