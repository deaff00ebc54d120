//! Queries over TCP (RFC 7766).
//!
//! So many connections and no more, for so long as they ask. A simulated network serves TCP by it too.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use servicekeel_runtime::net::{Listener, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Dns, MAX_UDP, Transport};

/// The most connections at a time. Others wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 64;
/// How long a connection may stand between queries, and take for a packet either way.
const IDLE: Duration = Duration::from_secs(10);
/// The same, once half of the connections are taken (RFC 7766 §6.2.3).
const IDLE_IN_DEMAND: Duration = Duration::from_secs(1);
/// How long accepting rests after an error that is not of one connection, such as too many open files.
const REST: Duration = Duration::from_millis(100);

/// Answers what comes over TCP, until dropped.
///
/// # Errors
/// None that ends it: an accept that fails is tried again.
pub async fn serve_stream<L: Listener>(listener: L, dns: Dns) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    let mut failing = false;
    loop {
        while connections.try_join_next().is_some() {}
        let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
        match listener.accept().await {
            Ok((stream, peer)) => {
                failing = false;
                connections.spawn(converse(stream, peer, dns.clone(), places.clone(), place));
            }
            Err(error) => {
                if !failing {
                    tracing::warn!(%error, "cannot accept DNS over TCP; retrying");
                }
                failing = true;
                tokio::time::sleep(REST).await;
            }
        }
    }
}

/// Answers one connection's queries in their order, until it ends, is idle, or sends what is no query.
async fn converse(
    mut stream: impl Stream,
    peer: SocketAddr,
    dns: Dns,
    places: Arc<Semaphore>,
    _place: OwnedSemaphorePermit,
) {
    loop {
        let in_demand = places.available_permits() < MAX_CONNECTIONS / 2;
        let idle = if in_demand { IDLE_IN_DEMAND } else { IDLE };
        let Ok(Ok(Some(query))) = timeout(idle, read(&mut stream)).await else { return };
        let Some(answer) = dns.answer(&query, peer, Transport::Tcp).await else { return };
        if !matches!(timeout(IDLE, write(&mut stream, &answer)).await, Ok(Ok(()))) {
            return;
        }
    }
}

/// One query; `None` where the client sends a longer one than there is.
async fn read(stream: &mut impl Stream) -> io::Result<Option<Vec<u8>>> {
    let len = stream.read_u16().await?;
    if len > MAX_UDP {
        return Ok(None);
    }
    let mut packet = vec![0; len.into()];
    stream.read_exact(&mut packet).await?;
    Ok(Some(packet))
}

/// One answer, in one segment with its length (RFC 7766 §8).
async fn write(stream: &mut impl Stream, answer: &[u8]) -> io::Result<()> {
    let len = u16::try_from(answer.len()).map_err(io::Error::other)?;
    let mut packet = Vec::with_capacity(answer.len() + 2);
    packet.extend(len.to_be_bytes());
    packet.extend(answer);
    stream.write_all(&packet).await?;
    stream.flush().await
}
