//! The UDP socket of an import: each client's datagrams to an endpoint here or at another router.

use std::net::SocketAddr;
use std::sync::Arc;

use servicekeel_core::flow::frame::Open;
use servicekeel_core::mesh::table::Candidate;
use servicekeel_core::name::ServicePort;
use servicekeel_core::session::Sessions;
use servicekeel_runtime::net::Net;
use servicekeel_runtime::throttle::Throttle;
use tokio::sync::mpsc;
use tokio::time::{Duration, Instant, sleep, sleep_until};
use tracing::{debug, warn};

use super::link::{DatagramLink, Reply};
use super::pod::{self, Answers};
use super::{Counted, Crowd, MAX_SESSIONS, Queued, SESSION_IDLE, Signs, receive};
use crate::absence::absence;
use crate::imports::Import;
use crate::node::Node;
use crate::rooms::Account;
use crate::tasks::AbortOnDrop;

/// Where one client's datagrams go.
enum Session<N: Net> {
    Here { queue: mpsc::Sender<Queued>, signs: Signs, _task: AbortOnDrop },
    There { link: DatagramLink<N>, session: u64, signs: Signs },
}

impl<N: Net> Session<N> {
    fn is_over(&self) -> bool {
        match self {
            Self::Here { queue, .. } => queue.is_closed(),
            Self::There { link, signs, .. } => link.is_closed() || signs.is_over(),
        }
    }

    fn take_answered(&self) -> bool {
        let (Self::Here { signs, .. } | Self::There { signs, .. }) = self;
        signs.take_answered()
    }

    fn send(&self, datagram: Queued) -> bool {
        match self {
            Self::Here { queue, .. } => queue.try_send(datagram).is_ok(),
            Self::There { link, session, .. } => link.send(*session, datagram),
        }
    }
}

impl<N: Net> Drop for Session<N> {
    fn drop(&mut self) {
        if let Self::There { link, session, .. } = self {
            link.close(*session);
        }
    }
}

/// Serves one import for ever. What waits counts against its pod, the `owner`.
pub(crate) async fn serve<N: Net>(
    node: Arc<Node<N>>,
    socket: N::UdpSocket,
    wanted: ServicePort,
    owner: Arc<Account>,
    log: Arc<Throttle>,
) {
    let (socket, import) = (Arc::new(socket), Import::new(wanted, &log));
    let wanted = &import.wanted;
    let mut sessions: Sessions<SocketAddr, Session<N>> = Sessions::new(MAX_SESSIONS, SESSION_IDLE);
    let mut counted = Counted::new(node.clone());
    let crowd = Crowd::new();
    loop {
        let now = Instant::now().into_std();
        while let Some((client, session)) = sessions.poll_expired(now) {
            // One that only listens lives by what it hears.
            if session.take_answered() && !session.is_over() {
                sessions.insert(client, session, now);
            } else {
                debug!(%wanted, %client, "a session was idle");
            }
        }
        counted.set(sessions.len());
        let expiry = sessions.poll_timeout().map(Instant::from_std);
        let (datagram, client) = tokio::select! {
            biased;
            received = receive(&*socket, &node.buffers) => match received {
                Ok(received) => received,
                Err(error) => {
                    if let Some(suppressed) = import.faults.permit() {
                        warn!(%wanted, %error, suppressed, "cannot receive datagrams for an import; retrying");
                    }
                    sleep(Duration::from_millis(10)).await;
                    continue;
                }
            },
            () = sleep_until(expiry.unwrap_or_else(Instant::now)), if expiry.is_some() => continue,
        };
        let now = Instant::now().into_std();
        if sessions.touch(&client, now).is_some_and(|session| session.is_over()) {
            sessions.remove(&client);
        }
        if sessions.touch(&client, now).is_none() {
            let session = match open(&node, &socket, client, &import) {
                Ok(session) => session,
                Err(reason) => {
                    let told = || reason.map_or_else(|| absence(&node, wanted), str::to_owned);
                    import.tell_no_session(told);
                    node.counters.datagrams_dropped.inc();
                    continue;
                }
            };
            if sessions.insert(client, session, now).is_some() {
                crowd.tell(wanted);
            }
        }
        if let Some(session) = sessions.touch(&client, now)
            && !Queued::new(&datagram, &owner).is_some_and(|datagram| session.send(datagram))
        {
            node.counters.datagrams_dropped.inc();
        }
    }
}

/// Opens a session. No reason: there is no candidate.
fn open<N: Net>(
    node: &Arc<Node<N>>,
    socket: &Arc<N::UdpSocket>,
    client: SocketAddr,
    import: &Arc<Import>,
) -> Result<Session<N>, Option<&'static str>> {
    let candidates = node.candidates(&import.wanted);
    let signs = Signs::default();
    match candidates.first().ok_or(None)? {
        Candidate::Local(_) => {
            let (queue, queued) = pod::queue();
            let answers = Answers::Client(socket.clone(), client, signs.clone());
            let (serving, import) = (node.clone(), import.clone());
            let task = node.tasks.spawn(async move {
                if let Err(refused) = pod::run(&serving, &import.wanted, candidates, queued, answers).await {
                    import.tell_no_session(|| refused.reason);
                }
            });
            Ok(Session::Here { queue, signs, _task: AbortOnDrop(task) })
        }
        Candidate::Remote(router) => {
            let peer = node.peer(router).ok_or(Some("there are as many peers as there may be"))?;
            let link = peer.datagrams(node).ok_or(Some("there is no link to the router that offers it"))?;
            let session = node.next_id();
            let open = Open { flow: node.seed(), wanted: import.wanted.clone(), namespace: None };
            let reply =
                Reply { socket: socket.clone(), client, import: import.clone(), signs: signs.clone() };
            // Not opened, there is none to close.
            match link.open(session, open, reply) {
                true => Ok(Session::There { link, session, signs }),
                false => Err(Some("too much waits for the router that offers it")),
            }
        }
    }
}
