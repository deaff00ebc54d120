//! stub
use crate::identity::Identity;
use servicekeel_core::name::ClusterName;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
pub struct Settings {
    pub config: Arc<Config>,
    pub identity: Option<Arc<Identity>>,
}
pub struct Config {
    pub cluster: ClusterName,
    pub node: ClusterName,
    pub listen: Listen,
    pub peers: Vec<P>,
}
pub struct P {
    pub address: String,
}
pub struct Listen {
    pub sidecars: PathBuf,
    pub peers: Option<SocketAddr>,
    pub admin: Option<SocketAddr>,
}
