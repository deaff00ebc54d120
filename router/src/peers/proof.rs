//! What a peer's connections have proven themselves by, and how long that holds.

use std::sync::{Arc, Weak};
use std::time::Duration;

use rustls::pki_types::{CertificateDer, UnixTime};
use servicekeel_runtime::latest;
use servicekeel_runtime::net::Net;

use super::{Distrust, Peer, State};
use crate::identity::{Identity, Proven};

/// The most different chains of certificates by which the connections of one peer stand at once. While certificates
/// change there are two.
pub(super) const MAX_PROOFS: usize = 16;

/// What a handshake has shown.
pub(crate) struct Shown {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    /// When it was found valid.
    pub(crate) at: UnixTime,
    /// When the peer's own proof ends.
    pub(crate) expires: UnixTime,
    /// When the proof of either side ends.
    pub(crate) until: UnixTime,
}

impl Shown {
    /// What `chain` has proven to a router by its own identity at the time of the handshake.
    pub(crate) fn new(
        chain: Vec<CertificateDer<'static>>,
        at: UnixTime,
        proven: &Proven,
        own: &Identity,
    ) -> Self {
        Self { chain, at, expires: proven.until, until: proven.until.min(own.expires()) }
    }
}

/// Certificates that a peer showed. Connections that showed the same share one.
pub(crate) struct Proof {
    chain: Vec<CertificateDer<'static>>,
    /// When they were found valid. What is up is judged by the dates of then: that a certificate has ended meanwhile is
    /// asked at the next connection.
    at: UnixTime,
    /// Becomes true, once, when they prove nothing any more.
    void: latest::Sender<bool>,
}

impl Proof {
    fn is_void(&self) -> bool {
        *self.void.borrow()
    }

    /// Judges it by the settings of now.
    fn judge(&self, identity: Option<&Identity>) -> Result<(), Distrust> {
        let judged = identity.ok_or(Distrust::NoIdentity).and_then(|identity| {
            identity.peer_at(&self.chain, self.at).map(drop).map_err(Distrust::Certificate)
        });
        if judged.is_err() {
            self.void.send_replace(true);
        }
        judged
    }
}

/// What one connection stands on: its own proof, and the peer's epoch.
pub(crate) struct Standing<N: Net> {
    /// Weak, since the peer holds what stands in its pool.
    peer: Weak<Peer<N>>,
    proof: Arc<Proof>,
    epoch: u64,
    /// How often a link had broken when the peer was heard on the connection last.
    breaks: u64,
    /// When the proof of either side ends. What is open then goes on; nothing new is begun. It is this connection's own:
    /// that another certificate of the peer has expired, be it a newer one, takes nothing from one that has not, by which
    /// the peer could connect anew at any time. To cut a certificate off before its end is what `revoked` is for.
    until: UnixTime,
}

impl<N: Net> Standing<N> {
    /// Whether the connection is of no use any more.
    pub(crate) fn is_lost(&self) -> bool {
        self.proof.is_void() || self.peer.upgrade().is_none_or(|peer| self.epoch != peer.epoch())
    }

    /// Whether that is since the settings do not trust it any more.
    pub(crate) fn is_distrusted(&self) -> bool {
        self.proof.is_void()
    }

    /// Resolves when the connection is of no use any more: it is not trusted, or has lost its path for good.
    pub(crate) async fn lost(&self) {
        let Some(peer) = self.peer.upgrade() else { return };
        let mut void = self.proof.void.subscribe();
        tokio::select! {
            biased;
            // The sender lives in self, so this ends by the value only.
            _ = void.wait_for(|void| *void) => {}
            () = peer.lost(self.epoch) => {}
        }
    }

    /// Whether nothing new is begun on the connection, since a certificate by which it was made has expired: this
    /// router's, or the peer's. A certificate is valid to the end of its last second.
    pub(crate) fn is_over(&self, now: UnixTime) -> bool {
        self.until < now
    }

    /// How long that is from now.
    pub(crate) fn left(&self, now: UnixTime) -> Duration {
        let left = (self.until.as_secs() + 1).saturating_sub(now.as_secs());
        Duration::from_secs(left)
    }

    pub(crate) fn until(&self) -> UnixTime {
        self.until
    }

    /// How often a link had broken when the peer was heard on the connection last.
    pub(crate) fn breaks(&self) -> u64 {
        self.breaks
    }

    /// The peer was heard on the connection.
    pub(super) fn heard(&mut self, breaks: u64) {
        self.breaks = breaks;
    }

    /// A link begins an epoch rather than being of one.
    pub(crate) fn begins(&mut self, epoch: u64) {
        self.epoch = epoch;
    }
}

impl<N: Net> Peer<N> {
    /// What a new connection stands on; `None` where the peer shows too many different certificates. It is to be judged
    /// after this call ([`Standing::judge`]): whoever changes the settings judges those that are here, so that none is
    /// missed.
    pub(crate) fn stand(self: &Arc<Self>, Shown { chain, at, expires, until }: Shown) -> Option<Standing<N>> {
        let mut state = self.lock();
        state.expires = Some(expires);
        state.proofs.retain(|proof| Arc::strong_count(proof) > 1 && !proof.is_void());
        let known = state.proofs.iter().find(|proof| proof.chain == chain).cloned();
        let proof = match known {
            Some(proof) => proof,
            None if state.proofs.len() >= MAX_PROOFS => return None,
            None => {
                let proof = Arc::new(Proof { chain, at, void: latest::Sender::new(false) });
                state.proofs.push(proof.clone());
                proof
            }
        };
        let (epoch, breaks) = (self.epoch(), self.breaks());
        Some(Standing { peer: Arc::downgrade(self), proof, epoch, breaks, until })
    }

    /// Judges what every connection was proven by, and cuts off those whose proof does not hold any more: says why.
    pub(crate) fn judge(&self, identity: Option<&Identity>) -> Result<(), Distrust> {
        let mut state = self.lock();
        let judged: Vec<_> = state.proofs.iter().map(|proof| proof.judge(identity)).collect();
        let judged = judged.into_iter().collect::<Result<(), _>>();
        if judged.is_err() {
            state.forget_void();
        }
        judged
    }
}

impl<N: Net> Standing<N> {
    /// Judges it by the settings of now.
    ///
    /// # Errors
    /// [`Distrust`] where they do not trust it: it is cut off then, with all that stands on the same.
    pub(crate) fn judge(&self, identity: Option<&Identity>) -> Result<(), Distrust> {
        self.proof.judge(identity)
    }
}

impl<N: Net> State<N> {
    fn forget_void(&mut self) {
        self.proofs.retain(|proof| !proof.is_void());
        self.idle.retain(|idle| !idle.standing.is_lost());
    }
}

#[cfg(test)]
mod tests;
