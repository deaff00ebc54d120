//! Links: the control connection between neighbours, and the dialling of every connection to a peer.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::flow::frame::{self, Kind, Preface, Purpose};
use servicekeel_core::mesh::keepalive::Keepalive;
use servicekeel_core::mesh::table::LinkId;
use servicekeel_core::mesh::{LinkMessage, Offer};
use servicekeel_core::name::{RouterId, ServicePort};
use servicekeel_runtime::net::Net;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};

use crate::inbound;
use crate::node::Node;
use crate::peers::{Ask, LinkState, Peer};
use crate::tls::{self, Channel, ChannelError, HandshakeError};

/// How long a peer may take to accept a TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a peer may take to say who it is.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a link may take to accept what is sent.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// The first and the longest pause between dials of a peer that does not answer.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));
/// The most connections that one request to dial back brings.
const MAX_DIAL_BACK: u16 = 64;

/// Why a connection to or from a peer is not used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("no answer within {} s", CONNECT_TIMEOUT.as_secs())]
    ConnectTimeout,
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Handshake(#[from] HandshakeError),
    #[error("{0}")]
    Channel(#[from] ChannelError),
    #[error("the certificate: {0}")]
    Identity(String),
    #[error("this router has no identity: set `identity` in its config")]
    NoIdentity,
    #[error("said nothing for {} s", PREFACE_TIMEOUT.as_secs())]
    Silent,
    #[error("closed before it said who it is")]
    Closed,
    #[error("does not begin with a preface")]
    NoPreface,
    #[error("a malformed message: {0}")]
    Malformed(String),
    #[error("speaks version {0}; this router speaks {max} and older", max = frame::VERSION)]
    Version(u32),
    #[error("says that it is {said}, and its certificate {proven}")]
    Liar { said: RouterId, proven: RouterId },
    #[error("is {met}, not {wanted}")]
    Another { wanted: RouterId, met: RouterId },
    #[error("has this router's own name, {0}: is a certificate used twice?")]
    Ourselves(RouterId),
    #[error("sends {0:?} frames on a link")]
    Unexpected(Kind),
    #[error("takes nothing for {} s", SEND_TIMEOUT.as_secs())]
    Stuck,
    #[error("does not answer")]
    Dead,
}

type PeerChannel<N> = Channel<<N as Net>::TcpStream>;

/// Dials a peer and says what for.
///
/// # Errors
/// [`LinkError`]: the network's, the handshake's, or a peer that is not whom it should be.
pub(crate) async fn dial<N: Net>(
    node: &Node<N>,
    address: &str,
    purpose: Purpose,
    wanted: Option<&RouterId>,
) -> Result<(PeerChannel<N>, Preface), LinkError> {
    let identity = node.settings().identity.clone().ok_or(LinkError::NoIdentity)?;
    let stream = timeout(CONNECT_TIMEOUT, node.net.connect(address))
        .await
        .map_err(|_| LinkError::ConnectTimeout)??;
    let (mut channel, chain) = tls::connect(stream, identity.client(), node.buffers.clone()).await?;
    let proven = identity.peer(&chain).map_err(|e| LinkError::Identity(e.to_string()))?;
    say_preface(node, &mut channel, purpose).await?;
    let preface = hear_preface(node, &mut channel, proven).await?;
    match wanted {
        Some(wanted) if *wanted != preface.sender => {
            Err(LinkError::Another { wanted: wanted.clone(), met: preface.sender })
        }
        _ => Ok((channel, preface)),
    }
}

/// Takes what a peer dialled: its handshake and its word.
///
/// # Errors
/// [`LinkError`], as [`dial`].
pub(crate) async fn accept<N: Net>(
    node: &Node<N>,
    stream: N::TcpStream,
) -> Result<(PeerChannel<N>, Preface), LinkError> {
    let identity = node.settings().identity.clone().ok_or(LinkError::NoIdentity)?;
    let (mut channel, chain) = tls::accept(stream, identity.server(), node.buffers.clone()).await?;
    let proven = identity.peer(&chain).map_err(|e| LinkError::Identity(e.to_string()))?;
    let preface = hear_preface(node, &mut channel, proven).await?;
    say_preface(node, &mut channel, preface.purpose).await?;
    Ok((channel, preface))
}

async fn say_preface<N: Net>(
    node: &Node<N>,
    channel: &mut PeerChannel<N>,
    purpose: Purpose,
) -> Result<(), LinkError> {
    let preface = Preface { version: frame::VERSION, purpose, sender: node.id.clone(), boot: node.boot };
    channel.send_message(Kind::Preface, 0, &preface)?;
    timeout(SEND_TIMEOUT, channel.flush()).await.map_err(|_| LinkError::Stuck)??;
    Ok(())
}

async fn hear_preface<N: Net>(
    node: &Node<N>,
    channel: &mut PeerChannel<N>,
    proven: RouterId,
) -> Result<Preface, LinkError> {
    let frame = timeout(PREFACE_TIMEOUT, channel.recv()).await.map_err(|_| LinkError::Silent)??;
    let (header, payload) = frame.ok_or(LinkError::Closed)?;
    if header.kind != Kind::Preface {
        return Err(LinkError::NoPreface);
    }
    let preface: Preface = frame::decode_payload(payload).map_err(|e| LinkError::Malformed(e.to_string()))?;
    if preface.version > frame::VERSION {
        return Err(LinkError::Version(preface.version));
    }
    if preface.sender != proven {
        return Err(LinkError::Liar { said: preface.sender, proven });
    }
    if preface.sender == node.id {
        return Err(LinkError::Ourselves(preface.sender));
    }
    Ok(preface)
}

/// Keeps a link to one address, for ever.
pub(crate) async fn keep<N: Net>(node: Arc<Node<N>>, address: String) {
    let mut pause = BACKOFF.0;
    let mut told = None;
    loop {
        match dial(&node, &address, Purpose::Link, None).await {
            Ok((channel, preface)) => {
                pause = BACKOFF.0;
                told = None;
                run(&node, channel, preface, Some(address.clone())).await;
            }
            Err(error) => {
                // The same reason again is no news.
                let reason = error.to_string();
                if told.as_ref() != Some(&reason) {
                    warn!(peer = %address, %reason, "a peer can't be reached; trying again");
                    told = Some(reason);
                }
            }
        }
        let jitter = Duration::from_millis(node.seed() % (pause.as_millis() as u64 / 2 + 1));
        sleep(pause + jitter).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

/// Resolves when the router ends.
async fn drained(draining: &mut watch::Receiver<bool>) {
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
        self.node.counters.links_active.dec();
        self.node.change(|table| table.link_down(self.id));
        self.peer.link_down(&self.node, self.id);
    }
}

/// Runs a link to its end.
pub(crate) async fn run<N: Net>(
    node: &Arc<Node<N>>,
    channel: PeerChannel<N>,
    preface: Preface,
    dialled: Option<String>,
) {
    let peer = node.peer(&preface.sender);
    let (ask, asked) = mpsc::channel(16);
    let id = node.next_id();
    let state = LinkState { ask, dialled: dialled.clone(), since: Instant::now() };
    peer.link_up(id, preface.boot, state);
    node.counters.links_active.inc();
    let place = Place { node: node.clone(), peer, id };
    info!(peer = %preface.sender, dialled = dialled.as_deref().unwrap_or("by the peer"), "link up");
    let link = Link { node, place: &place, channel, dialled, sent: BTreeMap::new() };
    let ended = link.converse(asked).await;
    match ended {
        Ok(()) => info!(peer = %preface.sender, "link closed"),
        Err(error) => warn!(peer = %preface.sender, %error, "link down"),
    }
}

struct Link<'a, N: Net> {
    node: &'a Arc<Node<N>>,
    place: &'a Place<N>,
    channel: PeerChannel<N>,
    dialled: Option<String>,
    /// What the peer was told.
    sent: BTreeMap<ServicePort, Offer>,
}

impl<N: Net> Link<'_, N> {
    async fn converse(mut self, mut asked: mpsc::Receiver<Ask>) -> Result<(), LinkError> {
        let node = self.node;
        let mut keepalive = Keepalive::new(Instant::now().into_std());
        let mut changed = node.changed.subscribe();
        let mut busy = self.place.peer.busy.subscribe();
        let mut draining = node.draining.subscribe();
        let lost = self.place.peer.lost(self.place.peer.epoch());
        let mut lost = std::pin::pin!(lost);
        self.tell_offers().await?;
        self.send(&LinkMessage::Synced).await?;
        loop {
            let now = Instant::now().into_std();
            keepalive.handle_busy(*busy.borrow_and_update() > 0, now);
            if keepalive.poll_ping(now) {
                self.send(&LinkMessage::Ping).await?;
            }
            if keepalive.is_dead(now) {
                return Err(LinkError::Dead);
            }
            tokio::select! {
                biased;
                frame = self.channel.recv() => {
                    let Some((header, payload)) = frame? else { return Ok(()) };
                    if header.kind != Kind::Message {
                        return Err(LinkError::Unexpected(header.kind));
                    }
                    let message = frame::decode_payload(payload);
                    keepalive.handle_received(Instant::now().into_std());
                    match message {
                        Ok(message) => self.handle(message).await?,
                        // A newer peer may say what this version does not know.
                        Err(error) => debug!(peer = %self.place.peer.id, %error, "a message is skipped"),
                    }
                }
                Ok(()) = changed.changed() => self.tell_offers().await?,
                Some(ask) = asked.recv() => {
                    let (flows, datagrams) = match ask {
                        Ask::Flows(n) => (n, 0),
                        Ask::Datagrams => (0, 1),
                    };
                    self.send(&LinkMessage::DialBack { flows, datagrams }).await?;
                }
                Ok(()) = busy.changed() => {}
                () = drained(&mut draining) => {
                    self.send(&LinkMessage::Goodbye).await?;
                    return Ok(());
                }
                () = &mut lost => return Ok(()),
                () = sleep_until(keepalive.poll_timeout().into()) => {}
            }
        }
    }

    async fn send(&mut self, message: &LinkMessage) -> Result<(), LinkError> {
        self.channel.send_message(Kind::Message, 0, message)?;
        timeout(SEND_TIMEOUT, self.channel.flush()).await.map_err(|_| LinkError::Stuck)??;
        Ok(())
    }

    /// Tells the peer what changed since it was told last.
    async fn tell_offers(&mut self) -> Result<(), LinkError> {
        let offers = self.node.routes().table.offers();
        if offers == self.sent {
            return Ok(());
        }
        for port in self.sent.keys().filter(|port| !offers.contains_key(*port)) {
            self.channel.send_message(Kind::Message, 0, &LinkMessage::Withdraw(port.clone()))?;
        }
        for (port, offer) in offers.iter().filter(|(port, offer)| self.sent.get(*port) != Some(*offer)) {
            match self.channel.send_message(Kind::Message, 0, &LinkMessage::Offer(offer.clone())) {
                Err(ChannelError::TooLong(_)) => {
                    warn!(%port, "an export with so many allow rules can't be offered")
                }
                sent => sent?,
            }
            if self.channel.is_full() {
                timeout(SEND_TIMEOUT, self.channel.flush()).await.map_err(|_| LinkError::Stuck)??;
            }
        }
        self.sent = offers;
        timeout(SEND_TIMEOUT, self.channel.flush()).await.map_err(|_| LinkError::Stuck)??;
        Ok(())
    }

    async fn handle(&mut self, message: LinkMessage) -> Result<(), LinkError> {
        let (peer, id) = (&self.place.peer.id, self.place.id);
        match message {
            LinkMessage::Offer(offer) => {
                debug!(%peer, port = %offer.port, "offered");
                if let Err(error) = self.node.change(|table| table.offer(peer, id, offer)) {
                    warn!(%error, "an offer is refused");
                }
            }
            LinkMessage::Withdraw(port) => {
                debug!(%peer, %port, "withdrawn");
                self.node.change(|table| table.withdraw(peer, id, &port));
            }
            LinkMessage::Synced => info!(%peer, "the peer has told all its exports"),
            LinkMessage::Ping => self.send(&LinkMessage::Pong).await?,
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
        let Some(address) = &self.dialled else {
            debug!(peer = %self.place.peer.id, "asks for a dial back on a link that it dialled");
            return;
        };
        let wanted =
            [(Purpose::FlowsBack, flows.min(MAX_DIAL_BACK)), (Purpose::DatagramsBack, datagrams.min(1))];
        for (purpose, n) in wanted {
            for _ in 0..n {
                let (node, peer, address) = (self.node.clone(), self.place.peer.id.clone(), address.clone());
                self.node.tasks.spawn(async move {
                    match dial(&node, &address, purpose, Some(&peer)).await {
                        Ok((channel, preface)) => {
                            inbound::serve(&node, channel, preface, purpose, true).await
                        }
                        Err(error) => debug!(%peer, %error, "a dial back failed"),
                    }
                });
            }
        }
    }
}
