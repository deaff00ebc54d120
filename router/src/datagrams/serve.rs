//! UDP sessions that a peer opens to pods of this node.

use std::sync::Arc;

use servicekeel_core::flow::frame::{self, Cause, Kind, Open, Refused};
use servicekeel_core::name::Protocol;
use servicekeel_core::session::Sessions;
use servicekeel_runtime::net::Net;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};

use super::link::Outgoing;
use super::pod::{self, Answers};
use super::{MAX_SESSIONS, QUEUE, SESSION_IDLE};
use crate::inbound;
use crate::links::LinkError;
use crate::node::Node;
use crate::peers::Peer;
use crate::tasks::AbortOnDrop;
use crate::tls::Channel;

struct Session {
    queue: mpsc::Sender<Vec<u8>>,
    _task: AbortOnDrop,
}

/// Serves the sessions of one connection until the peer closes it.
pub(crate) async fn run<N: Net>(node: Arc<Node<N>>, channel: Channel<N::TcpStream>, peer: Arc<Peer<N>>) {
    if let Err(error) = serve(&node, channel, &peer).await {
        debug!(peer = %peer.id, %error, "a peer's connection for UDP sessions is down");
    }
}

async fn serve<N: Net>(
    node: &Arc<Node<N>>,
    mut channel: Channel<N::TcpStream>,
    peer: &Arc<Peer<N>>,
) -> Result<(), LinkError> {
    let lost = peer.lost(peer.epoch());
    let mut lost = std::pin::pin!(lost);
    let (answers, mut answered) = mpsc::channel::<Outgoing<N>>(QUEUE);
    let mut sessions: Sessions<u64, Session> = Sessions::new(MAX_SESSIONS, SESSION_IDLE);
    loop {
        while let Some((session, _)) = sessions.poll_expired(Instant::now().into_std()) {
            channel.send_payload(Kind::Close, session, &[])?;
        }
        let expiry = sessions.poll_timeout().map(Instant::from_std);
        tokio::select! {
            biased;
            frame = channel.recv() => {
                let Some((header, payload)) = frame? else { return Ok(()) };
                let session = header.offset;
                match header.kind {
                    Kind::Open => {
                        let open: Open =
                            frame::decode_payload(payload).map_err(|e| LinkError::Malformed(e.to_string()))?;
                        match admit(node, peer, &open) {
                            Ok(candidates) => {
                                let (queue, queued) = pod::queue();
                                let to = Answers::Session(answers.clone(), session);
                                let wanted = Arc::new(open.wanted);
                                let task = pod::run(node.clone(), wanted, candidates, queued, to);
                                let task = AbortOnDrop(node.tasks.spawn(task));
                                let now = Instant::now().into_std();
                                if let Some((oldest, _)) = sessions.insert(session, Session { queue, _task: task }, now) {
                                    warn!(peer = %peer.id, limit = MAX_SESSIONS, "the oldest UDP session makes room");
                                    channel.send_payload(Kind::Close, oldest, &[])?;
                                }
                            }
                            Err(refused) => channel.send_message(Kind::Refused, session, &refused)?,
                        }
                    }
                    Kind::Datagram => {
                        let now = Instant::now().into_std();
                        let sent = sessions.touch(&session, now).map(|s| s.queue.try_send(payload.into()));
                        match sent {
                            Some(Ok(())) => {}
                            Some(Err(mpsc::error::TrySendError::Closed(_))) => {
                                sessions.remove(&session);
                                channel.send_payload(Kind::Close, session, &[])?;
                            }
                            Some(Err(mpsc::error::TrySendError::Full(_))) | None => {
                                node.counters.datagrams_dropped.inc();
                            }
                        }
                    }
                    Kind::Close => {
                        sessions.remove(&session);
                    }
                    kind => return Err(LinkError::Unexpected(kind)),
                }
            }
            Some(mut answer) = answered.recv() => loop {
                if let Outgoing::Data { session, bytes } = answer {
                    sessions.touch(&session, Instant::now().into_std());
                    if channel.is_full() {
                        node.counters.datagrams_dropped.inc();
                    } else {
                        channel.send_payload(Kind::Datagram, session, &bytes)?;
                    }
                }
                match answered.try_recv() {
                    Ok(next) => answer = next,
                    Err(_) => break,
                }
            },
            () = sleep_until(expiry.unwrap_or_else(Instant::now)), if expiry.is_some() => {}
            () = &mut lost => return Ok(()),
        }
    }
}

fn admit<N: Net>(
    node: &Node<N>,
    peer: &Peer<N>,
    open: &Open,
) -> Result<Vec<servicekeel_core::mesh::table::Candidate>, Refused> {
    if open.wanted.protocol != Protocol::Udp {
        return Err(Refused { cause: Cause::NotExported, reason: format!("{} is not UDP", open.wanted) });
    }
    inbound::admit(node, &peer.id, open)
}
