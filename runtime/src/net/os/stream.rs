//! TCP streams and listeners.

use std::io::{self, IoSlice, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketFlags};
use servicekeel_core::handoff::DescriptorKind;
use socket2::{Domain, Protocol, SockRef, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::{Handle, Id};

use super::descriptor::BACKLOG;
use super::lull::Lull;
use super::tcp_info;
use super::thread::OfPod;
use super::{OsDescriptor, OsPodThread, while_doing};
use crate::net::tcp::{BETWEEN_ROUTERS, TcpInfo};
use crate::net::{Descriptor, Listener, Stream};

/// A client that has closed both ways looks like one that only has nothing more to say, until its kernel has forgotten the
/// connection (60 s: tcp_fin_timeout, tcp(7)) and says so to a probe. One that stands still answers.
const OF_CLIENTS: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(75))
    .with_interval(Duration::from_secs(15))
    .with_retries(9);

/// A TCP stream without Nagle's delay.
#[derive(Debug)]
pub struct OsStream(Socket);

#[derive(Debug)]
enum Socket {
    /// This program's own, to be polled where it is polled first.
    Fresh(Option<std::net::TcpStream>),
    Polled(OfPod<TcpStream>, Id),
}

impl OsStream {
    /// On the pod's thread, which the connect may block.
    pub(super) async fn connect_descriptor(descriptor: OsDescriptor, addr: SocketAddr) -> io::Result<Self> {
        let (socket, thread) = descriptor.into_nonblocking()?;
        let socket = TcpSocket::from_std_stream(std::net::TcpStream::from(socket));
        socket.set_nodelay(true)?;
        of_application(&SockRef::from(&socket))?;
        let stream = socket.connect(addr).await?;
        Ok(Self::polled_here(stream, thread))
    }

    pub(super) async fn connect_router(addr: SocketAddr) -> io::Result<Self> {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        between_routers(&SockRef::from(&socket))?;
        socket.connect(addr).await.map(Self::own)
    }

    pub(super) fn own(stream: TcpStream) -> Self {
        Self::polled_here(stream, OsPodThread::default())
    }

    fn polled_here(stream: TcpStream, thread: OsPodThread) -> Self {
        Self(Socket::Polled(OfPod::new(stream, thread), Handle::current().id()))
    }

    /// The stream, polled by the runtime of the caller from now on where none did before.
    pub(super) fn polled(&mut self) -> io::Result<&mut TcpStream> {
        if let Socket::Fresh(stream) = &mut self.0 {
            let stream = stream.take().ok_or(io::ErrorKind::NotConnected)?;
            *self = Self::own(TcpStream::from_std(stream)?);
        }
        match &mut self.0 {
            Socket::Polled(stream, _) => Ok(stream.get_mut()),
            Socket::Fresh(_) => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// What is written first where nothing polls the stream yet needs nobody to wait.
    fn write_unpolled(&mut self, bufs: &[IoSlice<'_>]) -> Option<io::Result<usize>> {
        let Socket::Fresh(Some(stream)) = &mut self.0 else { return None };
        match stream.write_vectored(bufs) {
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => None,
            written => Some(written),
        }
    }

    /// The thread of the pod that has a duplicate, where one may have.
    pub(super) fn thread(&self) -> OsPodThread {
        match &self.0 {
            Socket::Polled(stream, _) => stream.thread().clone(),
            Socket::Fresh(_) => OsPodThread::default(),
        }
    }

    fn info(&self) -> Option<TcpInfo> {
        match &self.0 {
            Socket::Polled(stream, _) => tcp_info::read(stream.as_fd()).ok(),
            Socket::Fresh(stream) => stream.as_ref().and_then(|stream| tcp_info::read(stream.as_fd()).ok()),
        }
    }

    /// Drops the stream after what `how` does with it, on the pod's thread where it is one of a pod.
    fn end(self, how: impl FnOnce(&SockRef<'_>) + Send + 'static) {
        match self.0 {
            Socket::Polled(stream, _) => {
                let (stream, thread) = stream.into_parts();
                thread.call(move || how(&SockRef::from(&stream)));
            }
            Socket::Fresh(stream) => {
                if let Some(stream) = stream {
                    how(&SockRef::from(&stream));
                }
            }
        }
    }
}

/// What the streams of applications have.
fn of_application(socket: &SockRef<'_>) -> io::Result<()> {
    reset_when_dropped(socket)?;
    // Urgent bytes (tcp(7)) are carried at their place among the others: splice(2) has no other way for them.
    socket.set_out_of_band_inline(true)
}

/// Has the kernel reset the stream when its last descriptor closes, however that comes (SO_LINGER, socket(7)). Streams
/// that a listener accepts inherit it.
fn reset_when_dropped(socket: &SockRef<'_>) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))
}

/// What sockets between routers have. Those that a listener accepts inherit it.
fn between_routers(socket: &SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(BETWEEN_ROUTERS.keepalive_idle)
        .with_interval(BETWEEN_ROUTERS.keepalive_interval)
        .with_retries(BETWEEN_ROUTERS.keepalive_probes);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(BETWEEN_ROUTERS.user_timeout)
}

impl Stream for OsStream {
    fn reset(self) {
        // Where this fails the connection has broken already.
        self.end(|socket| drop(reset_when_dropped(socket)));
    }

    fn close(self) {
        self.end(|socket| drop(socket.set_linger(None)));
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Ok(stream) = self.polled() else { return Poll::Ready(()) };
        let mut byte = [0];
        match ready!(stream.poll_peek(cx, &mut ReadBuf::new(&mut byte))) {
            // What waits to be read, and an end, hide a reset behind them from all but the socket's state.
            Ok(_) if !self.is_broken() => Poll::Pending,
            _ => Poll::Ready(()),
        }
    }

    fn has_ended(&self) -> bool {
        self.info().is_some_and(|info| info.has_ended())
    }

    fn come_here(&mut self) -> io::Result<()> {
        let here = Handle::current().id();
        match std::mem::replace(&mut self.0, Socket::Fresh(None)) {
            // One of a pod stays where it is.
            Socket::Polled(stream, at) if at != here && stream.thread().is_none() => {
                self.0 = Socket::Fresh(Some(stream.into_parts().0.into_std()?));
            }
            socket => self.0 = socket,
        }
        Ok(())
    }

    fn is_idle(&self) -> bool {
        let peek = |fd| rustix::net::recv(fd, &mut [0; 1], RecvFlags::DONTWAIT | RecvFlags::PEEK);
        let peeked = match &self.0 {
            Socket::Polled(stream, _) => peek(stream.as_fd()),
            Socket::Fresh(Some(stream)) => peek(stream.as_fd()),
            Socket::Fresh(None) => return false,
        };
        peeked.is_err_and(|e| e == Errno::AGAIN)
    }

    fn is_taken(&self) -> bool {
        self.info().is_none_or(|info| info.is_taken())
    }

    fn retransmits_after(&self) -> Option<Duration> {
        self.info().map(|info| info.rto)
    }

    fn is_broken(&self) -> bool {
        self.info().is_some_and(|info| info.is_closed())
    }

    fn is_dead(&self) -> bool {
        self.info().is_some_and(|info| info.is_dead())
    }

    fn peer_addr(&self) -> io::Result<SocketAddr> {
        match &self.0 {
            Socket::Polled(stream, _) => stream.peer_addr(),
            Socket::Fresh(Some(stream)) => stream.peer_addr(),
            Socket::Fresh(None) => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl AsyncRead for OsStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(self.polled()?).poll_read(cx, buf)
    }
}

impl AsyncWrite for OsStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if let Some(written) = self.write_unpolled(&[IoSlice::new(buf)]) {
            return Poll::Ready(written);
        }
        Pin::new(self.polled()?).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Some(written) = self.write_unpolled(bufs) {
            return Poll::Ready(written);
        }
        Pin::new(self.polled()?).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.polled()?).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.polled()?).poll_shutdown(cx)
    }
}

/// A listening TCP socket, of this program or handed over.
#[derive(Debug)]
pub struct OsListener(Listening);

#[derive(Debug)]
enum Listening {
    Own(TcpListener),
    /// A stream for tokio, which polls them alike, and has no other way to be told when to accept oneself.
    OfPod(OfPod<TcpStream>),
}

impl OsListener {
    /// On the pod's thread.
    pub(super) fn adopt(descriptor: OsDescriptor) -> io::Result<Self> {
        descriptor.check(DescriptorKind::TcpListener)?;
        let (listener, thread) = descriptor.into_nonblocking()?;
        // What it accepts inherits this.
        let socket = SockRef::from(&listener);
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_keepalive(&OF_CLIENTS)?;
        let listener = TcpStream::from_std(listener.into())?;
        Ok(Self(Listening::OfPod(OfPod::new(listener, thread))))
    }

    pub(super) fn listen(addr: SocketAddr) -> io::Result<Self> {
        let kind = Type::STREAM.cloexec().nonblocking();
        let socket = socket2::Socket::new(Domain::for_address(addr), kind, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        between_routers(&SockRef::from(&socket))?;
        socket.bind(&addr.into()).map_err(while_doing(format_args!("cannot bind {addr}")))?;
        socket.listen(BACKLOG).map_err(while_doing(format_args!("cannot listen on {addr}")))?;
        TcpListener::from_std(socket.into()).map(Listening::Own).map(Self)
    }
}

/// Accepts on a listener of a pod. The call may block: the pod has cleared O_NONBLOCK, and has taken the connection.
async fn accept_of_pod(listener: &TcpStream) -> io::Result<(OsStream, SocketAddr)> {
    let mut lull = Lull::default();
    loop {
        listener.readable().await?;
        let accepted = listener.try_io(Interest::READABLE, || {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            Ok(rustix::net::acceptfrom_with(listener, flags)?)
        });
        if accepted.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock) {
            lull.pause().await;
            continue;
        }
        let (stream, peer) = accepted?;
        let peer = peer.and_then(|peer| peer.try_into().ok()).ok_or(io::ErrorKind::InvalidInput)?;
        // The listener's own may have been changed by the pod: a time to linger would have our close wait.
        of_application(&SockRef::from(&stream))?;
        return Ok((OsStream(Socket::Fresh(Some(stream.into()))), peer));
    }
}

impl Listener for OsListener {
    type Stream = OsStream;

    async fn accept(&self) -> io::Result<(OsStream, SocketAddr)> {
        loop {
            let accepted = match &self.0 {
                Listening::Own(listener) => {
                    listener.accept().await.map(|(stream, peer)| (OsStream::own(stream), peer))
                }
                Listening::OfPod(listener) => accept_of_pod(listener).await,
            };
            match accepted {
                Err(e) if of_one_connection(&e) => tokio::task::coop::consume_budget().await,
                accepted => return accepted,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        match &self.0 {
            Listening::Own(listener) => listener.local_addr(),
            Listening::OfPod(listener) => listener.local_addr(),
        }
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
