//! How it stands with an address that is dialled, and when that is told as trouble.

use servicekeel_core::name::RouterId;
use tokio::time::{Duration, Instant};

/// A configured peer that was not reached for so long is told as a problem: longer than a router takes to start anew.
const UNREACHED: Duration = Duration::from_secs(30);
/// How it stands with an address whose link has just ended: why that was says its peer.
pub(super) const REDIALLING: &str = "link down; redialling";

/// How it stands with an address that is dialled.
#[derive(Debug, Clone)]
pub(crate) struct Dial {
    /// Why there is no link; `None` where there is one, or the first dial is on its way.
    pub(crate) problem: Option<String>,
    /// The reason is no matter of time.
    lasting: bool,
    /// Since when there was no link that held ([`super::GOOD_LINK`]).
    since: Instant,
    is_linked: bool,
    /// Who was met there last.
    pub(super) met: Option<RouterId>,
    /// Whom the certificate names for which the last dial failed. It is not proven.
    pub(super) claimed: Option<RouterId>,
}

impl Dial {
    pub(crate) fn new() -> Self {
        let since = Instant::now();
        Self { problem: None, lasting: false, since, is_linked: false, met: None, claimed: None }
    }

    pub(super) fn linked(&mut self) {
        (self.problem, self.lasting, self.is_linked, self.claimed) = (None, false, true, None);
    }

    /// Why no dial succeeds since the last link; `None` before the first has failed.
    pub(crate) fn failure(&self) -> Option<&str> {
        self.problem.as_deref().filter(|problem| *problem != REDIALLING)
    }

    /// Whether nobody was met there.
    pub(crate) fn is_unmet(&self) -> bool {
        self.met.is_none()
    }

    /// Whether it is this router, as far as is known, that is dialled there.
    pub(crate) fn is_of(&self, id: &RouterId) -> bool {
        [&self.met, &self.claimed].contains(&&Some(id.clone()))
    }

    pub(super) fn failed(&mut self, problem: String, lasting: bool) {
        (self.problem, self.lasting, self.is_linked) = (Some(problem), lasting, false);
    }

    /// A link that held has ended.
    pub(super) fn held(&mut self) {
        self.since = Instant::now();
    }

    /// The reason where it is to be told as what keeps the router from its work: it is no matter of time, or there was
    /// time enough, and whoever was met there is not linked by another way. `is_up` says whether a router is linked.
    pub(crate) fn trouble(&self, now: Instant, is_up: impl FnOnce(&RouterId) -> bool) -> Option<&str> {
        let told = !self.is_linked && (self.lasting || now - self.since >= UNREACHED);
        let problem = self.problem.as_deref().filter(|_| told)?;
        (!self.met.as_ref().is_some_and(is_up)).then_some(problem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOMENT: Duration = Duration::from_millis(1);

    fn peer() -> RouterId {
        RouterId { cluster: "b.local".parse().unwrap(), node: "n".parse().unwrap() }
    }

    /// What a dial tells so long after now, where who was met there is not linked by another way.
    fn told(dial: &Dial, after: Duration) -> Option<&str> {
        dial.trouble(Instant::now() + after, |_| false)
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_mend_itself_is_told_after_30_seconds_without_a_link() {
        let mut dial = Dial::new();
        assert_eq!(told(&dial, UNREACHED), None, "it has not failed yet");
        tokio::time::advance(Duration::from_secs(10)).await;
        dial.failed("refused".into(), false);
        assert_eq!(told(&dial, Duration::from_secs(20) - MOMENT), None);
        assert_eq!(told(&dial, Duration::from_secs(20)), Some("refused"), "since it began");
        dial.linked();
        assert_eq!(told(&dial, UNREACHED), None);
        dial.failed(REDIALLING.into(), false);
        assert_eq!(told(&dial, Duration::from_secs(20)), Some(REDIALLING), "a link that held for no time");
        dial.linked();
        dial.failed("silent".into(), false);
        dial.held();
        tokio::time::advance(Duration::from_secs(10)).await;
        dial.failed("refused".into(), false);
        assert_eq!(told(&dial, Duration::from_secs(20) - MOMENT), None);
        assert_eq!(told(&dial, Duration::from_secs(20)), Some("refused"), "since the link ended");
    }

    #[tokio::test(start_paused = true)]
    async fn what_somebody_has_to_change_is_told_at_once() {
        let mut dial = Dial::new();
        dial.failed("not trusted".into(), true);
        assert_eq!(told(&dial, Duration::ZERO), Some("not trusted"));
        dial.failed("refused".into(), false);
        assert_eq!(told(&dial, Duration::ZERO), None);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_is_linked_by_another_way_is_no_trouble() {
        let id = peer();
        let mut dial = Dial::new();
        dial.met = Some(id.clone());
        dial.failed("refused".into(), true);
        let now = Instant::now();
        assert_eq!(dial.trouble(now, |met| *met == id), None);
        assert_eq!(dial.trouble(now, |met| *met != id), Some("refused"));
    }
}
