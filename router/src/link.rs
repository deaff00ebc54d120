//! One link: the control connection between neighbours.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::flow::frame::{self, Kind, Purpose};
use servicekeel_core::mesh::keepalive::Keepalive;
use servicekeel_core::mesh::table::{LinkId, MAX_OFFERS};
use servicekeel_core::mesh::{LinkMessage, Offer};
use servicekeel_core::name::ServicePort;
use servicekeel_runtime::latest;
use servicekeel_runtime::net::Net;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{debug, info, warn};

use crate::inbound;
use crate::links::{self, LinkError, Met, PeerChannel};
use crate::node::Node;
use crate::peers::{Ask, Dialled, LinkState, MAX_DIALS, NoLink, Peer, Standing};
use crate::tls::{ChannelError, Next};

/// Messages that wait for a peer which is slow to take them; beyond that its link is given up.
const MAX_DUE: usize = 4 * MAX_OFFERS;
/// How long the last word may take.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

/// Resolves when the router ends.
async fn drained(draining: &mut latest::Receiver<bool>) {
    // The node holds the sender for as long as anything runs.
    let _ = draining.wait_for(|draining| *draining).await;
}

/// The link's place in the peer and the table, while it lasts.
struct Place<N: Net> {
    node: Arc<Node<N>>,
    peer: Arc<Peer<N>>,
    id: LinkId,
}

impl<N: Net> Drop for Place<N> {
    fn drop(&mut self) {
        self.node.change(|table| table.link_down(self.id));
        self.peer.link_down(&self.node, self.id);
        self.node.count_links();
    }
}

/// Runs a link to its end.
///
/// # Errors
/// Where it does not come to be.
pub(crate) async fn run<N: Net>(
    node: &Arc<Node<N>>,
    met: Met<N>,
    dialled: Option<Dialled>,
) -> Result<(), NoLink> {
    let Met { channel, peer, boot, at: met_at, mut standing, .. } = met;
    let id = node.next_id();
    let (ask, asked) = mpsc::channel(16);
    let state = LinkState { ask, dialled: dialled.clone(), with: met_at.ip(), since: Instant::now() };
    match peer.link_up(id, boot, state) {
        Ok(epoch) => standing.begins(epoch),
        Err(error) => {
            node.counters.peers_refused.inc();
            let told = if error == NoLink::Twin { &peer.twins } else { &node.refusals };
            if let Some(untold) = told.permit() {
                warn!(peer = %peer.id, at = %met_at, %error, untold, "a link is refused");
            }
            return Err(error);
        }
    }
    node.count_links();
    let place = Place { node: node.clone(), peer: peer.clone(), id };
    let from = dialled.as_ref().map_or("by the peer", |dialled| &dialled.address);
    info!(peer = %peer.id, dialled = from, "link up");
    let link = Link {
        node,
        place: &place,
        standing: &standing,
        channel,
        dialled,
        told: BTreeMap::new(),
        due: VecDeque::new(),
        refusal_told: false,
    };
    match link.converse(asked).await {
        Ok(()) => info!(peer = %peer.id, "link closed"),
        Err(error) => {
            warn!(peer = %peer.id, %error, "link down");
            // Of the same path and no better, whatever other link there is.
            peer.close_unused();
        }
    }
    Ok(())
}

struct Link<'a, N: Net> {
    node: &'a Arc<Node<N>>,
    place: &'a Place<N>,
    standing: &'a Standing<N>,
    channel: PeerChannel<N>,
    dialled: Option<Dialled>,
    /// What the peer knows of this node's exports once all that is due has gone out.
    told: BTreeMap<ServicePort, Offer>,
    /// What goes out as fast as the peer takes it, while its own words are read: two routers with much to tell must not
    /// wait for one another.
    due: VecDeque<LinkMessage>,
    refusal_told: bool,
}

/// What to do next.
enum Event {
    Message(LinkMessage),
    /// Of a newer peer.
    Unknown,
    Flushed,
    Closed,
    Exports,
    Ask(Ask),
    Ends,
    Lost,
    Timer,
}

impl<N: Net> Link<'_, N> {
    async fn converse(mut self, mut asked: mpsc::Receiver<Ask>) -> Result<(), LinkError> {
        let node = self.node;
        let mut keepalive = Keepalive::new(Instant::now().into_std());
        // Who waits for what the peer is about to tell does not use it yet.
        keepalive.handle_use(Instant::now().into_std());
        let mut exports = node.exports.subscribe();
        let mut uses = self.place.peer.activity.watch();
        let mut draining = node.draining.subscribe();
        let lost = self.standing.lost();
        let mut lost = std::pin::pin!(lost);
        self.tell_exports()?;
        self.due.push_back(LinkMessage::Synced);
        loop {
            uses.tell(&mut keepalive);
            let now = Instant::now().into_std();
            if keepalive.poll_ping(now) {
                self.put(&LinkMessage::Ping)?;
            }
            if keepalive.is_dead(now) {
                return Err(LinkError::Dead);
            }
            self.put_due()?;
            let event = tokio::select! {
                biased;
                next = self.channel.next() => match next? {
                    Next::Frame(header, _) if header.kind != Kind::Message => {
                        return Err(LinkError::Unexpected(header.kind));
                    }
                    Next::Frame(_, payload) => match frame::decode_payload(payload) {
                        Ok(message) => Event::Message(message),
                        Err(error) => {
                            debug!(peer = %self.place.peer.id, %error, "a message is skipped");
                            Event::Unknown
                        }
                    },
                    Next::Flushed => Event::Flushed,
                    Next::Closed => Event::Closed,
                },
                Ok(()) = exports.changed() => Event::Exports,
                Some(ask) = asked.recv() => Event::Ask(ask),
                () = uses.resumed() => Event::Timer,
                () = drained(&mut draining) => Event::Ends,
                () = &mut lost => Event::Lost,
                () = sleep_until(keepalive.poll_timeout().into()) => Event::Timer,
            };
            match event {
                Event::Message(message) => {
                    keepalive.handle_received(Instant::now().into_std());
                    self.handle(message)?;
                }
                Event::Unknown => keepalive.handle_received(Instant::now().into_std()),
                Event::Exports => self.tell_exports()?,
                Event::Ask(ask) => {
                    let (flows, datagrams) = match ask {
                        Ask::Flows(n) => (n, 0),
                        Ask::Datagrams => (0, 1),
                    };
                    self.put(&LinkMessage::DialBack { flows, datagrams })?;
                }
                Event::Ends => {
                    self.put(&LinkMessage::Goodbye)?;
                    // Where it does not go out, the peer finds out by itself.
                    let _ = timeout(GOODBYE_TIMEOUT, self.channel.close()).await;
                    return Ok(());
                }
                Event::Closed | Event::Lost => return Ok(()),
                Event::Flushed | Event::Timer => {}
            }
        }
    }

    /// Puts a message to what is sent.
    fn put(&mut self, message: &LinkMessage) -> Result<(), LinkError> {
        Ok(self.channel.send_message(Kind::Message, 0, message)?)
    }

    fn put_due(&mut self) -> Result<(), LinkError> {
        while !self.channel.is_full() {
            let Some(message) = self.due.pop_front() else { break };
            match (self.channel.send_message(Kind::Message, 0, &message), &message) {
                (Err(ChannelError::TooLong(_)), LinkMessage::Offer(offer)) => {
                    warn!(port = %offer.port, "an export with so many allow rules can't be offered");
                }
                (sent, _) => sent?,
            }
        }
        Ok(())
    }

    /// What changed of this node's exports since the peer was told last is due.
    fn tell_exports(&mut self) -> Result<(), LinkError> {
        let offers = self.node.routes().table.offers();
        let gone = self.told.keys().filter(|port| !offers.contains_key(*port));
        self.due.extend(gone.map(|port| LinkMessage::Withdraw(port.clone())));
        let news = offers.iter().filter(|(port, offer)| self.told.get(*port) != Some(*offer));
        self.due.extend(news.map(|(_, offer)| LinkMessage::Offer(offer.clone())));
        self.told = offers;
        if self.due.len() > MAX_DUE { Err(LinkError::Stuck) } else { Ok(()) }
    }

    fn handle(&mut self, message: LinkMessage) -> Result<(), LinkError> {
        let (peer, id) = (&self.place.peer.id, self.place.id);
        match message {
            LinkMessage::Offer(offer) => {
                debug!(%peer, port = %offer.port, "offered");
                if let Err(error) = self.node.change(|table| table.offer(peer, id, offer))
                    && !std::mem::replace(&mut self.refusal_told, true)
                {
                    warn!(%error, "an offer is refused; further ones on this link are not told");
                }
            }
            LinkMessage::Withdraw(port) => {
                debug!(%peer, %port, "withdrawn");
                self.node.change(|table| table.withdraw(peer, id, &port));
            }
            LinkMessage::Synced => info!(%peer, "the peer has told all its exports"),
            LinkMessage::Ping => self.put(&LinkMessage::Pong)?,
            LinkMessage::Pong => {}
            LinkMessage::DialBack { flows, datagrams } => self.dial_back(flows, datagrams),
            LinkMessage::Goodbye => {
                info!(%peer, "the peer ends");
                self.node.change(|table| table.link_down(id));
            }
        }
        Ok(())
    }

    fn dial_back(&self, flows: u16, datagrams: u16) {
        let peer = &self.place.peer;
        let Some(Dialled { at, .. }) = &self.dialled else {
            debug!(peer = %peer.id, "asks for a dial back on a link that it dialled");
            return;
        };
        let wanted = [
            (Purpose::FlowsBack, usize::from(flows).min(MAX_DIALS)),
            (Purpose::DatagramsBack, datagrams.min(1).into()),
        ];
        for (purpose, n) in wanted {
            for _ in 0..n {
                if self.node.is_crowded() {
                    debug!(peer = %peer.id, "no descriptor is left for a dial back");
                    return;
                }
                let Ok(permit) = peer.dial_backs.clone().try_acquire_owned() else {
                    debug!(peer = %peer.id, "asks for more dials back than it may");
                    return;
                };
                let (node, peer, at) = (self.node.clone(), peer.id.clone(), at.clone());
                self.node.tasks.spawn(async move {
                    let dialled = links::dial(&node, &at, purpose, Some(&peer)).await;
                    drop(permit);
                    match dialled {
                        Ok(met) => inbound::serve(&node, met, true).await,
                        Err(error) => debug!(%peer, %error, "a dial back failed"),
                    }
                });
            }
        }
    }
}
