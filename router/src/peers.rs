//! Other routers: what is known of each, and its links.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::pki_types::UnixTime;
use servicekeel_core::flow::frame::{Cause, Refused};
use servicekeel_core::mesh::NoLink;
use servicekeel_core::mesh::table::LinkId;
use servicekeel_core::name::RouterId;
use servicekeel_runtime::latest;
use servicekeel_runtime::net::Net;
use servicekeel_runtime::throttle::Throttle;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{info, warn};

use crate::bounds::{self, Bound, Full, Owner};
use crate::datagrams::link::DatagramLink;
use crate::flow;
use crate::identity::PeerError;
use crate::node::{FLOW_TIMEOUT, Node};
use crate::rooms::{Account, Rooms};
use crate::tasks::AbortOnDrop;
use crate::tls::Channel;

mod activity;
mod pool;
mod proof;
mod trouble;

use activity::Activity;
pub(crate) use activity::Busy;
pub(crate) use pool::{Checkout, IDLE_TIMEOUT, MAX_DIALS};
use proof::Proof;
pub(crate) use proof::{Shown, Standing};
use trouble::{Fullness, Rejection, Trouble, Twin};

/// The most links with one peer: it and this router dial each other, perhaps by several addresses.
const MAX_LINKS: usize = 8;
/// The most connections for UDP sessions that have been replaced, and whose sessions go on.
const MAX_DATAGRAMS_BEFORE: usize = 4;
/// How long a peer without a link is remembered.
const MEMORY: Duration = Duration::from_secs(3600);

/// How long before a peer's certificate expires it is looked whether it has another.
const RENEWAL: Duration = Duration::from_secs(60);
/// How long a router that is linked has to answer where another of its name wants to be: a process that is gone is mostly
/// known to be by then, since its system says so at once.
const PROBE: Duration = Duration::from_secs(1);
/// So many lines of one kind that a peer brings about are logged at once ...
const LINES: u32 = 16;
/// ... and one more in this time.
const LINE: Duration = Duration::from_secs(2);
/// How often it is told that two routers have one name.
const TELL_TWINS: Duration = Duration::from_secs(60);

/// Why a live peer is cut off.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Distrust {
    #[error("this router no longer has an identity")]
    NoIdentity,
    #[error("{0}")]
    Certificate(PeerError),
}

/// What the pool asks of a link.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ask {
    /// Dial back, for flows.
    Flows(u16),
    /// Dial back, for UDP sessions.
    Datagrams,
    /// Say whether the peer answers.
    Probe,
}

/// Where a peer was dialled.
#[derive(Debug, Clone)]
pub(crate) struct Dialled {
    /// As the config has it.
    pub(crate) address: String,
    /// The address that answered, for further connections: behind a name there may be several routers.
    pub(crate) at: String,
}

/// One link, as the peer knows it.
pub(crate) struct LinkState {
    pub(crate) ask: mpsc::Sender<Ask>,
    /// Where this side dialled it; `None`: the peer dialled.
    pub(crate) dialled: Option<Dialled>,
    /// The address of the peer.
    pub(crate) with: IpAddr,
    pub(crate) since: Instant,
    /// That one side does not take all offers of the other, and when it was last so.
    pub(crate) declined: Option<(Instant, String)>,
}

struct Idle<N: Net> {
    channel: Channel<N::TcpStream>,
    standing: Standing<N>,
    since: Instant,
    _place: Option<bounds::Held>,
}

struct State<N: Net> {
    idle: Vec<Idle<N>>,
    dialling: usize,
    /// Connections that the peer was asked to dial back, and when last.
    asked: (usize, Option<Instant>),
    waiting: usize,
    failures: u64,
    /// Connections that came to the pool.
    came: u64,
    failure: String,
    links: BTreeMap<LinkId, LinkState>,
    /// Since when there is no link; `None` while there is one.
    down: Option<Instant>,
    boot: Option<u64>,
    /// How often a link answered a probe.
    answered: u64,
    /// When the certificates that it showed last expire.
    expires: Option<UnixTime>,
    /// What its connections were proven by.
    proofs: Vec<Arc<Proof>>,
    trouble: Trouble,
    /// The one that was refused a link last.
    twin: Option<Twin>,
    rejection: Option<Rejection>,
    fullness: Fullness,
    /// With the task that serves it.
    datagrams: Option<(DatagramLink<N>, AbortOnDrop)>,
    /// Those before it, which end with the last of their sessions.
    datagrams_before: VecDeque<AbortOnDrop>,
}

impl<N: Net> State<N> {
    /// The boot number of the run that is linked, where it is another.
    fn other_run(&self, boot: u64) -> Option<u64> {
        self.boot.filter(|linked| *linked != boot && !self.links.is_empty())
    }

    /// Lets the connection for UDP sessions end with the last of them: each holds its sending end.
    fn replace_datagrams(&mut self) {
        self.datagrams_before.retain(|task| !task.0.is_finished());
        self.datagrams_before.extend(self.datagrams.take().map(|(_, task)| task));
        if self.datagrams_before.len() > MAX_DATAGRAMS_BEFORE {
            self.datagrams_before.pop_front();
        }
    }

    fn close_unused(&mut self) {
        self.idle.clear();
        // What the peer was asked for may be dialled the same way, and was asked by a link that may be gone.
        self.asked = (0, None);
        self.datagrams = None;
        self.datagrams_before.clear();
    }
}

/// Another router.
pub(crate) struct Peer<N: Net> {
    pub(crate) id: RouterId,
    state: Mutex<State<N>>,
    /// A connection came to the pool, or a dial failed.
    news: Notify,
    /// A link answered a probe, or went.
    answers: Notify,
    /// Rises when the flows of before have lost their path for good.
    epoch: latest::Sender<u64>,
    /// Rises when a link breaks: what waits for an answer of the peer may wait in vain.
    breaks: latest::Sender<u64>,
    pub(crate) activity: Activity,
    /// What its flows have on their way, and what is held of them.
    pub(crate) owner: flow::Owner,
    /// In whose name its flows are.
    pub(crate) holder: Owner,
    /// Of the routers that are known.
    pub(crate) place: Option<bounds::Held>,
    /// UDP sessions of this node's pods at it.
    pub(crate) sessions: Arc<Bound>,
    /// Its datagrams that wait for pods of this node, and those that wait for it.
    pub(crate) datagrams_in: Arc<Account>,
    pub(crate) datagrams_out: Arc<Account>,
    /// For the log: it opens more than it may.
    full: Throttle,
    /// For the log: its links come and go.
    pub(crate) turns: Throttle,
    /// For the log: what it says on its links.
    pub(crate) words: Throttle,
    /// For the log: another router of this name.
    pub(crate) twins: Throttle,
    /// For the dials back that it asks for.
    pub(crate) dial_backs: Arc<Semaphore>,
}

impl<N: Net> Peer<N> {
    pub(crate) fn new(id: RouterId, holder: Owner, rooms: &Rooms) -> Self {
        let state = State {
            idle: Vec::new(),
            dialling: 0,
            asked: (0, None),
            waiting: 0,
            failures: 0,
            came: 0,
            failure: String::new(),
            links: BTreeMap::new(),
            down: Some(Instant::now()),
            boot: None,
            answered: 0,
            expires: None,
            proofs: Vec::new(),
            trouble: Trouble::default(),
            twin: None,
            rejection: None,
            fullness: Fullness::default(),
            datagrams: None,
            datagrams_before: VecDeque::new(),
        };
        Self {
            id,
            state: Mutex::new(state),
            news: Notify::new(),
            answers: Notify::new(),
            epoch: latest::Sender::new(0),
            breaks: latest::Sender::new(0),
            activity: Activity::new(),
            owner: flow::Owner::of(&holder, rooms),
            sessions: Bound::of_sessions(),
            datagrams_in: rooms.datagrams.account_of(&holder),
            datagrams_out: rooms.datagrams.account_of(&holder),
            holder,
            place: None,
            full: Throttle::new(1, bounds::TELL),
            turns: Throttle::new(LINES, LINE),
            words: Throttle::new(LINES, LINE),
            twins: Throttle::new(1, TELL_TWINS),
            dial_backs: Arc::new(Semaphore::new(MAX_DIALS)),
        }
    }

    /// Since when there is no link; `None` while there is one.
    pub(crate) fn down(&self) -> Option<Instant> {
        self.lock().down
    }

    fn lock(&self) -> MutexGuard<'_, State<N>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves when flows of this epoch have lost their path for good.
    pub(crate) async fn lost(&self, epoch: u64) {
        // The sender lives in self, so this ends by the value only.
        let _ = self.epoch.subscribe().wait_for(|now| *now > epoch).await;
    }

    pub(crate) fn epoch(&self) -> u64 {
        *self.epoch.borrow()
    }

    /// Closes what was not used for long, and what the peer has closed; says whether the peer can be forgotten where
    /// nobody else holds it.
    pub(crate) fn sweep(&self, time: UnixTime) -> bool {
        let now = Instant::now();
        let mut state = self.lock();
        state.idle.retain_mut(|idle| {
            now - idle.since < IDLE_TIMEOUT && !idle.standing.is_over(time) && idle.channel.is_quiet()
        });
        state.down.is_some_and(|since| now - since > MEMORY)
    }

    /// Asks the run of the peer that is linked whether it is alive, where `boot` is another. Returns its boot number where
    /// it does not answer in time: it is dead then, and so are its links, whatever they look like.
    pub(crate) async fn probe(&self, boot: u64) -> Option<u64> {
        let deadline = Instant::now() + PROBE;
        let (linked, answered) = {
            let state = self.lock();
            let linked = state.other_run(boot)?;
            // One whose queue is full is asked something already.
            for link in state.links.values() {
                let _ = link.ask.try_send(Ask::Probe);
            }
            (linked, state.answered)
        };
        loop {
            let mut answers = std::pin::pin!(self.answers.notified());
            answers.as_mut().enable();
            {
                let state = self.lock();
                if state.other_run(boot) != Some(linked) || state.answered != answered {
                    return None;
                }
            }
            if timeout_at(deadline, answers).await.is_err() {
                return Some(linked);
            }
        }
    }

    /// A link answered a probe.
    pub(crate) fn answered(&self) {
        self.lock().answered += 1;
        self.answers.notify_waiters();
    }

    /// A link came up, in the epoch that is returned. Another boot of the peer than the one that is linked is taken where
    /// that one is `dead` ([`Peer::probe`]), and all that went before with it.
    ///
    /// # Errors
    /// [`NoLink`]: the peer has too many, or another router of its name has one.
    pub(crate) fn link_up(
        &self,
        id: LinkId,
        boot: u64,
        link: LinkState,
        dead: Option<u64>,
    ) -> Result<u64, NoLink> {
        let mut state = self.lock();
        if state.links.len() >= MAX_LINKS {
            return Err(NoLink::TooMany);
        }
        if let Some(other) = state.other_run(boot)
            && dead != Some(other)
        {
            state.twin = Some(Twin { at: Instant::now(), from: link.with });
            return Err(NoLink::Twin);
        }
        let reborn = state.boot.replace(boot).is_some_and(|old| old != boot);
        state.links.insert(id, link);
        state.down = None;
        state.trouble = Trouble::default();
        if reborn {
            if let Some(suppressed) = self.turns.permit() {
                info!(peer = %self.id, suppressed, "peer restarted; its flows are reset");
            }
            self.cut(&mut state);
        }
        let epoch = self.epoch();
        drop(state);
        self.news.notify_waiters();
        Ok(epoch)
    }

    /// A link went down. Where no link comes up for [`FLOW_TIMEOUT`], the flows are reset.
    pub(crate) fn link_down(self: &Arc<Self>, node: &Arc<Node<N>>, id: LinkId) {
        let mut state = self.lock();
        if state.links.remove(&id).is_none() || !state.links.is_empty() {
            return;
        }
        self.answers.notify_waiters();
        let since = Instant::now();
        state.down = Some(since);
        // An unused connection is worth nothing behind a path that is gone.
        state.close_unused();
        self.breaks.send_modify(|times| *times += 1);
        drop(state);
        self.news.notify_waiters();
        let (peer, epoch) = (self.clone(), self.epoch());
        node.tasks.spawn(async move {
            sleep(FLOW_TIMEOUT).await;
            let mut state = peer.lock();
            // A link that came and went meanwhile has a time of its own.
            if state.down == Some(since) && peer.epoch() == epoch {
                info!(peer = %peer.id, "no link for {} s; resetting flows", FLOW_TIMEOUT.as_secs());
                peer.cut(&mut state);
            }
        });
    }

    /// A link broke, whatever other one there is: what went the same way is no better. Closes the connections that carry
    /// no flow, and the one for UDP sessions, which loses nothing that a network would not: all are made anew at need.
    pub(crate) fn link_broke(&self) {
        let mut state = self.lock();
        state.close_unused();
        // Under the lock: whoever takes a connection of the pool finds either this, or none.
        self.breaks.send_modify(|times| *times += 1);
    }

    /// How often a link broke.
    pub(crate) fn breaks(&self) -> u64 {
        *self.breaks.borrow()
    }

    /// Resolves when a link has broken since [`Peer::breaks`] said so.
    pub(crate) async fn broke_since(&self, breaks: u64) {
        // The sender lives in self, so this ends by the value only.
        let _ = self.breaks.subscribe().wait_for(|now| *now > breaks).await;
    }

    /// Closes the connections that carry no flow.
    pub(crate) fn close_idle(&self) {
        self.lock().idle.clear();
    }

    fn cut(&self, state: &mut State<N>) {
        state.close_unused();
        self.epoch.send_modify(|epoch| *epoch += 1);
    }

    /// Why it gets no further flow or session; says so in the log.
    pub(crate) fn busy(&self, node: &Node<N>) -> Refused {
        let (id, what) = (&self.id, "flows and UDP sessions");
        let full = match node.flows.full(&self.holder) {
            Full::Cluster(cluster, held) => format!(
                "{cluster} holds {held} {what} at {}, over all of its routers, as many as it may beside others",
                node.id
            ),
            Full::Owner(held) => {
                format!("{id} holds {held} {what} at {}, as many as it may beside others", node.id)
            }
            Full::All(held) => format!("{} carries {held} {what}, as many as it may", node.id),
            Full::None => format!(
                "{id}, or one consumer of it, holds {what} at {}, as many as it may beside others, of which three quarters may be sessions",
                node.id
            ),
        };
        if let Some(suppressed) = self.full.permit() {
            warn!(peer = %id, suppressed, "further flows and UDP sessions of the peer are rejected: {full}");
        }
        self.note_full_here(&full);
        Refused { cause: Cause::Busy, reason: full }
    }

    /// The connection for UDP sessions, dialled or asked for where there is none yet.
    pub(crate) fn datagrams(self: &Arc<Self>, node: &Arc<Node<N>>) -> Option<DatagramLink<N>> {
        let mut state = self.lock();
        if let Some((link, _)) = &state.datagrams
            && !link.is_closed()
        {
            if !link.is_over(node.time()) {
                return Some(link.clone());
            }
            state.replace_datagrams();
        }
        if state.links.is_empty() {
            return None;
        }
        let at = dialled_at(&state);
        let (link, receiver) = DatagramLink::new();
        if at.is_none() {
            self.ask(&mut state, Ask::Datagrams, 1);
        }
        let task = crate::datagrams::link::run(node.clone(), self.clone(), receiver, at);
        state.datagrams = Some((link.clone(), AbortOnDrop(node.tasks.spawn(task))));
        Some(link)
    }

    /// The peer dialled back for UDP sessions.
    pub(crate) fn datagrams_dialled_back(&self, channel: Channel<N::TcpStream>, standing: Standing<N>) {
        if let Some((link, _)) = &self.lock().datagrams {
            link.deliver(channel, standing);
        }
    }

    /// The addresses at which it is linked.
    pub(crate) fn linked_from(&self) -> Vec<IpAddr> {
        self.lock().links.values().map(|link| link.with).collect()
    }

    /// Whether there is a link.
    pub(crate) fn is_up(&self) -> bool {
        !self.lock().links.is_empty()
    }

    /// Since when the certificate is expired that it showed last: new connections fail, where it is linked by it still
    /// or tries to be.
    pub(crate) fn expired(&self, now: UnixTime) -> Option<UnixTime> {
        let tries = self.tries_in_vain();
        let state = self.lock();
        state.expires.filter(|expires| *expires < now && (tries || !state.links.is_empty()))
    }

    /// When the certificates expire that it showed last, where it is linked.
    pub(crate) fn expires(&self) -> Option<UnixTime> {
        let state = self.lock();
        state.expires.filter(|_| !state.links.is_empty())
    }

    /// How many links it has.
    pub(crate) fn links(&self) -> usize {
        self.lock().links.len()
    }

    /// Makes a new connection where the certificate that the peer showed last expires before long, or where the last one was
    /// rejected: whether it is better now is known by that only. It is for the next flow.
    pub(crate) fn look_for_renewal(self: &Arc<Self>, node: &Arc<Node<N>>, now: UnixTime) {
        let mut state = self.lock();
        let soon = state.expires.is_some_and(|expires| expires.as_secs() < now.as_secs() + RENEWAL.as_secs());
        if (soon || state.rejection.is_some()) && !state.links.is_empty() {
            state.forget_unanswered();
            if state.dialling + state.asked.0 == 0 {
                self.more(node, &mut state, 1);
            }
        }
    }

    /// For the status: links, unused connections, flows.
    pub(crate) fn describe(&self) -> (Vec<(Option<String>, Instant)>, usize, usize) {
        let state = self.lock();
        let links = state.links.values();
        let links = links.map(|link| (link.dialled.as_ref().map(|d| d.address.clone()), link.since));
        (links.collect(), state.idle.len(), self.activity.flows())
    }
}

/// Where further connections to the peer are dialled; `None`: it must be asked to dial back.
fn dialled_at<N: Net>(state: &State<N>) -> Option<String> {
    state.links.values().find_map(|link| link.dialled.as_ref().map(|dialled| dialled.at.clone()))
}

#[cfg(test)]
pub(crate) mod tests;
