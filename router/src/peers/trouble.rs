//! What hinders a peer, or work with it: for whoever looks at the status, where the log may be long gone.

use std::net::IpAddr;

use servicekeel_core::mesh::table::LinkId;
use servicekeel_runtime::net::Net;
use tokio::time::{Duration, Instant};

use super::Peer;
use crate::identity::PeerError;

/// How long it is of interest that a connection, a link or a flow was refused: who is alive tries again within this time.
const FRESH: Duration = Duration::from_secs(60);
/// How long it is shown that offers are not taken: each side says so again while it is so.
const DECLINED: Duration = Duration::from_secs(120);

/// What is known since the last link.
#[derive(Default)]
pub(super) struct Trouble {
    /// How the link ended, or why the peer is no longer trusted.
    ended: Option<String>,
    /// A connection that showed a certificate with the peer's name, and was refused.
    refused: Option<Refused>,
}

/// New connections fail while a link is up.
pub(super) struct Rejection {
    /// `None`: until one succeeds. Else it came of somebody who has proven nothing, at the address of a link.
    until: Option<Instant>,
    reason: String,
}

/// Another router of the peer's name.
pub(super) struct Twin {
    pub(super) at: Instant,
    pub(super) from: IpAddr,
}

/// Flows that were refused since one side holds as many at the other as it may.
#[derive(Default)]
pub(super) struct Fullness {
    /// Here, and why.
    here: Option<(Instant, String)>,
    /// There, and why.
    there: Option<(Instant, String)>,
}

fn fresh(at: Instant) -> bool {
    at.elapsed() < FRESH
}

struct Refused {
    at: Instant,
    from: IpAddr,
    reason: String,
    /// For the dates of the certificate.
    untimely: bool,
}

impl<N: Net> Peer<N> {
    /// How the link ended, or why the peer is not trusted any more.
    pub(crate) fn note_end(&self, reason: impl Into<String>) {
        let mut state = self.lock();
        state.trouble.ended = Some(reason.into());
    }

    /// A connection with a certificate of the peer's name was refused. Anybody can make one: it counts only where there is
    /// no link.
    pub(crate) fn note_refused(&self, from: IpAddr, error: &PeerError) {
        let mut state = self.lock();
        if state.links.is_empty() {
            let untimely = matches!(error, PeerError::Expired { .. } | PeerError::NotYetValid { .. });
            let reason = error.to_string();
            state.trouble.refused = Some(Refused { at: Instant::now(), from, reason, untimely });
        }
    }

    /// A new connection failed since one of the two routers rejects the other, which is no matter of time: this one dialled
    /// it where the peer had proven itself. Says whether that is news.
    pub(crate) fn note_rejected(&self, reason: String) -> bool {
        self.lock().rejection.replace(Rejection { until: None, reason }).is_none()
    }

    /// The same of a connection that came from where it is linked, and has proven nothing.
    pub(crate) fn note_rejected_from(&self, from: IpAddr, reason: &str) -> bool {
        let mut state = self.lock();
        let linked = state.links.values().any(|link| link.with == from);
        let proven = state.rejection.as_ref().is_some_and(|known| known.until.is_none());
        if !linked || proven {
            return false;
        }
        let reason = format!("one from {from} was rejected: {reason}");
        state.rejection.replace(Rejection { until: Some(Instant::now() + FRESH), reason }).is_none()
    }

    /// A new connection has succeeded. Says whether that is news.
    pub(crate) fn note_accepted(&self) -> bool {
        self.lock().rejection.take().is_some()
    }

    /// Why new connections fail, while there is a link.
    pub(crate) fn rejection(&self) -> Option<String> {
        let state = self.lock();
        let rejection = state.rejection.as_ref().filter(|_| !state.links.is_empty())?;
        let told = rejection.until.is_none_or(|until| Instant::now() < until);
        told.then(|| format!("new connections with {} fail: {}", self.id, rejection.reason))
    }

    /// That there is another router of its name, where that has shown lately.
    pub(crate) fn twin(&self) -> Option<String> {
        let state = self.lock();
        let Twin { at, from } = state.twin.as_ref().filter(|twin| fresh(twin.at))?;
        let (id, ago) = (&self.id, at.elapsed().as_secs());
        let linked = state.links.values().next();
        let linked = linked.map_or("was linked".into(), |link| format!("is linked from {}", link.with));
        Some(format!(
            "two routers have the name {id}: one {linked}, and the other was rejected {ago} s ago, from {from}: issue each node its own certificate"
        ))
    }

    /// A flow or session of the peer was rejected here, for want of room.
    pub(super) fn note_full_here(&self, reason: &str) {
        self.lock().fullness.here = Some((Instant::now(), reason.to_owned()));
    }

    /// One of this router was rejected there.
    pub(crate) fn note_full_there(&self, reason: &str) {
        self.lock().fullness.there = Some((Instant::now(), reason.to_owned()));
    }

    /// What was rejected lately for want of room, here and there.
    pub(crate) fn fullness(&self) -> Vec<String> {
        let (state, id) = (self.lock(), &self.id);
        let Fullness { here, there } = &state.fullness;
        let told = |what: &Option<(Instant, String)>, who: String| {
            let (at, reason) = what.as_ref().filter(|(at, _)| fresh(*at))?;
            Some(format!("{who} {} s ago: {reason}", at.elapsed().as_secs()))
        };
        let here = told(here, format!("further flows and UDP sessions of {id} were rejected"));
        here.into_iter().chain(told(there, format!("{id} rejected a flow"))).collect()
    }

    /// One side of a link does not take all offers of the other.
    pub(crate) fn note_declined(&self, id: LinkId, text: String) {
        if let Some(link) = self.lock().links.get_mut(&id) {
            link.declined = Some((Instant::now(), text));
        }
    }

    /// That one side does not take all offers of the other.
    pub(crate) fn declined(&self) -> Option<String> {
        let state = self.lock();
        let told = state.links.values().filter_map(|link| link.declined.as_ref());
        told.filter(|(when, _)| when.elapsed() < DECLINED).map(|(_, text)| text.clone()).next()
    }

    /// Why there is no link, as far as that is known. `dialled`: what came of dialling it since; that is newer than how
    /// the link ended, and where the other side cut it off it has the reason, which the end of a link has not.
    pub(crate) fn trouble(&self, dialled: Option<&str>) -> Option<String> {
        let state = self.lock();
        let Trouble { ended, refused } = &state.trouble;
        let ended = dialled.map(str::to_owned).or_else(|| ended.clone());
        let refused = refused.as_ref().filter(|refused| fresh(refused.at));
        let told = refused
            .map(|refused| format!("a connection from {} was rejected: {}", refused.from, refused.reason));
        match (ended, refused) {
            // The same words again.
            (Some(ended), Some(refused)) if ended.ends_with(&refused.reason) => Some(ended),
            (Some(ended), Some(_)) => Some(format!("{ended}; {}", told?)),
            (ended, _) => told.or(ended),
        }
    }

    /// Whether the peer was refused lately for the dates of its certificate.
    pub(crate) fn tries_in_vain(&self) -> bool {
        let state = self.lock();
        let refused = state.trouble.refused.as_ref();
        refused.is_some_and(|refused| refused.untimely && fresh(refused.at))
    }
}
