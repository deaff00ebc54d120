//! The connection on which this router opens UDP sessions at a peer.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use servicekeel_core::flow::frame::{self, Kind, Open, Purpose, Refused};
use servicekeel_core::mesh::table::Candidate;
use servicekeel_core::name::ServicePort;
use servicekeel_runtime::net::{Datagrams, Net};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::{MAX_SESSIONS, QUEUE};
use crate::links::{self, LinkError};
use crate::node::Node;
use crate::peers::Peer;
use crate::tls::Channel;

/// How long the peer may take to dial back.
const DIAL_BACK_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a session's answers go: the import's socket, and its client.
pub(crate) struct Reply<N: Net> {
    pub(crate) socket: Arc<N::UdpSocket>,
    pub(crate) client: SocketAddr,
    pub(crate) wanted: Arc<ServicePort>,
}

/// What goes to the peer.
pub(crate) enum Outgoing<N: Net> {
    Open { session: u64, open: Open, reply: Reply<N> },
    Data { session: u64, bytes: Vec<u8> },
    Close { session: u64 },
}

/// The sending end of the connection; a clone is the same.
pub(crate) struct DatagramLink<N: Net> {
    outgoing: mpsc::Sender<Outgoing<N>>,
    delivered: mpsc::Sender<Channel<N::TcpStream>>,
    /// The sessions that the peer refused or ended: their imports open new ones.
    over: Arc<Mutex<std::collections::BTreeSet<u64>>>,
}

impl<N: Net> Clone for DatagramLink<N> {
    fn clone(&self) -> Self {
        Self { outgoing: self.outgoing.clone(), delivered: self.delivered.clone(), over: self.over.clone() }
    }
}

/// The receiving end, which [`run`] serves.
pub(crate) struct Receiver<N: Net> {
    outgoing: mpsc::Receiver<Outgoing<N>>,
    delivered: mpsc::Receiver<Channel<N::TcpStream>>,
    over: Arc<Mutex<std::collections::BTreeSet<u64>>>,
}

impl<N: Net> DatagramLink<N> {
    pub(crate) fn new() -> (Self, Receiver<N>) {
        let (outgoing, from_imports) = mpsc::channel(QUEUE);
        let (delivered, channels) = mpsc::channel(1);
        let over = Arc::new(Mutex::default());
        let receiver = Receiver { outgoing: from_imports, delivered: channels, over: over.clone() };
        (Self { outgoing, delivered, over }, receiver)
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.outgoing.is_closed()
    }

    /// Whether a session can carry no more.
    pub(crate) fn is_over(&self, session: u64) -> bool {
        self.is_closed() || self.over.lock().unwrap_or_else(PoisonError::into_inner).contains(&session)
    }

    /// Opens a session; the peer's answer is not waited for.
    pub(crate) fn open(&self, session: u64, open: Open, reply: Reply<N>) -> bool {
        self.send(Outgoing::Open { session, open, reply })
    }

    /// Queues what goes to the peer; false where it is dropped.
    pub(crate) fn send(&self, outgoing: Outgoing<N>) -> bool {
        self.outgoing.try_send(outgoing).is_ok()
    }

    /// The peer dialled back.
    pub(crate) fn deliver(&self, channel: Channel<N::TcpStream>) {
        // A second one was not asked for, and is closed.
        let _ = self.delivered.try_send(channel);
    }
}

/// Connects and serves the link to its end.
pub(crate) async fn run<N: Net>(
    node: Arc<Node<N>>,
    peer: Arc<Peer<N>>,
    mut receiver: Receiver<N>,
    dialled: Option<String>,
) {
    let channel = match &dialled {
        Some(address) => {
            links::dial(&node, address, Purpose::Datagrams, Some(&peer.id)).await.map(|(c, _)| c)
        }
        None => match timeout(DIAL_BACK_TIMEOUT, receiver.delivered.recv()).await {
            Ok(Some(channel)) => Ok(channel),
            _ => Err(LinkError::Silent),
        },
    };
    let ended = match channel {
        Ok(channel) => serve(&node, &peer, receiver, channel).await,
        Err(error) => Err(error),
    };
    if let Err(error) = ended {
        debug!(peer = %peer.id, %error, "the connection for UDP sessions is down");
    }
}

async fn serve<N: Net>(
    node: &Node<N>,
    peer: &Peer<N>,
    mut receiver: Receiver<N>,
    mut channel: Channel<N::TcpStream>,
) -> Result<(), LinkError> {
    let lost = peer.lost(peer.epoch());
    let mut lost = std::pin::pin!(lost);
    let mut replies: BTreeMap<u64, Reply<N>> = BTreeMap::new();
    loop {
        tokio::select! {
            biased;
            frame = channel.recv() => {
                let Some((header, payload)) = frame? else { return Ok(()) };
                let session = header.offset;
                match header.kind {
                    Kind::Datagram => match replies.get(&session) {
                        Some(reply) if reply.socket.send_to(payload, reply.client).await.is_ok() => {
                            node.counters.datagrams.inc();
                        }
                        _ => {
                            node.counters.datagrams_dropped.inc();
                        }
                    },
                    Kind::Refused => {
                        let refused: Refused =
                            frame::decode_payload(payload).map_err(|e| LinkError::Malformed(e.to_string()))?;
                        if let Some(reply) = replies.remove(&session) {
                            warn!(wanted = %reply.wanted, peer = %peer.id, reason = %refused.reason, "a UDP session is refused");
                            node.failed(&reply.wanted, &Candidate::Remote(peer.id.clone()));
                            end(&receiver, session);
                        }
                    }
                    Kind::Close => {
                        replies.remove(&session);
                        end(&receiver, session);
                    }
                    Kind::Opened => {}
                    kind => return Err(LinkError::Unexpected(kind)),
                }
            }
            outgoing = receiver.outgoing.recv() => {
                let Some(mut outgoing) = outgoing else { return Ok(()) };
                // What waits goes out together.
                loop {
                    put(node, &mut channel, &mut replies, &receiver, outgoing)?;
                    match receiver.outgoing.try_recv() {
                        Ok(next) => outgoing = next,
                        Err(_) => break,
                    }
                }
            }
            () = &mut lost => return Ok(()),
        }
    }
}

fn end<N: Net>(receiver: &Receiver<N>, session: u64) {
    receiver.over.lock().unwrap_or_else(PoisonError::into_inner).insert(session);
}

fn put<N: Net>(
    node: &Node<N>,
    channel: &mut Channel<N::TcpStream>,
    replies: &mut BTreeMap<u64, Reply<N>>,
    receiver: &Receiver<N>,
    outgoing: Outgoing<N>,
) -> Result<(), LinkError> {
    match outgoing {
        Outgoing::Open { session, open, reply } => {
            if replies.len() >= MAX_SESSIONS {
                node.counters.datagrams_dropped.inc();
                end(receiver, session);
                return Ok(());
            }
            channel.send_message(Kind::Open, session, &open)?;
            replies.insert(session, reply);
        }
        Outgoing::Data { .. } if channel.is_full() => {
            node.counters.datagrams_dropped.inc();
        }
        Outgoing::Data { session, bytes } => {
            channel.send_payload(Kind::Datagram, session, &bytes)?;
        }
        Outgoing::Close { session } => {
            receiver.over.lock().unwrap_or_else(PoisonError::into_inner).remove(&session);
            if replies.remove(&session).is_some() {
                channel.send_payload(Kind::Close, session, &[])?;
            }
        }
    }
    Ok(())
}
