//! The last connection that came to nothing for a certificate, where no known peer can be shown to have made it: for the
//! status, since the log may be long gone.

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long it is told: who is alive tries again within this time.
const FRESH: Duration = Duration::from_secs(60);

struct Last {
    at: Instant,
    from: IpAddr,
    reason: String,
}

/// The last one: anybody can make many.
#[derive(Default)]
pub(crate) struct Rejected(Mutex<Option<Last>>);

impl Rejected {
    /// A connection from there was rejected, by this router or by the other one.
    pub(crate) fn note(&self, from: IpAddr, reason: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Last { at: Instant::now(), from, reason });
    }

    /// What is to be told of it.
    pub(crate) fn told(&self) -> Option<String> {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Last { at, from, reason } = last.as_ref().filter(|last| last.at.elapsed() < FRESH)?;
        Some(format!("a connection from {from} failed {} s ago: {reason}", at.elapsed().as_secs()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_last_one_is_told_for_a_minute() {
        let rejected = Rejected::default();
        assert_eq!(rejected.told(), None);
        rejected.note("192.0.2.1".parse().unwrap(), "of a stranger".into());
        rejected.note("192.0.2.2".parse().unwrap(), "it has expired".into());
        tokio::time::advance(FRESH - Duration::from_secs(1)).await;
        let told = "a connection from 192.0.2.2 failed 59 s ago: it has expired";
        assert_eq!(rejected.told().as_deref(), Some(told));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(rejected.told(), None);
    }
}
