//! Queries over UDP.
//!
//! - An answer leaves from the address that was asked at: a client takes none from elsewhere, and at an unspecified
//!   address the kernel would choose.
//! - What can be answered at once is, without a task of its own. What waits for an upstream is bounded
//!   ([`super::Limits`]); noise takes no memory.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

use super::{Begun, Dns, Transport};

/// The most that one call receives, in bytes: the kernel may join datagrams of one client up to the longest one.
const BUFFER: usize = 65_535;
/// How long receiving rests after an error.
const REST: Duration = Duration::from_millis(100);

/// A bound socket.
#[derive(Debug)]
pub(super) struct Datagrams {
    socket: UdpSocket,
    state: UdpSocketState,
}

/// Where an answer goes, and whence.
#[derive(Debug, Clone, Copy)]
struct Way {
    to: SocketAddr,
    from: Option<IpAddr>,
}

impl Datagrams {
    pub(super) fn new(socket: UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Self { socket, state })
    }

    async fn receive(&self, buffer: &mut [u8]) -> io::Result<RecvMeta> {
        let mut meta = [RecvMeta::default()];
        let receive = || self.state.recv((&self.socket).into(), &mut [IoSliceMut::new(buffer)], &mut meta);
        self.socket.async_io(Interest::READABLE, receive).await?;
        Ok(meta[0])
    }

    async fn send(&self, answer: &[u8], way: Way) {
        let transmit = Transmit {
            destination: way.to,
            ecn: None,
            contents: answer,
            segment_size: None,
            src_ip: way.from,
        };
        let send = || self.state.try_send((&self.socket).into(), &transmit);
        if let Err(error) = self.socket.async_io(Interest::WRITABLE, send).await {
            tracing::debug!(%error, client = %way.to, "a DNS answer could not be sent");
        }
    }
}

/// Answers what comes, until dropped.
pub(super) async fn serve_datagrams(datagrams: Datagrams, dns: Dns) {
    let datagrams = Arc::new(datagrams);
    let mut buffer = vec![0; BUFFER];
    let mut waiting = JoinSet::new();
    let mut failing = false;
    loop {
        let received = tokio::select! {
            biased;
            Some(_) = waiting.join_next() => continue,
            received = datagrams.receive(&mut buffer) => received,
        };
        let meta = match received {
            Ok(meta) => meta,
            Err(error) => {
                if !failing {
                    tracing::warn!(%error, "cannot receive DNS over UDP; retrying");
                }
                failing = true;
                tokio::time::sleep(REST).await;
                continue;
            }
        };
        failing = false;
        let way = Way { to: meta.addr, from: meta.dst_ip };
        for packet in buffer[..meta.len].chunks(meta.stride.max(1)) {
            match dns.begin(packet, way.to, Transport::Udp) {
                Begun::Noise => {}
                Begun::Done(answer) => datagrams.send(&answer, way).await,
                Begun::Waits(asked) => {
                    let (datagrams, dns) = (datagrams.clone(), dns.clone());
                    waiting.spawn(async move { datagrams.send(&dns.finish(*asked).await, way).await });
                }
            }
        }
    }
}
