//! The sidecar as a whole: what it starts, what it waits for, how it ends.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use servicekeel_core::lease::RangeError;
use servicekeel_core::sidecar::{Config, Saved, Sidecar};
use servicekeel_runtime::admin::{self, Admin};
use servicekeel_runtime::net::Net;
use servicekeel_runtime::ready::Readiness;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{error, info, warn};

use crate::disk::Disk;
use crate::dns::{Bound, Dns, Limits, Serve};
use crate::driver::Driver;
use crate::metrics::Metrics;
use crate::settings::Settings;
use crate::source::Annotations;
use crate::state::Store;
use crate::status::{Shared, ipv6_only};

/// How long the end may take: a router or a disk that hangs is not waited for any longer.
const DRAIN: Duration = Duration::from_secs(1);

/// How long readiness waits for the first state to be on disk, so that what a ready pod has shown outlives a crash. A
/// disk that hangs keeps no pod from its work.
const KEEP_WAIT: Duration = Duration::from_secs(2);

/// Why the sidecar can't start, or can't go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The range of addresses.
    #[error("{0} (SIDECAR_IP_RANGE)")]
    Range(RangeError),
    /// The address of DNS.
    #[error("{0} (SIDECAR_DNS_ADDR)")]
    Dns(io::Error),
    /// DNS ended.
    #[error("DNS server failed: {0}")]
    DnsEnded(io::Error),
}

/// Which task ended.
enum Ended {
    Dns(io::Result<()>),
    Admin(io::Result<()>),
}

/// Runs a sidecar until `shutdown` resolves; then it says goodbye to the router, which keeps the flows that live, and
/// closes everything. Dropped, it ends at once.
///
/// `dns` is how queries come in, and `annotations` what the pod's annotations say now and from now on.
///
/// # Errors
/// [`RunError`] where DNS can't be served. A router that is away, an admin address that is taken, an annotation that is
/// wrong and a disk that can't be written are none.
pub async fn run<N: Net, D: Serve>(
    settings: Settings,
    net: N,
    dns: D,
    mut annotations: watch::Receiver<Arc<Annotations>>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let store = settings.state_dir.as_deref().map(|directory| Store::new(directory, &settings.pod));
    let sidecar = Sidecar::new(config(&settings), load(store.as_ref()), Instant::now().into_std())
        .map_err(RunError::Range)?;
    if settings.upstreams.is_empty() && settings.dns_addr.is_some() {
        warn!("no DNS upstream: only imported names resolve (SIDECAR_DNS_UPSTREAM)");
    }
    if let Some(warning) = ipv6_only(&settings.addresses) {
        warn!("{warning} (SIDECAR_POD_ADDRS)");
    }
    let answers = Dns::new(settings.upstreams, Limits::default());
    let (metrics, mut registry) = (Metrics::default(), Registry::default());
    metrics.register(&mut registry);
    answers.register(&mut registry);
    let shared =
        Arc::new(Shared::new(sidecar, settings.pod, settings.addresses, settings.router, answers.clone()));
    let readiness = Readiness::new();
    let mut first_state = Some(readiness.wait_for("a first state of the annotations"));

    let mut tasks = JoinSet::new();
    if let Some(addr) = settings.dns_addr {
        let bound = dns.bind(addr).await.map_err(RunError::Dns)?;
        info!(addr = %bound.local_addr(), "answering DNS");
        tasks.spawn(async move { Ended::Dns(bound.run(answers).await) });
    }
    if let Some(addr) = settings.admin {
        let shared = shared.clone();
        let mut admin = Admin::new(readiness, registry, move || std::future::ready(shared.json()));
        if settings.private_status {
            admin = admin.private();
        }
        tasks.spawn(async move { Ended::Admin(admin::serve(addr, admin, "SIDECAR_ADMIN_ADDR").await) });
    }

    let mut driver = Driver::new(net, shared, metrics, Disk::new(store));
    driver.handle_annotations(&annotations.borrow_and_update().clone());
    let mut shutdown = std::pin::pin!(shutdown);
    let mut ready_by = None;
    loop {
        driver.drive().await;
        let now = Instant::now();
        if first_state.is_some() && driver.is_applied() {
            let until = *ready_by.get_or_insert(now + KEEP_WAIT);
            if driver.disk.is_idle() || until <= now {
                info!("ready");
                (first_state, ready_by) = (None, None);
            }
        }
        let timer = driver.poll_timeout().into_iter().chain(ready_by).min();
        let timer = async {
            match timer {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = &mut shutdown => break,
            event = driver.link.event() => driver.handle_event(event),
            Ok(()) = annotations.changed() => {
                let changed = annotations.borrow_and_update().clone();
                driver.handle_annotations(&changed);
            }
            written = driver.disk.written() => driver.handle_written(written),
            () = timer => driver.handle_timeout(),
            Some(ended) = tasks.join_next() => match ended {
                Ok(Ended::Admin(result)) => {
                    error!(error = ?result.err(), "admin endpoint failed; everything else keeps running");
                }
                Ok(Ended::Dns(result)) => {
                    return Err(RunError::DnsEnded(result.err().unwrap_or_else(|| io::ErrorKind::Other.into())));
                }
                Err(error) => return Err(RunError::DnsEnded(error.into())),
            },
        }
    }
    info!("draining");
    if timeout(DRAIN, driver.finish()).await.is_err() {
        warn!("router or disk did not respond in time; exiting anyway");
    }
    info!("stopped");
    Ok(())
}

fn config(settings: &Settings) -> Config {
    let own = [settings.dns_addr, settings.admin].into_iter().flatten().map(|addr| addr.ip());
    let reserved: Vec<Ipv4Addr> = own
        .chain(settings.upstreams.iter().map(SocketAddr::ip))
        .filter_map(|ip| match ip {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        })
        .collect();
    Config {
        pod: settings.pod.clone(),
        addresses: settings.addresses.clone(),
        cluster: settings.cluster.clone(),
        range: settings.range,
        reserved,
        search: settings.search.clone(),
    }
}

fn load(store: Option<&Store>) -> Saved {
    let Some(store) = store else { return Saved::default() };
    let (saved, message) = store.load();
    if let Some(message) = message {
        warn!("{message}");
    }
    saved
}
