//! The upstreams: a question to them, on sockets. What is asked of whom and when is decided in `core::dns::upstream`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use servicekeel_core::dns::upstream::{Asking, Failure, Health, News, Servers, Times};
use servicekeel_core::dns::wire::{Outgoing, Response};
use tokio::task::JoinSet;
use tokio::time::sleep_until;

use super::exchange::{Buffer, exchange};
use super::metrics::Metrics;
use super::{Limits, UpstreamState, UpstreamStatus};

/// The upstreams of a pod.
pub(super) struct Upstreams {
    servers: Mutex<Servers>,
    times: Times,
    metrics: Metrics,
    buffer: Arc<Buffer>,
}

impl Upstreams {
    pub(super) fn new(addrs: Vec<SocketAddr>, limits: Limits, metrics: Metrics) -> Self {
        Self {
            servers: Mutex::new(Servers::new(addrs)),
            times: Times { one_try: limits.one_try, all_tries: limits.all_tries },
            metrics,
            buffer: Arc::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Servers> {
        self.servers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is none to ask.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Never asks a server again that is what listens at `own`.
    pub(super) fn refuse(&self, own: SocketAddr) {
        for upstream in self.lock().refuse(|addr| leads_to(addr, own)) {
            tracing::error!(
                %upstream, listening = %own,
                "ignoring a DNS upstream that is this sidecar itself; set SIDECAR_DNS_UPSTREAM to the cluster's DNS"
            );
        }
    }

    pub(super) fn status(&self) -> Vec<UpstreamStatus> {
        let state = |health| match health {
            Health::Good => UpstreamState::Good,
            Health::Silent => UpstreamState::Silent,
            Health::Refusing => UpstreamState::Refusing,
            Health::Ourselves => UpstreamState::Ourselves,
        };
        self.lock()
            .status(now())
            .map(|(address, health)| UpstreamStatus { address, state: state(health) })
            .collect()
    }

    /// Asks them.
    ///
    /// # Errors
    /// Where none gives an answer in time.
    pub(super) async fn ask(&self, question: &Arc<Outgoing>) -> Result<Response, Failure> {
        let mut asking = Asking::new(&self.lock(), self.times, now());
        // Dropped, they listen no more.
        let mut tries = JoinSet::new();
        loop {
            self.tell();
            if let Some(outcome) = asking.poll_outcome() {
                return outcome;
            }
            while let Some(send) = asking.poll_send() {
                let (buffer, question) = (self.buffer.clone(), question.clone());
                tries.spawn(async move { (send.id, exchange(&buffer, &question, send).await) });
            }
            tokio::select! {
                biased;
                Some(Ok((id, result))) = tries.join_next() => {
                    let servers = &mut self.lock();
                    match result {
                        Ok(heard) => asking.handle_heard(servers, id, heard, now()),
                        Err(fault) => asking.handle_fault(servers, id, fault, now()),
                    }
                }
                () = sleep_until(asking.poll_timeout().into()) => asking.handle_timeout(&mut self.lock(), now()),
            }
        }
    }

    /// Tells the log and the metrics what was learnt.
    fn tell(&self) {
        let mut servers = self.lock();
        self.metrics.upstream_failures.inc_by(servers.take_failures());
        while let Some(news) = servers.poll_news() {
            match news {
                News::Gone(upstream) => tracing::warn!(%upstream, "DNS upstream not responding"),
                News::Back(upstream) => tracing::info!(%upstream, "DNS upstream responding again"),
                News::NoEdns(upstream) => {
                    tracing::info!(%upstream, "DNS upstream does not support EDNS; querying without it");
                }
                News::NoCase(upstream) => {
                    tracing::info!(%upstream, "DNS upstream does not preserve the case of names; querying in lower case");
                }
            }
        }
    }
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
}
