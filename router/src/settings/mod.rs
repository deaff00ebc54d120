//! What a router runs by: its config file, and the identity that the files make which the config names.

mod config;
pub mod follow;
pub mod problem;
mod read;
mod text;

use std::sync::Arc;

pub use config::{Config, DEFAULT_ADMIN, DEFAULT_PATH, Listen, MAX_PEERS, Peer};
pub use read::{Bad, Good, Reading, read};
pub(crate) use read::{admin_of, host, read_text};
pub use text::MAX_CONFIG;
pub(crate) use text::{explain, options};

use crate::identity::{Identity, Untimely};

/// Good settings: what the router runs by until the next ones.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The config.
    pub config: Arc<Config>,
    /// Who the router is; `None`: it serves its own node only.
    pub identity: Option<Arc<Identity>>,
    /// Why there is none, where the config names one whose dates are wrong.
    pub untimely: Option<Untimely>,
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

    /// Why the own certificate proves nothing just now, where the config names one.
    pub(crate) fn untimely(&self) -> Option<Untimely> {
        self.identity.as_ref().map_or(self.untimely, |identity| identity.untimely())
    }
}
