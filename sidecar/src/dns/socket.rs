//! Sockets towards the upstreams, as hickory-net wants them.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU16, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_trait::async_trait;
use hickory_net::runtime::iocompat::AsyncIoTokioAsStd;
use hickory_net::runtime::{DnsUdpSocket, RuntimeProvider, TokioHandle, TokioRuntimeProvider, TokioTime};
use hickory_proto::op::ResponseCode;
use tokio::io::ReadBuf;
use tokio::net::{TcpStream, UdpSocket};

/// Tokio's sockets; those for UDP are connected. So the kernel takes datagrams from the upstream alone, and an
/// upstream that is gone is known by its ICMP refusal at once and not by a timeout.
#[derive(Clone, Default)]
pub(super) struct Connected(TokioRuntimeProvider);

impl RuntimeProvider for Connected {
    type Handle = TokioHandle;
    type Timer = TokioTime;
    type Udp = ConnectedSocket;
    type Tcp = AsyncIoTokioAsStd<TcpStream>;

    fn create_handle(&self) -> TokioHandle {
        self.0.create_handle()
    }

    fn connect_tcp(
        &self,
        server: SocketAddr,
        bind: Option<SocketAddr>,
        timeout: Option<Duration>,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<Self::Tcp>>>> {
        self.0.connect_tcp(server, bind, timeout)
    }

    // hickory-net wants the socket unconnected, for systems where sendto(2) then fails. Linux's does not.
    fn bind_udp(
        &self,
        local: SocketAddr,
        server: SocketAddr,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<ConnectedSocket>>>> {
        Box::pin(async move {
            let socket = UdpSocket::bind(local).await?;
            socket.connect(server).await?;
            Ok(ConnectedSocket { socket, asked: AtomicU16::new(0) })
        })
    }
}

/// FORMERR with nothing behind the header, which servers from before EDNS send to a query with it. hickory-net would
/// skip it, since it has no question.
#[derive(Debug, thiserror::Error)]
#[error("the upstream says FORMERR and no more")]
pub(super) struct BareFormErr;

/// A connected UDP socket, for one query.
pub(super) struct ConnectedSocket {
    socket: UdpSocket,
    /// The query's id.
    asked: AtomicU16,
}

#[async_trait]
impl DnsUdpSocket for ConnectedSocket {
    type Time = TokioTime;

    fn poll_recv_from(&self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<(usize, SocketAddr)>> {
        let mut buf = ReadBuf::new(buf);
        let from = ready!(self.socket.poll_recv_from(cx, &mut buf))?;
        Poll::Ready(Ok((buf.filled().len(), from)))
    }

    // hickory-net receives by this. Its own waits by the function above, which a refusal does not wake.
    async fn recv_from(&self, buf: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        let (len, from) = self.socket.recv_from(buf).await?;
        if is_bare_form_err(&buf[..len], self.asked.load(Ordering::Relaxed)) {
            return Err(io::Error::other(BareFormErr));
        }
        Ok((len, from))
    }

    fn poll_send_to(&self, cx: &mut Context<'_>, buf: &[u8], target: SocketAddr) -> Poll<io::Result<usize>> {
        if let Some(id) = buf.first_chunk() {
            self.asked.store(u16::from_be_bytes(*id), Ordering::Relaxed);
        }
        self.socket.poll_send_to(cx, buf, target)
    }
}

/// Whether this is a header alone (RFC 1035 §4.1.1), an answer to that query, with FORMERR.
fn is_bare_form_err(packet: &[u8], asked: u16) -> bool {
    packet.len() == 12
        && packet[..2] == asked.to_be_bytes()
        && packet[2] & 0x80 != 0
        && packet[3] & 0x0f == ResponseCode::FormErr.low()
        && packet[4..] == [0; 8]
}
