//! TCP streams and listeners, inside a node and between nodes.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use servicekeel_runtime::net::{Listener, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::kernel::Process;
use super::local::{Listening, Local};
use super::wire::{Wire, WireListener};

/// A TCP stream.
pub struct SimStream {
    path: Path,
    process: Process,
}

enum Path {
    Local(Local),
    Wire(Wire),
}

impl SimStream {
    pub(super) fn local(stream: Local, process: &Process) -> Self {
        Self { path: Path::Local(stream), process: process.clone() }
    }

    pub(super) fn wire(stream: Wire, process: &Process) -> Self {
        Self { path: Path::Wire(stream), process: process.clone() }
    }

    pub(super) fn poll_read_shared(
        &self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &self.path {
            Path::Local(stream) => stream.poll_read(cx, buf),
            Path::Wire(stream) => stream.poll_read(cx, buf),
        }
    }

    pub(super) fn poll_write_shared(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &self.path {
            Path::Local(stream) => stream.poll_write(cx, bytes),
            Path::Wire(stream) => stream.poll_write(cx, bytes),
        }
    }

    pub(super) fn shutdown_shared(&self) -> io::Result<()> {
        match &self.path {
            Path::Local(stream) => stream.shutdown(),
            Path::Wire(stream) => stream.shutdown(),
        }
    }

    pub(super) fn poll_broken(&self, cx: &mut Context<'_>) -> Poll<io::Error> {
        match &self.path {
            Path::Local(stream) => stream.poll_broken(cx),
            Path::Wire(stream) => stream.poll_broken(cx),
        }
    }
}

impl Stream for SimStream {
    fn reset(self) {
        if self.process.is_killed() {
            return;
        }
        match self.path {
            Path::Local(stream) => stream.reset(),
            Path::Wire(stream) => stream.reset(),
        }
    }

    fn close(self) {
        if !self.process.is_killed()
            && let Path::Local(stream) = self.path
        {
            stream.close();
        }
    }

    fn is_taken(&self) -> bool {
        match &self.path {
            Path::Local(stream) => stream.is_taken(),
            Path::Wire(stream) => stream.info().is_taken(),
        }
    }

    fn retransmits_after(&self) -> Option<Duration> {
        match &self.path {
            Path::Local(_) => None,
            Path::Wire(stream) => Some(stream.info().rto),
        }
    }

    fn is_broken(&self) -> bool {
        matches!(&self.path, Path::Local(stream) if stream.is_broken())
    }

    fn is_dead(&self) -> bool {
        matches!(&self.path, Path::Wire(stream) if stream.info().is_dead())
    }

    fn peer_addr(&self) -> io::Result<SocketAddr> {
        Ok(match &self.path {
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
pub struct SimListener {
    place: Place,
    process: Process,
    resets: bool,
}

enum Place {
    Local(Arc<Listening>),
    Wire(WireListener),
}

impl SimListener {
    pub(super) fn local(listening: Arc<Listening>, process: &Process, resets: bool) -> Self {
        Self { place: Place::Local(listening), process: process.clone(), resets }
    }

    pub(super) fn wire(listener: WireListener, process: &Process) -> Self {
        Self { place: Place::Wire(listener), process: process.clone(), resets: false }
    }
}

impl Listener for SimListener {
    type Stream = SimStream;

    async fn accept(&self) -> io::Result<(SimStream, SocketAddr)> {
        let stream = match &self.place {
            Place::Local(listening) => {
                let stream = listening.accept().await;
                SimStream::local(
                    if self.resets { stream.reset_when_dropped() } else { stream },
                    &self.process,
                )
            }
            Place::Wire(listener) => SimStream::wire(listener.accept().await?, &self.process),
        };
        let peer = stream.peer_addr()?;
        Ok((stream, peer))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(match &self.place {
            Place::Local(listening) => listening.addr(),
            Place::Wire(listener) => listener.local_addr()?,
        })
    }
}
