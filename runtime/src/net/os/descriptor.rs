//! Sockets that are held and handed over.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::FileType;
use servicekeel_core::handoff::DescriptorKind;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::getsockopt::getsockopt;
use super::thread::{OfPod, OsPodThread};
use super::while_doing;
use crate::limit::{self, LAST_RESERVE, RESERVE, leaves};
use crate::net::{Descriptor, NamespaceCookie};

/// Connections that wait in the kernel while the router is away.
pub(super) const BACKLOG: i32 = 1024;

/// A socket that nothing polls.
#[derive(Debug)]
pub struct OsDescriptor(OfPod<OwnedFd>);

/// A descriptor that is something else than it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the descriptor should be {wanted}, but is {found}")]
pub struct WrongKind {
    /// What it should be.
    pub wanted: DescriptorKind,
    /// What the kernel says that it is.
    pub found: String,
}

impl OsDescriptor {
    /// A socket without an address: [`DescriptorKind::TcpUnconnected`] or [`DescriptorKind::UdpUnconnected`].
    pub(super) fn unbound(kind: DescriptorKind) -> io::Result<Self> {
        let socket = match kind {
            DescriptorKind::TcpUnconnected => tcp(Domain::IPV4)?,
            DescriptorKind::UdpUnconnected => udp(Domain::IPV4)?,
            DescriptorKind::TcpListener | DescriptorKind::UdpBound => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{kind} needs an address")));
            }
        };
        leaves(&socket, LAST_RESERVE, limit::open_files())?;
        Ok(Self::own(socket.into()))
    }

    /// A socket at an address: [`DescriptorKind::TcpListener`] or [`DescriptorKind::UdpBound`].
    pub(super) fn bound(kind: DescriptorKind, addr: SocketAddr) -> io::Result<Self> {
        let domain = Domain::for_address(addr);
        let socket = match kind {
            DescriptorKind::TcpListener => tcp(domain)?,
            DescriptorKind::UdpBound => udp(domain)?,
            DescriptorKind::TcpUnconnected | DescriptorKind::UdpUnconnected => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{kind} has no address")));
            }
        };
        leaves(&socket, RESERVE, limit::open_files())?;
        // A sidecar that comes back binds beside the socket of its earlier run, which the router still holds. The
        // kernel allows that among sockets of one user that all ask for SO_REUSEPORT (socket(7)).
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&addr.into()).map_err(while_doing(format_args!("cannot bind {addr}")))?;
        if kind == DescriptorKind::TcpListener {
            socket.listen(BACKLOG).map_err(while_doing(format_args!("cannot listen on {addr}")))?;
        }
        Ok(Self::own(socket.into()))
    }

    /// This program's own.
    fn own(fd: OwnedFd) -> Self {
        Self(OfPod::new(fd, OsPodThread::default()))
    }

    /// One that came from the pod of this thread.
    pub(super) fn of_pod(fd: OwnedFd, thread: &OsPodThread) -> Self {
        Self(OfPod::new(fd, thread.clone()))
    }

    pub(super) fn thread(&self) -> OsPodThread {
        self.0.thread().clone()
    }

    /// The socket, for tokio to poll: on its thread, whose it stays. It may block again at any moment.
    pub(super) fn into_nonblocking(self) -> io::Result<(OwnedFd, OsPodThread)> {
        SockRef::from(&*self.0).set_nonblocking(true)?;
        Ok(self.0.into_parts())
    }
}

impl Descriptor for OsDescriptor {
    fn share(&self) -> io::Result<Self> {
        Ok(Self(OfPod::new(self.0.try_clone()?, self.thread())))
    }

    fn check(&self, kind: DescriptorKind) -> io::Result<()> {
        let found = Found::ask(self.as_fd())?;
        let fits = match kind {
            DescriptorKind::TcpListener => matches!(found, Found::TcpListener(_)),
            DescriptorKind::TcpUnconnected => matches!(found, Found::Tcp { local: None, peer: None }),
            DescriptorKind::UdpBound => matches!(found, Found::Udp { local: Some(_), peer: None }),
            DescriptorKind::UdpUnconnected => matches!(found, Found::Udp { local: None, peer: None }),
        };
        if fits {
            return Ok(());
        }
        let wrong = WrongKind { wanted: kind, found: found.to_string() };
        Err(io::Error::new(io::ErrorKind::InvalidInput, wrong))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        let addr = SockRef::from(&*self.0).local_addr()?;
        addr.as_socket().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not an Internet socket"))
    }

    fn namespace(&self) -> io::Result<Option<NamespaceCookie>> {
        namespace(self.as_fd())
    }
}

/// The network namespace of a socket; `None` where the kernel does not say.
pub(super) fn namespace(socket: BorrowedFd<'_>) -> io::Result<Option<NamespaceCookie>> {
    match getsockopt::<8>(socket, libc::SOL_SOCKET, libc::SO_NETNS_COOKIE) {
        Ok((bytes, 8)) => Ok(Some(NamespaceCookie(u64::from_ne_bytes(bytes)))),
        Ok(_) => Ok(None),
        // Before Linux 5.14.
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(None),
        Err(error) => Err(error),
    }
}

impl From<OwnedFd> for OsDescriptor {
    fn from(fd: OwnedFd) -> Self {
        Self::own(fd)
    }
}

impl AsFd for OsDescriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn tcp(domain: Domain) -> io::Result<Socket> {
    Socket::new(domain, Type::STREAM.cloexec().nonblocking(), Some(Protocol::TCP))
}

fn udp(domain: Domain) -> io::Result<Socket> {
    Socket::new(domain, Type::DGRAM.cloexec().nonblocking(), Some(Protocol::UDP))
}

/// What the kernel says of a descriptor. An address with port 0 counts as none.
#[derive(Debug)]
enum Found {
    TcpListener(SocketAddr),
    Tcp { local: Option<SocketAddr>, peer: Option<SocketAddr> },
    Udp { local: Option<SocketAddr>, peer: Option<SocketAddr> },
    OtherSocket(Domain, Type, Option<Protocol>),
    File(FileType),
}

impl Found {
    fn ask(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let file = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
        if file != FileType::Socket {
            return Ok(Self::File(file));
        }
        let socket = SockRef::from(&fd);
        let (domain, kind, protocol) = (socket.domain()?, socket.r#type()?, socket.protocol()?);
        if domain != Domain::IPV4 && domain != Domain::IPV6 {
            return Ok(Self::OtherSocket(domain, kind, protocol));
        }
        let local = socket.local_addr()?.as_socket().filter(|addr| addr.port() != 0);
        let peer = match socket.peer_addr() {
            Ok(addr) => addr.as_socket(),
            Err(e) if e.kind() == io::ErrorKind::NotConnected => None,
            Err(e) => return Err(e),
        };
        Ok(match (kind, protocol) {
            (Type::STREAM, Some(Protocol::TCP)) => match local {
                Some(addr) if socket.is_listener()? => Self::TcpListener(addr),
                _ => Self::Tcp { local, peer },
            },
            (Type::DGRAM, Some(Protocol::UDP)) => Self::Udp { local, peer },
            _ => Self::OtherSocket(domain, kind, protocol),
        })
    }
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (what, local, peer) = match self {
            Self::TcpListener(addr) => return write!(f, "a TCP socket that listens on {addr}"),
            Self::OtherSocket(Domain::UNIX, _, _) => return f.write_str("a Unix socket"),
            Self::OtherSocket(domain, kind, protocol) => {
                return write!(f, "a socket of {domain:?}, {kind:?}, {protocol:?}");
            }
            Self::File(FileType::RegularFile) => return f.write_str("a regular file"),
            Self::File(FileType::Directory) => return f.write_str("a directory"),
            Self::File(FileType::Fifo) => return f.write_str("a pipe"),
            Self::File(FileType::CharacterDevice | FileType::BlockDevice) => return f.write_str("a device"),
            Self::File(_) => return f.write_str("no socket"),
            Self::Tcp { local, peer } => ("TCP", local, peer),
            Self::Udp { local, peer } => ("UDP", local, peer),
        };
        match (local, peer) {
            (_, Some(peer)) => write!(f, "a {what} socket connected to {peer}"),
            (Some(local), None) => write!(f, "a {what} socket bound to {local}"),
            (None, None) => write!(f, "an unconnected {what} socket"),
        }
    }
}

#[cfg(test)]
mod tests;
