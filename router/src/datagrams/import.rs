//! The UDP socket of an import: each client's datagrams to an endpoint here or at another router.

use std::net::SocketAddr;
use std::sync::Arc;

use servicekeel_core::flow::frame::Open;
use servicekeel_core::mesh::table::Candidate;
use servicekeel_core::name::ServicePort;
use servicekeel_core::session::Sessions;
use servicekeel_runtime::net::{Datagrams, Net};
use tokio::sync::mpsc;
use tokio::time::{Duration, Instant, sleep, sleep_until};
use tracing::{debug, warn};

use super::link::{DatagramLink, Outgoing, Reply};
use super::pod::{self, Answers};
use super::{MAX_SESSIONS, SESSION_IDLE};
use crate::node::Node;
use crate::tasks::AbortOnDrop;

/// Where one client's datagrams go.
enum Session<N: Net> {
    Here { queue: mpsc::Sender<Vec<u8>>, _task: AbortOnDrop },
    There { link: DatagramLink<N>, session: u64 },
}

impl<N: Net> Session<N> {
    fn is_over(&self) -> bool {
        match self {
            Self::Here { queue, .. } => queue.is_closed(),
            Self::There { link, session } => link.is_over(*session),
        }
    }

    fn send(&self, datagram: Vec<u8>) -> bool {
        match self {
            Self::Here { queue, .. } => queue.try_send(datagram).is_ok(),
            Self::There { link, session } => link.send(Outgoing::Data { session: *session, bytes: datagram }),
        }
    }
}

impl<N: Net> Drop for Session<N> {
    fn drop(&mut self) {
        if let Self::There { link, session } = self {
            link.send(Outgoing::Close { session: *session });
        }
    }
}

/// Serves one import for ever.
pub(crate) async fn serve<N: Net>(node: Arc<Node<N>>, socket: N::UdpSocket, wanted: ServicePort) {
    let (socket, wanted) = (Arc::new(socket), Arc::new(wanted));
    let mut sessions: Sessions<SocketAddr, Session<N>> = Sessions::new(MAX_SESSIONS, SESSION_IDLE);
    let counted = Counted(node.clone(), 0);
    let mut counted = counted;
    let mut buf = vec![0; super::MAX_DATAGRAM];
    loop {
        while let Some((client, _)) = sessions.poll_expired(Instant::now().into_std()) {
            debug!(%wanted, %client, "a session was idle");
        }
        counted.set(sessions.len());
        let expiry = sessions.poll_timeout().map(Instant::from_std);
        let (len, client) = tokio::select! {
            biased;
            received = socket.recv_from(&mut buf) => match received {
                Ok(received) => received,
                Err(error) => {
                    debug!(%wanted, %error, "an import's socket");
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
            let Some(session) = open(&node, &socket, client, &wanted) else {
                node.counters.datagrams_dropped.inc();
                continue;
            };
            if let Some((client, _)) = sessions.insert(client, session, now) {
                warn!(%wanted, %client, limit = MAX_SESSIONS, "the oldest UDP session makes room");
            }
        }
        if let Some(session) = sessions.touch(&client, now)
            && !session.send(buf[..len].into())
        {
            node.counters.datagrams_dropped.inc();
        }
    }
}

fn open<N: Net>(
    node: &Arc<Node<N>>,
    socket: &Arc<N::UdpSocket>,
    client: SocketAddr,
    wanted: &Arc<ServicePort>,
) -> Option<Session<N>> {
    let candidates = node.candidates(wanted);
    match candidates.first()? {
        Candidate::Local(_) => {
            let (queue, queued) = pod::queue();
            let answers = Answers::Client(socket.clone(), client);
            let task = node.tasks.spawn(pod::run(node.clone(), wanted.clone(), candidates, queued, answers));
            Some(Session::Here { queue, _task: AbortOnDrop(task) })
        }
        Candidate::Remote(router) => {
            let link = node.peer(router).datagrams(node)?;
            let session = node.next_id();
            let open = Open { flow: node.seed(), wanted: (**wanted).clone(), namespace: None };
            let reply = Reply { socket: socket.clone(), client, wanted: wanted.clone() };
            link.open(session, open, reply).then_some(Session::There { link, session })
        }
    }
}

/// Keeps the count of sessions right, also where the import ends.
struct Counted<N: Net>(Arc<Node<N>>, i64);

impl<N: Net> Counted<N> {
    fn set(&mut self, sessions: usize) {
        let sessions = sessions as i64;
        if sessions != self.1 {
            self.0.counters.sessions_active.inc_by(sessions - self.1);
            self.1 = sessions;
        }
    }
}

impl<N: Net> Drop for Counted<N> {
    fn drop(&mut self) {
        self.set(0);
    }
}
