//! UDP sockets.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

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

/// What a receiver waits for. An ICMP error is EPOLLERR without EPOLLIN (udp_poll, datagram_poll), and the next receive
/// takes it.
const NEWS: Interest = Interest::READABLE.add(Interest::ERROR);

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
    fn try_recv_from(&self, buf: &mut ReadBuf<'_>) -> io::Result<SocketAddr> {
        let socket: &UdpSocket = &self.0;
        let mut receive = || {
            let room = buf.initialize_unfilled();
            let (n, _, from) = rustix::net::recvfrom(socket, room, RecvFlags::DONTWAIT)?;
            buf.advance(n);
            let from = from.ok_or(io::ErrorKind::AddrNotAvailable)?;
            Ok(SocketAddr::try_from(from)?)
        };
        // Each clears what it is called for: a try_io of both at once is called for neither.
        match socket.try_io(Interest::READABLE, &mut receive) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => socket.try_io(Interest::ERROR, receive),
            received => received,
        }
    }

    async fn readable(&self) -> io::Result<()> {
        let socket: &UdpSocket = &self.0;
        // No read takes away a shutdown(2) of another holder: what waits is received still, and then nothing is waited
        // for.
        if socket.ready(NEWS).await?.is_read_closed() {
            let peeked = rustix::net::recv(socket, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT);
            if peeked == Err(rustix::io::Errno::AGAIN) {
                return Err(io::Error::new(
                    io::ErrorKind::BrokenPipe,
                    "the socket was shut down by another holder",
                ));
            }
        }
        Ok(())
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
        let connected = async move {
            socket.connect(to).await?;
            // What the address before may have said too late is not this one's.
            socket.take_error().map(drop)
        };
        on(self.0.thread(), connected).await
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}
