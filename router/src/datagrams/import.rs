//! The UDP socket of an import: each client's datagrams to an endpoint here or at another router.

use std::net::SocketAddr;
use std::sync::Arc;

use servicekeel_core::flow::frame::Open;
use servicekeel_core::mesh::outcome::Outcome;
use servicekeel_core::mesh::table::Candidate;
use servicekeel_core::name::{RouterId, ServicePort};
use servicekeel_core::session::Sessions;
use servicekeel_runtime::net::Net;
use servicekeel_runtime::throttle::Throttle;
use tokio::sync::mpsc;
use tokio::time::{Duration, Instant, sleep, sleep_until};
use tracing::debug;

use super::link::{DatagramLink, Reply};
use super::outlet::Outlet;
use super::pod::{self, Answers};
use super::{Counted, Crowd, GIVES_WAY, ImportSocket, MAX_SESSIONS, Queued, SESSION_IDLE, Signs, receive};
use crate::bounds::{Bound, Held, Owner, Party};
use crate::imports::Import;
use crate::node::Node;
use crate::tasks::AbortOnDrop;

/// How often a session is tried at an endpoint that has just failed, where there is no other: each costs the endpoint's
/// pod a socket. Datagrams that come more often are dropped.
const TRY: Duration = Duration::from_millis(50);

/// Where one client's datagrams go.
struct Session<N: Net> {
    path: Path<N>,
    signs: Signs,
    /// The table of endpoints as it was when the path was last known to be one of those that there are.
    version: u64,
    _held: Held,
}

enum Path<N: Net> {
    /// To a pod of this node. Which one, its task decides.
    Here {
        queue: mpsc::Sender<Queued>,
        _task: AbortOnDrop,
    },
    There {
        router: RouterId,
        link: DatagramLink<N>,
        session: u64,
    },
}

impl<N: Net> Session<N> {
    fn is_over(&self) -> bool {
        match &self.path {
            Path::Here { queue, .. } => queue.is_closed(),
            Path::There { link, .. } => link.is_closed() || self.signs.is_over(),
        }
    }

    /// Whether its path is not offered any more, and another is.
    fn is_withdrawn(&mut self, node: &Node<N>, wanted: &ServicePort) -> bool {
        let version = *node.changed.borrow();
        if std::mem::replace(&mut self.version, version) == version {
            return false;
        }
        let is_own = |candidate: &Candidate| match (&self.path, candidate) {
            (Path::Here { .. }, Candidate::Local(_)) => true,
            (Path::There { router, .. }, Candidate::Remote(other)) => router == other,
            _ => false,
        };
        let candidates = node.candidates(wanted);
        !candidates.is_empty() && !candidates.iter().any(is_own)
    }

    fn send(&self, datagram: Queued) -> bool {
        match &self.path {
            Path::Here { queue, .. } => queue.try_send(datagram).is_ok(),
            Path::There { link, session, .. } => link.send(*session, datagram),
        }
    }
}

impl<N: Net> Drop for Session<N> {
    fn drop(&mut self) {
        if let Path::There { link, session, .. } = &self.path {
            link.close(*session);
        }
    }
}

type Table<N> = Sessions<SocketAddr, Session<N>>;

/// Serves one import for ever. Sessions, and what waits, are in the name of its pod.
pub(crate) async fn serve<N: Net>(
    node: Arc<Node<N>>,
    socket: N::UdpSocket,
    wanted: ServicePort,
    party: Arc<Party>,
    outlet: Outlet<N>,
) {
    let (socket, import) =
        (ImportSocket { socket: Arc::new(socket), outlet }, Import::new(wanted, &party.log));
    let wanted = &import.wanted;
    let mut sessions: Table<N> = Sessions::new(MAX_SESSIONS, SESSION_IDLE);
    let mut counted = Counted::new(node.clone());
    let crowd = Crowd::new();
    let tries = Throttle::new(1, TRY);
    loop {
        let now = Instant::now().into_std();
        while let Some((client, session)) = sessions.poll_expired(now) {
            // One that only listens lives by what it hears.
            if session.signs.take_answered() && !session.is_over() {
                sessions.insert(client, session, now);
            } else {
                debug!(%wanted, %client, "session idle; closed");
            }
        }
        counted.set(sessions.len());
        let expiry = sessions.poll_timeout().map(Instant::from_std);
        let (datagram, client) = tokio::select! {
            biased;
            received = receive(&*socket.socket, &node.buffers) => match received {
                Ok(received) => received,
                Err(error) => {
                    import.tell_fault(&error, "receive datagrams");
                    sleep(Duration::from_millis(10)).await;
                    continue;
                }
            },
            () = sleep_until(expiry.unwrap_or_else(Instant::now)), if expiry.is_some() => continue,
        };
        let now = Instant::now().into_std();
        let leaves = |session: &mut Session<N>| session.is_over() || session.is_withdrawn(&node, wanted);
        if sessions.touch(&client, now).is_some_and(leaves) {
            sessions.remove(&client);
        }
        if sessions.touch(&client, now).is_none() {
            let opened = open(&node, (&socket, client), &import, &tries, |bound, take| {
                room((bound, take), &party, &mut sessions, wanted)
            });
            let session = match opened {
                Ok(session) => session,
                Err(reason) => {
                    match reason {
                        NoSession::Absent => import.tell_no_session(&node, None),
                        NoSession::Because(reason) => import.tell_no_session(&node, Some(reason.to_owned())),
                        NoSession::Full | NoSession::Failing => {}
                    }
                    node.counters.datagrams_dropped.inc();
                    continue;
                }
            };
            if sessions.insert(client, session, now).is_some() {
                crowd.tell(wanted);
            }
        }
        if let Some(session) = sessions.touch(&client, now)
            && !Queued::new(&datagram, &party.datagrams).is_some_and(|datagram| session.send(datagram))
        {
            node.counters.datagrams_dropped.inc();
        }
    }
}

/// Why a session is not opened.
enum NoSession {
    /// There is no candidate.
    Absent,
    /// The pod has as many as it may, as is told elsewhere.
    Full,
    /// All candidates have just failed, as was told then.
    Failing,
    Because(&'static str),
}

/// How one of a bound is taken.
type Take = fn(&Arc<Bound>, &Owner) -> Option<Held>;

/// Room for one more session of a pod. Where it has as many as it may, the one of this import that was idle longest gives
/// way.
fn room<N: Net>(
    (bound, take): (&Arc<Bound>, Take),
    party: &Party,
    sessions: &mut Table<N>,
    wanted: &ServicePort,
) -> Option<Held> {
    if let Some(held) = take(bound, &party.owner) {
        return Some(held);
    }
    party.tell_full(
        bound,
        wanted,
        "UDP sessions may be three quarters of them; an idle one gives way to a new one, or its datagrams are dropped",
    );
    drop(sessions.pop_idle(GIVES_WAY, Instant::now().into_std()));
    let held = take(bound, &party.owner);
    if held.is_none() {
        party.note_no_session();
    }
    held
}

/// Opens a session, where there is `room` for it.
fn open<N: Net>(
    node: &Arc<Node<N>>,
    (socket, client): (&ImportSocket<N>, SocketAddr),
    import: &Arc<Import>,
    tries: &Throttle,
    room: impl FnOnce(&Arc<Bound>, Take) -> Option<Held>,
) -> Result<Session<N>, NoSession> {
    let wanted = &import.wanted;
    let version = *node.changed.borrow();
    let candidate = node.candidates(wanted).into_iter().next().ok_or(NoSession::Absent)?;
    let failing = node.routes().table.is_failing(wanted, &candidate, Instant::now().into_std());
    if failing && tries.permit().is_none() {
        return Err(NoSession::Failing);
    }
    let signs = Signs::default();
    let path_fails = |reason| {
        node.report(wanted, &candidate, Outcome::Refused, reason);
        NoSession::Because(reason)
    };
    match &candidate {
        Candidate::Local(_) => {
            let held = room(&node.flows, Bound::take_session).ok_or(NoSession::Full)?;
            let (queue, mut queued) = pod::queue();
            let answers = Answers::Client(socket.clone(), client, signs.clone());
            let (serving, import, owner) = (node.clone(), import.clone(), held.owner().clone());
            let task = node.tasks.spawn(async move {
                let choose = || serving.candidates(&import.wanted);
                let served =
                    pod::run(&serving, (&import.wanted, &owner), choose, &mut queued, &answers).await;
                if let Err(refused) = served {
                    import.tell_no_session(&serving, Some(refused.reason));
                }
            });
            Ok(Session { path: Path::Here { queue, _task: AbortOnDrop(task) }, signs, version, _held: held })
        }
        Candidate::Remote(router) => {
            let peer = node.peer(router).ok_or_else(|| path_fails("too many peers"))?;
            let link =
                peer.datagrams(node).ok_or_else(|| path_fails("no link to the router that offers it"))?;
            let held = room(&peer.sessions, Bound::take).ok_or(NoSession::Full)?;
            let session = node.next_id();
            let open = Open {
                flow: node.seed(),
                wanted: wanted.clone(),
                namespace: None,
                consumer: held.owner().number(),
            };
            let reply =
                Reply { socket: socket.clone(), client, import: import.clone(), signs: signs.clone() };
            // Not opened, there is none to close.
            match link.open(session, open, reply) {
                true => {
                    let path = Path::There { router: router.clone(), link, session };
                    Ok(Session { path, signs, version, _held: held })
                }
                false => Err(NoSession::Because("too much data queued for the router that offers it")),
            }
        }
    }
}
