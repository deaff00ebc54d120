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

use crate::identity::Identity;

/// Good settings: what the router runs by until the next ones.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The config.
    pub config: Arc<Config>,
    /// Who the router is; `None`: it serves its own node only.
    pub identity: Option<Arc<Identity>>,
}

impl Settings {
    /// When the own certificate ends, in seconds of Unix time.
    pub(crate) fn certificate_ends(&self) -> Option<u64> {
        let ends = self.identity.as_ref()?.not_after().duration_since(std::time::UNIX_EPOCH);
        Some(ends.unwrap_or_default().as_secs())
    }
}
