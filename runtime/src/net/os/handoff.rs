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
use tracing::warn;

use super::closer::{Closer, Left, leave};
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
/// The most conversations that are refused and not told so yet.
const MAX_REFUSED: usize = 64;
const CONTROL: usize = rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS));

/// Where sidecars come in. Its file goes when it is dropped, unless another has taken the path.
#[derive(Debug)]
pub struct OsHandoffListener {
    // Removed before the socket closes: as long as it is open, no other file can get its inode number.
    _file: path::SocketFile,
    socket: UnixListener,
    /// Behind the socket, since it is dropped when that has closed.
    left: Option<Left>,
    /// Where whoever is refused is told so.
    closing: OsPodThread,
    /// Closes what is refused; `None` where the system can't have one.
    closer: Option<Arc<Closer>>,
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
        let closer = Closer::start();
        if let Err(error) = &closer {
            warn!(%error, "cannot have a thread with descriptors of its own (close_range(2), Linux 5.9): whoever is rejected may hold up that others are");
        }
        let closer = closer.ok();
        let [closing, shared] = [(); 2].map(|()| OsPodThread::start(Arc::new(|_| None)));
        Ok(Self {
            _file: file,
            socket: UnixListener::from_std(socket.into())?,
            left: None,
            closing: closing?,
            closer,
            shared: shared?,
            refused: Arc::new(Semaphore::new(MAX_REFUSED)),
        })
    }
}

impl Drop for OsHandoffListener {
    /// With it goes what is under way in connections that nobody has accepted.
    fn drop(&mut self) {
        self.left = leave(self.closer.as_ref(), self.socket.as_fd());
    }
}

impl HandoffListener for OsHandoffListener {
    type Handoff = OsHandoff;

    async fn accept(&self) -> io::Result<(OsHandoff, PeerCredentials)> {
        let permit = self.refused.clone().acquire_owned().await.map_err(io::Error::other)?;
        loop {
            match self.socket.accept().await {
                Ok((socket, _)) => {
                    let (shared, closer) = (self.shared.clone(), self.closer.clone());
                    let held =
                        Held { socket, left: None, permit: Some(permit), shared, closer, is_own: false };
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
    /// Behind the socket, since it is dropped when that has closed.
    left: Option<Left>,
    /// Of those that may be refused and not closed, until it has a thread of its own. Given back behind the close.
    permit: Option<OwnedSemaphorePermit>,
    shared: OsPodThread,
    closer: Option<Arc<Closer>>,
    /// Where it is dropped is its pod's own.
    is_own: bool,
}

impl Drop for Held {
    /// The kernel closes what is under way in it, and a socket may have that wait for as long as it says.
    fn drop(&mut self) {
        let _ = SockRef::from(&self.socket).shutdown(Shutdown::Both);
        if !self.is_own {
            self.left = leave(self.closer.as_ref(), self.socket.as_fd());
        }
    }
}

impl OsHandoff {
    fn own(socket: OwnedFd) -> io::Result<Self> {
        let (socket, shared) = (UnixStream::from_std(socket.into())?, OsPodThread::default());
        let held = Held { socket, left: None, permit: None, shared, closer: None, is_own: true };
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
            Ok(thread) => {
                let mut own = self.on(thread);
                own.held.get_mut().is_own = true;
                Ok(own)
            }
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

    async fn peek(&self) -> io::Result<Option<Vec<u8>>> {
        let socket = &self.held.socket;
        socket.async_io(Interest::READABLE, || peek(socket.as_fd())).await
    }

    fn take(&self, most: usize) -> io::Result<(Vec<OsDescriptor>, bool)> {
        take(self.held.socket.as_fd(), most, self.held.thread())
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

/// The bytes of the next message. Descriptors that nobody has room for are not opened (unix(7)).
fn peek(fd: BorrowedFd<'_>) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let received = loop {
        let (mut iov, flags) = ([IoSliceMut::new(&mut bytes)], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        match rustix::net::recvmsg(fd, &mut iov, &mut RecvAncillaryBuffer::default(), flags) {
            // The other side closed with messages of ours unread. What it sent before that is still to come, and
            // then the end; the kernel says this once.
            Err(Errno::CONNRESET | Errno::INTR) => {}
            other => break other?,
        }
    };
    let too_long = received.flags.contains(ReturnFlags::TRUNC);
    if too_long || received.bytes == 0 {
        skip(fd);
    }
    if too_long {
        let text = format!("a message of more than {MAX_MESSAGE} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    bytes.truncate(received.bytes);
    bytes.shrink_to_fit();
    Ok(Some(bytes).filter(|bytes| !bytes.is_empty()))
}

/// Takes a message that was peeked at and lets it go, with what came beside it.
fn skip(fd: BorrowedFd<'_>) {
    let _ = rustix::net::recvmsg(fd, &mut [], &mut RecvAncillaryBuffer::default(), RecvFlags::DONTWAIT);
}

/// Takes the descriptors of a message that was peeked at, `most` at most, and says whether there were more.
fn take(fd: BorrowedFd<'_>, most: usize, thread: &OsPodThread) -> io::Result<(Vec<OsDescriptor>, bool)> {
    let mut space = [MaybeUninit::uninit(); CONTROL];
    let most = most.min(MAX_DESCRIPTORS);
    let room = if most == 0 { 0 } else { rights_space(most) };
    let mut control = RecvAncillaryBuffer::new(&mut space[..room]);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = loop {
        match rustix::net::recvmsg(fd, &mut [], &mut control, flags) {
            Err(Errno::CONNRESET | Errno::INTR) => {}
            other => break other?,
        }
    };
    let rights = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(rights) => Some(rights),
        _ => None,
    });
    // Owned before anything is looked at, so that whoever does not pass them on closes them.
    let mut taken: Vec<_> = rights.flatten().map(|fd| OsDescriptor::of_pod(fd, thread)).collect();
    let more = received.flags.contains(ReturnFlags::CTRUNC);
    // The kernel fills the space, or stops before where it has no number for the next descriptor.
    if more && taken.len() < most {
        return Err(io::Error::new(
            io::ErrorKind::QuotaExceeded,
            "out of file descriptors: raise the open file limit (RLIMIT_NOFILE)",
        ));
    }
    // The space may have room for one more, for its alignment.
    let more = more || taken.len() > most;
    taken.truncate(most);
    Ok((taken, more))
}

/// The space of a control message with so many descriptors.
fn rights_space(count: usize) -> usize {
    let each = size_of::<std::os::fd::RawFd>();
    CONTROL - (MAX_DESCRIPTORS - count) * each
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
