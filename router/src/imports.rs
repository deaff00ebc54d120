//! Imports: the listening sockets of pods, on which the router accepts.

use std::io;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use servicekeel_core::name::ServicePort;
use servicekeel_runtime::net::{Listener, Net};
use servicekeel_runtime::throttle::{ByReason, Throttle};
use tokio::sync::oneshot;
use tokio::task::yield_now;
use tokio::time::sleep;
use tracing::warn;

use crate::absence::{Absence, absence};
use crate::bounds::{Held, Party};
use crate::ended::Ended;
use crate::endpoint::Reply;
use crate::node::Node;
use crate::outbound;
use crate::tasks::AbortOnDrop;

/// How long to wait where the system can't give another descriptor.
const PAUSE: Duration = Duration::from_millis(50);

/// How many connections are taken at the last moment, before a socket closes.
const LAST: usize = 1024;

/// How often it is told that the flows of an import find no endpoint, and that its socket fails.
const TELL: Duration = Duration::from_secs(10);

/// How many tasks whose flow is taken are told of it at once.
const TAKEN: usize = 16;

/// One import.
pub(crate) struct Import {
    pub(crate) wanted: ServicePort,
    /// For the log: flows, or UDP sessions, that found no endpoint.
    failures: ByReason,
    /// For the log: its socket fails.
    faults: ByReason,
    /// Where its last flow went.
    pub(crate) leaves_node: AtomicBool,
    pub(crate) taken: Taken,
    /// Clients that wait and have ended.
    pub(crate) ended: Ended,
}

/// What tells the tasks that waited for an endpoint of this node that their flows are taken. It need not wake them one by
/// one: what they hold has gone with the flow, and each ends by itself before long.
#[derive(Default)]
pub(crate) struct Taken(Mutex<Vec<Reply<()>>>);

impl Taken {
    /// From the thread that carries the flow.
    pub(crate) fn put(&self, reply: Reply<()>) {
        self.tell(2 * TAKEN, Some(reply));
    }

    /// Tells them all once they are so many.
    fn tell(&self, many: usize, another: Option<Reply<()>>) {
        let mut replies = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        replies.extend(another);
        if replies.len() >= many {
            let all = std::mem::take(&mut *replies);
            drop(replies);
            all.into_iter().for_each(|reply| reply.taken(()));
        }
    }
}

impl Import {
    /// Its lines in the log are its pod's too.
    pub(crate) fn new(wanted: ServicePort, of_pod: &Arc<Throttle>) -> Arc<Self> {
        let throttle = || ByReason::new(TELL, of_pod);
        let (failures, faults) = (throttle(), throttle());
        Arc::new(Self {
            wanted,
            failures,
            faults,
            leaves_node: AtomicBool::new(true),
            taken: Taken::default(),
            ended: Ended::default(),
        })
    }

    /// Says that a flow found no endpoint, for this reason of the last one, or since there is none.
    pub(crate) fn tell_no_flow<N: Net>(&self, node: &Node<N>, reason: Option<String>) {
        if let Some((reason, suppressed)) = self.may_tell(node, reason) {
            warn!(wanted = %self.wanted, reason, suppressed, "no endpoint accepted the connection; client reset");
        }
    }

    /// The same of a UDP session.
    pub(crate) fn tell_no_session<N: Net>(&self, node: &Node<N>, reason: Option<String>) {
        if let Some((reason, suppressed)) = self.may_tell(node, reason) {
            warn!(wanted = %self.wanted, reason, suppressed, "no endpoint accepted the datagrams; dropped");
        }
    }

    /// Says that its socket fails.
    pub(crate) fn tell_fault(&self, error: &io::Error, what: &str) {
        if let Some(suppressed) = self.faults.permit(&error.to_string()) {
            warn!(wanted = %self.wanted, %error, suppressed, "cannot {what}; retrying");
        }
    }

    /// The reason in full, for which much is looked at, only where it may be told.
    fn may_tell<N: Net>(
        &self,
        node: &Node<N>,
        reason: Option<String>,
    ) -> Option<(String, Option<NonZeroU64>)> {
        match reason {
            Some(reason) => self.failures.permit(&reason).map(|suppressed| (reason, suppressed)),
            None => {
                let kind = Absence::of(node, &self.wanted).kind();
                self.failures.permit(&kind).map(|suppressed| (absence(node, &self.wanted), suppressed))
            }
        }
    }
}

/// Accepts on one import until it is to close, on the pod's `thread`. Where its pod has as many flows as it may,
/// connections wait in the backlog.
pub(crate) async fn serve<N: Net>(
    node: Arc<Node<N>>,
    listener: N::TcpListener,
    wanted: ServicePort,
    party: Arc<Party>,
    thread: N::Thread,
    close: oneshot::Receiver<AbortOnDrop>,
) {
    let import = Import::new(wanted, &party.log);
    let wanted = &import.wanted;
    let mut draining = node.draining.subscribe();
    let accept = async {
        loop {
            if !node.flows.has_room(&party.owner) && !import.ended.make_room() {
                party.tell_full(&node.flows, wanted, "further connections wait");
            }
            node.room_for_flow(&party.owner).await;
            match listener.accept().await {
                Ok((app, _)) => {
                    let held = node.flows.taken(&party.owner).await;
                    begin(&node, app, &import, held, &thread);
                }
                Err(error) => {
                    // Such as EMFILE: what waits stays in the backlog meanwhile.
                    node.relieve();
                    import.tell_fault(&error, "accept connections");
                    sleep(PAUSE).await;
                }
            }
        }
    };
    let _this = tokio::select! {
        biased;
        // What comes from now on waits in the backlog for the next router.
        _ = draining.wait_for(|draining| *draining) => return,
        closing = close => closing,
        () = accept => return,
    };
    // A listener that closes resets what waits in its backlog (tcp(7)), also where another socket of its address would
    // have taken it.
    for _ in 0..LAST {
        yield_now().await;
        let Some(Ok((app, _))) = listener.accept().now_or_never() else { return };
        let Some(held) = node.flows.take(&party.owner) else { return };
        begin(&node, app, &import, held, &thread);
    }
}

fn begin<N: Net>(
    node: &Arc<Node<N>>,
    app: N::TcpStream,
    import: &Arc<Import>,
    held: Held,
    thread: &N::Thread,
) {
    // They wait on this thread, which is awake.
    import.taken.tell(TAKEN, None);
    let flow = outbound::flow(node.clone(), app, import.clone(), held);
    // Most likely it goes where the last one went.
    node.tasks.spawn_flow(thread, import.leaves_node.load(Ordering::Relaxed), flow);
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpStream;

    use servicekeel_runtime::net::os::OsPodThread;

    use super::*;
    use crate::bounds::Owner;
    use crate::peers::tests::{node, web};

    #[test]
    fn tasks_whose_flows_are_taken_are_told_a_few_at_a_time() {
        let taken = Taken::default();
        let mut waiting = Vec::new();
        let mut told_of = |more: usize| {
            for _ in 0..more {
                let (reply, outcome) = Reply::new();
                taken.put(reply);
                waiting.push(outcome);
            }
            taken.tell(TAKEN, None);
            waiting.iter_mut().map(|outcome| usize::from(outcome.try_recv().is_ok())).sum::<usize>()
        };
        assert_eq!((told_of(TAKEN - 1), told_of(1), told_of(TAKEN - 1)), (0, TAKEN, 0));
    }

    /// One thread carries flows and none comes at which the others are told.
    #[test]
    fn they_are_told_also_where_no_further_flow_comes() {
        let taken = Taken::default();
        let mut waiting = Vec::from_iter((0..2 * TAKEN).map(|_| {
            let (reply, outcome) = Reply::new();
            taken.put(reply);
            outcome
        }));
        assert!(waiting.iter_mut().all(|outcome| outcome.try_recv().is_ok()));
    }

    /// Whether a connection that comes in the moment before the listener closes is still there after it.
    #[tokio::test]
    async fn what_waits_when_a_listener_closes_is_served() {
        let (node, wanted) = (node(), web("a.local"));
        let listener = node.net.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let party = Party::new(Owner::Conversation(1), &node.rooms, Arc::new(Throttle::new(1, TELL)));
        let (close, closing) = oneshot::channel();
        let task =
            node.tasks.spawn(serve(node.clone(), listener, wanted, party, OsPodThread::default(), closing));
        yield_now().await;
        // One thread: the router has no turn between the two.
        let mut app = TcpStream::connect(addr).unwrap();
        close.send(AbortOnDrop(task)).map_err(|_| "it has ended").unwrap();
        sleep(PAUSE).await;
        assert!(TcpStream::connect(addr).is_err(), "the listener is open");
        app.set_nonblocking(true).unwrap();
        let read = app.read(&mut [0]).unwrap_err();
        assert_eq!(read.kind(), io::ErrorKind::WouldBlock, "{read}");
    }
}
