//! The dialling and accepting of every connection to a peer, and the link that is kept to each address of the config.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rustls::pki_types::CertificateDer;
use servicekeel_core::flow::frame::{self, Kind, Preface, Purpose};
use servicekeel_core::mesh::NoLink;
use servicekeel_core::name::RouterId;
use servicekeel_runtime::net::{Net, Stream};
use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use crate::bounds::{Held, Owner};
use crate::identity::{Identity, PeerError, Untimely};
use crate::link;
use crate::node::Node;
use crate::peers::{Dialled, Distrust, Peer, Shown, Standing};
use crate::tls::{self, Channel, ChannelError, HandshakeError};

mod dial;

pub(crate) use dial::Dial;
use dial::REDIALLING;

/// How long a peer may take to accept a TCP connection: a name with two addresses has time for both.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(11);
/// How long one attempt is alone. The kernel sends a SYN again after 1, 3 and 7 s (RFC 6298), so that a path which came
/// back is found the later the longer it was away; and a path that forgets a connection swallows all that is sent on it,
/// in mid-handshake too. The next attempt finds out at once.
const STAGGER: Duration = Duration::from_millis(1500);
/// How long a peer may take to say who it is.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may take to accept what is sent.
pub(crate) const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// The first and the longest pause between dials of a peer that does not answer.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));
/// A link that lived for this long was a good one: the pauses start anew.
const GOOD_LINK: Duration = Duration::from_secs(5);

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
    Identity(PeerError),
    #[error("this router has no identity: set `identity` in its config")]
    NoIdentity,
    #[error("{0}")]
    Untimely(#[from] Untimely),
    #[error("sent nothing for {} s", PREFACE_TIMEOUT.as_secs())]
    Silent,
    #[error("closed before identifying itself")]
    Closed,
    #[error("does not start with a preface")]
    NoPreface,
    #[error("a malformed message: {0}")]
    Malformed(String),
    #[error("speaks version {0}; this router speaks {max} and older", max = frame::VERSION)]
    Version(u32),
    #[error("claims to be {said}, but its certificate says {proven}")]
    Liar { said: RouterId, proven: RouterId },
    #[error("is {met}, not {wanted}")]
    Another { wanted: RouterId, met: RouterId },
    #[error(
        "has this router's own name, {0}: it is this router itself, or another with a certificate of the same name"
    )]
    Ourselves(RouterId),
    #[error("{0}: as many of its routers are known here as may be beside others")]
    TooManyPeers(String),
    #[error("presents too many different certificates at once")]
    TooManyProofs,
    #[error("{0}")]
    Distrusted(#[from] Distrust),
    #[error("unexpected {0:?} frame")]
    Unexpected(Kind),
    #[error("accepted no data for {} s", SEND_TIMEOUT.as_secs())]
    Stuck,
    #[error("not responding")]
    Dead,
    #[error("out of file descriptors for flows")]
    Short,
    #[error("{0} holds {1} connections that carry no flow, as many as it may beside others")]
    Crowd(String, u64),
    #[error("did not answer on the link within 3 s")]
    Untaken,
    #[error("closed the link before it said a word: see the peer's log")]
    Unexplained,
    #[error("the peer rejected the link: {0}")]
    Rejected(NoLink),
    /// By this router.
    #[error("{0}")]
    NotTaken(NoLink),
}

impl LinkError {
    /// What is wrong with the peer's certificate, where it is that.
    pub(crate) fn certificate(&self) -> Option<&PeerError> {
        match self {
            Self::Handshake(HandshakeError::Certificate(error))
            | Self::Identity(error)
            | Self::Distrusted(Distrust::Certificate(error)) => Some(error),
            _ => None,
        }
    }

    /// What the other side is told of it, where it proved who it is and has to know.
    fn to_peer(&self) -> Option<NoLink> {
        match self {
            Self::TooManyPeers(_) | Self::TooManyProofs => Some(NoLink::TooManyRouters),
            Self::Crowd(..) | Self::Short => Some(NoLink::TooManyConnections),
            Self::Distrusted(_) => Some(NoLink::Distrusted),
            _ => None,
        }
    }

    /// What tells a reason from another: the same words, or the same fault of the same certificate, whenever that is.
    fn same_as(&self, earlier: &Self) -> bool {
        match (self.certificate(), earlier.certificate()) {
            (Some(one), Some(other)) => one.same_as(other),
            (None, None) => self.to_string() == earlier.to_string(),
            _ => false,
        }
    }

    /// Whether one of the two routers rejects what the other shows.
    fn is_rejection(&self) -> bool {
        self.is_alert() || self.certificate().is_some()
    }

    /// Whether the other side said by an alert that it rejects this one.
    pub(crate) fn is_alert(&self) -> bool {
        match self {
            Self::Handshake(error) => matches!(error, HandshakeError::Alert(_)),
            Self::Channel(error) => error.is_alert(),
            _ => false,
        }
    }

    /// Whether it is no matter of time: somebody has to change something here or there.
    fn is_lasting(&self) -> bool {
        match self {
            Self::Handshake(error) => match error {
                HandshakeError::Alert(_)
                | HandshakeError::Certificate(_)
                | HandshakeError::Tls(_)
                | HandshakeError::HttpRequest
                | HandshakeError::HttpAnswer
                | HandshakeError::NotTls(_)
                | HandshakeError::Protocol => true,
                HandshakeError::Timeout
                | HandshakeError::Io(_)
                | HandshakeError::Closed(_)
                | HandshakeError::TooLong
                | HandshakeError::Record(_) => false,
            },
            Self::Channel(error) => error.is_alert(),
            Self::Identity(_)
            | Self::NoIdentity
            | Self::Untimely(_)
            | Self::NoPreface
            | Self::Version(_)
            | Self::Liar { .. }
            | Self::Another { .. }
            | Self::Ourselves(_)
            | Self::Distrusted(_)
            | Self::Rejected(NoLink::Twin | NoLink::Distrusted)
            | Self::NotTaken(NoLink::Twin) => true,
            _ => false,
        }
    }
}

pub(crate) type PeerChannel<N> = Channel<<N as Net>::TcpStream>;

/// A connection to a peer that has proven who it is.
pub(crate) struct Met<N: Net> {
    pub(crate) channel: PeerChannel<N>,
    pub(crate) purpose: Purpose,
    pub(crate) boot: u64,
    pub(crate) peer: Arc<Peer<N>>,
    /// When that is lost, so is the connection.
    pub(crate) standing: Standing<N>,
    /// Of the connections that carry no flow; `None` where this side dialled it for itself.
    pub(crate) place: Option<Held>,
    /// The address of the other side.
    pub(crate) at: SocketAddr,
}

/// Dials a peer and says what for, by attempts that overlap: the first that comes to an end counts.
///
/// # Errors
/// [`LinkError`]: the network's, the handshake's, or a peer that is not whom it should be.
pub(crate) async fn dial<N: Net>(
    node: &Node<N>,
    address: &str,
    purpose: Purpose,
    wanted: Option<&RouterId>,
) -> Result<Met<N>, LinkError> {
    let mut attempts = FuturesUnordered::new();
    attempts.push(attempt(node, address, purpose, wanted));
    let met = loop {
        match timeout(STAGGER, attempts.next()).await {
            Ok(Some(met)) => break met,
            // None has met it yet, and there is one at least.
            Ok(None) | Err(_) => attempts.push(attempt(node, address, purpose, wanted)),
        }
    };
    if let (Err(error), Some(wanted)) = (&met, wanted)
        && error.is_rejection()
    {
        node.note_rejected(wanted, error.to_string());
    }
    met
}

/// One attempt of [`dial`].
async fn attempt<N: Net>(
    node: &Node<N>,
    address: &str,
    purpose: Purpose,
    wanted: Option<&RouterId>,
) -> Result<Met<N>, LinkError> {
    let identity = own(node)?;
    let stream = timeout(CONNECT_TIMEOUT, node.net.connect(address))
        .await
        .map_err(|_| LinkError::ConnectTimeout)??;
    let at = stream.peer_addr()?;
    let (mut channel, chain) = tls::connect(stream, identity.client(), node.buffers.clone()).await?;
    let (proven, shown) = prove(&identity, chain)?;
    // Told here, since the other side closes at the preface, without a word.
    if proven == node.id {
        return Err(LinkError::Ourselves(proven));
    }
    if let Err(error) = say_preface(node, &mut channel, purpose).await {
        // It has closed, perhaps with an alert that says why: the last step of a handshake is the other side's.
        let said = hear_preface(node, &mut channel, proven).await;
        return Err(said.err().filter(|said| said.is_lasting()).unwrap_or(error));
    }
    let preface = hear_preface(node, &mut channel, proven).await?;
    match wanted {
        Some(wanted) if *wanted != preface.sender => {
            Err(LinkError::Another { wanted: wanted.clone(), met: preface.sender })
        }
        _ => {
            let (peer, standing) = admit(node, shown, &preface, at)?;
            Ok(Met { channel, purpose, boot: preface.boot, peer, standing, place: None, at })
        }
    }
}

/// Takes what a peer dialled: its handshake and its word.
///
/// # Errors
/// [`LinkError`], as [`dial`].
pub(crate) async fn accept<N: Net>(
    node: &Node<N>,
    stream: N::TcpStream,
    from: SocketAddr,
) -> Result<Met<N>, LinkError> {
    // One that has expired is shown all the same: the other side finds that by its own clock, and says so to whoever looks
    // there. A connection that is closed without a word would say nothing.
    let identity = node.settings().identity.clone().ok_or(LinkError::NoIdentity)?;
    let accepted = tls::accept(stream, identity.server(), node.buffers.clone()).await;
    if let Some(untimely) = identity.untimely() {
        return Err(untimely.into());
    }
    let (mut channel, chain) = accepted?;
    let (proven, shown) = prove(&identity, chain)?;
    let preface = hear_preface(node, &mut channel, proven).await?;
    let purpose = preface.purpose;
    let owner = node.owner(&preface.sender);
    if purpose == Purpose::Flows && node.holds_back(&owner) {
        return Err(LinkError::Short);
    }
    let place = place(node, &owner);
    if place.is_ok() || purpose == Purpose::Link {
        say_preface(node, &mut channel, purpose).await?;
    }
    let place = match place {
        Ok(place) => place,
        Err(error) => return Err(turn_away(channel, purpose, error).await),
    };
    match admit(node, shown, &preface, from) {
        Ok((peer, standing)) => {
            Ok(Met { channel, purpose, boot: preface.boot, peer, standing, place: Some(place), at: from })
        }
        Err(error) => Err(turn_away(channel, purpose, error).await),
    }
}

/// Says why nothing comes of a connection that a router has made whose name is proven, where it listens to that.
async fn turn_away<S: Stream>(mut channel: Channel<S>, purpose: Purpose, error: LinkError) -> LinkError {
    if purpose == Purpose::Link
        && let Some(reason) = error.to_peer()
    {
        link::reject(&mut channel, reason).await;
    }
    error
}

/// What this router shows.
fn own<N: Net>(node: &Node<N>) -> Result<Arc<Identity>, LinkError> {
    let settings = node.settings();
    // The other side would refuse it, and say less.
    if let Some(untimely) = settings.untimely() {
        return Err(untimely.into());
    }
    settings.identity.clone().ok_or(LinkError::NoIdentity)
}

/// Whom certificates name, by the identity with which the handshake was made.
fn prove(identity: &Identity, chain: Vec<CertificateDer<'static>>) -> Result<(RouterId, Shown), LinkError> {
    let now = identity.now();
    let proven = identity.prove(&chain, now).map_err(LinkError::Identity)?;
    let shown = Shown::new(chain, now, &proven, identity);
    Ok((proven.id, shown))
}

/// Room for a connection that a peer wants.
///
/// # Errors
/// [`LinkError::Crowd`] where it has as many as it may, [`LinkError::Short`] where this router has fewer than it thought.
pub(crate) fn place<N: Net>(node: &Node<N>, owner: &Owner) -> Result<Held, LinkError> {
    if node.relieve() && node.connections.gives_back(owner) {
        return Err(LinkError::Short);
    }
    let place = node.connections.take(owner);
    place.ok_or_else(|| LinkError::Crowd(owner.of_whom(), node.connections.held_with(owner)))
}

/// The peer that has proven itself, and what its connection stands on.
fn admit<N: Net>(
    node: &Node<N>,
    shown: Shown,
    preface: &Preface,
    at: SocketAddr,
) -> Result<(Arc<Peer<N>>, Standing<N>), LinkError> {
    let peer = node
        .peer(&preface.sender)
        .ok_or_else(|| LinkError::TooManyPeers(node.owner(&preface.sender).of_whom()))?;
    let expires = shown.expires;
    let standing = peer.stand(shown).ok_or(LinkError::TooManyProofs)?;
    // By the settings of now, once it stands: whatever they no longer trust is either found here or cut off then.
    standing.judge(node.settings().identity.as_deref())?;
    if peer.note_accepted() {
        node.count_links();
    }
    node.proven(&peer.id, at.ip());
    node.note_end(expires);
    Ok((peer, standing))
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
        let began = Instant::now();
        let linked = match dial(&node, &address, Purpose::Link, None).await {
            Ok(met) => {
                let id = met.peer.id.clone();
                set(&node, &address, |dial| dial.met = Some(id));
                let dialled = Dialled { address: address.clone(), at: met.at.to_string() };
                let since = Instant::now();
                link::run(&node, met, Some(dialled)).await.map(|()| since.elapsed())
            }
            Err(error) => Err(error),
        };
        let rested = match linked {
            Ok(lived) => {
                set(&node, &address, |dial| dial.failed(REDIALLING.into(), false));
                if lived >= GOOD_LINK {
                    (told, pause) = (None, BACKOFF.0);
                    set(&node, &address, Dial::held);
                }
                Duration::ZERO
            }
            Err(error) => {
                node.relieve();
                let reason = error.to_string();
                let claimed = error.certificate().and_then(PeerError::claims);
                set(&node, &address, |dial| {
                    dial.failed(reason.clone(), error.is_lasting());
                    dial.claimed = claimed.cloned();
                });
                // The same reason again is no news.
                if !told.as_ref().is_some_and(|told| error.same_as(told)) {
                    warn!(peer = %address, %reason, "peer unreachable; retrying");
                }
                told = Some(error);
                // A dial that nobody answered was a pause for the peer too.
                began.elapsed()
            }
        };
        let jitter = Duration::from_millis(node.seed() % (pause.as_millis() as u64 / 2 + 1));
        sleep((pause + jitter).saturating_sub(rested).max(BACKOFF.0)).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

/// Notes for the status that a link by an address is up.
pub(crate) fn linked<N: Net>(node: &Node<N>, address: &str) {
    set(node, address, Dial::linked);
}

/// Notes for the status how it stands with an address, as long as it is dialled.
fn set<N: Net>(node: &Node<N>, address: &str, change: impl FnOnce(&mut Dial)) {
    if let Some(dial) = node.dials().get_mut(address) {
        change(dial);
    }
}
