//! What a router runs by: its config file, and the identity that the files make which the config names.

mod config;
pub mod follow;
pub mod problem;
mod read;
mod text;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::UnixTime;
use servicekeel_core::name::ClusterName;

pub use config::{Config, DEFAULT_ADMIN, DEFAULT_PATH, Listen, MAX_PEERS, Peer};
pub(crate) use read::{AdminOf, admin_of, host, read_text};
pub use read::{Bad, Good, Reading, read};
pub use text::MAX_CONFIG;
pub(crate) use text::{explain, options};

use crate::identity::{Date, Identity, TrustBundle, Untimely};

/// Good settings: what the router runs by until the next ones.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The config.
    pub config: Arc<Config>,
    /// Who the router is; `None`: it serves its own node only.
    pub identity: Option<Arc<Identity>>,
    /// Why there is none, where the config names one whose dates are wrong.
    pub untimely: Option<Untimely>,
    /// What the files say that is not in use.
    pub pending: Pending,
}

/// What the files say that a router which runs does not run by.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pending {
    /// The files as they are now can't be used.
    pub refused: Option<Refused>,
    /// The settings that differ and take effect at the next start, such as `listen.peers`.
    pub at_next_start: Vec<&'static str>,
}

/// Files that can't be used while those from before are in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// When that was found.
    pub since: SystemTime,
    /// When the files were read that are in use.
    pub in_use: SystemTime,
    /// What is wrong with them: the first problem, and how many more there are.
    pub reason: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (since, in_use) = (Date::from(self.since), Date::from(self.in_use));
        write!(f, "config rejected since {since}: {}; the config of {in_use} is in use", self.reason)
    }
}

impl Settings {
    /// When the own certificate expires, in seconds of Unix time.
    pub(crate) fn certificate_ends(&self) -> Option<u64> {
        match (&self.identity, self.untimely) {
            (None, Some(Untimely::Expired(not_after))) => Some(not_after.as_secs()),
            (identity, _) => {
                let ends = identity.as_ref()?.not_after().duration_since(std::time::UNIX_EPOCH);
                Some(ends.unwrap_or_default().as_secs())
            }
        }
    }

    /// How many seconds the own certificate is valid still: negative once it has expired, 0 where it is not valid yet and
    /// NaN where there is none.
    pub(crate) fn seconds_left(&self) -> f64 {
        let now = self.identity.as_ref().map_or_else(UnixTime::now, |identity| identity.now());
        match (self.certificate_ends(), self.untimely()) {
            (Some(ends), _) => ends as f64 - now.as_secs() as f64,
            (None, Some(_)) => 0.0,
            (None, None) => f64::NAN,
        }
    }

    /// That the own certificate ends soon.
    pub(crate) fn renewal(&self) -> Option<String> {
        let identity = self.identity.as_ref()?;
        let now = UNIX_EPOCH + Duration::from_secs(identity.now().as_secs());
        identity.is_due(now).then(|| {
            let ends = Date(identity.expires());
            format!(
                "this router's certificate expires on {ends}: renew it with `servicekeel-router pki issue --force`"
            )
        })
    }

    /// The clusters whose routers get in, this one's own among them; `None` without an identity: nobody's do.
    pub(crate) fn mesh(&self) -> Option<BTreeSet<ClusterName>> {
        let trust = self.identity.as_ref()?.trust();
        Some(trust.map(TrustBundle::cluster).chain([&self.config.cluster]).cloned().collect())
    }

    /// Why the own certificate proves nothing just now, where the config names one.
    pub(crate) fn untimely(&self) -> Option<Untimely> {
        self.identity.as_ref().map_or(self.untimely, |identity| identity.untimely())
    }
}
