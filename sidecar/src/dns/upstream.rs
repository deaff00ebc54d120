//! The upstreams: in which order they are asked, and which of their answers counts.
//!
//! - They are asked in the order of the settings; one that did not answer comes after the others for a while.
//! - One that is silent for its turn is not given up when the next one is asked: the first good answer counts.
//! - NOERROR and NXDOMAIN are answers. Any other code is passed on only if no other upstream does better.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hickory_net::NetError;
use hickory_proto::op::{DnsResponse, Message, ResponseCode};
use tokio::task::JoinSet;

use super::exchange::exchange;
use super::metrics::Metrics;
use super::question::Question;
use super::{Limits, UpstreamState, UpstreamStatus};

/// How long an upstream that did not answer comes after the others.
const REST: Duration = Duration::from_secs(30);
/// An upstream is told to be gone after so many tries in a row without an answer: a datagram may be lost.
const GONE: u32 = 3;
/// Between two lines of the log about one upstream.
const QUIET: Duration = Duration::from_secs(10);
/// How often the whole list is gone through, where time is left.
const ROUNDS: usize = 3;

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// None is configured.
    NoUpstream,
    /// Too much is under way.
    Busy,
    /// None answered in time.
    Unreachable,
    /// None gave a better code than this one.
    Said(ResponseCode),
}

/// The upstreams of a pod.
pub(super) struct Upstreams {
    servers: Mutex<Vec<Server>>,
    limits: Limits,
    metrics: Metrics,
}

#[derive(Debug)]
struct Server {
    addr: SocketAddr,
    health: Health,
    told: Told,
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Health {
    Good,
    Silent { until: Instant },
    Ourselves,
}

impl Upstreams {
    pub(super) fn new(addrs: Vec<SocketAddr>, limits: Limits, metrics: Metrics) -> Self {
        let servers =
            addrs.into_iter().map(|addr| Server { addr, health: Health::Good, told: Told::default() });
        Self { servers: Mutex::new(servers.collect()), limits, metrics }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Server>> {
        self.servers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is none to ask.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().iter().all(|server| server.health == Health::Ourselves)
    }

    /// Never asks a server again that is what listens at `own`.
    pub(super) fn refuse(&self, own: SocketAddr) {
        for server in self.lock().iter_mut().filter(|server| leads_to(server.addr, own)) {
            server.health = Health::Ourselves;
            tracing::error!(
                upstream = %server.addr, listening = %own,
                "refused a DNS upstream that is this sidecar itself; set SIDECAR_DNS_UPSTREAM to the cluster's DNS"
            );
        }
    }

    pub(super) fn status(&self) -> Vec<UpstreamStatus> {
        let state = |health| match health {
            Health::Good => UpstreamState::Good,
            Health::Silent { .. } => UpstreamState::Silent,
            Health::Ourselves => UpstreamState::Ourselves,
        };
        self.lock()
            .iter()
            .map(|server| UpstreamStatus { address: server.addr, state: state(server.health) })
            .collect()
    }

    /// Asks one after the other: the answer, read and as it came.
    ///
    /// # Errors
    /// Where none gives an answer in time.
    pub(super) async fn ask(&self, question: &Question) -> Result<(Message, Vec<u8>), Failure> {
        let end = tokio::time::Instant::now() + self.limits.all_tries;
        let mut asking = Asking { upstreams: self, end, tries: JoinSet::new(), open: Vec::new(), said: None };
        let mut order = order(&self.lock(), now());
        for _ in 0..ROUNDS {
            let mut silent = Vec::new();
            for addr in order {
                if tokio::time::Instant::now() >= end {
                    break;
                }
                match asking.turn(addr, question).await {
                    Turn::Answer(response) => return Ok(response.into_parts()),
                    Turn::Said => {}
                    Turn::Silent => silent.push(addr),
                }
            }
            if asking.said.is_some() || silent.is_empty() {
                break;
            }
            order = silent;
        }
        match asking.said {
            Some(code) => Err(Failure::Said(code)),
            None => asking.last().await.map(DnsResponse::into_parts).ok_or(Failure::Unreachable),
        }
    }

    fn answered(&self, addr: SocketAddr) {
        self.note(addr, |server| {
            server.health = Health::Good;
            if server.told.is_news(true, now()) {
                tracing::info!(upstream = %addr, "the DNS upstream answers again");
            }
        });
    }

    fn failed(&self, addr: SocketAddr, error: &NetError) {
        self.metrics.upstream_failures.inc();
        let now = now();
        self.note(addr, |server| {
            server.health = Health::Silent { until: now + REST };
            if server.told.is_news(false, now) {
                tracing::warn!(upstream = %addr, %error, "the DNS upstream does not answer");
            }
        });
    }

    fn note(&self, addr: SocketAddr, change: impl FnOnce(&mut Server)) {
        let mut servers = self.lock();
        let server = servers.iter_mut().find(|server| server.addr == addr);
        if let Some(server) = server.filter(|server| server.health != Health::Ourselves) {
            change(server);
        }
    }
}

/// One question, and the tries of it that may still be answered. Dropped, it listens no more.
struct Asking<'u> {
    upstreams: &'u Upstreams,
    end: tokio::time::Instant,
    tries: JoinSet<(SocketAddr, Result<DnsResponse, NetError>)>,
    /// Whose tries these are.
    open: Vec<SocketAddr>,
    /// The first code that was no answer.
    said: Option<ResponseCode>,
}

enum Turn {
    Answer(DnsResponse),
    /// It gave another code than those of answers.
    Said,
    Silent,
}

impl Asking<'_> {
    /// Asks an upstream, unless it still owes an answer, and waits for its turn's time; another's answer that comes
    /// meanwhile is as good.
    async fn turn(&mut self, addr: SocketAddr, question: &Question) -> Turn {
        let limits = self.upstreams.limits;
        let now = tokio::time::Instant::now();
        if !self.open.contains(&addr) {
            let (within, one_try, question) = (self.end - now, limits.one_try, question.clone());
            self.open.push(addr);
            self.tries.spawn(async move { (addr, exchange(addr, &question, one_try, within).await) });
        }
        let until = self.end.min(now + limits.one_try);
        loop {
            match self.next(until).await {
                Some((_, Ok(response))) if is_answer(&response) => return Turn::Answer(response),
                Some((from, result)) if from == addr => {
                    return match result {
                        Ok(_) => Turn::Said,
                        Err(error) => {
                            self.upstreams.failed(addr, &error);
                            Turn::Silent
                        }
                    };
                }
                Some(_) => {}
                None => {
                    self.upstreams.failed(addr, &NetError::Timeout);
                    return Turn::Silent;
                }
            }
        }
    }

    /// All had their turns: what else comes in time.
    async fn last(&mut self) -> Option<DnsResponse> {
        while let Some((_, result)) = self.next(self.end).await {
            if let Some(response) = result.ok().filter(is_answer) {
                return Some(response);
            }
        }
        None
    }

    /// The next try that has come to its end, where one does in time.
    async fn next(
        &mut self,
        until: tokio::time::Instant,
    ) -> Option<(SocketAddr, Result<DnsResponse, NetError>)> {
        let ended = tokio::time::timeout_at(until, self.tries.join_next()).await.ok()??;
        let (from, result) = ended.ok()?;
        self.open.retain(|addr| *addr != from);
        if let Ok(response) = &result {
            self.upstreams.answered(from);
            if !is_answer(response) {
                // Codes beyond four bits are about EDNS between us and it.
                let code = response.response_code;
                let code = if code.high() > 0 { ResponseCode::ServFail } else { code };
                self.said.get_or_insert(code);
            }
        }
        Some((from, result))
    }
}

fn is_answer(response: &DnsResponse) -> bool {
    matches!(response.response_code, ResponseCode::NoError | ResponseCode::NXDomain)
}

/// Whom to ask first: those that answer, then those that rest.
fn order(servers: &[Server], now: Instant) -> Vec<SocketAddr> {
    let resting = |server: &&Server| matches!(server.health, Health::Silent { until } if now < until);
    let asked = || servers.iter().filter(|server| server.health != Health::Ourselves);
    let awake = asked().filter(|server| !resting(server));
    awake.chain(asked().filter(resting)).map(|server| server.addr).collect()
}

/// Whether packets to `upstream` arrive at what listens at `own`. Linux takes the unspecified address as a
/// destination for loopback, and a listener at it takes what comes to any address of the machine; of those the
/// loopback ones are known without asking.
fn leads_to(upstream: SocketAddr, own: SocketAddr) -> bool {
    let destination = match upstream.ip().to_canonical() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let own_ip = own.ip().to_canonical();
    upstream.port() == own.port()
        && (destination == own_ip || (own_ip.is_unspecified() && destination.is_loopback()))
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_to_ourselves() {
        let leads = |upstream: &str, own: &str| leads_to(upstream.parse().unwrap(), own.parse().unwrap());
        for (upstream, own) in [
            ("127.0.0.2:53", "127.0.0.2:53"),
            ("[::ffff:127.0.0.2]:53", "127.0.0.2:53"),
            ("0.0.0.0:53", "127.0.0.1:53"),
            ("127.0.0.53:53", "0.0.0.0:53"),
            ("[::1]:53", "[::]:53"),
            ("127.0.0.1:53", "[::]:53"),
        ] {
            assert!(leads(upstream, own), "{upstream} is {own}");
        }
        for (upstream, own) in [
            ("127.0.0.2:5353", "127.0.0.2:53"),
            ("127.0.0.1:53", "127.0.0.2:53"),
            ("0.0.0.0:53", "127.0.0.2:53"),
            ("10.96.0.10:53", "0.0.0.0:53"),
        ] {
            assert!(!leads(upstream, own), "{upstream} is not {own}");
        }
    }

    #[test]
    fn those_that_rest_come_last() {
        let now = now();
        let server = |last, health| Server {
            addr: SocketAddr::from(([192, 0, 2, last], 53)),
            health,
            told: Told::default(),
        };
        let servers = [
            server(1, Health::Silent { until: now + REST }),
            server(2, Health::Good),
            server(3, Health::Ourselves),
            server(4, Health::Silent { until: now + REST / 2 }),
            server(5, Health::Good),
        ];
        let asked = |at| order(&servers, at).iter().map(|addr| addr.ip().to_string()).collect::<Vec<_>>();
        assert_eq!(asked(now), ["192.0.2.2", "192.0.2.5", "192.0.2.1", "192.0.2.4"]);
        assert_eq!(asked(now + REST / 2), ["192.0.2.2", "192.0.2.4", "192.0.2.5", "192.0.2.1"]);
        assert_eq!(asked(now + REST), ["192.0.2.1", "192.0.2.2", "192.0.2.4", "192.0.2.5"]);
    }

    #[test]
    fn a_lossy_upstream_does_not_fill_the_log() {
        let start = now();
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
}
