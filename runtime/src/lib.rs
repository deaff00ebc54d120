//! What the three programs share of tokio and the operating system. It knows nothing of Services.

pub mod admin;
pub mod file;
pub mod flags;
pub mod latest;
pub mod limit;
pub mod logs;
pub mod net;
pub mod ready;
pub mod signal;
pub mod throttle;
pub mod watch;
