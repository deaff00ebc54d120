//! Whether a peer is in use: its links are watched more closely then.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};

use servicekeel_core::mesh::keepalive::Keepalive;
use servicekeel_runtime::latest;
use servicekeel_runtime::net::Net;
use tokio::time::Instant;

use super::Peer;

/// Uses of one peer. A use costs two atomic steps; the links are woken by the first after a pause only.
pub(crate) struct Activity {
    flows: AtomicUsize,
    uses: AtomicU64,
    /// Every link knows that the peer is in use.
    known: AtomicBool,
    resumed: latest::Sender<u64>,
}

impl Activity {
    pub(super) fn new() -> Self {
        Self {
            flows: AtomicUsize::new(0),
            uses: AtomicU64::new(0),
            known: AtomicBool::new(false),
            resumed: latest::Sender::new(0),
        }
    }

    /// The peer is used now, by either side.
    pub(crate) fn note(&self) {
        self.uses.fetch_add(1, SeqCst);
        if !self.known.load(SeqCst) && !self.known.swap(true, SeqCst) {
            self.resumed.send_modify(|times| *times += 1);
        }
    }

    /// How many flows use the peer or wait for it.
    pub(crate) fn flows(&self) -> usize {
        self.flows.load(SeqCst)
    }

    /// What a link looks at.
    pub(crate) fn watch(&self) -> Watch<'_> {
        self.known.store(false, SeqCst);
        Watch { activity: self, seen: self.uses.load(SeqCst), resumed: self.resumed.subscribe() }
    }
}

/// One link's view of the uses.
pub(crate) struct Watch<'a> {
    activity: &'a Activity,
    seen: u64,
    resumed: latest::Receiver<u64>,
}

impl Watch<'_> {
    /// Tells the link's machine of the uses since the last call.
    pub(crate) fn tell(&mut self, keepalive: &mut Keepalive) {
        let now = Instant::now().into_std();
        if !keepalive.is_used(now) {
            // Before the look at the uses: one that comes after it wakes this link.
            self.activity.known.store(false, SeqCst);
        }
        let uses = self.activity.uses.load(SeqCst);
        if std::mem::replace(&mut self.seen, uses) != uses || self.activity.flows() > 0 {
            keepalive.handle_use(now);
        }
    }

    /// Resolves when the peer is used again after a pause.
    pub(crate) async fn resumed(&mut self) {
        // The sender is the peer's, and outlives its links.
        let _ = self.resumed.changed().await;
    }
}

/// Counts a flow while it lasts.
pub(crate) struct Busy<N: Net>(Arc<Peer<N>>);

impl<N: Net> Busy<N> {
    pub(crate) fn new(peer: Arc<Peer<N>>) -> Self {
        peer.activity.flows.fetch_add(1, SeqCst);
        peer.activity.note();
        Self(peer)
    }
}

impl<N: Net> Drop for Busy<N> {
    fn drop(&mut self) {
        self.0.activity.flows.fetch_sub(1, SeqCst);
        // What lasted until now was a use until now.
        self.0.activity.note();
    }
}
