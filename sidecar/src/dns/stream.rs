//! Queries over TCP (RFC 7766).
//!
//! So many connections and no more, for so long as they ask: where there are more, the one goes that was silent for
//! longest, so that silent ones keep nobody out. A simulated network serves TCP by it too.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use servicekeel_runtime::net::{Listener, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::{JoinSet, yield_now};
use tokio::time::timeout;

use super::places::{Place, Places};
use super::{Dns, MAX_UDP, Transport};

/// The most connections that have not asked yet, or not again; one more ends the oldest of them (RFC 7766 §6.2.3).
const MAX_IDLE: usize = 64;
/// The most connections whose query is being answered; one more ends the oldest of them.
const MAX_ASKING: usize = 64;
/// How long a connection may stand between queries, and take for a packet either way.
const IDLE: Duration = Duration::from_secs(10);
/// How long accepting rests after an error that is not of one connection, such as too many open files.
const REST: Duration = Duration::from_millis(100);

/// For the connections in either state.
struct Room {
    idle: Places,
    asking: Places,
}

/// Answers what comes over TCP, until dropped.
///
/// # Errors
/// None that ends it: an accept that fails is tried again.
pub async fn serve_stream<L: Listener>(listener: L, dns: Dns) -> io::Result<()> {
    let room = Arc::new(Room { idle: Places::new(MAX_IDLE), asking: Places::new(MAX_ASKING) });
    let mut connections = JoinSet::new();
    let mut failing = false;
    loop {
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, peer)) => {
                failing = false;
                if let Some(place) = room.idle.take() {
                    connections.spawn(converse(stream, peer, dns.clone(), room.clone(), place));
                }
                // Whose place is lost closes before the next one comes.
                yield_now().await;
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

/// Answers one connection's queries in their order, until it ends, is idle, sends what is no query, or loses its place.
async fn converse(mut stream: impl Stream, peer: SocketAddr, dns: Dns, room: Arc<Room>, mut place: Place) {
    loop {
        let query = tokio::select! {
            // What has come is answered.
            biased;
            query = timeout(IDLE, read(&mut stream)) => query,
            () = place.lost() => return,
        };
        let Ok(Ok(Some(query))) = query else { return };
        let Some(asking) = room.asking.take() else { return };
        place = asking;
        let answered = async {
            let answer = dns.answer(&query, peer, Transport::Tcp).await?;
            timeout(IDLE, write(&mut stream, &answer)).await.ok()?.ok()
        };
        let answered = tokio::select! {
            biased;
            answered = answered => answered,
            () = place.lost() => return,
        };
        let (Some(()), Some(idle)) = (answered, room.idle.take()) else { return };
        place = idle;
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
