//! TCP streams and listeners, inside a node and between nodes.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use servicekeel_runtime::net::{Listener, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::local::{Listening, Local};
use super::wire::{Wire, WireListener};

/// A TCP stream.
pub struct SimStream(Path);

enum Path {
    Local(Local),
    Wire(Wire),
}

impl SimStream {
    pub(super) fn local(stream: Local) -> Self {
        Self(Path::Local(stream))
    }

    pub(super) fn wire(stream: Wire) -> Self {
        Self(Path::Wire(stream))
    }

    pub(super) fn poll_read_shared(
        &self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &self.0 {
            Path::Local(stream) => stream.poll_read(cx, buf),
            Path::Wire(stream) => stream.poll_read(cx, buf),
        }
    }

    pub(super) fn poll_write_shared(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &self.0 {
            Path::Local(stream) => stream.poll_write(cx, bytes),
            Path::Wire(stream) => stream.poll_write(cx, bytes),
        }
    }

    pub(super) fn shutdown_shared(&self) -> io::Result<()> {
        match &self.0 {
            Path::Local(stream) => stream.shutdown(),
            Path::Wire(stream) => stream.shutdown(),
        }
    }

    pub(super) fn poll_broken(&self, cx: &mut Context<'_>) -> Poll<io::Error> {
        match &self.0 {
            Path::Local(stream) => stream.poll_broken(cx),
            Path::Wire(stream) => stream.poll_broken(cx),
        }
    }
}

impl Stream for SimStream {
    fn reset(self) {
        match self.0 {
            Path::Local(stream) => stream.reset(),
            Path::Wire(stream) => stream.reset(),
        }
    }

    fn peer_addr(&self) -> io::Result<SocketAddr> {
        Ok(match &self.0 {
            Path::Local(stream) => stream.peer_addr(),
            Path::Wire(stream) => stream.peer_addr(),
        })
    }
}

impl AsyncRead for SimStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_read_shared(cx, buf)
    }
}

impl AsyncWrite for SimStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_shared(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.shutdown_shared())
    }
}

/// A listening TCP socket.
pub struct SimListener(Place);

enum Place {
    Local(Arc<Listening>),
    Wire(WireListener),
}

impl SimListener {
    pub(super) fn local(listening: Arc<Listening>) -> Self {
        Self(Place::Local(listening))
    }

    pub(super) fn wire(listener: WireListener) -> Self {
        Self(Place::Wire(listener))
    }
}

impl Listener for SimListener {
    type Stream = SimStream;

    async fn accept(&self) -> io::Result<(SimStream, SocketAddr)> {
        let stream = match &self.0 {
            Place::Local(listening) => SimStream::local(listening.accept().await),
            Place::Wire(listener) => SimStream::wire(listener.accept().await?),
        };
        let peer = stream.peer_addr()?;
        Ok((stream, peer))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(match &self.0 {
            Place::Local(listening) => listening.addr(),
            Place::Wire(listener) => listener.local_addr()?,
        })
    }
}
