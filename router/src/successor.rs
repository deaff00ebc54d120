//! A pod's next sidecar takes the place of the one before.
//!
//! What a sidecar says of itself anybody can say who may reach the router's socket. That it is the same pod's, the
//! kernel says: its sockets are of the same network namespace, where nobody makes one who is not in it. Before its
//! first socket a conversation is nobody's next one and has none. Where the kernel does not say it (before Linux
//! 5.14), none ever has: what is left is kept for its time.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::handoff;
use servicekeel_core::name::ServicePort;
use servicekeel_runtime::net::{Descriptor, Net};
use tokio::time::{sleep, timeout};

use crate::missing::Gone;
use crate::node::Node;
use crate::pods::{Pod, State};
use crate::sockets::Sockets;

/// How long the sockets of a sidecar that is gone are kept: it restarts.
pub(crate) const GRACE: Duration = Duration::from_secs(30);
/// How long the old sockets of a sidecar that came back stay beside its new ones.
pub(crate) const OVERLAP: Duration = Duration::from_secs(2);

impl<N: Net> Pod<N> {
    /// Whether this is what is left of an earlier conversation of the same pod.
    pub(crate) fn came_before(&self, later: &Self) -> bool {
        *self.state.borrow() != State::Connected && is_next(later, self)
    }

    /// The pod's next sidecar has this Service at an address. One that lost its leases may have given it to another
    /// Service than before, and the kernel shares new connections out among all sockets of an address.
    pub(crate) fn give_way(&self, at: SocketAddr, wanted: &ServicePort) {
        self.imports().retain(|_, served| served.at != at || served.wanted == *wanted);
    }
}

/// A conversation began: it is in the table from now on.
pub(crate) fn begin<N: Net>(node: &Node<N>, pod: &Arc<Pod<N>>) {
    let mut pods = node.pods();
    node.missing.came(|gone| is_back(gone, pod));
    pods.insert(pod.session, pod.clone());
}

/// A socket came from the pod, on whose thread this is: it must be of the same network namespace as those before it.
/// The first one shows whose next one it is, which is superseded then.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`]: it is of another.
pub(crate) fn identify<N: Net>(node: &Node<N>, pod: &Pod<N>, socket: &N::Descriptor) -> io::Result<()> {
    let Some(namespace) = socket.namespace()? else { return Ok(()) };
    match pod.namespace.get() {
        Some(known) if *known == namespace => return Ok(()),
        Some(_) => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the socket belongs to another network namespace than this sidecar's first one",
            ));
        }
        None => {}
    }
    // Locked, since the end of an earlier one may be seen at this moment.
    let pods = node.pods();
    let _ = pod.namespace.set(namespace);
    node.missing.came(|gone| is_back(gone, pod));
    for old in pods.values().filter(|old| old.came_before(pod)) {
        old.state.send_replace(State::Superseded);
    }
    Ok(())
}

/// Waits until the sockets of a sidecar that is gone are to be closed; true where that is since the pod's next one has
/// come. `without_a_word`: it is missed, until it is back.
pub(crate) async fn keep<N: Net>(
    node: &Node<N>,
    pod: &Pod<N>,
    sockets: &mut Sockets<N>,
    without_a_word: bool,
) -> bool {
    let mut state = pod.state.subscribe();
    // Its next one may have come before its end was seen.
    let next: Vec<_> = {
        let pods = node.pods();
        let gone = Gone::new(pod);
        if without_a_word && !pods.values().any(|later| later.session > pod.session && is_back(&gone, later))
        {
            node.missing.went(gone);
        }
        let next: Vec<_> = pods.values().filter(|later| is_next(later, pod)).cloned().collect();
        pod.state.send_replace(if next.is_empty() { State::Gone } else { State::Superseded });
        next
    };
    for next in next {
        let moved: Vec<_> = next.imports().values().map(|s| (s.at, s.wanted.clone())).collect();
        moved.iter().for_each(|(at, wanted)| pod.give_way(*at, wanted));
    }
    let superseded = state.wait_for(|state| *state == State::Superseded);
    let mut over = pin!(timeout(GRACE, superseded));
    // Either end is fine: the time is over, or the pod's next sidecar has come.
    tokio::select! {
        biased;
        _ = &mut over => {}
        () = pod.stock.udp_spent() => {
            // A flow that comes goes on to the next endpoint, and a datagram is lost: those are not to come.
            sockets.withdraw_udp();
            let _ = over.await;
        }
    }
    let is_back = *pod.state.borrow() == State::Superseded;
    if is_back {
        sleep(OVERLAP).await;
    }
    is_back
}

/// Whether a conversation is a later one of the same pod: of its network namespace and its user by the kernel's word,
/// and the same pod by both sidecars', of which several may be in one namespace.
pub(crate) fn is_next<N: Net>(later: &Pod<N>, pod: &Pod<N>) -> bool {
    later.session > pod.session
        && pod.namespace.get().is_some()
        && pod.namespace.get() == later.namespace.get()
        && pod.credentials.uid == later.credentials.uid
        && same_claim(&pod.claim, &later.claim)
}

/// Whether a pod that is missed has come back. Where its namespace is not known it goes by what is said: nothing but
/// the status depends on it.
fn is_back<N: Net>(gone: &Gone, pod: &Pod<N>) -> bool {
    gone.user == pod.credentials.uid
        && same_claim(&gone.claim, &pod.claim)
        && gone.network.is_none_or(|network| pod.namespace.get() == Some(&network))
}

/// The same uid of a pod, or the same name where neither has one.
fn same_claim(a: &handoff::Pod, b: &handoff::Pod) -> bool {
    match (a.uid.as_str(), b.uid.as_str()) {
        ("", "") => !a.name.is_empty() && a.namespace == b.namespace && a.name == b.name,
        (one, other) => one == other,
    }
}
