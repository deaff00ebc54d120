//! The conversation between sidecar and router: whole messages with descriptors, over a Unix socket of type
//! SEQPACKET (unix(7)).
//!
//! tokio's types for Unix streams poll these sockets: what they ask of the kernel beside read and write, which are not
//! used here, is the same for both types of socket.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use servicekeel_core::handoff::{MAX_DESCRIPTORS, MAX_MESSAGE};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::descriptor::namespace;
use super::thread::OfPod;
use super::{OsDescriptor, OsPodThread, while_doing};
use crate::net::{Handoff, HandoffListener, PeerCredentials, Places};

mod path;

/// Sidecars that may wait to be accepted. A node has at most a few hundred pods.
const BACKLOG: i32 = 512;
/// A router whose backlog is full is tried again this often ...
const CONNECT_TRIES: u32 = 50;
/// ... at this interval.
const CONNECT_INTERVAL: Duration = Duration::from_millis(20);
/// The most conversations that are refused and not closed: a close may wait for as long as whoever was refused wants
/// (SO_LINGER of what it sent), and holds a descriptor meanwhile.
const MAX_REFUSED: usize = 64;
/// The most messages under way in a Unix socket: each takes some 800 bytes of a send buffer of 208 KiB at least.
const MAX_UNDER_WAY: usize = 512;
/// How deep the kernel lets Unix sockets be under way in one another (MAX_RECURSION_LEVEL).
const MAX_DEPTH: usize = 4;
/// The most messages that are taken when one conversation ends: a tenth of a second of the thread that closes it.
const MAX_LOOKED_AT: usize = 1 << 16;
const CONTROL: usize = rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS));

/// Where sidecars come in. Its file goes when it is dropped, unless another has taken the path.
#[derive(Debug)]
pub struct OsHandoffListener {
    // Removed before the socket closes: as long as it is open, no other file can get its inode number.
    _file: path::SocketFile,
    socket: UnixListener,
    /// Closes what is refused.
    closing: OsPodThread,
    /// For conversations that get no thread of their own.
    shared: OsPodThread,
    refused: Arc<Semaphore>,
}

impl OsHandoffListener {
    pub(super) async fn listen(path: &Path) -> io::Result<Self> {
        address(path)?;
        if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            fs::create_dir_all(parent)
                .map_err(while_doing(format_args!("cannot create the directory {}", parent.display())))?;
        }
        let socket = socket()?;
        let listen = || Ok(rustix::net::listen(&socket, BACKLOG)?);
        let file = path::serve(path, &socket, listen)
            .await
            .map_err(while_doing(format_args!("cannot listen on {}", path.display())))?;
        let [closing, shared] = [(); 2].map(|()| OsPodThread::start(Arc::new(|| None)));
        Ok(Self {
            _file: file,
            socket: UnixListener::from_std(socket.into())?,
            closing: closing?,
            shared: shared?,
            refused: Arc::new(Semaphore::new(MAX_REFUSED)),
        })
    }
}

impl HandoffListener for OsHandoffListener {
    type Handoff = OsHandoff;

    async fn accept(&self) -> io::Result<(OsHandoff, PeerCredentials)> {
        let permit = self.refused.clone().acquire_owned().await.map_err(io::Error::other)?;
        loop {
            match self.socket.accept().await {
                Ok((socket, _)) => {
                    let held = Held { socket, permit: Some(permit), shared: self.shared.clone() };
                    let conversation = OsHandoff { held: OfPod::new(held, self.closing.clone()) };
                    let socket = &conversation.held.socket;
                    let (peer, network) = (socket.peer_cred()?, namespace(socket.as_fd())?);
                    let credentials =
                        PeerCredentials { pid: peer.pid().unwrap_or(0), uid: peer.uid(), network };
                    return Ok((conversation, credentials));
                }
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// One end of a conversation.
#[derive(Debug)]
pub struct OsHandoff {
    held: OfPod<Held>,
}

#[derive(Debug)]
struct Held {
    socket: UnixStream,
    /// Of those that may be refused and not closed, until it has a thread of its own. Given back behind the close.
    permit: Option<OwnedSemaphorePermit>,
    shared: OsPodThread,
}

impl Drop for Held {
    /// The kernel closes what is under way in it, and a socket may have that wait for as long as it says.
    fn drop(&mut self) {
        let _ = SockRef::from(&self.socket).shutdown(Shutdown::Both);
        let mut left = MAX_LOOKED_AT;
        empty(self.socket.as_fd(), 0, &mut left);
    }
}

/// Takes what is under way in a Unix socket, and in those that are under way in it, so that nothing of it has its close
/// wait. `left`: how many messages are looked at still.
fn empty(fd: BorrowedFd<'_>, depth: usize, left: &mut usize) {
    // An empty message looks like the end, so that is not waited for.
    for _ in 0..MAX_UNDER_WAY {
        let Some(fewer) = left.checked_sub(1) else { return };
        *left = fewer;
        let Ok(received) = receive(fd) else { return };
        for descriptor in &received.descriptors {
            let _ = SockRef::from(descriptor).set_linger(None);
            if depth < MAX_DEPTH && rustix::net::sockopt::socket_domain(descriptor) == Ok(AddressFamily::UNIX)
            {
                empty(descriptor.as_fd(), depth + 1, left);
            }
        }
    }
}

impl OsHandoff {
    fn own(socket: OwnedFd) -> io::Result<Self> {
        let (socket, shared) = (UnixStream::from_std(socket.into())?, OsPodThread::default());
        let held = Held { socket, permit: None, shared };
        Ok(Self { held: OfPod::new(held, OsPodThread::default()) })
    }

    /// Has it served there.
    fn on(self, thread: OsPodThread) -> Self {
        let (mut held, _closing) = self.held.into_parts();
        held.permit = None;
        Self { held: OfPod::new(held, thread) }
    }

    pub(super) async fn connect(path: &Path) -> io::Result<Self> {
        let addr = address(path)?;
        let socket = socket()?;
        let mut tries = CONNECT_TRIES;
        loop {
            match rustix::net::connect(&socket, &addr) {
                Ok(()) => return Self::own(socket),
                // The backlog is full; no event tells when it is not (connect(2)).
                Err(Errno::AGAIN) if tries > 0 => {
                    tries -= 1;
                    tokio::time::sleep(CONNECT_INTERVAL).await;
                }
                Err(e) => {
                    return Err(while_doing(format_args!("no router at {}", path.display()))(e.into()));
                }
            }
        }
    }
}

impl Handoff for OsHandoff {
    type Descriptor = OsDescriptor;
    type Thread = OsPodThread;

    fn with_own_thread(self, places: Places) -> Result<Self, (Self, io::Error)> {
        match OsPodThread::start(places) {
            Ok(thread) => Ok(self.on(thread)),
            Err(error) => Err((self, error)),
        }
    }

    fn with_shared_thread(self, places: Places) -> Self {
        let thread = self.held.shared.beside(places);
        self.on(thread)
    }

    fn thread(&self) -> OsPodThread {
        self.held.thread().clone()
    }

    async fn send(&self, message: &[u8], descriptors: Vec<OsDescriptor>) -> io::Result<()> {
        // An empty message can't be told from the end of the conversation.
        if message.is_empty() || message.len() > MAX_MESSAGE || descriptors.len() > MAX_DESCRIPTORS {
            let (bytes, count) = (message.len(), descriptors.len());
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "a message of {bytes} bytes with {count} descriptors; \
                     1 to {MAX_MESSAGE} bytes and {MAX_DESCRIPTORS} descriptors are the most"
                ),
            ));
        }
        let socket = &self.held.socket;
        socket.async_io(Interest::WRITABLE, || send(socket.as_fd(), message, &descriptors)).await
    }

    async fn recv(&self) -> io::Result<Option<(Vec<u8>, Vec<OsDescriptor>)>> {
        let socket = &self.held.socket;
        socket.async_io(Interest::READABLE, || recv(socket.as_fd(), self.held.thread())).await
    }
}

fn send(fd: BorrowedFd<'_>, message: &[u8], descriptors: &[OsDescriptor]) -> io::Result<()> {
    let rights: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); CONTROL];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !rights.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&rights)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors"));
    }
    rustix::net::sendmsg(fd, &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// What one message was, owned before anything is looked at, so that whoever does not pass it on closes it.
struct Received {
    bytes: Vec<u8>,
    length: usize,
    flags: ReturnFlags,
    descriptors: Vec<OwnedFd>,
}

/// Takes one message off the socket.
fn receive(fd: BorrowedFd<'_>) -> io::Result<Received> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); CONTROL];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        match rustix::net::recvmsg(fd, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            // The other side closed with messages of ours unread. What it sent before that is still to come, and
            // then the end; the kernel says this once.
            Err(Errno::CONNRESET | Errno::INTR) => {}
            other => break other?,
        }
    };
    let rights = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(rights) => Some(rights),
        _ => None,
    });
    let descriptors = rights.flatten().collect();
    let (length, flags) = (received.bytes, received.flags);
    Ok(Received { bytes, length, flags, descriptors })
}

/// Takes one message off the socket, or none of it.
fn recv(fd: BorrowedFd<'_>, thread: &OsPodThread) -> io::Result<Option<(Vec<u8>, Vec<OsDescriptor>)>> {
    let Received { mut bytes, length, flags, descriptors } = receive(fd)?;
    let descriptors: Vec<_> = descriptors.into_iter().map(|fd| OsDescriptor::of_pod(fd, thread)).collect();
    if length == 0 {
        return Ok(None);
    }
    if flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message of more than {MAX_MESSAGE} bytes"),
        ));
    }
    let truncated = flags.contains(ReturnFlags::CTRUNC);
    // The kernel fills the space, or stops before where it has no number for the next descriptor.
    if truncated && descriptors.len() < MAX_DESCRIPTORS {
        return Err(io::Error::new(
            io::ErrorKind::QuotaExceeded,
            "out of file descriptors: raise the open file limit (RLIMIT_NOFILE)",
        ));
    }
    // The space has room for one more, for its alignment.
    if truncated || descriptors.len() > MAX_DESCRIPTORS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message with more than {MAX_DESCRIPTORS} descriptors"),
        ));
    }
    bytes.truncate(length);
    bytes.shrink_to_fit();
    Ok(Some((bytes, descriptors)))
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

fn address(path: &Path) -> io::Result<SocketAddrUnix> {
    SocketAddrUnix::new(path).map_err(|e| match e {
        Errno::NAMETOOLONG => io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("the socket path {} is longer than the 107 bytes of unix(7)", path.display()),
        ),
        e => while_doing(format_args!("the socket path {}", path.display()))(e.into()),
    })
}

#[cfg(test)]
mod tests;
