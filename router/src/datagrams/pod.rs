//! One UDP session with a pod of this node, by a socket of the pod's network namespace.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::flow::frame::{Cause, Refused};
use servicekeel_core::handoff::DescriptorKind;
use servicekeel_core::mesh::outcome::Outcome;
use servicekeel_core::mesh::table::Candidate;
use servicekeel_core::name::ServicePort;
use servicekeel_runtime::net::{Datagrams, Net};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::link::{Outbox, Outgoing};
use super::outlet::Faults;
use super::{ImportSocket, QUEUE, Queued, Signs, receive};
use crate::bounds::Owner;
use crate::endpoint::PodPort;
use crate::node::Node;
use crate::rooms::Account;

/// How often it is told at most that an endpoint which has answered refuses.
const TELL: Duration = Duration::from_secs(1);
/// An endpoint that has refused nothing for so long takes what it gets: it need not answer.
const ACCEPTED: Duration = Duration::from_secs(1);

/// Where the pod's answers go.
pub(crate) enum Answers<N: Net> {
    /// To a client of this node, from the import's own socket.
    Client(ImportSocket<N>, SocketAddr, Signs),
    /// To another router; what waits counts against it.
    Session(Outbox<N>, u64, Arc<Account>),
}

impl<N: Net> Answers<N> {
    /// What waits for a client of this node counts against `pod`, which answers.
    fn send(&self, datagram: &[u8], pod: &Arc<Account>) -> bool {
        match self {
            Self::Client(import, client, signs) => {
                signs.answer();
                import.send(datagram, pod, *client)
            }
            Self::Session(outbox, session, owner) => {
                Queued::new(datagram, owner).is_some_and(|datagram| outbox.send_datagram(*session, datagram))
            }
        }
    }

    /// The endpoint takes datagrams and has not answered. Another router would not know.
    fn accepted(&self) {
        if let Self::Session(outbox, session, _) = self {
            outbox.send(Outgoing::Opened { session: *session });
        }
    }
}

/// The queue to a session that [`run`] serves.
pub(crate) fn queue() -> (mpsc::Sender<Queued>, mpsc::Receiver<Queued>) {
    mpsc::channel(QUEUE)
}

/// Carries one session, of `owner`, until its queue closes. It sticks to its endpoint until that refuses or is
/// withdrawn, and goes on with the next of those that `choose` gives then. Where this node has none, it says why, and
/// the session is over: its client's router may have another. One of this node that has answered is kept as long as
/// there is no other.
///
/// # Errors
/// Why no endpoint of this node takes the last datagram.
pub(crate) async fn run<N: Net>(
    node: &Arc<Node<N>>,
    (wanted, owner): (&ServicePort, &Owner),
    choose: impl Fn() -> Vec<Candidate> + Send + Sync,
    queue: &mut mpsc::Receiver<Queued>,
    answers: &Answers<N>,
) -> Result<(), Refused> {
    let Some(last) = queue.recv().await.map(Arc::new) else { return Ok(()) };
    let mut session = Session { node, wanted, choose, queue, answers, last };
    // Those that refused the last datagram.
    let mut tried: Vec<Arc<PodPort<N>>> = Vec::new();
    let mut reason = String::from("none is there");
    'endpoints: while let Some(mut place) = session.next(&tried) {
        let endpoint = place.endpoint.clone();
        tried.push(endpoint.clone());
        let taken = endpoint.pod.stock.take(DescriptorKind::UdpUnconnected, owner).await;
        let adopted = match taken {
            Ok(stocked) => node.net.adopt_udp(stocked.socket).await,
            Err(error) => Err(error),
        };
        let socket = match adopted {
            Ok(socket) => Arc::new(socket),
            Err(error) => {
                reason = error.to_string();
                node.report(wanted, &place.candidate, Outcome::Away, &reason);
                continue;
            }
        };
        let addresses: Vec<_> = endpoint.addresses().collect();
        for (number, addr) in addresses {
            if let Err(error) = socket.connect(addr).await {
                reason = format!("{addr}: {error}");
                continue;
            }
            match session.converse(&socket, (number, addr), &mut place).await {
                End::Over => return Ok(()),
                End::Withdrawn => {
                    debug!(%wanted, %addr, "endpoint withdrawn; a UDP session goes to another");
                    tried.clear();
                    continue 'endpoints;
                }
                End::Failed(error) => {
                    debug!(%wanted, %addr, %error, "endpoint refused; a UDP session goes to another");
                    reason = format!("{addr}: {error}");
                    tried = vec![endpoint];
                    continue 'endpoints;
                }
                End::Refused(error) => {
                    debug!(%wanted, %addr, %error, "address refused datagrams");
                    reason = format!("{addr}: {error}");
                }
            }
        }
        if let Some(untried) = endpoint.not_dialled() {
            reason = format!("{reason}; {untried}");
        }
        node.report(wanted, &place.candidate, Outcome::Refused, &reason);
    }
    node.counters.datagrams_dropped.inc();
    let reason = format!("no endpoint of {wanted} at {} takes the datagram: {reason}", node.id);
    Err(Refused { cause: Cause::Unreachable, reason })
}

/// Where a session is.
struct Place<N: Net> {
    candidate: Candidate,
    endpoint: Arc<PodPort<N>>,
}

struct Session<'a, N: Net, F> {
    node: &'a Arc<Node<N>>,
    wanted: &'a ServicePort,
    choose: F,
    queue: &'a mut mpsc::Receiver<Queued>,
    answers: &'a Answers<N>,
    /// Kept until the next one comes: it is sent again where it is refused.
    last: Arc<Queued>,
}

/// How a conversation with an address ends.
enum End {
    /// The client's side ended it.
    Over,
    /// The endpoint is offered no more, and another of this node is.
    Withdrawn,
    /// The endpoint refuses, and has answered before. There may be another.
    Failed(io::Error),
    /// It refuses and has never answered: another address of the same endpoint may.
    Refused(io::Error),
}

/// What came of the datagrams that went to an address.
struct Course {
    /// An answer came, at any time.
    heard: bool,
    /// The endpoint is known to work: it answered, or took what it got, and has refused nothing since.
    well: bool,
    /// When it is taken to work: what it got since it refused something is not refused till then.
    accepted: Option<Instant>,
    /// When it was told last that it refuses.
    told: Option<Instant>,
}

impl<N: Net, F: Fn() -> Vec<Candidate>> Session<'_, N, F> {
    /// The endpoints of this node that may have it.
    fn places(&self) -> Vec<Place<N>> {
        let candidates = (self.choose)();
        let endpoints = self.node.endpoints();
        let place = |candidate| match candidate {
            Candidate::Local(id) => Some(Place { candidate, endpoint: endpoints.get(&id)?.clone() }),
            Candidate::Remote(_) => None,
        };
        candidates.into_iter().filter_map(place).collect()
    }

    /// The best that was not tried.
    fn next(&self, tried: &[Arc<PodPort<N>>]) -> Option<Place<N>> {
        let untried = |place: &Place<N>| !tried.iter().any(|tried| Arc::ptr_eq(tried, &place.endpoint));
        self.places().into_iter().find(untried)
    }

    /// Whether it leaves its endpoint, since that is not offered any more and another of this node is. The same pod by its
    /// next sidecar, or by other rules, is the same place.
    fn is_withdrawn(&self, place: &mut Place<N>) -> bool {
        let mut places = self.places();
        match places.iter().position(|other| other.endpoint.is_where(&place.endpoint)) {
            Some(i) => {
                *place = places.swap_remove(i);
                false
            }
            None => !places.is_empty(),
        }
    }

    /// Whether it may go on anywhere else than at an endpoint which refuses. What another router's side has it knows.
    fn has_another(&self, place: &Place<N>) -> bool {
        match self.answers {
            Answers::Session(..) => true,
            Answers::Client(..) => {
                (self.choose)().iter().any(|other| *other != place.candidate)
                    || self.next(std::slice::from_ref(&place.endpoint)).is_some()
            }
        }
    }

    fn report(&self, place: &Place<N>, outcome: Outcome, reason: &str) {
        self.node.report(self.wanted, &place.candidate, outcome, reason);
    }

    /// An ICMP refusal: the port is closed. It comes to whoever asks the socket next, so both ways end here. Says whether
    /// the conversation ends.
    fn refuse(
        &self,
        error: io::Error,
        addr: SocketAddr,
        place: &Place<N>,
        course: &mut Course,
    ) -> Option<End> {
        let now = Instant::now();
        course.accepted = None;
        if !course.heard {
            return Some(End::Refused(error));
        }
        if std::mem::replace(&mut course.well, false) || course.told.is_none_or(|told| now - told >= TELL) {
            course.told = Some(now);
            self.report(place, Outcome::Refused, &format!("{addr}: {error}"));
        }
        if self.has_another(place) {
            return Some(End::Failed(error));
        }
        // It may only be restarting.
        debug!(%addr, %error, "endpoint refused datagrams");
        self.node.counters.datagrams_dropped.inc();
        None
    }

    /// Carries datagrams both ways, from the last one on.
    async fn converse(
        &mut self,
        socket: &Arc<N::UdpSocket>,
        (number, addr): (usize, SocketAddr),
        place: &mut Place<N>,
    ) -> End {
        let node = self.node;
        let (outlet, faults) = (place.endpoint.pod.outlet(node), Arc::<Faults>::default());
        let accepted = Some(Instant::now() + ACCEPTED);
        let mut course = Course { heard: false, well: false, accepted, told: None };
        let mut version = *node.changed.borrow();
        outlet.send(socket, &self.last, addr, &faults).await;
        node.counters.datagrams.inc();
        loop {
            let refused = tokio::select! {
                biased;
                error = faults.next() => error,
                received = receive(&**socket, &node.buffers) => match received {
                    Ok((datagram, _)) => {
                        course.heard = true;
                        if !std::mem::replace(&mut course.well, true) {
                            place.endpoint.answered(number);
                            self.report(place, Outcome::Taken, "");
                        }
                        let sent = self.answers.send(&datagram, &place.endpoint.pod.party.datagrams);
                        if sent { node.counters.datagrams.inc() } else { node.counters.datagrams_dropped.inc() };
                        continue;
                    }
                    // Nothing comes by it any more.
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return End::Failed(error),
                    Err(error) => error,
                },
                () = sleep_until(course.accepted.unwrap_or_else(Instant::now)), if !course.well && course.accepted.is_some() => {
                    course.well = true;
                    place.endpoint.answered(number);
                    self.report(place, Outcome::Taken, "");
                    self.answers.accepted();
                    continue;
                }
                datagram = self.queue.recv() => {
                    let Some(datagram) = datagram else { return End::Over };
                    self.last = Arc::new(datagram);
                    let now = *node.changed.borrow();
                    if std::mem::replace(&mut version, now) != now && self.is_withdrawn(place) {
                        return End::Withdrawn;
                    }
                    outlet.send(socket, &self.last, addr, &faults).await;
                    node.counters.datagrams.inc();
                    course.accepted.get_or_insert_with(|| Instant::now() + ACCEPTED);
                    continue;
                }
            };
            if let Some(end) = self.refuse(refused, addr, place, &mut course) {
                return end;
            }
        }
    }
}
