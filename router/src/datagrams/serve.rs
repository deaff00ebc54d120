//! UDP sessions that a peer opens to pods of this node.

use std::sync::{Arc, OnceLock};

use servicekeel_core::flow::frame::{self, Cause, Kind, Open, Refused};
use servicekeel_core::mesh::table::Consumer;
use servicekeel_core::name::Protocol;
use servicekeel_core::session::Sessions;
use servicekeel_runtime::net::Net;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::link::{Outbox, Outgoing};
use super::pod::{self, Answers};
use super::{Counted, Crowd, GIVES_WAY, MAX_SESSIONS, QUEUE, Queued, SESSION_IDLE};
use crate::bounds::Held;
use crate::inbound;
use crate::links::LinkError;
use crate::node::Node;
use crate::peers::{Peer, Standing};
use crate::tasks::AbortOnDrop;
use crate::tls::{Channel, Next};

struct Session {
    queue: mpsc::Sender<Queued>,
    _task: AbortOnDrop,
    held: Held,
    /// Why no endpoint takes its datagrams, once none does.
    refused: Arc<OnceLock<Refused>>,
}

/// Serves the sessions of one connection until the peer closes it.
pub(crate) async fn run<N: Net>(
    node: Arc<Node<N>>,
    channel: Channel<N::TcpStream>,
    peer: Arc<Peer<N>>,
    standing: &Standing<N>,
) {
    if let Err(error) = serve(&node, channel, &peer, standing).await {
        debug!(peer = %peer.id, %error, "a peer's connection for UDP sessions is down");
    }
}

async fn serve<N: Net>(
    node: &Arc<Node<N>>,
    mut channel: Channel<N::TcpStream>,
    peer: &Arc<Peer<N>>,
    standing: &Standing<N>,
) -> Result<(), LinkError> {
    channel.count_begun(peer.owner.waiting());
    let lost = standing.lost();
    let mut lost = std::pin::pin!(lost);
    let (answers, mut answered) = Outbox::new();
    let mut served = Served {
        node,
        peer,
        standing,
        answers,
        sessions: Sessions::new(MAX_SESSIONS, SESSION_IDLE),
        counted: Counted::new(node.clone()),
        crowd: Crowd::new(),
    };
    loop {
        // What waits goes out together, also while datagrams come without a pause.
        for _ in 0..QUEUE {
            if channel.is_full() {
                break;
            }
            let Ok(answer) = answered.try_recv() else { break };
            served.answer(&mut channel, answer)?;
        }
        while let Some((session, _)) = served.sessions.poll_expired(Instant::now().into_std()) {
            channel.send_payload(Kind::Close, session, &[])?;
        }
        served.counted.set(served.sessions.len());
        let expiry = served.sessions.poll_timeout().map(Instant::from_std);
        let full = channel.is_full();
        let due = tokio::select! {
            biased;
            next = channel.next() => match next? {
                Next::Frame(header, payload) => served.handle(header, payload)?,
                Next::Flushed => None,
                Next::Closed => return Ok(()),
            },
            Some(answer) = answered.recv(), if !full => {
                served.answer(&mut channel, answer)?;
                None
            }
            () = sleep_until(expiry.unwrap_or_else(Instant::now)), if expiry.is_some() => None,
            () = &mut lost => return Ok(()),
        };
        match due {
            // The next datagram of the session would be answered in the same way.
            Some((_, Due::Close)) if channel.is_full() => {}
            Some((session, Due::Close)) => channel.send_payload(Kind::Close, session, &[])?,
            Some((session, Due::Refused(refused))) => {
                channel.send_message(Kind::Refused, session, &refused)?;
            }
            None => {}
        }
    }
}

/// What the peer must be told of a session.
enum Due {
    Close,
    Refused(Refused),
}

struct Served<'a, N: Net> {
    node: &'a Arc<Node<N>>,
    peer: &'a Peer<N>,
    standing: &'a Standing<N>,
    answers: Outbox<N>,
    sessions: Sessions<u64, Session>,
    counted: Counted<N>,
    crowd: Crowd,
}

impl<N: Net> Served<'_, N> {
    /// Takes a frame of the peer.
    fn handle(&mut self, header: frame::Header, payload: &[u8]) -> Result<Option<(u64, Due)>, LinkError> {
        let session = header.offset;
        let now = Instant::now().into_std();
        match header.kind {
            Kind::Open => {
                let open = frame::decode_payload(payload).map_err(|e| LinkError::Malformed(e.to_string()))?;
                return Ok(self.open(session, open));
            }
            Kind::Datagram => {
                self.peer.activity.note();
                let served = self.sessions.touch(&session, now).filter(|served| !served.queue.is_closed());
                let sent = served.as_ref().is_some_and(|served| {
                    Queued::new(payload, &self.peer.datagrams_in)
                        .is_some_and(|datagram| served.queue.try_send(datagram).is_ok())
                });
                if !sent {
                    self.node.counters.datagrams_dropped.inc();
                }
                if served.is_none() {
                    // The peer's next datagram of this client opens another.
                    let ended = self.sessions.remove(&session);
                    let refused = ended.and_then(|ended| ended.refused.get().cloned());
                    return Ok(Some((session, refused.map_or(Due::Close, Due::Refused))));
                }
            }
            Kind::Close => {
                self.sessions.remove(&session);
            }
            kind => return Err(LinkError::Unexpected(kind)),
        }
        Ok(None)
    }

    fn open(&mut self, session: u64, open: Open) -> Option<(u64, Due)> {
        if self.standing.is_over(self.node.time()) {
            let reason = format!("a certificate of the connection from {} has expired", self.peer.id);
            return Some((session, Due::Refused(Refused { cause: Cause::NotAllowed, reason })));
        }
        if let Err(refused) = admit(self.node, self.peer, &open) {
            return Some((session, Due::Refused(refused)));
        }
        // Where the peer, or its consumer, has as many as it may, one of the consumer's own that is idle gives way.
        let owner = self.peer.holder.for_consumer(open.consumer);
        let mut closed = None;
        let mut held = self.node.flows.take_session(&owner);
        if held.is_none() {
            let now = Instant::now().into_std();
            let own = |session: &Session| *session.held.owner() == owner;
            closed = self.sessions.pop_idle_of(GIVES_WAY, now, own).map(|(oldest, _)| oldest);
            held = self.node.flows.take_session(&owner);
        }
        let Some(held) = held else {
            return Some((session, Due::Refused(self.peer.busy(self.node))));
        };
        let (queue, mut queued) = pod::queue();
        let to = Answers::Session(self.answers.clone(), session, self.peer.datagrams_out.clone());
        let (node, answers) = (self.node.clone(), self.answers.clone());
        let cluster = self.peer.id.cluster.clone();
        let refused = Arc::<OnceLock<Refused>>::default();
        let slot = refused.clone();
        let task = self.node.tasks.spawn(async move {
            let consumer = Consumer { cluster: &cluster, namespace: None };
            let choose = || node.local_candidates(&open.wanted, consumer).1;
            if let Err(refused) = pod::run(&node, (&open.wanted, &owner), choose, &mut queued, &to).await {
                // Dropped, the next datagram is answered by it.
                let _ = slot.set(refused.clone());
                answers.send(Outgoing::Refused { session, refused });
            }
        });
        let task = AbortOnDrop(task);
        let now = Instant::now().into_std();
        let opened = Session { queue, _task: task, held, refused };
        if let Some((oldest, _)) = self.sessions.insert(session, opened, now) {
            self.crowd.tell(&self.peer.id);
            closed = Some(oldest);
        }
        closed.map(|oldest| (oldest, Due::Close))
    }

    /// Puts an answer of a pod to what is sent.
    fn answer(&mut self, channel: &mut Channel<N::TcpStream>, answer: Outgoing<N>) -> Result<(), LinkError> {
        match answer {
            Outgoing::Data { session, datagram } => {
                self.peer.activity.note();
                self.sessions.touch(&session, Instant::now().into_std());
                channel.send_payload(Kind::Datagram, session, &datagram.bytes)?;
            }
            Outgoing::Opened { session } => channel.send_payload(Kind::Opened, session, &[])?,
            Outgoing::Refused { session, refused } => {
                if self.sessions.remove(&session).is_some() {
                    channel.send_message(Kind::Refused, session, &refused)?;
                }
            }
            // Said by the side that opens.
            Outgoing::Open { .. } | Outgoing::Close { .. } => {}
        }
        Ok(())
    }
}

fn admit<N: Net>(node: &Node<N>, peer: &Peer<N>, open: &Open) -> Result<(), Refused> {
    if open.wanted.protocol != Protocol::Udp {
        return Err(Refused { cause: Cause::NotExported, reason: format!("{} is not UDP", open.wanted) });
    }
    inbound::admit(node, &peer.id, open).map(drop)
}
