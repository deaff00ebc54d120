//! A socket whose last close waits.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use servicekeel_runtime::net::os::OsDescriptor;
use socket2::SockRef;

/// A connection with bytes that nobody takes, and an hour for them at its close.
pub(crate) fn lingering() -> OsDescriptor {
    let deaf = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut stream = TcpStream::connect(deaf.local_addr().unwrap()).unwrap();
    // Accepted and never read, for as long as the test runs.
    std::mem::forget(deaf.accept().unwrap());
    SockRef::from(&stream).set_send_buffer_size(4096).unwrap();
    stream.set_nonblocking(true).unwrap();
    while stream.write(&[0; 64 << 10]).is_ok() {}
    SockRef::from(&stream).set_linger(Some(Duration::from_secs(3600))).unwrap();
    OsDescriptor::from(OwnedFd::from(stream))
}
