//! What the three programs share of tokio and the operating system. It knows nothing of Services.

pub mod net;
pub mod admin;
pub mod ready;
