//! The connection on which this router opens UDP sessions at a peer.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustls::pki_types::UnixTime;
use servicekeel_core::flow::frame::{self, Kind, Open, Purpose, Refused};
use servicekeel_core::mesh::outcome::Outcome;
use servicekeel_core::mesh::table::Candidate;
use servicekeel_core::session::Sessions;
use servicekeel_runtime::net::Net;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::debug;

use super::{Crowd, ImportSocket, LINK_QUEUE, MAX_SESSIONS, QUEUE, Queued, SESSION_IDLE, Signs};
use crate::imports::Import;
use crate::links::{self, LinkError};
use crate::node::Node;
use crate::peers::{Peer, Standing};
use crate::tls::{Channel, Next};

/// How long the peer may take to dial back.
const DIAL_BACK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a session is kept here without a datagram: longer than by its import, which ends it.
const KEPT: Duration = SESSION_IDLE.saturating_mul(3);

/// Where a session's answers go: the import's socket, and its client.
pub(crate) struct Reply<N: Net> {
    pub(crate) socket: ImportSocket<N>,
    pub(crate) client: SocketAddr,
    pub(crate) import: Arc<Import>,
    pub(crate) signs: Signs,
}

impl<N: Net> Drop for Reply<N> {
    fn drop(&mut self) {
        self.signs.end();
    }
}

/// What goes to the peer.
pub(crate) enum Outgoing<N: Net> {
    Open { session: u64, open: Open, reply: Reply<N> },
    Data { session: u64, datagram: Queued },
    Opened { session: u64 },
    Refused { session: u64, refused: Refused },
    Close { session: u64 },
}

/// The queue to a connection between two routers; a clone is the same. What does not fit in is dropped.
pub(crate) struct Outbox<N: Net> {
    queue: mpsc::Sender<Outgoing<N>>,
}

impl<N: Net> Clone for Outbox<N> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone() }
    }
}

impl<N: Net> Outbox<N> {
    pub(crate) fn new() -> (Self, mpsc::Receiver<Outgoing<N>>) {
        let (queue, receiver) = mpsc::channel(LINK_QUEUE);
        (Self { queue }, receiver)
    }

    /// Queues something; false where it is dropped.
    pub(crate) fn send(&self, outgoing: Outgoing<N>) -> bool {
        self.queue.try_send(outgoing).is_ok()
    }

    /// Queues a datagram; false where it is dropped.
    pub(crate) fn send_datagram(&self, session: u64, datagram: Queued) -> bool {
        self.send(Outgoing::Data { session, datagram })
    }
}

/// The sending end of the connection; a clone is the same.
pub(crate) struct DatagramLink<N: Net> {
    outgoing: Outbox<N>,
    delivered: mpsc::Sender<(Channel<N::TcpStream>, Standing<N>)>,
    /// Until when a session may begin on it, once it is connected.
    until: Arc<OnceLock<UnixTime>>,
}

impl<N: Net> Clone for DatagramLink<N> {
    fn clone(&self) -> Self {
        Self { outgoing: self.outgoing.clone(), delivered: self.delivered.clone(), until: self.until.clone() }
    }
}

/// The receiving end, which [`run`] serves.
pub(crate) struct Receiver<N: Net> {
    outgoing: mpsc::Receiver<Outgoing<N>>,
    delivered: mpsc::Receiver<(Channel<N::TcpStream>, Standing<N>)>,
    until: Arc<OnceLock<UnixTime>>,
}

impl<N: Net> DatagramLink<N> {
    pub(crate) fn new() -> (Self, Receiver<N>) {
        let (outgoing, from_imports) = Outbox::new();
        let (delivered, channels) = mpsc::channel(1);
        let until = Arc::new(OnceLock::new());
        let receiver = Receiver { outgoing: from_imports, delivered: channels, until: until.clone() };
        (Self { outgoing, delivered, until }, receiver)
    }

    /// Whether its sessions can carry no more.
    pub(crate) fn is_closed(&self) -> bool {
        self.outgoing.queue.is_closed()
    }

    /// Whether a certificate has expired by which it was made: no session begins on it, and those that have go on.
    pub(crate) fn is_over(&self, now: UnixTime) -> bool {
        self.until.get().is_some_and(|until| *until < now)
    }

    /// Opens a session; the peer's answer is not waited for.
    pub(crate) fn open(&self, session: u64, open: Open, reply: Reply<N>) -> bool {
        self.outgoing.send(Outgoing::Open { session, open, reply })
    }

    /// Queues a datagram to the peer; false where it is dropped.
    pub(crate) fn send(&self, session: u64, datagram: Queued) -> bool {
        self.outgoing.send_datagram(session, datagram)
    }

    /// Ends a session. Where the queue is full, it ends at the peer by its idle time.
    pub(crate) fn close(&self, session: u64) {
        self.outgoing.send(Outgoing::Close { session });
    }

    /// The peer dialled back.
    pub(crate) fn deliver(&self, channel: Channel<N::TcpStream>, standing: Standing<N>) {
        // A second one was not asked for, and is closed.
        let _ = self.delivered.try_send((channel, standing));
    }
}

/// Connects and serves the link to its end. `at`: where to dial; `None`: the peer was asked to dial back.
pub(crate) async fn run<N: Net>(
    node: Arc<Node<N>>,
    peer: Arc<Peer<N>>,
    mut receiver: Receiver<N>,
    at: Option<String>,
) {
    let channel = match &at {
        Some(at) => links::dial(&node, at, Purpose::Datagrams, Some(&peer.id))
            .await
            .map(|met| (met.channel, met.standing)),
        None => match timeout(DIAL_BACK_TIMEOUT, receiver.delivered.recv()).await {
            Ok(Some(delivered)) => Ok(delivered),
            _ => Err(LinkError::Silent),
        },
    };
    let ended = match channel {
        Ok((channel, standing)) => {
            receiver.until.get_or_init(|| standing.until());
            let replies = Sessions::new(MAX_SESSIONS, KEPT);
            let mut link = Link { node: &node, peer: &peer, channel, replies, crowd: Crowd::new() };
            link.serve(receiver.outgoing, &standing).await
        }
        Err(error) => {
            no_path(&node, &peer, &mut receiver.outgoing, &error);
            Err(error)
        }
    };
    if let Err(error) = ended {
        debug!(peer = %peer.id, %error, "the connection for UDP sessions is down");
    }
}

/// Sessions were to begin on a connection that could not be made. Each Service is told of once.
fn no_path<N: Net>(
    node: &Node<N>,
    peer: &Peer<N>,
    outgoing: &mut mpsc::Receiver<Outgoing<N>>,
    error: &LinkError,
) {
    let candidate = Candidate::Remote(peer.id.clone());
    let mut told = BTreeSet::new();
    while let Ok(next) = outgoing.try_recv() {
        if let Outgoing::Open { reply, .. } = next
            && told.insert(reply.import.wanted.clone())
        {
            node.report(&reply.import.wanted, &candidate, Outcome::Refused, error);
            reply.import.tell_no_session(node, Some(error.to_string()));
        }
    }
}

struct Link<'a, N: Net> {
    node: &'a Node<N>,
    peer: &'a Peer<N>,
    channel: Channel<N::TcpStream>,
    replies: Sessions<u64, Reply<N>>,
    crowd: Crowd,
}

impl<N: Net> Link<'_, N> {
    async fn serve(
        &mut self,
        mut outgoing: mpsc::Receiver<Outgoing<N>>,
        standing: &Standing<N>,
    ) -> Result<(), LinkError> {
        let lost = standing.lost();
        let mut lost = std::pin::pin!(lost);
        loop {
            // What waits goes out together, also while answers come without a pause.
            for _ in 0..QUEUE {
                if self.channel.is_full() {
                    break;
                }
                let Ok(next) = outgoing.try_recv() else { break };
                self.put(next)?;
            }
            let now = Instant::now().into_std();
            while let Some((session, _)) = self.replies.poll_expired(now) {
                self.channel.send_payload(Kind::Close, session, &[])?;
            }
            let expiry = self.replies.poll_timeout().map(Instant::from_std);
            let full = self.channel.is_full();
            tokio::select! {
                biased;
                next = self.channel.next() => match next? {
                    Next::Frame(header, payload) => {
                        handle(self.node, self.peer, &mut self.replies, header, payload)?;
                    }
                    Next::Flushed => {}
                    Next::Closed => return Ok(()),
                },
                next = outgoing.recv(), if !full => match next {
                    Some(next) => self.put(next)?,
                    None => return Ok(()),
                },
                () = &mut lost => return Ok(()),
                () = sleep_until(expiry.unwrap_or_else(Instant::now)), if expiry.is_some() => {}
            }
        }
    }

    fn put(&mut self, outgoing: Outgoing<N>) -> Result<(), LinkError> {
        let now = Instant::now().into_std();
        match outgoing {
            Outgoing::Open { session, open, reply } => {
                self.channel.send_message(Kind::Open, session, &open)?;
                if let Some((oldest, _)) = self.replies.insert(session, reply, now) {
                    self.channel.send_payload(Kind::Close, oldest, &[])?;
                    self.crowd.tell(&self.peer.id);
                }
            }
            Outgoing::Data { session, datagram } => {
                if self.replies.touch(&session, now).is_some() {
                    self.peer.activity.note();
                    self.channel.send_payload(Kind::Datagram, session, &datagram.bytes)?;
                } else {
                    self.node.counters.datagrams_dropped.inc();
                }
            }
            // Said by the side that serves.
            Outgoing::Opened { .. } | Outgoing::Refused { .. } => {}
            Outgoing::Close { session } => {
                if self.replies.remove(&session).is_some() {
                    self.channel.send_payload(Kind::Close, session, &[])?;
                }
            }
        }
        Ok(())
    }
}

/// Takes a frame of the peer. No pod's socket is waited for: one that takes nothing loses its own datagrams.
fn handle<N: Net>(
    node: &Node<N>,
    peer: &Peer<N>,
    replies: &mut Sessions<u64, Reply<N>>,
    header: frame::Header,
    payload: &[u8],
) -> Result<(), LinkError> {
    let session = header.offset;
    match header.kind {
        Kind::Datagram => match replies.touch(&session, Instant::now().into_std()) {
            Some(reply) if reply.socket.send(payload, &peer.datagrams_in, reply.client) => {
                if reply.signs.answer() {
                    let candidate = Candidate::Remote(peer.id.clone());
                    node.report(&reply.import.wanted, &candidate, Outcome::Taken, "");
                }
                peer.activity.note();
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
                let candidate = Candidate::Remote(peer.id.clone());
                let outcome = Outcome::Rejected(refused.cause);
                node.report(&reply.import.wanted, &candidate, outcome, &refused.reason);
                reply.import.tell_no_session(node, Some(refused.reason));
            }
        }
        Kind::Close => {
            replies.remove(&session);
        }
        Kind::Opened => {
            if let Some(reply) = replies.touch(&session, Instant::now().into_std()) {
                let candidate = Candidate::Remote(peer.id.clone());
                node.report(&reply.import.wanted, &candidate, Outcome::Taken, "");
            }
        }
        kind => return Err(LinkError::Unexpected(kind)),
    }
    Ok(())
}
