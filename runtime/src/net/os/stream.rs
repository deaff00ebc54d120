//! TCP streams and listeners.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::io::Errno;
use servicekeel_core::handoff::DescriptorKind;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::descriptor::BACKLOG;
use super::tcp_info::TcpInfo;
use super::{OsDescriptor, while_doing};
use crate::net::{Descriptor, Listener, Stream};

/// An idle path that is dead is found by probes after 15 s of silence, three of them, 5 s apart. One whose reader pauses
/// answers them. There is no limit to how long bytes may stay unacknowledged (TCP_USER_TIMEOUT, RFC 5482): Linux counts
/// a closed window as such (tcp(7)), so it would end a flow whose application takes nothing for a while. A peer that is
/// gone is found by the link.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(15))
    .with_interval(Duration::from_secs(5))
    .with_retries(3);

/// A TCP stream without Nagle's delay.
#[derive(Debug)]
pub struct OsStream(TcpStream);

impl OsStream {
    pub(super) async fn connect_descriptor(descriptor: OsDescriptor, addr: SocketAddr) -> io::Result<Self> {
        descriptor.check(DescriptorKind::TcpUnconnected)?;
        let socket = std::net::TcpStream::from(descriptor.into_nonblocking()?);
        let socket = TcpSocket::from_std_stream(socket);
        socket.set_nodelay(true)?;
        reset_when_dropped(&SockRef::from(&socket))?;
        socket.connect(addr).await.map(Self)
    }

    pub(super) async fn connect_router(addr: SocketAddr) -> io::Result<Self> {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        between_routers(&SockRef::from(&socket))?;
        socket.connect(addr).await.map(Self)
    }

    pub(super) fn tokio(&self) -> &TcpStream {
        &self.0
    }
}

/// Has the kernel reset the stream when its last descriptor closes, however that comes (SO_LINGER, socket(7)). Streams
/// that a listener accepts inherit it.
fn reset_when_dropped(socket: &SockRef<'_>) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))
}

/// What sockets between routers have. Those that a listener accepts inherit it.
fn between_routers(socket: &SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&KEEPALIVE)
}

impl Stream for OsStream {
    fn reset(self) {
        // Where this fails the connection has broken already.
        let _ = self.0.set_zero_linger();
    }

    fn close(self) {
        let _ = SockRef::from(&self.0).set_linger(None);
    }

    fn is_taken(&self) -> bool {
        TcpInfo::read(self.0.as_fd()).is_ok_and(|info| info.is_taken())
    }

    fn is_broken(&self) -> bool {
        TcpInfo::read(self.0.as_fd()).is_ok_and(|info| info.is_closed())
    }

    fn is_dead(&self) -> bool {
        TcpInfo::read(self.0.as_fd()).is_ok_and(|info| info.is_dead())
    }

    fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.0.peer_addr()
    }
}

impl AsyncRead for OsStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for OsStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A listening TCP socket, of this program or handed over.
#[derive(Debug)]
pub struct OsListener(TcpListener);

impl OsListener {
    pub(super) fn adopt(descriptor: OsDescriptor) -> io::Result<Self> {
        descriptor.check(DescriptorKind::TcpListener)?;
        let listener = std::net::TcpListener::from(descriptor.into_nonblocking()?);
        // What it accepts inherits this.
        SockRef::from(&listener).set_tcp_nodelay(true)?;
        reset_when_dropped(&SockRef::from(&listener))?;
        TcpListener::from_std(listener).map(Self)
    }

    pub(super) fn listen(addr: SocketAddr) -> io::Result<Self> {
        let kind = Type::STREAM.cloexec().nonblocking();
        let socket = Socket::new(Domain::for_address(addr), kind, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        between_routers(&SockRef::from(&socket))?;
        socket.bind(&addr.into()).map_err(while_doing(format_args!("can't bind {addr}")))?;
        socket.listen(BACKLOG).map_err(while_doing(format_args!("can't listen on {addr}")))?;
        TcpListener::from_std(socket.into()).map(Self)
    }
}

impl Listener for OsListener {
    type Stream = OsStream;

    async fn accept(&self) -> io::Result<(OsStream, SocketAddr)> {
        loop {
            match self.0.accept().await {
                Ok((stream, peer)) => return Ok((OsStream(stream), peer)),
                Err(e) if of_one_connection(&e) => tokio::task::coop::consume_budget().await,
                Err(e) => return Err(e),
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// Errors that accept(2) passes on from the one connection that it took, "to be treated like EAGAIN".
fn of_one_connection(e: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(e),
        Some(
            Errno::CONNABORTED
                | Errno::CONNRESET
                | Errno::NETDOWN
                | Errno::PROTO
                | Errno::NOPROTOOPT
                | Errno::HOSTDOWN
                | Errno::NONET
                | Errno::HOSTUNREACH
                | Errno::OPNOTSUPP
                | Errno::NETUNREACH
                | Errno::PERM
        )
    )
}

#[cfg(test)]
mod tests;
