//! Closes conversations that are refused, whatever is under way in them.
//!
//! Whoever closes the last descriptor of a Unix socket closes what is under way in it, and a TCP socket there has that
//! wait for as long as its owner said (SO_LINGER, socket(7)). Not in a thread that ends: the kernel then closes what the
//! thread has left, and lingers for none of it (`inet_release`: "if the close is due to the process exiting, we never
//! linger"). So what is to be closed is sent to a thread that has descriptors of its own, which takes it, looks at nothing,
//! and ends.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use super::own_files;

/// The most that one thread takes with it.
const AT_ONCE: usize = 32;
/// A descriptor to take.
const TAKE: u8 = 0;
/// Whoever sent one has closed its own.
const LEFT: u8 = 1;
/// Where no thread can be had, it is tried again after this.
const PAUSE: Duration = Duration::from_millis(100);

/// Where to send what is to be closed. Dropped, its threads end.
#[derive(Debug)]
pub(super) struct Closer(OwnedFd);

impl Closer {
    /// To be started early: what this process has open by then is looked at once.
    ///
    /// # Errors
    /// Those of [`own_files::spawn`].
    pub(super) fn start() -> io::Result<Arc<Self>> {
        let (to, from) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        own_files::spawn("closer", from.as_fd(), serve)?;
        Ok(Arc::new(Self(to)))
    }

    /// Leaves the closing of a socket to it. The caller closes its own descriptor, and drops what is returned after that.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub(super) fn close(self: &Arc<Self>, socket: BorrowedFd<'_>) -> io::Result<Left> {
        send(self.0.as_fd(), TAKE, Some(socket))?;
        Ok(Left(self.clone()))
    }
}

fn send(to: BorrowedFd<'_>, what: u8, socket: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if let Some(socket) = &socket {
        control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(socket)));
    }
    rustix::net::sendmsg(to, &[IoSlice::new(&[what])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// A socket that is left to the closer. Dropped, the closer has the last descriptor.
#[derive(Debug)]
pub(super) struct Left(Arc<Closer>);

impl Drop for Left {
    fn drop(&mut self) {
        // Where this fails the closer ends its thread at the next one.
        let _ = send(self.0.0.as_fd(), LEFT, None);
    }
}

/// Has one thread after the other take what comes, until nothing can come any more.
fn serve(from: BorrowedFd<'_>) {
    loop {
        match own_files::spawn("closing", from, take).map(JoinHandle::join) {
            Ok(Ok(Some(false))) => return,
            Ok(_) => {}
            Err(_) => thread::sleep(PAUSE),
        }
    }
}

/// Takes what there is, at least one, until nobody else has a descriptor of it; false where nothing can come any more. It
/// is closed when this thread has ended.
fn take(from: BorrowedFd<'_>) -> bool {
    let (mut taken, mut left) = (0, 0);
    while taken == 0 || left < taken && taken < AT_ONCE {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let flags = RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(from, &mut [IoSliceMut::new(&mut byte)], &mut control, flags) {
            Ok(received) if received.bytes == 0 => return false,
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(_) => {
                thread::sleep(PAUSE);
                return true;
            }
        }
        match byte[0] {
            TAKE => taken += 1,
            _ => left += 1,
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                rights.for_each(|taken| _ = taken.into_raw_fd());
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// Whether every write end of the pipe closes within a few seconds.
    fn closes(read: &OwnedFd) -> bool {
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end {
            if rustix::io::read(read, &mut [0_u8; 1]) == Ok(0) {
                return true;
            }
            thread::sleep(Duration::from_millis(1));
        }
        false
    }

    fn lingering() -> (OwnedFd, std::net::TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        stream.set_nonblocking(true).unwrap();
        while io::Write::write(&mut stream, &[0; 64 << 10]).is_ok() {}
        socket2::SockRef::from(&stream).set_linger(Some(Duration::from_secs(3600))).unwrap();
        (stream.into(), listener.accept().unwrap().0)
    }

    #[test]
    fn what_lingers_holds_up_nothing_that_is_closed_behind_it() {
        let closer = Closer::start().unwrap();
        let mut deaf = Vec::new();
        for _ in 0..2 * AT_ONCE {
            let (stock, reader) = lingering();
            deaf.push(reader);
            // As a pod does that has gone.
            let (ours, theirs) = rustix::net::socketpair(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )
            .unwrap();
            let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
            for fd in [&stock, &write] {
                send(theirs.as_fd(), TAKE, Some(fd.as_fd())).unwrap();
            }
            drop((stock, write, theirs));
            let left = closer.close(ours.as_fd()).unwrap();
            drop(ours);
            drop(left);
            assert!(closes(&read));
        }
    }

    #[test]
    fn a_thread_with_descriptors_of_its_own_closes_nobody_elses() {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let (kept, end) = rustix::pipe::pipe().unwrap();
        let count = |_: BorrowedFd<'_>| std::fs::read_dir("/proc/thread-self/fd").unwrap().count();
        let had = own_files::spawn("test", kept.as_fd(), count).unwrap().join().unwrap().unwrap();
        assert!(had <= 5, "{had}: the standard ones, the kept one, and the directory");
        rustix::io::write(&end, b"x").unwrap();
        assert_eq!(rustix::io::read(&kept, &mut [0_u8; 1]), Ok(1));
        assert_eq!(rustix::io::read(&read, &mut [0_u8; 1]), Err(Errno::AGAIN));
        drop(write);
        assert!(closes(&read));
    }
}
