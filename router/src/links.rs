//! The dialling and accepting of every connection to a peer, and the link that is kept to each address of the config.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rustls::pki_types::{CertificateDer, UnixTime};
use servicekeel_core::flow::frame::{self, Kind, Preface, Purpose};
use servicekeel_core::name::RouterId;
use servicekeel_runtime::net::{Net, Stream};
use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use crate::identity::{Identity, Untimely};
use crate::link;
use crate::node::Node;
use crate::peers::{Dialled, Distrust, Peer, Standing};
use crate::tls::{self, Channel, ChannelError, HandshakeError};

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
    Identity(String),
    #[error("this router has no identity: set `identity` in its config")]
    NoIdentity,
    #[error("{0}")]
    Untimely(#[from] Untimely),
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
    #[error(
        "has this router's own name, {0}: it is this router itself, or one with a certificate of its name"
    )]
    Ourselves(RouterId),
    #[error("this router knows as many peers as it may")]
    TooManyPeers,
    #[error("shows more different certificates at once than a router needs")]
    TooManyProofs,
    #[error("{0}")]
    Distrusted(#[from] Distrust),
    #[error("sends {0:?} frames where none belong")]
    Unexpected(Kind),
    #[error("takes nothing for {} s", SEND_TIMEOUT.as_secs())]
    Stuck,
    #[error("does not answer")]
    Dead,
    #[error("this router has no descriptor left for flows")]
    Short,
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
    loop {
        match timeout(STAGGER, attempts.next()).await {
            Ok(Some(met)) => return met,
            // None has met it yet, and there is one at least.
            Ok(None) | Err(_) => attempts.push(attempt(node, address, purpose, wanted)),
        }
    }
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
    say_preface(node, &mut channel, purpose).await?;
    let preface = hear_preface(node, &mut channel, proven).await?;
    match wanted {
        Some(wanted) if *wanted != preface.sender => {
            Err(LinkError::Another { wanted: wanted.clone(), met: preface.sender })
        }
        _ => meet(node, channel, shown, preface, purpose, at),
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
    let identity = own(node)?;
    let (mut channel, chain) = tls::accept(stream, identity.server(), node.buffers.clone()).await?;
    let (proven, shown) = prove(&identity, chain)?;
    let preface = hear_preface(node, &mut channel, proven).await?;
    let purpose = preface.purpose;
    if purpose == Purpose::Flows && node.is_crowded() {
        return Err(LinkError::Short);
    }
    say_preface(node, &mut channel, purpose).await?;
    meet(node, channel, shown, preface, purpose, from)
}

/// Whom certificates name, by the identity with which the handshake was made.
/// What this router shows.
fn own<N: Net>(node: &Node<N>) -> Result<Arc<Identity>, LinkError> {
    let settings = node.settings();
    // The other side would refuse it, and say less.
    if let Some(untimely) = settings.untimely() {
        return Err(untimely.into());
    }
    settings.identity.clone().ok_or(LinkError::NoIdentity)
}

fn prove(identity: &Identity, chain: Vec<CertificateDer<'static>>) -> Result<(RouterId, Shown), LinkError> {
    let now = identity.now();
    let proven = identity.peer_at(&chain, now).map_err(|e| LinkError::Identity(e.to_string()))?;
    Ok((proven, (chain, now)))
}

/// The certificates that a peer has shown, and when they were found valid.
type Shown = (Vec<CertificateDer<'static>>, UnixTime);

fn meet<N: Net>(
    node: &Node<N>,
    channel: PeerChannel<N>,
    (chain, proven_at): Shown,
    preface: Preface,
    purpose: Purpose,
    at: SocketAddr,
) -> Result<Met<N>, LinkError> {
    let peer = node.peer(&preface.sender).ok_or(LinkError::TooManyPeers)?;
    let standing = peer.stand(chain, proven_at).ok_or(LinkError::TooManyProofs)?;
    // By the settings of now, once it stands: whatever they no longer trust is either found here or cut off then.
    standing.judge(node.settings().identity.as_deref())?;
    node.proven(&peer.id, at.ip());
    Ok(Met { channel, purpose, boot: preface.boot, peer, standing, at })
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
        let rested = match dial(&node, &address, Purpose::Link, None).await {
            Ok(met) => {
                told = None;
                set_problem(&node, &address, None);
                let since = Instant::now();
                let dialled = Dialled { address: address.clone(), at: met.at.to_string() };
                let problem = match link::run(&node, met, Some(dialled)).await {
                    Ok(()) => "the link went down; dialling again".into(),
                    Err(refused) => refused.to_string(),
                };
                set_problem(&node, &address, Some(problem));
                if since.elapsed() >= GOOD_LINK {
                    pause = BACKOFF.0;
                }
                Duration::ZERO
            }
            Err(error) => {
                node.relieve();
                let reason = error.to_string();
                set_problem(&node, &address, Some(reason.clone()));
                // The same reason again is no news.
                if told.as_ref() != Some(&reason) {
                    warn!(peer = %address, %reason, "peer unreachable; retrying");
                    told = Some(reason);
                }
                // A dial that nobody answered was a pause for the peer too.
                began.elapsed()
            }
        };
        let jitter = Duration::from_millis(node.seed() % (pause.as_millis() as u64 / 2 + 1));
        sleep((pause + jitter).saturating_sub(rested).max(BACKOFF.0)).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

/// Notes for the status how it stands with an address, as long as it is dialled.
fn set_problem<N: Net>(node: &Node<N>, address: &str, problem: Option<String>) {
    if let Some(entry) = node.dials().get_mut(address) {
        *entry = problem;
    }
}
