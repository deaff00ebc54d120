//! Closes conversations that are refused, whatever is under way in them.
//!
//! Whoever closes the last descriptor of a Unix socket closes what is under way in it, and a TCP socket there has that
//! wait for as long as its owner said (SO_LINGER, socket(7)). Not in a thread that ends: the kernel then closes what the
//! thread has left, and lingers for none of it (`inet_release`: "if the close is due to the process exiting, we never
//! linger"). So what is to be closed is sent to a thread that has descriptors of its own, which takes it, looks at nothing,
//! and ends.

use std::collections::BTreeSet;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
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
/// The most threads that end at once: what they leave may take a while to close.
const MOST_ENDING: usize = 16;
/// A descriptor to take.
const TAKE: u8 = 0;
/// Whoever sent one has closed its own.
const LEFT: u8 = 1;
/// Each of them has the number of the descriptor behind it.
const MESSAGE: usize = 9;
/// How long a thread that is started for one descriptor waits for its sender to close its own.
const WHILE: Duration = Duration::from_millis(500);
/// Where nothing can be received, it is tried again after this.
const PAUSE: Duration = Duration::from_millis(100);

/// Where to send what is to be closed. Dropped, its threads end.
#[derive(Debug)]
pub(super) struct Closer {
    to: OwnedFd,
    next: AtomicU64,
}

impl Closer {
    /// To be started early: what this process has open by then is looked at once.
    ///
    /// # Errors
    /// Those of [`own_files::spawn`].
    pub(super) fn start() -> io::Result<Arc<Self>> {
        let (to, from) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        own_files::spawn("closer", from.as_fd(), serve)?;
        Ok(Arc::new(Self { to, next: AtomicU64::new(0) }))
    }

    /// Leaves the closing of a socket to it. The caller closes its own descriptor, and drops what is returned after that.
    ///
    /// # Errors
    /// Those of sendmsg(2): such as that too many descriptors of this process's user are on their way (ETOOMANYREFS),
    /// be they those of its other processes.
    fn close(self: &Arc<Self>, socket: BorrowedFd<'_>) -> io::Result<Left> {
        let number = self.next.fetch_add(1, Relaxed);
        send(self.to.as_fd(), (TAKE, number), Some(socket))?;
        Ok(Left { closer: self.clone(), number })
    }
}

/// Has a socket be closed by a thread that ends, once the caller has closed its own descriptor of it, and dropped what is
/// returned after that.
pub(super) fn leave(closer: Option<&Arc<Closer>>, socket: BorrowedFd<'_>) -> Option<Left> {
    let left = closer.map(|closer| closer.close(socket));
    if let Some(Ok(left)) = left {
        return Some(left);
    }
    // Where that can't be either, it is closed where the caller is.
    let _ = own_files::spawn("closing", socket, |_| thread::sleep(WHILE));
    None
}

fn send(to: BorrowedFd<'_>, (what, number): (u8, u64), socket: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if let Some(socket) = &socket {
        control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(socket)));
    }
    let number = number.to_ne_bytes();
    let message = [IoSlice::new(std::slice::from_ref(&what)), IoSlice::new(&number)];
    rustix::net::sendmsg(to, &message, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// A socket that is left to the closer. Dropped, the closer has the last descriptor.
#[derive(Debug)]
pub(super) struct Left {
    closer: Arc<Closer>,
    number: u64,
}

impl Drop for Left {
    fn drop(&mut self) {
        // Where this fails the closer's thread has it until others have come.
        let _ = send(self.closer.to.as_fd(), (LEFT, self.number), None);
    }
}

/// Has one thread after the other take what comes, until nothing can come any more.
fn serve(from: BorrowedFd<'_>) {
    let mut ending: Vec<i32> = Vec::new();
    loop {
        match own_files::spawn("closing", from, take).map(JoinHandle::join) {
            Ok(Ok(Some(None))) => return,
            // It is joined before it has closed anything.
            Ok(Ok(Some(Some(thread)))) => ending.push(thread),
            Ok(_) => {}
            // There is no thread to be had: better that it is closed here than not at all.
            Err(_) if receive(from).is_none() => return,
            Err(_) => {}
        }
        while ending.len() >= MOST_ENDING {
            ending.retain(|thread| Path::new(&format!("/proc/self/task/{thread}")).exists());
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Takes what there is, and says which thread has it: it is closed when that has ended. `None` where nothing can come any
/// more.
fn take(from: BorrowedFd<'_>) -> Option<i32> {
    receive(from)?.into_iter().for_each(|taken| _ = taken.into_raw_fd());
    Some(rustix::thread::gettid().as_raw_nonzero().get())
}

/// What there is, at least one, once nobody else has a descriptor of it; `None` where nothing can come any more.
fn receive(from: BorrowedFd<'_>) -> Option<Vec<OwnedFd>> {
    let (mut taken, mut waiting) = (Vec::new(), BTreeSet::new());
    while taken.is_empty() || (!waiting.is_empty() && taken.len() < AT_ONCE) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut message = [0; MESSAGE];
        let flags = RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(from, &mut [IoSliceMut::new(&mut message)], &mut control, flags) {
            Ok(received) if received.bytes == 0 => return None,
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(_) => {
                thread::sleep(PAUSE);
                break;
            }
        }
        let [what, number @ ..] = message;
        let number = u64::from_ne_bytes(number);
        _ = if what == TAKE { waiting.insert(number) } else { waiting.remove(&number) };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                taken.extend(rights);
            }
        }
    }
    Some(taken)
}

#[cfg(test)]
pub(super) mod tests {
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

    /// A connection with bytes that nobody takes, and an hour for them at its close; and who does not take them.
    pub(in crate::net::os) fn lingering() -> (OwnedFd, std::net::TcpStream) {
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
        for number in 0..2 * AT_ONCE {
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
                send(theirs.as_fd(), (TAKE, 0), Some(fd.as_fd())).unwrap();
            }
            drop((stock, write, theirs));
            // Without a closer, too: it may have no room.
            let closer = Some(&closer).filter(|_| number % 2 == 0);
            let left = leave(closer, ours.as_fd());
            assert_eq!(left.is_some(), closer.is_some());
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
