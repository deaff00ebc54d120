//! Sidecars: each hands over the sockets of one pod, and takes them back.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use servicekeel_core::handoff::{self, MessageError, SocketId, ToRouter, ToSidecar};
use servicekeel_runtime::latest;
use servicekeel_runtime::net::{
    Handoff, HandoffListener, NamespaceCookie, Net, PeerCredentials, Place, Places, PodThread,
};
use servicekeel_runtime::throttle::Throttle;
use tokio::task::yield_now;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use crate::bounds::{Bound, Full, Owner, Party};
use crate::datagrams::outlet::Outlet;
use crate::node::Node;
use crate::sockets::{MAX_SOCKETS, Served, Sockets};
use crate::stock::{Stock, Stocked};
use crate::successor::{self, GRACE};

/// How long a sidecar may take to read what it is told.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// So many lines about the sockets of one conversation are logged at once ...
const LINES: u32 = 32;
/// ... and one more in this time.
const LINE: Duration = Duration::from_secs(2);
/// So many refused sockets of one conversation the log has, each once: the sidecar asks again, and tells all of them.
const TOLD: usize = 32;
/// The most characters that a claim of a sidecar has in logs and the status.
const MAX_CLAIM: usize = 253;
/// How long a connection may take to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// The most addresses of one pod, which has one for each family and network.
const MAX_ADDRESSES: usize = 8;

/// One pod, as its sidecar presents it.
pub(crate) struct Pod<N: Net> {
    /// The number of the conversation.
    pub(crate) session: u64,
    /// A claim, for logs and status.
    pub(crate) claim: handoff::Pod,
    pub(crate) credentials: PeerCredentials,
    /// Where its sockets are used.
    pub(crate) thread: N::Thread,
    /// Where its exports are dialled first.
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) stock: Stock<Stocked<N::Descriptor>>,
    /// In whose name its sockets and flows are.
    pub(crate) party: Arc<Party>,
    /// How the conversation stands.
    pub(crate) state: latest::Sender<State>,
    /// Of its sockets, once the first one came; never where the kernel does not say it.
    pub(crate) namespace: OnceLock<NamespaceCookie>,
    imports: Mutex<BTreeMap<SocketId, Served>>,
    /// To its exports, by UDP.
    outlet: OnceLock<Outlet<N>>,
}

impl<N: Net> Pod<N> {
    pub(crate) fn imports(&self) -> MutexGuard<'_, BTreeMap<SocketId, Served>> {
        self.imports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The way to the UDP sockets that its exports are asked by.
    pub(crate) fn outlet(&self, node: &Node<N>) -> Outlet<N> {
        self.outlet.get_or_init(|| Outlet::new(node, &self.thread)).clone()
    }
}

/// How a conversation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// The sidecar is connected.
    Connected,
    /// It is gone, with a word or without.
    Gone,
    /// The same pod's sidecar came back in another conversation.
    Superseded,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Message(#[from] MessageError),
    #[error("does not start with Hello")]
    NoHello,
    #[error("sent Hello twice")]
    SecondHello,
    #[error("speaks version {0} of the handoff; this router speaks {max} and older", max = handoff::VERSION)]
    Version(u32),
    #[error("sent nothing for {} s", HELLO_TIMEOUT.as_secs())]
    Silent,
    #[error("handed over more than {MAX_SOCKETS} sockets")]
    TooMany,
    #[error("read nothing for {} s", SEND_TIMEOUT.as_secs())]
    Stuck,
}

impl SessionError {
    /// Whether it is this router that is short of something.
    fn is_shortage(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == std::io::ErrorKind::QuotaExceeded)
    }
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

/// Why a conversation gets no thread.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum NoSeat {
    #[error("its network namespace has {0} conversations with this router, as many as it may beside others")]
    OfOwner(u64),
    #[error(
        "all places for conversations are taken, {0} beside those that are kept for restarts, by the limits of open files and threads: whoever is there keeps its own"
    )]
    Any(u64),
}

impl NoSeat {
    /// Of an owner that was refused one.
    fn of(seats: &Bound, owner: &Owner) -> Self {
        match seats.full(owner) {
            Full::All(total) => Self::Any(total),
            _ => Self::OfOwner(seats.held(owner)),
        }
    }
}

/// In whose name a conversation is.
fn owner<N: Net>(node: &Node<N>, credentials: PeerCredentials) -> Owner {
    match (credentials.network, credentials.pid) {
        (Some(NamespaceCookie(number)), _) => Owner::Namespace(number),
        // Those of other process namespaces have no number here and can't be told apart.
        (None, 0) => Owner::Conversation(node.next_id()),
        (None, pid) => Owner::Process(pid),
    }
}

/// Gives a conversation a thread. Where there is none to be had, whoever has many is refused, and others share one: who
/// else has threads is not known, where they are of the same user or of a cgroup that is not seen.
fn with_thread<N: Net>(node: &Arc<Node<N>>, conversation: N::Handoff, owner: &Owner) -> Option<N::Handoff> {
    let (threads, sockets, pod) = (node.threads.clone(), node.sockets.clone(), owner.clone());
    let places: Places = Arc::new(move |place| {
        let held = match place {
            Place::Thread => threads.take(&pod)?,
            Place::Closing => sockets.owe(&pod),
        };
        Some(Box::new(held) as Box<dyn Any + Send>)
    });
    let (conversation, error) = match conversation.with_own_thread(places.clone()) {
        Ok(conversation) => return Some(conversation),
        Err(failed) => failed,
    };
    let shares = node.sidecars.is_modest(owner);
    if let Some(suppressed) = node.shortage.permit() {
        let outcome = if shares { "it shares one with others" } else { "cannot serve it; it will reconnect" };
        let hint = match error.kind() {
            std::io::ErrorKind::WouldBlock => "; raise the limits of threads (ulimit -u, pids.max, TasksMax)",
            _ => "",
        };
        warn!(%error, suppressed, "no thread for a sidecar: {outcome}{hint}");
    }
    node.relieve();
    shares.then(|| conversation.with_shared_thread(places))
}

/// Accepts sidecars for ever.
pub(crate) async fn serve<N: Net>(node: Arc<Node<N>>, listener: N::HandoffListener) {
    let mut failing = false;
    loop {
        match listener.accept().await {
            Ok((conversation, credentials)) => {
                failing = false;
                let owner = owner(&node, credentials);
                match node.sidecars.take(&owner) {
                    Some(seat) => {
                        if let Some(conversation) = with_thread(&node, conversation, &owner) {
                            let thread = conversation.thread();
                            // What blocks there keeps the seat, so that it is the pod that runs out of them.
                            thread.hold(seat);
                            let counted = Conversing::new(node.clone());
                            let session = session(node.clone(), conversation, credentials, owner, counted);
                            node.tasks.spawn_on(&thread, session);
                        }
                    }
                    None => {
                        let error = NoSeat::of(&node.sidecars, &owner);
                        if let Some(suppressed) = node.refusals.permit() {
                            warn!(pid = credentials.pid, uid = credentials.uid, %error, suppressed, "sidecar rejected");
                        }
                        node.counters.sidecars_refused.inc();
                        node.tasks.spawn_on(&conversation.thread(), async move {
                            refuse(&conversation, error.to_string()).await;
                        });
                    }
                }
                // However many come, the links and flows have their turn between two of them.
                yield_now().await;
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    warn!(%error, "cannot accept sidecars; retrying");
                }
                node.relieve();
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Speaks with one sidecar, on its thread: what comes from it may be closed at any moment.
async fn session<N: Net>(
    node: Arc<Node<N>>,
    conversation: N::Handoff,
    credentials: PeerCredentials,
    owner: Owner,
    counted: Conversing<N>,
) {
    let hello = timeout(HELLO_TIMEOUT, hello(&conversation)).await.unwrap_or(Err(SessionError::Silent));
    let (claim, addresses) = match hello {
        Ok(Some(hello)) => hello,
        Ok(None) => {
            debug!(
                pid = credentials.pid,
                uid = credentials.uid,
                "a connection to the sidecars' socket closed before Hello"
            );
            return;
        }
        Err(error) => {
            if let Some(suppressed) = node.refusals.permit() {
                warn!(pid = credentials.pid, uid = credentials.uid, %error, suppressed, "sidecar rejected");
            }
            refuse(&conversation, error.to_string()).await;
            node.counters.sidecars_refused.inc();
            return;
        }
    };
    let log = Arc::new(Throttle::new(LINES, LINE).under(&node.pods_log));
    let pod = Arc::new(Pod {
        session: node.next_id(),
        claim,
        credentials,
        thread: conversation.thread(),
        addresses,
        stock: Stock::new(node.limits.stock),
        party: Party::new(owner, &node.rooms, log),
        state: latest::Sender::new(State::Connected),
        namespace: OnceLock::new(),
        imports: Mutex::default(),
        outlet: OnceLock::new(),
    });
    let name = format!("{}/{}", pod.claim.namespace, pod.claim.name);
    let told = node.arrivals.permit();
    if let Some(suppressed) = told {
        info!(pod = %name, pid = credentials.pid, uid = credentials.uid, suppressed, "sidecar connected");
    }
    successor::begin(&node, &pod);
    let mut sockets = Sockets::new(node.clone(), pod.clone());

    let ended = converse(&node, &pod, &conversation, &mut sockets).await;
    drop(counted);
    pod.stock.close();
    if let Err(error) = &ended
        && error.is_shortage()
    {
        // Not refused, the sidecar comes back soon.
        if let Some(suppressed) = node.shortage.permit() {
            warn!(pod = %name, %error, suppressed, "out of file descriptors for a sidecar's sockets; it will reconnect");
        }
    } else if let Err(error) = &ended {
        if let Some(suppressed) = node.refusals.permit() {
            warn!(pod = %name, %error, suppressed, "sidecar violated the protocol; disconnected");
        }
        node.counters.sidecars_refused.inc();
        refuse(&conversation, error.to_string()).await;
    }
    // What is kept is its sockets, not the conversation.
    drop(conversation);
    if matches!(ended, Ok(true)) {
        sockets.withdraw_all();
    }
    let (kept, said_nothing) = (!sockets.is_empty(), !matches!(ended, Ok(true)));
    // The end is told where the beginning was.
    if told.is_some() {
        match ended {
            Ok(true) if kept => info!(
                pod = %name,
                "sidecar shut down; exports withdrawn, imports served for another {} s",
                GRACE.as_secs()
            ),
            Ok(true) => info!(pod = %name, "sidecar shut down; exports withdrawn"),
            _ if kept => warn!(
                pod = %name,
                imports = pod.imports().len(),
                exports = sockets.exports(),
                "sidecar disconnected unexpectedly; its imports and exports are served for another {} s, and longer only \
                 if it reconnects",
                GRACE.as_secs()
            ),
            _ => info!(pod = %name, "sidecar disconnected; it had handed over no sockets"),
        }
    }
    if kept {
        let (imports, exports) = (pod.imports().len(), sockets.exports());
        let is_back = successor::keep(&node, &pod, &mut sockets, said_nothing).await;
        if said_nothing && !is_back {
            node.counters.sidecars_lost.inc();
            if told.is_some() {
                warn!(
                    pod = %name,
                    imports,
                    exports,
                    "sidecar did not reconnect within {} s; connections to its imports are refused and its exports are \
                     withdrawn until it does",
                    GRACE.as_secs()
                );
            }
        }
    }
    drop(sockets);
}

async fn hello<H: Handoff>(conversation: &H) -> Result<Option<(handoff::Pod, Vec<IpAddr>)>, SessionError> {
    let Some(bytes) = conversation.peek().await? else { return Ok(None) };
    let hello = ToRouter::decode(&bytes)?;
    take(conversation, 0, 0)?;
    match hello {
        ToRouter::Hello { version, .. } if version > handoff::VERSION => Err(SessionError::Version(version)),
        ToRouter::Hello { mut addresses, mut pod, .. } => {
            addresses.truncate(MAX_ADDRESSES);
            addresses.shrink_to_fit();
            pod.name = cut(&pod.name);
            pod.uid = cut(&pod.uid);
            Ok(Some((pod, addresses)))
        }
        _ => Err(SessionError::NoHello),
    }
}

/// A claim, not longer than a name. What else makes it fit for a log was done where it was decoded.
fn cut(claim: &str) -> String {
    claim.chars().take(MAX_CLAIM).collect()
}

async fn refuse<H: Handoff>(conversation: &H, reason: String) {
    let message = ToSidecar::Refused { id: None, reason }.encode();
    // The sidecar may be gone already, and its log has the other half of the story.
    let _ = timeout(Duration::from_secs(1), conversation.send(&message, Vec::new())).await;
}

/// The router's half of a conversation.
struct Words<'c, H> {
    conversation: &'c H,
    /// The sidecar is gone. What it said before is heard still: a Bye, most likely.
    gone: bool,
}

impl<H: Handoff> Words<'_, H> {
    /// Says something. A sidecar that reads nothing must not hold up what it says itself.
    async fn say(&mut self, message: &ToSidecar) -> Result<(), SessionError> {
        if self.gone {
            return Ok(());
        }
        let sent = timeout(SEND_TIMEOUT, self.conversation.send(&message.encode(), Vec::new())).await;
        match sent.map_err(|_| SessionError::Stuck)? {
            Err(error) if is_gone(&error) => self.gone = true,
            sent => sent?,
        }
        Ok(())
    }
}

fn is_gone(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset)
}

/// Waits until the sidecar should be asked for sockets: for how many at once.
async fn asked<N: Net>(node: &Node<N>, pod: &Pod<N>) -> usize {
    pod.stock.low().await;
    node.room_for_sockets(&pod.party.owner).await
}

/// Whether a message gives what this router wants, which is no more than its flows need.
fn was_asked_for<N: Net>(pod: &Pod<N>, message: &ToRouter) -> bool {
    match message {
        ToRouter::Stock { tcp, udp } => pod.stock.awaits((*tcp).into(), (*udp).into()),
        ToRouter::Bye => true,
        _ => false,
    }
}

/// Takes the descriptors that a message says it has, `most` of them. Others were never open here.
fn take<H: Handoff>(conversation: &H, most: usize, want: usize) -> Result<Vec<H::Descriptor>, SessionError> {
    match conversation.take(most)? {
        (_, true) if most == want => Err(MessageError::MoreDescriptors(want).into()),
        (taken, false) if taken.len() < most => {
            Err(MessageError::Descriptors { got: taken.len(), want }.into())
        }
        (taken, _) => Ok(taken),
    }
}

/// Speaks with a sidecar until it closes; true where it said Bye.
async fn converse<N: Net>(
    node: &Arc<Node<N>>,
    pod: &Arc<Pod<N>>,
    conversation: &N::Handoff,
    sockets: &mut Sockets<N>,
) -> Result<bool, SessionError> {
    let mut words = Words { conversation, gone: false };
    let mut reset = false;
    let welcome = ToSidecar::Welcome {
        version: handoff::VERSION,
        cluster: node.id.cluster.clone(),
        node: node.id.node.clone(),
    };
    words.say(&welcome).await?;
    let pace = node.paces.of(&pod.party.owner);
    let mut told = BTreeSet::new();
    loop {
        let bytes = tokio::select! {
            biased;
            message = conversation.peek() => match message {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(false),
                // Told once of a sidecar that went without having read all (unix(7)); its own words come behind it.
                Err(error) if is_gone(&error) && !reset => {
                    (reset, words.gone) = (true, true);
                    continue;
                }
                Err(error) => return Err(error.into()),
            },
            most = asked(node, pod), if !words.gone => {
                let (tcp, udp) = pod.stock.ask(most);
                words.say(&ToSidecar::More { tcp, udp }).await?;
                continue;
            }
        };
        let message = ToRouter::decode(&bytes)?;
        if !was_asked_for(pod, &message) {
            node.paces.wait(&pace, bytes.len()).await;
        }
        // What there is no room for stays closed, and its sender pays for its closing.
        let want = message.descriptors().count();
        let rooms = sockets.rooms(&message, want).await;
        let descriptors = take(conversation, rooms.len(), want)?;
        match message {
            ToRouter::Bye => return Ok(true),
            ToRouter::Hello { .. } => return Err(SessionError::SecondHello),
            ToRouter::Ping => {
                // That this thread lives says little of the others.
                node.tasks.at_home(async {}).await;
                words.say(&ToSidecar::Pong).await?;
            }
            message => {
                if let Some((id, reason)) =
                    sockets.handle(message, descriptors.into_iter().zip(rooms).collect()).await?
                {
                    if told.len() < TOLD
                        && told.insert(id)
                        && let Some(suppressed) = node.refusals.permit()
                    {
                        warn!(pod = %pod.claim.name, id, %reason, suppressed, "socket from a sidecar rejected");
                    }
                    words.say(&ToSidecar::Refused { id: Some(id), reason }).await?;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use servicekeel_core::shares::Shares;

    use super::*;

    #[test]
    fn a_conversation_that_is_refused_is_told_whose_bound_it_is() {
        let (pod, newcomer) = (Owner::Namespace(0), Owner::Namespace(100));
        let seats = Bound::with_most(Shares { budget: 8, least: 1, part: 1 }, 10);
        let own: Vec<_> = std::iter::repeat_with(|| seats.take(&pod)).map_while(|seat| seat).collect();
        assert_eq!(NoSeat::of(&seats, &pod), NoSeat::OfOwner(own.len() as u64));
        let others: Vec<_> = (1..100).map_while(|other| seats.take(&Owner::Namespace(other))).collect();
        assert_eq!(own.len() + others.len(), 10);
        assert!(seats.take(&newcomer).is_none());
        let told = NoSeat::of(&seats, &newcomer).to_string();
        assert!(told.starts_with("all places for conversations are taken, 10 beside"), "{told}");
    }
}
