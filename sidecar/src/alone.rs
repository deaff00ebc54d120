//! One sidecar has a range of addresses in its network namespace.
//!
//! Two of them, as pods of the host's network may be, would not see each other's sockets: SO_REUSEPORT, by which a
//! sidecar that restarts binds beside what the router still holds of its earlier run, would share every connection out
//! among both. So each reserves its range, by a socket that is never handed over.
//!
//! The name of a range is its first address, from which on addresses are given. Ranges that overlap and begin
//! elsewhere are not found out; they meet when the wider one has given its addresses up to the other.

use std::io;
use std::time::Duration;

use ipnet::Ipv4Net;
use servicekeel_runtime::net::Net;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

/// How long an earlier sidecar of the pod may take to end: longer than [`crate::run`] drains.
const PATIENCE: Duration = Duration::from_secs(2);
const INTERVAL: Duration = Duration::from_millis(20);

/// Another sidecar has the range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "another sidecar in this network namespace has the addresses from {} on, and each would take connections of the \
     other: give every sidecar that shares a loopback a range of its own (SIDECAR_IP_RANGE), or end the other one",
    .0.network()
)]
pub struct Taken(pub Ipv4Net);

/// Reserves a range for as long as what is returned lives. `None`: the system has no such reservations, and the sidecar
/// does without.
pub(crate) async fn reserve<N: Net>(net: &N, range: Ipv4Net) -> Result<Option<N::Reservation>, Taken> {
    let name = format!("sidecar/{}", range.network());
    let end = Instant::now() + PATIENCE;
    let mut told = false;
    loop {
        match net.reserve(&name) {
            Ok(reservation) => return Ok(Some(reservation)),
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                warn!(%range, %error, "can't find out whether another sidecar has this range");
                return Ok(None);
            }
            Err(_) if Instant::now() >= end => return Err(Taken(range)),
            Err(_) => {
                if !std::mem::replace(&mut told, true) {
                    info!(%range, "another sidecar has this range; waiting for it to end");
                }
                sleep(INTERVAL).await;
            }
        }
    }
}
