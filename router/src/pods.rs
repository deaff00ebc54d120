//! Sidecars: each hands over the sockets of one pod, and takes them back.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::handoff::{self, MessageError, SocketId, ToRouter, ToSidecar};
use servicekeel_core::mesh::table::{Endpoint, EndpointId};
use servicekeel_core::name::{Protocol, ServicePort};
use servicekeel_runtime::net::{Descriptor, Handoff, HandoffListener, Net, PeerCredentials};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use crate::endpoint::PodPort;
use crate::node::Node;
use crate::stock::Stock;
use crate::tasks::AbortOnDrop;
use crate::{datagrams, imports};

/// How long a sidecar may take to read what it is told.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// The most bytes that a claim of a sidecar has in logs and the status.
const MAX_CLAIM: usize = 253;
/// How long a connection may take to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the sockets of a sidecar that went without a word are kept: it restarts.
const GRACE: Duration = Duration::from_secs(30);
/// How long the old sockets of a sidecar that came back stay beside its new ones.
const OVERLAP: Duration = Duration::from_secs(2);
/// The most sidecars at once, those included that are gone and whose sockets are kept.
const MAX_SIDECARS: usize = 4096;
/// The most addresses of one pod, which has one for each family and network.
const MAX_ADDRESSES: usize = 8;
/// The most imports, and the most exports, of one sidecar.
const MAX_SOCKETS: usize = 4096;

/// One pod, as its sidecar presents it.
pub(crate) struct Pod<N: Net> {
    /// The number of the conversation.
    pub(crate) session: u64,
    /// A claim, for logs and status.
    pub(crate) claim: handoff::Pod,
    pub(crate) credentials: PeerCredentials,
    /// Where its exports are dialled first.
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) stock: Stock<N::Descriptor>,
    /// How the conversation stands.
    pub(crate) state: watch::Sender<State>,
    pub(crate) imports: std::sync::Mutex<BTreeMap<SocketId, ServicePort>>,
}

/// How a conversation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// The sidecar is connected.
    Connected,
    /// It went without a word.
    Gone,
    /// The same pod's sidecar came back in another conversation.
    Superseded,
}

#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Message(#[from] MessageError),
    #[error("does not begin with Hello")]
    NoHello,
    #[error("says Hello twice")]
    SecondHello,
    #[error("speaks version {0} of the handoff; this router speaks {max} and older", max = handoff::VERSION)]
    Version(u32),
    #[error("said nothing for {} s", HELLO_TIMEOUT.as_secs())]
    Silent,
    #[error("hands over more than {MAX_SOCKETS} sockets")]
    TooMany,
    #[error("reads nothing for {} s", SEND_TIMEOUT.as_secs())]
    Stuck,
}

/// Counts a conversation, however it ends.
struct Conversing<N: Net>(Arc<Node<N>>);

impl<N: Net> Conversing<N> {
    fn new(node: Arc<Node<N>>) -> Self {
        node.counters.sidecars_active.inc();
        Self(node)
    }
}

impl<N: Net> Drop for Conversing<N> {
    fn drop(&mut self) {
        self.0.counters.sidecars_active.dec();
    }
}

/// Accepts sidecars for ever.
pub(crate) async fn serve<N: Net>(node: Arc<Node<N>>, listener: N::HandoffListener) {
    let (mut failing, mut full) = (false, false);
    loop {
        match listener.accept().await {
            Ok((conversation, credentials)) => {
                failing = false;
                // The gauge has those that have not said Hello yet, the table those that are gone.
                let conversing = usize::try_from(node.counters.sidecars_active.get()).unwrap_or(0);
                if conversing.max(node.pods().len()) >= MAX_SIDECARS {
                    if !std::mem::replace(&mut full, true) {
                        warn!(limit = MAX_SIDECARS, "sidecars are refused: the bound is reached");
                    }
                    node.counters.sidecars_refused.inc();
                    continue;
                }
                full = false;
                let counted = Conversing::new(node.clone());
                node.tasks.spawn(session(node.clone(), conversation, credentials, counted));
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    warn!(%error, "no sidecar can be accepted; trying again");
                }
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn session<N: Net>(
    node: Arc<Node<N>>,
    conversation: N::Handoff,
    credentials: PeerCredentials,
    counted: Conversing<N>,
) {
    let hello = timeout(HELLO_TIMEOUT, hello(&conversation)).await.unwrap_or(Err(SessionError::Silent));
    let (claim, addresses) = match hello {
        Ok(Some(hello)) => hello,
        Ok(None) => {
            debug!(?credentials, "a connection to the sidecars' socket closed before Hello");
            return;
        }
        Err(error) => {
            warn!(?credentials, %error, "a sidecar is refused");
            refuse(&conversation, error.to_string()).await;
            node.counters.sidecars_refused.inc();
            return;
        }
    };
    let pod = Arc::new(Pod {
        session: node.next_id(),
        claim,
        credentials,
        addresses,
        stock: Stock::new(),
        state: watch::Sender::new(State::Connected),
        imports: std::sync::Mutex::default(),
    });
    let name = format!("{}/{}", pod.claim.namespace, pod.claim.name);
    info!(pod = %name, ?credentials, "sidecar connected");
    supersede(&node, &pod);
    node.pods().insert(pod.session, pod.clone());
    let mut sockets =
        Sockets { node: node.clone(), pod: pod.clone(), imports: BTreeMap::new(), exports: BTreeMap::new() };

    let ended = converse(&node, &pod, &conversation, &mut sockets).await;
    drop(counted);
    pod.stock.close();
    if let Err(error) = &ended {
        warn!(pod = %name, %error, "the sidecar broke the conversation");
        node.counters.sidecars_refused.inc();
        refuse(&conversation, error.to_string()).await;
    }
    // What is kept is its sockets, not the conversation.
    drop(conversation);
    if matches!(ended, Ok(true)) {
        info!(pod = %name, "the pod ends");
    } else {
        info!(pod = %name, "sidecar gone; its sockets are kept for {} s", GRACE.as_secs());
        keep(&node, &pod).await;
    }
    drop(sockets);
}

/// Waits until the sockets of a sidecar that is gone are to be closed.
async fn keep<N: Net>(node: &Node<N>, pod: &Pod<N>) {
    let mut state = pod.state.subscribe();
    // Its next one may have come before its end was seen.
    let next = node.pods().values().any(|other| other.session > pod.session && same_pod(other, pod));
    pod.state.send_replace(if next { State::Superseded } else { State::Gone });
    // Either end is fine: the time is over, or the pod's next sidecar has come.
    let _ = timeout(GRACE, state.wait_for(|state| *state == State::Superseded)).await;
    if *pod.state.borrow() == State::Superseded {
        sleep(OVERLAP).await;
    }
}

/// A sidecar that came back takes its old place.
fn supersede<N: Net>(node: &Node<N>, pod: &Pod<N>) {
    for old in node.pods().values().filter(|old| same_pod(old, pod)) {
        old.state.send_if_modified(|state| {
            let gone = *state == State::Gone;
            if gone {
                *state = State::Superseded;
            }
            gone
        });
    }
}

/// The same uid of the pod by both words, and the same user by the kernel's.
fn same_pod<N: Net>(a: &Pod<N>, b: &Pod<N>) -> bool {
    !a.claim.uid.is_empty() && a.claim.uid == b.claim.uid && a.credentials.uid == b.credentials.uid
}

async fn hello<H: Handoff>(conversation: &H) -> Result<Option<(handoff::Pod, Vec<IpAddr>)>, SessionError> {
    let Some((bytes, descriptors)) = conversation.recv().await? else { return Ok(None) };
    match ToRouter::decode(&bytes, descriptors.len())? {
        ToRouter::Hello { version, .. } if version > handoff::VERSION => Err(SessionError::Version(version)),
        ToRouter::Hello { mut addresses, mut pod, .. } => {
            addresses.truncate(MAX_ADDRESSES);
            pod.name = shown(&pod.name);
            pod.uid = shown(&pod.uid);
            Ok(Some((pod, addresses)))
        }
        _ => Err(SessionError::NoHello),
    }
}

/// A claim as it may stand in a log: no line of its own, and not longer than a name.
fn shown(claim: &str) -> String {
    claim.chars().flat_map(char::escape_debug).take(MAX_CLAIM).collect()
}

/// Sends a message. A sidecar that reads nothing must not hold up what it sends itself.
async fn send<H: Handoff>(conversation: &H, message: &ToSidecar) -> Result<(), SessionError> {
    let sent = timeout(SEND_TIMEOUT, conversation.send(&message.encode(), Vec::new())).await;
    Ok(sent.map_err(|_| SessionError::Stuck)??)
}

async fn refuse<H: Handoff>(conversation: &H, reason: String) {
    let message = ToSidecar::Refused { id: None, reason }.encode();
    // The sidecar may be gone already, and its log has the other half of the story.
    let _ = timeout(Duration::from_secs(1), conversation.send(&message, Vec::new())).await;
}

/// Speaks with a sidecar until it closes; true where it said Bye.
async fn converse<N: Net>(
    node: &Arc<Node<N>>,
    pod: &Arc<Pod<N>>,
    conversation: &N::Handoff,
    sockets: &mut Sockets<N>,
) -> Result<bool, SessionError> {
    let welcome = ToSidecar::Welcome {
        version: handoff::VERSION,
        cluster: node.id.cluster.clone(),
        node: node.id.node.clone(),
    };
    send(conversation, &welcome).await?;
    loop {
        let (bytes, descriptors) = tokio::select! {
            biased;
            message = conversation.recv() => match message? {
                Some(message) => message,
                None => return Ok(false),
            },
            (tcp, udp) = pod.stock.poll_ask() => {
                send(conversation, &ToSidecar::More { tcp, udp }).await?;
                continue;
            }
        };
        match ToRouter::decode(&bytes, descriptors.len())? {
            ToRouter::Bye => return Ok(true),
            ToRouter::Hello { .. } => return Err(SessionError::SecondHello),
            message => {
                if let Some((id, reason)) = sockets.handle(message, descriptors)? {
                    warn!(pod = %pod.claim.name, id, %reason, "a socket of a sidecar is refused");
                    send(conversation, &ToSidecar::Refused { id: Some(id), reason }).await?;
                }
            }
        }
    }
}

/// What one sidecar handed over. Dropped, all of it is closed and withdrawn.
struct Sockets<N: Net> {
    node: Arc<Node<N>>,
    pod: Arc<Pod<N>>,
    imports: BTreeMap<SocketId, AbortOnDrop>,
    exports: BTreeMap<SocketId, EndpointId>,
}

impl<N: Net> Sockets<N> {
    /// Takes a message; says which socket is refused, and why, where one is.
    fn handle(
        &mut self,
        message: ToRouter,
        mut descriptors: Vec<N::Descriptor>,
    ) -> Result<Option<(SocketId, String)>, SessionError> {
        let wrong = message.descriptors().zip(&descriptors).find_map(|(kind, d)| d.check(kind).err());
        match message {
            ToRouter::Import { id, wanted } => {
                if let Some(error) = wrong {
                    return Ok(Some((id, error.to_string())));
                }
                if self.imports.len() >= MAX_SOCKETS && !self.imports.contains_key(&id) {
                    return Err(SessionError::TooMany);
                }
                let Some(descriptor) = descriptors.pop() else { return Ok(None) };
                if let Err(error) = self.import(id, wanted, descriptor) {
                    return Ok(Some((id, error.to_string())));
                }
            }
            ToRouter::Unimport { id } => {
                self.imports.remove(&id);
                self.pod.imports.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&id);
            }
            ToRouter::Export { id, offered, target, allow } => {
                if offered.service.cluster != self.node.id.cluster {
                    let (theirs, ours) = (&offered.service.cluster, &self.node.id.cluster);
                    return Ok(Some((
                        id,
                        format!("{offered} is of the cluster {theirs}; this router serves {ours}"),
                    )));
                }
                if self.exports.len() >= MAX_SOCKETS && !self.exports.contains_key(&id) {
                    return Err(SessionError::TooMany);
                }
                let endpoint = *self.exports.entry(id).or_insert_with(|| self.node.next_id());
                self.node.endpoints().insert(endpoint, Arc::new(PodPort::new(self.pod.clone(), target)));
                self.node
                    .change_exports(|table| table.add(endpoint, Endpoint { port: offered, target, allow }));
            }
            ToRouter::Unexport { id } => {
                if let Some(endpoint) = self.exports.remove(&id) {
                    self.withdraw(endpoint);
                }
            }
            ToRouter::Stock { tcp, .. } => {
                if let Some(error) = wrong {
                    return Err(error.into());
                }
                let udp = descriptors.split_off(usize::from(tcp).min(descriptors.len()));
                self.pod.stock.put(descriptors, udp);
            }
            ToRouter::Hello { .. } | ToRouter::Bye => {}
        }
        Ok(None)
    }

    fn import(
        &mut self,
        id: SocketId,
        wanted: ServicePort,
        descriptor: N::Descriptor,
    ) -> std::io::Result<()> {
        let task = match wanted.protocol {
            Protocol::Tcp => {
                let listener = self.node.net.adopt_listener(descriptor)?;
                self.node.tasks.spawn(imports::serve(self.node.clone(), listener, wanted.clone()))
            }
            Protocol::Udp => {
                let socket = self.node.net.adopt_udp(descriptor)?;
                self.node.tasks.spawn(datagrams::import::serve(self.node.clone(), socket, wanted.clone()))
            }
        };
        self.imports.insert(id, AbortOnDrop(task));
        self.pod.imports.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(id, wanted);
        Ok(())
    }

    fn withdraw(&self, endpoint: EndpointId) {
        self.node.endpoints().remove(&endpoint);
        self.node.change_exports(|table| table.remove(endpoint));
    }
}

impl<N: Net> Drop for Sockets<N> {
    fn drop(&mut self) {
        for endpoint in std::mem::take(&mut self.exports).into_values() {
            self.withdraw(endpoint);
        }
        self.pod.stock.close();
        self.node.pods().remove(&self.pod.session);
    }
}
