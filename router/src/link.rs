//! One link: the control connection between neighbours.

use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::flow::frame::{self, Header, Kind, PayloadError, Purpose};
use servicekeel_core::mesh::announce::{Announcer, Change};
use servicekeel_core::mesh::keepalive::Keepalive;
use servicekeel_core::mesh::table::{LinkId, OfferError};
use servicekeel_core::mesh::{LinkMessage, NoLink, Offer};
use servicekeel_runtime::latest;
use servicekeel_runtime::net::{Net, Stream};
use tokio::sync::mpsc;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{debug, info, warn};

use crate::inbound;
use crate::links::{self, LinkError, Met, PeerChannel};
use crate::node::Node;
use crate::peers::{Ask, Dialled, LinkState, MAX_DIALS, Peer, Standing};
use crate::tls::{Channel, ChannelError, Next};

/// How long changes of exports are gathered: what changes at once is looked at once.
const GATHER: Duration = Duration::from_millis(20);
/// The changes that are told before it is read again what the peer says.
const MAX_CHANGES: usize = 64;
/// How often a peer is told that not all of its offers are taken ...
const DECLINE: Duration = Duration::from_secs(30);
/// ... and how long one is given that has said so, before it is offered all once more.
const OFFER_AGAIN: Duration = Duration::from_secs(60);
/// How long the side that was dialled may take to say its first word: it may have to ask another router first.
const FIRST_WORD: Duration = Duration::from_secs(3);
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
    /// Nothing has ended it yet: dropped, it is this side that does, since nobody is to dial there any more.
    runs: bool,
}

impl<N: Net> Drop for Place<N> {
    fn drop(&mut self) {
        if self.runs {
            self.peer.note_end(
                "this router closed the link when its address was removed from the config's `peers`",
            );
        }
        self.node.link_down(self.id);
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
) -> Result<(), LinkError> {
    let Met { mut channel, peer, boot, at: met_at, mut standing, place: _connection, .. } = met;
    // The side that was dialled may not take it: what is not taken never was a link.
    let first = if dialled.is_some() { Some(first_word(&mut channel).await?) } else { None };
    let id = node.next_id();
    let (ask, asked) = mpsc::channel(16);
    let dead = peer.probe(boot).await;
    let state =
        LinkState { ask, dialled: dialled.clone(), with: met_at.ip(), since: Instant::now(), declined: None };
    match peer.link_up(id, boot, state, dead) {
        Ok(epoch) => standing.begins(epoch),
        Err(reason) => {
            node.counters.peers_refused.inc();
            let told = if reason == NoLink::Twin { &peer.twins } else { &node.refusals };
            if let Some(suppressed) = told.permit() {
                warn!(peer = %peer.id, at = %met_at, error = %reason, suppressed, "link rejected");
            }
            reject(&mut channel, reason).await;
            return Err(LinkError::NotTaken(reason));
        }
    }
    if let Some(Dialled { address, .. }) = &dialled {
        links::linked(node, address);
    }
    node.count_links();
    let mut place = Place { node: node.clone(), peer: peer.clone(), id, runs: true };
    let from = dialled.as_ref().map_or("by the peer", |dialled| &dialled.address);
    if let Some(suppressed) = peer.turns.permit() {
        info!(peer = %peer.id, dialled = from, suppressed, "link up");
    }
    let link = Link {
        node,
        place: &place,
        standing: &standing,
        channel,
        dialled,
        announcer: Announcer::default(),
        seen: 0,
        synced: false,
        said_goodbye: false,
        refusal_told: false,
        declined: None,
        offers_again: None,
        probing: false,
    };
    let ended = link.converse(first, asked).await;
    place.runs = false;
    // Others have their turn between the steps; nothing is left to do where the place is dropped.
    while node.change(|table| table.link_down(id)) {
        yield_now().await;
    }
    let told = peer.turns.permit();
    match ended {
        Ok(over) => {
            over.into_iter().for_each(|how| peer.note_end(how));
            if let Some(suppressed) = told {
                info!(peer = %peer.id, suppressed, "link closed");
            }
        }
        Err(error) => {
            if let Some(suppressed) = told {
                warn!(peer = %peer.id, %error, suppressed, "link down");
            }
            peer.note_end(format!("the link went down: {error}"));
            peer.link_broke();
        }
    }
    Ok(())
}

/// What the side that was dialled says first. It takes the link, unless that is [`LinkMessage::Rejected`]: what it exports
/// follows at once, or that this is nothing.
async fn first_word<S: Stream>(channel: &mut Channel<S>) -> Result<Event, LinkError> {
    let frame = timeout(FIRST_WORD, channel.recv()).await.map_err(|_| LinkError::Untaken)??;
    let (header, payload) = frame.ok_or(LinkError::Unexplained)?;
    match read(header, payload)? {
        Event::Message(LinkMessage::Rejected(reason)) => Err(LinkError::Rejected(reason)),
        event => Ok(event),
    }
}

/// Says why a link is not taken, or not kept. Where it does not go out, the peer finds out by itself.
pub(crate) async fn reject<S: Stream>(channel: &mut Channel<S>, reason: NoLink) {
    let last_word = async {
        channel.send_message(Kind::Message, 0, &LinkMessage::Rejected(reason))?;
        channel.close().await?;
        // What is closed with words unread is reset, and the reset may overtake this one.
        while channel.recv().await?.is_some() {}
        Ok::<_, ChannelError>(())
    };
    let _ = timeout(GOODBYE_TIMEOUT, last_word).await;
}

fn read(header: Header, payload: &[u8]) -> Result<Event, LinkError> {
    if header.kind != Kind::Message {
        return Err(LinkError::Unexpected(header.kind));
    }
    Ok(match frame::decode_payload(payload) {
        Ok(message) => Event::Message(message),
        Err(error) if error.is_unknown() => {
            debug!(%error, "message skipped");
            Event::Unknown
        }
        Err(error) => Event::Malformed(error),
    })
}

struct Link<'a, N: Net> {
    node: &'a Arc<Node<N>>,
    place: &'a Place<N>,
    standing: &'a Standing<N>,
    channel: PeerChannel<N>,
    dialled: Option<Dialled>,
    /// What goes out as fast as the peer takes it, while its own words are read: two routers with much to tell must not
    /// wait for one another.
    announcer: Announcer,
    /// The revision of this node's exports that the announcer knows.
    seen: u64,
    /// The peer was told that this was all at first.
    synced: bool,
    /// The peer said that it ends.
    said_goodbye: bool,
    refusal_told: bool,
    /// When the peer was last told that not all of its offers are taken.
    declined: Option<Instant>,
    /// When it is offered all once more.
    offers_again: Option<Instant>,
    /// It is asked whether the peer is alive.
    probing: bool,
}

/// What to do next.
enum Event {
    Message(LinkMessage),
    /// Of a newer peer.
    Unknown,
    /// Something that is no message.
    Malformed(PayloadError),
    Flushed,
    Closed,
    Exports,
    Ask(Ask),
    Ends,
    Lost,
    Timer,
}

impl<N: Net> Link<'_, N> {
    /// Goes on after the `first` word of the peer, where that was heard already. Ok: how it ended, where that is not told
    /// elsewhere.
    async fn converse(
        mut self,
        mut first: Option<Event>,
        mut asked: mpsc::Receiver<Ask>,
    ) -> Result<Option<&'static str>, LinkError> {
        let node = self.node;
        let mut keepalive = Keepalive::new(Instant::now().into_std());
        // Who waits for what the peer is about to tell does not use it yet.
        keepalive.handle_use(Instant::now().into_std());
        let mut exports = node.exports.subscribe();
        let mut uses = self.place.peer.activity.watch();
        let mut draining = node.draining.subscribe();
        let lost = self.standing.lost();
        let mut lost = std::pin::pin!(lost);
        self.look_at_exports();
        let mut gathered: Option<Instant> = None;
        let mut suspected = false;
        loop {
            uses.tell(&mut keepalive);
            let now = Instant::now().into_std();
            if keepalive.poll_ping(now) {
                self.put(&LinkMessage::Ping)?;
            }
            // This task may have waited for its own turn: what has come meanwhile is read before the verdict.
            let dead = keepalive.is_dead(now);
            if dead && suspected {
                return Err(LinkError::Dead);
            }
            suspected = dead;
            if suspected {
                yield_now().await;
            }
            if gathered.is_some_and(|when| when.into_std() <= now) {
                gathered = None;
                self.look_at_exports();
            }
            if self.put_changes()? {
                // Others have their turn, and what the peer says is looked for.
                yield_now().await;
            }
            let timers =
                [Some(keepalive.poll_timeout()), gathered.map(Instant::into_std), self.next_change()];
            let timer = timers.into_iter().flatten().min().unwrap_or(now);
            let event = tokio::select! {
                biased;
                Some(event) = std::future::ready(first.take()) => event,
                next = self.channel.next() => match next? {
                    Next::Frame(header, payload) => read(header, payload)?,
                    Next::Flushed => Event::Flushed,
                    Next::Closed => Event::Closed,
                },
                Ok(()) = exports.changed(), if gathered.is_none() => Event::Exports,
                Some(ask) = asked.recv() => Event::Ask(ask),
                () = uses.resumed() => Event::Timer,
                () = drained(&mut draining) => Event::Ends,
                () = &mut lost => Event::Lost,
                () = sleep_until(timer.into()) => Event::Timer,
            };
            match event {
                Event::Message(message) => {
                    keepalive.handle_received(Instant::now().into_std());
                    self.handle(message)?;
                }
                Event::Unknown => keepalive.handle_received(Instant::now().into_std()),
                Event::Malformed(error) => {
                    keepalive.handle_received(Instant::now().into_std());
                    self.refuse(&error);
                }
                Event::Exports => gathered = Some(Instant::now() + GATHER),
                Event::Ask(ask) => {
                    let message = match ask {
                        Ask::Flows(flows) => LinkMessage::DialBack { flows, datagrams: 0 },
                        Ask::Datagrams => LinkMessage::DialBack { flows: 0, datagrams: 1 },
                        Ask::Probe => {
                            // One that says that it ends is as good as gone.
                            self.probing = !self.said_goodbye;
                            LinkMessage::Ping
                        }
                    };
                    self.put(&message)?;
                }
                Event::Ends => {
                    self.put(&LinkMessage::Goodbye)?;
                    // Where it does not go out, the peer finds out by itself.
                    let _ = timeout(GOODBYE_TIMEOUT, self.channel.close()).await;
                    return Ok(None);
                }
                Event::Closed if self.said_goodbye => return Ok(Some("it was shut down")),
                Event::Closed => return Ok(Some("it closed the link")),
                Event::Lost => {
                    if self.standing.is_distrusted() {
                        // The link is over at once, whether the peer reads this or not.
                        let mut channel = self.channel;
                        let last_word = async move { reject(&mut channel, NoLink::Distrusted).await };
                        node.tasks.spawn(last_word);
                    }
                    return Ok(None);
                }
                Event::Flushed | Event::Timer => {}
            }
        }
    }

    /// Puts a message to what is sent.
    fn put(&mut self, message: &LinkMessage) -> Result<(), LinkError> {
        Ok(self.channel.send_message(Kind::Message, 0, message)?)
    }

    /// When there is a change to tell; `None` where there is none, or the peer has to take others first.
    fn next_change(&self) -> Option<std::time::Instant> {
        if self.channel.is_full() { None } else { self.announcer.poll_timeout() }
    }

    /// Puts what is to be told, up to a bound; says whether there may be more.
    fn put_changes(&mut self) -> Result<bool, LinkError> {
        let cluster = &self.place.peer.id.cluster;
        let now = Instant::now().into_std();
        for _ in 0..MAX_CHANGES {
            if self.channel.is_full() {
                return Ok(false);
            }
            let change = {
                let routes = self.node.routes();
                self.announcer.poll(now, |port| routes.table.is_open_to(port, cluster))
            };
            let message = match change {
                // Who else may use it is nothing to the peer.
                Some(Change::Offer(port)) => LinkMessage::Offer(Offer { port, allow: None }),
                Some(Change::Withdraw(port)) => LinkMessage::Withdraw(port),
                None if self.synced => return Ok(false),
                None => {
                    self.synced = true;
                    LinkMessage::Synced
                }
            };
            self.put(&message)?;
        }
        Ok(true)
    }

    /// Has the announcer look at what has changed of this node's exports.
    fn look_at_exports(&mut self) {
        let routes = self.node.routes();
        let now = Instant::now().into_std();
        match routes.table.changed_since(self.seen) {
            Some(changed) => changed.for_each(|port| self.announcer.handle_changed(port.clone(), now)),
            None => {
                let all: Vec<_> = routes.table.exported().chain(self.announcer.told()).cloned().collect();
                all.into_iter().for_each(|port| self.announcer.handle_changed(port, now));
            }
        }
        self.seen = routes.table.exports_revision();
    }

    /// Says, once, that something of the peer is not taken.
    fn refuse(&mut self, error: &dyn std::fmt::Display) {
        if !std::mem::replace(&mut self.refusal_told, true)
            && let Some(suppressed) = self.place.peer.words.permit()
        {
            warn!(peer = %self.place.peer.id, %error, suppressed, "offer rejected; further rejections on this link are not logged");
        }
    }

    /// Tells the peer that an offer is not taken, and whoever looks at the status.
    fn decline(&mut self, error: &OfferError) -> Result<(), LinkError> {
        self.refuse(error);
        self.node.counters.offers_rejected.inc();
        let now = Instant::now();
        if self.declined.is_some_and(|last| now - last < DECLINE) {
            return Ok(());
        }
        self.declined = Some(now);
        let peer = &self.place.peer;
        peer.note_declined(self.place.id, format!("not all offers of {} are taken: {error}", peer.id));
        self.put(&LinkMessage::Declined { reason: error.to_string() })
    }

    /// The peer does not take all that it is offered.
    fn declined(&mut self, reason: &str) {
        let (peer, now) = (&self.place.peer, Instant::now());
        if self.offers_again.is_some_and(|when| now < when) {
            return;
        }
        if self.offers_again.is_none()
            && let Some(suppressed) = peer.words.permit()
        {
            warn!(peer = %peer.id, %reason, suppressed, "the peer does not take all offers of this router; offering them again from time to time");
        }
        peer.note_declined(
            self.place.id,
            format!("{} does not take all offers of this router: {reason}", peer.id),
        );
        let when = now + OFFER_AGAIN;
        self.offers_again = Some(when);
        self.announcer.handle_declined(when.into_std());
    }

    fn handle(&mut self, message: LinkMessage) -> Result<(), LinkError> {
        let (peer, id) = (&self.place.peer.id, self.place.id);
        match message {
            LinkMessage::Offer(offer) => {
                debug!(%peer, port = %offer.port, "offered");
                let open = offer.is_open_to(&self.node.id.cluster);
                let taken = self.node.change(|table| {
                    if open {
                        return table.offer(peer, id, offer.port);
                    }
                    // Of a peer of an earlier version, which tells what is not for this cluster too.
                    table.withdraw(peer, id, &offer.port);
                    Ok(())
                });
                if let Err(error) = taken {
                    self.decline(&error)?;
                }
            }
            LinkMessage::Withdraw(port) => {
                debug!(%peer, %port, "withdrawn");
                self.node.change(|table| table.withdraw(peer, id, &port));
            }
            LinkMessage::Declined { reason } => self.declined(&reason),
            LinkMessage::Synced => {
                if let Some(suppressed) = self.place.peer.words.permit() {
                    info!(%peer, suppressed, "exports synced");
                }
            }
            LinkMessage::Ping => self.put(&LinkMessage::Pong)?,
            LinkMessage::Pong => {
                if std::mem::take(&mut self.probing) {
                    self.place.peer.answered();
                }
            }
            LinkMessage::Rejected(reason) => return Err(LinkError::Rejected(reason)),
            LinkMessage::DialBack { flows, datagrams } => self.dial_back(flows, datagrams),
            LinkMessage::Goodbye => {
                if let Some(suppressed) = self.place.peer.words.permit() {
                    info!(%peer, suppressed, "peer is shutting down");
                }
                self.said_goodbye = true;
                self.node.link_down(id);
            }
        }
        Ok(())
    }

    fn dial_back(&self, flows: u16, datagrams: u16) {
        let peer = &self.place.peer;
        let Some(Dialled { at, .. }) = &self.dialled else {
            debug!(peer = %peer.id, "dial-back requested on a link that the peer dialled");
            return;
        };
        let wanted = [
            (Purpose::FlowsBack, usize::from(flows).min(MAX_DIALS)),
            (Purpose::DatagramsBack, datagrams.min(1).into()),
        ];
        for (purpose, n) in wanted {
            for _ in 0..n {
                if self.node.holds_back(&peer.holder) {
                    debug!(peer = %peer.id, "out of file descriptors for a dial-back");
                    return;
                }
                let Ok(permit) = peer.dial_backs.clone().try_acquire_owned() else {
                    debug!(peer = %peer.id, "too many dial-backs requested");
                    return;
                };
                let place = match links::place(self.node, &peer.holder) {
                    Ok(place) => place,
                    Err(error) => {
                        debug!(peer = %peer.id, %error, "no dial-back");
                        return;
                    }
                };
                let (node, peer, at) = (self.node.clone(), peer.id.clone(), at.clone());
                self.node.tasks.spawn(async move {
                    let dialled = links::dial(&node, &at, purpose, Some(&peer)).await;
                    drop(permit);
                    match dialled {
                        Ok(met) => inbound::serve(&node, Met { place: Some(place), ..met }, true).await,
                        Err(error) => debug!(%peer, %error, "dial-back failed"),
                    }
                });
            }
        }
    }
}
