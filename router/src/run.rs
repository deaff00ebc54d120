//! The router as a whole: what it starts, how it follows its settings, how it ends.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use rustls::pki_types::UnixTime;
use servicekeel_core::name::RouterId;
use servicekeel_runtime::admin::{self, Admin};
use servicekeel_runtime::net::Net;
use servicekeel_runtime::ready::{Pending, Readiness};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{error, info, warn};

use crate::counters::Expiry;
use crate::identity::Untimely;
use crate::links::Dial;
use crate::node::{Node, SWEEP};
use crate::settings::Settings;
use crate::tasks::AbortOnDrop;
use crate::{inbound, links, pods, status};

/// How long flows may go on after the order to end. Short: meanwhile new connections wait in the sidecars' backlogs.
const DRAIN: Duration = Duration::from_millis(1500);

/// How often it is tried again to listen for peers.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);

/// Why the router can't start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The sidecars' socket.
    #[error("cannot listen for sidecars: {0} (listen.sidecars)")]
    Sidecars(std::io::Error),
    /// What accepts, dials or tells has panicked.
    #[error("internal error: a vital task panicked")]
    Fallen,
}

/// Ends every task when the router's future is dropped.
struct EndAll<N: Net>(Arc<Node<N>>);

impl<N: Net> Drop for EndAll<N> {
    fn drop(&mut self) {
        self.0.tasks.end();
    }
}

/// Runs a router until `shutdown` resolves, then lets flows end for a moment and closes everything.
///
/// `seed` is for what is drawn: its boot number, the order among equal endpoints, the jitter of dials. Two runs of a
/// router need different ones.
///
/// # Errors
/// [`RunError`] where it can't listen for sidecars, or has a fault. An address for peers or for the admin endpoint that
/// is taken, peers that can't be reached, and settings that turn bad, are no errors: it tries again, and keeps the last
/// good ones.
pub async fn run<N: Net>(
    mut settings: watch::Receiver<Arc<Settings>>,
    net: N,
    seed: u64,
    shutdown: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let first = settings.borrow_and_update().clone();
    let config = first.config.clone();
    let id = RouterId { cluster: config.cluster.clone(), node: config.node.clone() };
    let node = Node::new(net, id, seed, settings.clone());
    let _end_all = EndAll(node.clone());
    node.tell_limit();

    let path = &config.listen.sidecars;
    let sidecars = node.net.handoff_listen(path).await.map_err(RunError::Sidecars)?;
    let readiness = Readiness::new();
    let mut peers = Peers::new(node.clone(), first, readiness.clone());
    peers.listen().await;
    if let Some(addr) = config.listen.admin {
        let admin = admin(&node, readiness.clone());
        node.tasks.spawn_vital(async move {
            if let Err(error) = admin::serve(addr, admin, "listen.admin").await {
                error!(%error, "admin endpoint failed; everything else keeps running");
            }
        });
    }
    let accepting = node.tasks.spawn_vital(pods::serve(node.clone(), sidecars));
    peers.dial();
    info!(router = %node.id, sidecars = %path.display(), "serving");

    let mut shutdown = std::pin::pin!(shutdown);
    let mut sweep = Instant::now() + peers.pause();
    loop {
        tokio::select! {
            biased;
            () = &mut shutdown => break,
            Ok(()) = settings.changed() => {
                let new = settings.borrow_and_update().clone();
                peers.follow(new).await;
                sweep = sweep.min(Instant::now() + peers.pause());
            }
            () = node.tasks.fallen() => return Err(RunError::Fallen),
            () = node.ends_soon.notified() => sweep = sweep.min(Instant::now() + peers.pause()),
            () = sleep_until(sweep) => {
                node.sweep();
                peers.observe();
                sweep = Instant::now() + peers.pause();
            }
        }
    }

    info!(flows = node.counters.flows_active.get(), "draining");
    let _ending = readiness.wait_for("a restart: this router is shutting down");
    accepting.abort();
    peers.close();
    node.draining.send_replace(true);
    let idle = async {
        while node.counters.flows_active.get() > 0 {
            sleep(Duration::from_millis(20)).await;
        }
        // The links say goodbye.
        while node.counters.links_active.get() + node.counters.links_expired.get() > 0 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    if timeout(DRAIN, idle).await.is_err() {
        warn!(
            flows = node.counters.flows_active.get(),
            "flows still open after {} ms; closing them",
            DRAIN.as_millis()
        );
    }
    info!("stopped");
    Ok(())
}

fn admin<N: Net>(node: &Arc<Node<N>>, readiness: Readiness) -> Admin {
    let mut registry = Registry::default();
    node.counters.register(&mut registry);
    Expiry::register(node.settings.clone(), &mut registry);
    let node = node.clone();
    let status = move || {
        let node = node.clone();
        async move {
            serde_json::to_string(&status::read(&node).await)
                .unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
        }
    };
    Admin::new(readiness, registry, status).with_page(include_str!("page.html"))
}

/// The ways to and from other routers, as the settings have them.
struct Peers<N: Net> {
    node: Arc<Node<N>>,
    settings: Arc<Settings>,
    listening: Option<AbortHandle>,
    /// Why nothing listens, as the log has it.
    told: Option<&'static str>,
    /// The tasks that keep a link to each address of the config.
    dialling: BTreeMap<String, AbortOnDrop>,
    readiness: Readiness,
    /// The own certificate proves nothing just now.
    untimely: Option<(Untimely, Pending)>,
}

impl<N: Net> Peers<N> {
    fn new(node: Arc<Node<N>>, settings: Arc<Settings>, readiness: Readiness) -> Self {
        let dialling = BTreeMap::new();
        let mut peers =
            Self { node, settings, listening: None, told: None, dialling, readiness, untimely: None };
        peers.observe();
        peers
    }

    /// How long until the next sweep.
    fn pause(&self) -> Duration {
        let now = self.node.time();
        self.node.next_end(now).map_or(SWEEP, |expires| pause(expires, now))
    }

    /// Looks at the dates of certificates, which become wrong by themselves.
    fn observe(&mut self) {
        let counters = &self.node.counters;
        let ends = self.settings.certificate_ends();
        counters.certificate_ends.set(ends.unwrap_or(0).try_into().unwrap_or(i64::MAX));
        let untimely = self.settings.untimely();
        counters.config_refused.set(self.settings.pending.refused.is_some().into());
        if untimely != self.untimely.as_ref().map(|(untimely, _)| *untimely) {
            self.untimely = untimely.map(|untimely| {
                let what = match untimely {
                    Untimely::Expired(_) => "a new certificate: this router's own has expired",
                    Untimely::NotYetValid(_) => "this router's certificate to become valid",
                };
                (untimely, self.readiness.wait_for(what))
            });
        }
        self.node.all_peers().iter().for_each(|peer| peer.look_for_renewal(&self.node, self.node.time()));
        self.node.count_links();
    }

    /// Listens, once there is an identity to show.
    async fn listen(&mut self) {
        match (self.settings.config.listen.peers, &self.settings.identity) {
            _ if self.listening.is_some() => {}
            (Some(addr), Some(_)) => {
                let node = self.node.clone();
                self.listening = Some(match node.net.listen(addr).await {
                    Ok(listener) => {
                        info!(%addr, "listening for peers");
                        self.node.tasks.spawn_vital(inbound::listen(node, listener))
                    }
                    Err(error) => {
                        warn!(%addr, %error, "cannot listen for peers; retrying (listen.peers)");
                        let waits = self
                            .readiness
                            .wait_for("the address for peers (listen.peers): it cannot be listened at");
                        self.node.tasks.spawn_vital(async move {
                            let listener = listen_again(&node, addr).await;
                            drop(waits);
                            info!(%addr, "listening for peers");
                            inbound::listen(node, listener).await;
                        })
                    }
                });
            }
            (_, identity) => {
                let why = match identity {
                    None if self.settings.untimely.is_some() => {
                        "this router's certificate is not valid now: serving this node only until it has a valid one"
                    }
                    None => "no `identity` in the config: serving this node only",
                    Some(_) => "listen.peers is off: peers cannot dial this router",
                };
                if self.told.replace(why) != Some(why) {
                    info!("{why}");
                }
            }
        }
    }

    /// Dials the peers of the settings, and no others any more.
    fn dial(&mut self) {
        let wanted: Vec<String> = match self.settings.identity {
            Some(_) => self.settings.config.peers.iter().map(|peer| peer.address.clone()).collect(),
            None => Vec::new(),
        };
        self.dialling.retain(|address, _| wanted.contains(address));
        self.node.dials().retain(|address, _| wanted.contains(address));
        for address in wanted {
            let node = &self.node;
            self.dialling.entry(address.clone()).or_insert_with(|| {
                node.dials().insert(address.clone(), Dial::new());
                AbortOnDrop(node.tasks.spawn_vital(links::keep(node.clone(), address)))
            });
        }
    }

    /// Takes new settings: what they do not change goes on as it is.
    async fn follow(&mut self, new: Arc<Settings>) {
        self.settings = new;
        self.observe();
        for peer in self.node.all_peers() {
            if let Err(reason) = peer.judge(self.settings.identity.as_deref()) {
                warn!(peer = %peer.id, %reason, "peer no longer trusted; disconnected");
                peer.note_end(reason.to_string());
            }
        }
        self.listen().await;
        self.dial();
    }

    fn close(&mut self) {
        if let Some(listening) = self.listening.take() {
            listening.abort();
        }
    }
}

/// Listens at an address that could not be had, once it can.
async fn listen_again<N: Net>(node: &Node<N>, addr: SocketAddr) -> N::TcpListener {
    loop {
        sleep(LISTEN_AGAIN).await;
        if let Ok(listener) = node.net.listen(addr).await {
            return listener;
        }
    }
}

/// How long until the next sweep where the next certificate expires at `expires`: its end is not waited past. It is valid
/// to the end of that second.
fn pause(expires: UnixTime, now: UnixTime) -> Duration {
    let left = expires.as_secs().checked_sub(now.as_secs());
    left.map_or(SWEEP, |left| SWEEP.min(Duration::from_secs(left + 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_the_certificate_is_not_waited_past() {
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let expires = at(100);
        for (now, wanted) in [(50, SWEEP), (101, SWEEP), (95, Duration::from_secs(6))] {
            assert_eq!(pause(expires, at(now)), wanted, "at {now}");
        }
        // Sweep after sweep, whatever second the first one is at.
        for start in 70..=100 {
            let mut now = start;
            while now <= expires.as_secs() {
                now += pause(expires, at(now)).as_secs();
            }
            assert_eq!(now, 101, "from {start}");
        }
    }
}
