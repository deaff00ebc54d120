//! The pool of connections on which this router opens flows at a peer.

use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::flow::frame::Purpose;
use servicekeel_core::name::RouterId;
use servicekeel_runtime::net::Net;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::activity::Busy;
use super::{Ask, Idle, Peer, Standing, State, dialled_at};
use crate::links;
use crate::node::Node;
use crate::tls::Channel;

/// How long a flow waits for a connection of the pool or a new one while none comes for any flow ...
const CHECKOUT_TIMEOUT: Duration = Duration::from_secs(3);
/// ... and how long while they do come, for others that wait.
const CROWD_TIMEOUT: Duration = Duration::from_secs(15);
/// One that has waited for so long for its first flow is no new one any more.
const STOOD: Duration = Duration::from_secs(1);
/// How long a connection stays in the pool unused.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// So many dials that failed while a flow waits, and it waits no more. One may be bad luck.
const TRIES: u64 = 2;
/// The most unused connections to one peer.
const MAX_IDLE: usize = 256;
/// The most dials to one peer at once, and the most dials back that it has asked for.
pub(crate) const MAX_DIALS: usize = 64;
/// Why there is no connection to open a flow on.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum CheckoutError {
    #[error("no link to {0} is up")]
    NoLink(RouterId),
    #[error("cannot dial {0}: {1}")]
    Dial(RouterId, String),
    #[error("no connection to {0} came up within {limit} s", limit = CHECKOUT_TIMEOUT.as_secs())]
    Timeout(RouterId),
    #[error("too many flows wait for a connection to {0}")]
    Crowd(RouterId),
    #[error("no connection to {0} came up within {limit} s: {1}", limit = CHECKOUT_TIMEOUT.as_secs())]
    Certificate(RouterId, String),
}

/// A connection that carries a flow. Dropped without [`Checkout::put_back`], it is closed.
pub(crate) struct Checkout<N: Net> {
    pub(crate) peer: Arc<Peer<N>>,
    pub(crate) channel: Channel<N::TcpStream>,
    pub(crate) standing: Standing<N>,
    /// Whether it was used before, or has stood unused: its path may have gone since.
    pub(crate) pooled: bool,
    _busy: Busy<N>,
}

impl<N: Net> Checkout<N> {
    /// Gives the connection back for the next flow.
    pub(crate) fn put_back(mut self, node: &Node<N>) {
        self.standing.heard(self.peer.breaks());
        self.peer.put(node, self.channel, self.standing);
    }
}

struct Waiting<'a, N: Net>(&'a Peer<N>);

impl<N: Net> Drop for Waiting<'_, N> {
    fn drop(&mut self) {
        self.0.lock().waiting -= 1;
    }
}

/// A dial on its way, however it ends.
struct Dialling<N: Net>(Arc<Peer<N>>);

impl<N: Net> Drop for Dialling<N> {
    fn drop(&mut self) {
        self.0.lock().dialling -= 1;
    }
}

impl<N: Net> State<N> {
    /// Connections that the peer was asked for and that have not come for long.
    pub(super) fn forget_unanswered(&mut self) {
        if self.asked.1.is_some_and(|when| when + CHECKOUT_TIMEOUT <= Instant::now()) {
            self.asked = (0, None);
        }
    }
}

impl<N: Net> Peer<N> {
    /// A connection to open a flow on.
    ///
    /// # Errors
    /// [`CheckoutError`], within 3 s where no connection comes up.
    pub(crate) async fn checkout(
        self: &Arc<Self>,
        node: &Arc<Node<N>>,
    ) -> Result<Checkout<N>, CheckoutError> {
        let idle = self.take_idle(node, &mut self.lock());
        if let Some(idle) = idle {
            return Ok(self.checked_out(idle, Busy::new(self.clone())));
        }
        // Each connection that comes wakes one that waits: nobody waits on a thread that a pod can hold up.
        let (peer, task) = (self.clone(), node.clone());
        let waiting = node.tasks.at_home(async move { peer.wait_for_connection(&task).await });
        let mut connection = waiting.await.unwrap_or(Err(CheckoutError::Timeout(self.id.clone())))?;
        // Where this fails its first use does.
        let _ = connection.channel.come_here();
        Ok(connection)
    }

    /// An unused connection of the pool.
    fn take_idle(self: &Arc<Self>, node: &Arc<Node<N>>, state: &mut State<N>) -> Option<Idle<N>> {
        let time = node.time();
        while let Some(mut idle) = state.idle.pop() {
            let useful = !idle.standing.is_lost() && !idle.standing.is_over(time);
            // Whoever looks uses it.
            if useful && idle.channel.come_here().is_ok() && idle.channel.is_quiet() {
                node.counters.pool_reused.inc_by(idle.channel.was_used().into());
                // One is kept in reserve, so that the next flow need not wait for a handshake.
                if state.idle.is_empty() && state.dialling == 0 && !node.net.is_short() {
                    self.more(node, state, 1);
                }
                return Some(idle);
            }
        }
        None
    }

    fn checked_out(self: &Arc<Self>, idle: Idle<N>, busy: Busy<N>) -> Checkout<N> {
        let Idle { channel, standing, since, .. } = idle;
        let pooled = channel.was_used() || since.elapsed() >= STOOD;
        Checkout { peer: self.clone(), pooled, channel, standing, _busy: busy }
    }

    async fn wait_for_connection(
        self: &Arc<Self>,
        node: &Arc<Node<N>>,
    ) -> Result<Checkout<N>, CheckoutError> {
        let busy = Busy::new(self.clone());
        let start = Instant::now();
        let mut deadline = start + CHECKOUT_TIMEOUT;
        let (failures, mut came) = {
            let mut state = self.lock();
            state.waiting += 1;
            (state.failures, state.came)
        };
        let _waiting = Waiting(self);
        loop {
            let mut news = std::pin::pin!(self.news.notified());
            news.as_mut().enable();
            {
                let mut state = self.lock();
                if let Some(idle) = self.take_idle(node, &mut state) {
                    return Ok(self.checked_out(idle, busy));
                }
                if state.links.is_empty() {
                    return Err(CheckoutError::NoLink(self.id.clone()));
                }
                let failed = state.failures - failures >= TRIES;
                if failed && state.dialling + state.asked.0 == 0 {
                    return Err(CheckoutError::Dial(self.id.clone(), state.failure.clone()));
                }
                state.forget_unanswered();
                let missing = state.waiting.saturating_sub(state.dialling + state.asked.0);
                if !failed && missing > 0 {
                    self.more(node, &mut state, missing);
                }
            }
            if timeout_at(deadline, news).await.is_err() {
                let now_came = self.lock().came;
                if now_came == came {
                    return Err(match node.lapsed(self) {
                        Some(reason) => CheckoutError::Certificate(self.id.clone(), reason),
                        None => CheckoutError::Timeout(self.id.clone()),
                    });
                }
                if start.elapsed() >= CROWD_TIMEOUT {
                    return Err(CheckoutError::Crowd(self.id.clone()));
                }
                came = now_came;
                deadline = Instant::now() + CHECKOUT_TIMEOUT;
            }
        }
    }

    /// Dials, or asks the peer to dial back where this side can't.
    pub(super) fn more(self: &Arc<Self>, node: &Arc<Node<N>>, state: &mut State<N>, missing: usize) {
        let missing = missing.min(MAX_DIALS.saturating_sub(state.dialling + state.asked.0));
        if missing == 0 {
            return;
        }
        let Some(at) = dialled_at(state) else {
            return self.ask(state, Ask::Flows(missing as u16), missing);
        };
        for _ in 0..missing {
            state.dialling += 1;
            let (dialling, breaks) = (Dialling(self.clone()), self.breaks());
            let (node, at) = (node.clone(), at.clone());
            let owner = node.clone();
            owner.tasks.spawn(async move {
                let dialled = tokio::select! {
                    biased;
                    dialled = links::dial(&node, &at, Purpose::Flows, Some(&dialling.0.id)) => Some(dialled),
                    // The pool would not take it, and flows wait for another, maybe at another address.
                    () = dialling.0.broke_since(breaks) => None,
                };
                let peer = dialling.0.clone();
                drop(dialling);
                let Some(dialled) = dialled else { return peer.news.notify_waiters() };
                match dialled {
                    Ok(met) => {
                        node.counters.pool_dialled.inc();
                        peer.put(&node, met.channel, met.standing);
                    }
                    Err(error) => {
                        debug!(peer = %peer.id, %at, %error, "dialling for flows failed");
                        node.relieve();
                        peer.dial_failed(error.to_string());
                    }
                }
            });
        }
    }

    pub(super) fn ask(&self, state: &mut State<N>, ask: Ask, missing: usize) {
        let sent = state.links.values().any(|link| link.ask.try_send(ask).is_ok());
        if sent && matches!(ask, Ask::Flows(_)) {
            state.asked = (state.asked.0 + missing, Some(Instant::now()));
        }
    }

    /// One connection of the pool is silently dead: those that were heard no later than `when` may have gone the same way,
    /// and cost no more than a handshake.
    pub(crate) fn suspect(&self, when: Instant) {
        self.lock().idle.retain(|idle| idle.since > when);
    }

    fn dial_failed(&self, reason: String) {
        let mut state = self.lock();
        state.failures += 1;
        state.failure = reason;
        drop(state);
        self.news.notify_waiters();
    }

    /// A connection for flows came up, or its flow ended. One that is of no use any more is closed, and so is one for which
    /// the peer has no place.
    pub(crate) fn put(&self, node: &Node<N>, channel: Channel<N::TcpStream>, standing: Standing<N>) {
        let time = node.time();
        let mut state = self.lock();
        // What was made before a link broke is no better than that, and without a link nobody would say that it broke.
        let has_path = !state.links.is_empty() && standing.breaks() == self.breaks();
        let useful = has_path && !standing.is_lost() && !standing.is_over(time);
        let place = node.connections.take_sparing(&self.holder);
        // One that a flow waits for is not unused for long.
        if useful && state.idle.len() < MAX_IDLE && (place.is_some() || state.waiting > 0) {
            state.idle.push(Idle { channel, standing, since: Instant::now(), _place: place });
            state.came += 1;
        }
        drop(state);
        self.news.notify_one();
    }

    /// The peer dialled back.
    pub(crate) fn put_dialled_back(
        &self,
        node: &Node<N>,
        channel: Channel<N::TcpStream>,
        standing: Standing<N>,
    ) {
        let mut state = self.lock();
        state.asked.0 = state.asked.0.saturating_sub(1);
        drop(state);
        self.put(node, channel, standing);
    }
}
