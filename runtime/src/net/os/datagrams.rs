//! UDP sockets.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::net::{RecvFlags, SendFlags};
use servicekeel_core::handoff::DescriptorKind;
use socket2::SockRef;
use tokio::io::{Interest, ReadBuf};
use tokio::net::UdpSocket;

use super::thread::OfPod;
use super::{OsDescriptor, on};
use crate::net::{Datagrams, Descriptor};

/// Bytes that may wait on an import's socket for the router, as far as the system gives it (net.core.rmem_max): all its
/// clients may begin at once.
const WAITING: usize = 1 << 20;

/// How often in a row a socket may say that it can be read, and then have nothing.
const SPURIOUS: usize = 16;

/// A UDP socket. Another program may hold it too, and have it block at any moment: no call here relies on O_NONBLOCK.
#[derive(Debug)]
pub struct OsDatagrams(Arc<OfPod<UdpSocket>>);

impl OsDatagrams {
    pub(super) fn adopt(descriptor: OsDescriptor) -> io::Result<Self> {
        let bound = descriptor.check(DescriptorKind::UdpUnconnected).is_err();
        if bound {
            descriptor.check(DescriptorKind::UdpBound)?;
        }
        let (socket, thread) = descriptor.into_nonblocking()?;
        let socket = std::net::UdpSocket::from(socket);
        if bound {
            SockRef::from(&socket).set_recv_buffer_size(WAITING)?;
        }
        Ok(Self(Arc::new(OfPod::new(UdpSocket::from_std(socket)?, thread))))
    }
}

impl Datagrams for OsDatagrams {
    fn poll_recv_from(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<SocketAddr>> {
        let socket: &UdpSocket = &self.0;
        for _ in 0..SPURIOUS {
            ready!(socket.poll_recv_ready(cx))?;
            let received = socket.try_io(Interest::READABLE, || {
                let room = buf.initialize_unfilled();
                let (n, _, from) = rustix::net::recvfrom(socket, room, RecvFlags::DONTWAIT)?;
                buf.advance(n);
                let from = from.ok_or(io::ErrorKind::AddrNotAvailable)?;
                Ok(SocketAddr::try_from(from)?)
            });
            match received {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                received => return Poll::Ready(received),
            }
        }
        // As after a shutdown(2) of another holder, which no read takes away.
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::BrokenPipe,
            "the socket was shut down by another holder",
        )))
    }

    async fn send_to(&self, buf: &[u8], to: SocketAddr) -> io::Result<()> {
        let socket: &UdpSocket = &self.0;
        let send = || {
            rustix::net::sendto(socket, buf, SendFlags::DONTWAIT | SendFlags::NOSIGNAL, &to)?;
            Ok(())
        };
        socket.async_io(Interest::WRITABLE, send).await
    }

    fn try_send_to(&self, buf: &[u8], to: SocketAddr) -> io::Result<()> {
        let socket: &UdpSocket = &self.0;
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        socket.try_io(Interest::WRITABLE, || Ok(rustix::net::sendto(socket, buf, flags, &to)?)).map(|_| ())
    }

    async fn connect(&self, to: SocketAddr) -> io::Result<()> {
        let socket = self.0.clone();
        on(self.0.thread(), async move { socket.connect(to).await }).await
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}
