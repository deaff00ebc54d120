//! UDP sockets.

use std::io;
use std::net::SocketAddr;
use std::task::{Context, Poll};

use servicekeel_core::handoff::DescriptorKind;
use socket2::SockRef;
use tokio::io::ReadBuf;
use tokio::net::UdpSocket;

use super::OsDescriptor;
use crate::net::{Datagrams, Descriptor};

/// Bytes that may wait on an import's socket for the router, as far as the system gives it (net.core.rmem_max): all its
/// clients may begin at once.
const WAITING: usize = 1 << 20;

/// A UDP socket.
#[derive(Debug)]
pub struct OsDatagrams(UdpSocket);

impl OsDatagrams {
    pub(super) fn adopt(descriptor: OsDescriptor) -> io::Result<Self> {
        let bound = descriptor.check(DescriptorKind::UdpUnconnected).is_err();
        if bound {
            descriptor.check(DescriptorKind::UdpBound)?;
        }
        let socket = std::net::UdpSocket::from(descriptor.into_nonblocking()?);
        if bound {
            SockRef::from(&socket).set_recv_buffer_size(WAITING)?;
        }
        UdpSocket::from_std(socket).map(Self)
    }
}

impl Datagrams for OsDatagrams {
    fn poll_recv_from(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<SocketAddr>> {
        self.0.poll_recv_from(cx, buf)
    }

    async fn send_to(&self, buf: &[u8], to: SocketAddr) -> io::Result<()> {
        self.0.send_to(buf, to).await.map(|_| ())
    }

    async fn connect(&self, to: SocketAddr) -> io::Result<()> {
        self.0.connect(to).await
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}
