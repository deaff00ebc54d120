//! What is known of each upstream.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::dns::wire::Manner;

/// How long an upstream that did not answer comes after the others.
const REST: Duration = Duration::from_secs(30);
/// How long an upstream that refused is not asked again: a resolver tries a name under several domains one after the
/// other, and each would be refused again.
const MOMENT: Duration = Duration::from_secs(1);
/// How long it is remembered that an upstream does not bear EDNS, or does not keep the case of names.
const MANNERS: Duration = Duration::from_secs(900);
/// An upstream is told to be gone after so many tries in a row without an answer: a datagram may be lost.
const GONE: u32 = 3;
/// Between two lines of the log about one upstream.
const QUIET: Duration = Duration::from_secs(10);
/// The most news that wait to be told.
const MAX_NEWS: usize = 64;

/// How an upstream is, as the last query found it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It answered, or was never asked.
    Good,
    /// It did not answer. It is asked after the others for a while.
    Silent,
    /// It refused: nobody listens there, or no way leads there.
    Refusing,
    /// It is our own address, and never asked.
    Ourselves,
}

/// What the log should have of an upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// It does not answer.
    Gone(SocketAddr),
    /// It answers again.
    Back(SocketAddr),
    /// It does not bear EDNS, and is asked without for a while.
    NoEdns(SocketAddr),
    /// It does not keep the case of names, and is asked in lower case for a while.
    NoCase(SocketAddr),
}

/// The upstreams of a pod, in the order of its settings.
#[derive(Debug)]
pub struct Servers {
    servers: Vec<Server>,
    news: VecDeque<News>,
    failures: u64,
}

#[derive(Debug)]
struct Server {
    addr: SocketAddr,
    ourselves: bool,
    silent_until: Option<Instant>,
    refusing_until: Option<Instant>,
    edns: Habit,
    mixed_case: Habit,
    told: Told,
}

/// Whether an upstream bears something.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Habit {
    /// Not known: try it, and try without.
    #[default]
    Unknown,
    /// An answer to it came.
    Proven,
    /// Not before this time.
    Avoided { until: Instant },
}

impl Habit {
    fn is_used(self, now: Instant) -> bool {
        !matches!(self, Self::Avoided { until } if now < until)
    }
}

/// What the log has of an upstream.
#[derive(Debug, Default)]
struct Told {
    /// Tries in a row without an answer.
    failures: u32,
    gone: bool,
    at: Option<Instant>,
}

impl Told {
    /// Takes in that it answered, or did not. True where the log is to have it.
    fn is_news(&mut self, answered: bool, now: Instant) -> bool {
        self.failures = if answered { 0 } else { self.failures.saturating_add(1) };
        let news = if answered { self.gone } else { !self.gone && self.failures >= GONE };
        if !news || self.at.is_some_and(|at| now.saturating_duration_since(at) < QUIET) {
            return false;
        }
        self.gone = !answered;
        self.at = Some(now);
        true
    }
}

impl Servers {
    /// Of which nothing is known yet.
    pub fn new(addrs: impl IntoIterator<Item = SocketAddr>) -> Self {
        let servers = addrs.into_iter().map(|addr| Server {
            addr,
            ourselves: false,
            silent_until: None,
            refusing_until: None,
            edns: Habit::default(),
            mixed_case: Habit::default(),
            told: Told::default(),
        });
        Self { servers: servers.collect(), news: VecDeque::new(), failures: 0 }
    }

    /// Whether there is none to ask.
    pub fn is_empty(&self) -> bool {
        self.servers.iter().all(|server| server.ourselves)
    }

    /// Never asks those again that `leads` says are ourselves. Says which these are.
    pub fn refuse(&mut self, leads: impl Fn(SocketAddr) -> bool) -> Vec<SocketAddr> {
        let own = self.servers.iter_mut().filter(|server| leads(server.addr));
        own.map(|server| {
            server.ourselves = true;
            server.addr
        })
        .collect()
    }

    /// Each and how it is.
    pub fn status(&self, now: Instant) -> impl Iterator<Item = (SocketAddr, Health)> {
        self.servers.iter().map(move |server| {
            let health = match () {
                () if server.ourselves => Health::Ourselves,
                () if is_before(server.refusing_until, now) => Health::Refusing,
                () if server.silent_until.is_some() => Health::Silent,
                () => Health::Good,
            };
            (server.addr, health)
        })
    }

    /// What the log should have.
    pub fn poll_news(&mut self) -> Option<News> {
        self.news.pop_front()
    }

    /// How many tries failed since this was asked last.
    pub fn take_failures(&mut self) -> u64 {
        std::mem::take(&mut self.failures)
    }

    /// Whom to ask, in this order: those that answer, then those that rest; not those that refused a moment ago.
    pub(super) fn order(&self, now: Instant) -> Vec<usize> {
        let resting = |at: &usize| is_before(self.servers[*at].silent_until, now);
        let asked = || {
            (0..self.servers.len()).filter(|at| {
                let server = &self.servers[*at];
                !server.ourselves && !is_before(server.refusing_until, now)
            })
        };
        asked().filter(|at| !resting(at)).chain(asked().filter(resting)).collect()
    }

    pub(super) fn addr(&self, at: usize) -> SocketAddr {
        self.servers[at].addr
    }

    /// How to put a question to it at first.
    pub(super) fn manner(&self, at: usize, now: Instant) -> Manner {
        let server = &self.servers[at];
        Manner { edns: server.edns.is_used(now), mixed_case: server.mixed_case.is_used(now) }
    }

    /// What it is known to bear.
    pub(super) fn proven(&self, at: usize) -> Manner {
        let server = &self.servers[at];
        Manner { edns: server.edns == Habit::Proven, mixed_case: server.mixed_case == Habit::Proven }
    }

    pub(super) fn answered(&mut self, at: usize, now: Instant) {
        let server = &mut self.servers[at];
        (server.silent_until, server.refusing_until) = (None, None);
        if server.told.is_news(true, now) {
            let news = News::Back(server.addr);
            self.tell(news);
        }
    }

    pub(super) fn silent(&mut self, at: usize, now: Instant) {
        self.servers[at].silent_until = Some(now + REST);
        self.failed(at, now);
    }

    pub(super) fn refused(&mut self, at: usize, now: Instant) {
        self.servers[at].silent_until = Some(now + REST);
        self.servers[at].refusing_until = Some(now + MOMENT);
        self.failed(at, now);
    }

    fn failed(&mut self, at: usize, now: Instant) {
        self.failures += 1;
        let server = &mut self.servers[at];
        if server.told.is_news(false, now) {
            let news = News::Gone(server.addr);
            self.tell(news);
        }
    }

    /// It answered a query with an OPT record.
    pub(super) fn bears_edns(&mut self, at: usize) {
        self.servers[at].edns = Habit::Proven;
    }

    /// It kept the case.
    pub(super) fn keeps_case(&mut self, at: usize) {
        self.servers[at].mixed_case = Habit::Proven;
    }

    /// It answered without an OPT record what it did not answer with one. One that bore it before may just have lost
    /// datagrams: it is doubted first.
    pub(super) fn avoid_edns(&mut self, at: usize, now: Instant) {
        let server = &mut self.servers[at];
        if server.edns == Habit::Proven {
            server.edns = Habit::Unknown;
        } else if server.edns.is_used(now) {
            server.edns = Habit::Avoided { until: now + MANNERS };
            let news = News::NoEdns(server.addr);
            self.tell(news);
        }
    }

    /// The same, of the case of names.
    pub(super) fn avoid_mixed_case(&mut self, at: usize, now: Instant) {
        let server = &mut self.servers[at];
        if server.mixed_case == Habit::Proven {
            server.mixed_case = Habit::Unknown;
        } else if server.mixed_case.is_used(now) {
            server.mixed_case = Habit::Avoided { until: now + MANNERS };
            let news = News::NoCase(server.addr);
            self.tell(news);
        }
    }

    fn tell(&mut self, news: News) {
        if self.news.len() < MAX_NEWS {
            self.news.push_back(news);
        }
    }
}

fn is_before(until: Option<Instant>, now: Instant) -> bool {
    until.is_some_and(|until| now < until)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> Instant {
        // The one clock reading: an Instant has no other origin.
        #[allow(clippy::disallowed_methods)]
        Instant::now()
    }

    #[test]
    fn those_that_rest_come_last() {
        let now = start();
        let mut servers = Servers::new((1..=6).map(|last| SocketAddr::from(([192, 0, 2, last], 53))));
        servers.silent(0, now);
        servers.refuse(|addr| addr == SocketAddr::from(([192, 0, 2, 3], 53)));
        servers.silent(3, now - REST / 2);
        servers.refused(5, now);
        assert_eq!(servers.order(now), [1, 4, 0, 3], "the sixth has just refused");
        assert_eq!(servers.order(now + MOMENT), [1, 4, 0, 3, 5]);
        assert_eq!(servers.order(now + REST / 2), [1, 3, 4, 0, 5]);
        assert_eq!(servers.order(now + REST), [0, 1, 3, 4, 5]);
    }

    #[test]
    fn a_lossy_upstream_does_not_fill_the_log() {
        let start = start();
        let mut told = Told::default();
        let mut said = |answered, seconds| told.is_news(answered, start + Duration::from_secs(seconds));
        // One in two is lost.
        assert!((0..=100).all(|second| !said(second % 2 == 0, second)));
        // Gone, at the third try.
        assert_eq!([101, 102, 103, 104].map(|second| said(false, second)), [false, false, true, false]);
        // Back, which is told when the line before it is old enough.
        assert_eq!([105, 112, 113, 114].map(|second| said(true, second)), [false, false, true, false]);
        assert_eq!([115, 116, 117, 123].map(|second| said(false, second)), [false, false, false, true]);
    }

    #[test]
    fn habits_end() {
        let now = start();
        let mut servers = Servers::new([SocketAddr::from(([192, 0, 2, 1], 53))]);
        let fullest = Manner { edns: true, mixed_case: true };
        assert_eq!(servers.manner(0, now), fullest);
        servers.avoid_edns(0, now);
        servers.avoid_mixed_case(0, now + MANNERS / 2);
        assert_eq!(servers.manner(0, now + MANNERS / 2), Manner { edns: false, mixed_case: false });
        assert_eq!(servers.manner(0, now + MANNERS), Manner { edns: true, mixed_case: false });
        assert_eq!(servers.manner(0, now + 2 * MANNERS), fullest);
        // Twice where it was proven.
        servers.bears_edns(0);
        servers.avoid_edns(0, now);
        assert!(servers.manner(0, now).edns);
        servers.avoid_edns(0, now);
        assert!(!servers.manner(0, now).edns);
    }
}
