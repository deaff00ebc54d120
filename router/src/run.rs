//! The router as a whole: what it starts, how it follows its settings, how it ends.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use servicekeel_core::name::RouterId;
use servicekeel_runtime::admin::{self, Admin};
use servicekeel_runtime::net::Net;
use servicekeel_runtime::ready::Readiness;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};

use crate::node::Node;
use crate::settings::Settings;
use crate::tasks::AbortOnDrop;
use crate::{inbound, links, pods, status};

/// How long flows may go on after the order to end. Short: meanwhile new connections wait in the sidecars' backlogs.
const DRAIN: Duration = Duration::from_secs(2);
/// How often unused connections are looked through.
const SWEEP: Duration = Duration::from_secs(10);

/// Why the router can't start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The sidecars' socket.
    #[error("can't listen for sidecars at {}: {source} (listen.sidecars)", path.display())]
    Sidecars {
        /// Its path.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The port for peers.
    #[error("can't listen for peers at {addr}: {source} (listen.peers)")]
    Peers {
        /// Its address.
        addr: std::net::SocketAddr,
        /// The reason.
        source: std::io::Error,
    },
    /// The admin port.
    #[error("can't listen at {addr}: {source} (listen.admin)")]
    Admin {
        /// Its address.
        addr: std::net::SocketAddr,
        /// The reason.
        source: std::io::Error,
    },
}

/// Ends every task when the router's future is dropped.
struct EndAll<N: Net>(Arc<Node<N>>);

impl<N: Net> Drop for EndAll<N> {
    fn drop(&mut self) {
        self.0.tasks.abort_all();
    }
}

/// Runs a router until `shutdown` resolves, then lets flows end for a moment and closes everything.
///
/// `seed` is for what is drawn: its boot number, the order among equal endpoints, the jitter of dials. Two runs of a
/// router need different ones.
///
/// # Errors
/// [`RunError`] where it can't listen. Peers that can't be reached, and settings that turn bad, are no errors: it
/// tries again, and keeps the last good ones.
pub async fn run<N: Net>(
    settings: watch::Receiver<Arc<Settings>>,
    net: N,
    seed: u64,
    shutdown: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let first = settings.borrow().clone();
    let config = first.config.clone();
    let id = RouterId { cluster: config.cluster.clone(), node: config.node.clone() };
    let node = Node::new(net, id, seed, settings.clone());
    let _end_all = EndAll(node.clone());

    let path = &config.listen.sidecars;
    let sidecars = node
        .net
        .handoff_listen(path)
        .await
        .map_err(|source| RunError::Sidecars { path: path.clone(), source })?;
    let mut accepting = vec![node.tasks.spawn(pods::serve(node.clone(), sidecars))];
    match (config.listen.peers, &first.identity) {
        (Some(addr), Some(_)) => {
            let listener = node.net.listen(addr).await.map_err(|source| RunError::Peers { addr, source })?;
            accepting.push(node.tasks.spawn(inbound::listen(node.clone(), listener)));
            info!(%addr, "listening for peers");
        }
        (Some(_), None) => info!("no identity: this router serves its own node only"),
        (None, _) => info!("listen.peers is off: peers can't dial this router"),
    }
    if let Some(addr) = config.listen.admin {
        let admin = admin(&node);
        let serving = admin::bind(addr, admin).await.map_err(|source| RunError::Admin { addr, source })?;
        node.tasks.spawn(async move {
            if let Err(error) = serving.run().await {
                error!(%error, "the admin endpoint ended");
            }
        });
    }
    info!(router = %node.id, sidecars = %path.display(), "serving");

    let mut dials = Dials { node: node.clone(), settings: first, running: BTreeMap::new() };
    dials.start();
    let mut settings = settings;
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        tokio::select! {
            biased;
            () = &mut shutdown => break,
            Ok(()) = settings.changed() => {
                let new = settings.borrow_and_update().clone();
                dials.follow(new);
            }
            () = sleep(SWEEP) => node.all_peers().iter().for_each(|peer| peer.sweep()),
        }
    }

    info!(flows = node.counters.flows_active.get(), "ending");
    accepting.into_iter().for_each(|task| task.abort());
    node.draining.send_replace(true);
    let idle = async {
        while node.counters.flows_active.get() > 0 {
            sleep(Duration::from_millis(20)).await;
        }
        // The links say goodbye.
        while node.counters.links_active.get() > 0 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    if timeout(DRAIN, idle).await.is_err() {
        warn!(
            flows = node.counters.flows_active.get(),
            "flows are cut: they did not end within {} s",
            DRAIN.as_secs()
        );
    }
    info!("ended");
    Ok(())
}

fn admin<N: Net>(node: &Arc<Node<N>>) -> Admin {
    let mut registry = Registry::default();
    node.counters.register(&mut registry);
    let node = node.clone();
    Admin::new(Readiness::new(), registry, move || {
        serde_json::to_string(&status::read(&node))
            .unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
    })
}

/// The tasks that keep a link to each address of the config.
struct Dials<N: Net> {
    node: Arc<Node<N>>,
    settings: Arc<Settings>,
    running: BTreeMap<String, AbortOnDrop>,
}

impl<N: Net> Dials<N> {
    fn start(&mut self) {
        if self.settings.identity.is_none() {
            if !self.settings.config.peers.is_empty() {
                warn!("peers are configured but no identity: they are not dialled");
            }
            self.running.clear();
            return;
        }
        let wanted: Vec<String> =
            self.settings.config.peers.iter().map(|peer| peer.address.clone()).collect();
        self.running.retain(|address, _| wanted.contains(address));
        for address in wanted {
            let node = &self.node;
            self.running
                .entry(address.clone())
                .or_insert_with(|| AbortOnDrop(node.tasks.spawn(links::keep(node.clone(), address))));
        }
    }

    /// Takes new settings: what they do not change goes on as it is.
    fn follow(&mut self, new: Arc<Settings>) {
        self.settings = new;
        info!(peers = self.settings.config.peers.len(), "new settings");
        for peer in self.node.all_peers() {
            let trusted = self
                .settings
                .identity
                .as_ref()
                .is_some_and(|i| i.trust().any(|bundle| bundle.cluster() == &peer.id.cluster));
            if !trusted {
                warn!(peer = %peer.id, "the peer's cluster is no longer trusted: cut off");
                peer.cut_off();
            }
        }
        self.start();
    }
}
