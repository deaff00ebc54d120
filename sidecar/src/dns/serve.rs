//! How queries reach [`Dns`].

use std::future::Future;
use std::io;
use std::net::SocketAddr;

use super::Dns;

/// A way to serve DNS: on the kernel's sockets ([`super::OsDns`]), or on a simulated network.
pub trait Serve: Send + Sync + 'static {
    /// Bound sockets.
    type Bound: Bound;
    /// Binds one address for UDP and TCP.
    ///
    /// # Errors
    /// Those of bind(2), with a text that says what was tried.
    fn bind(&self, addr: SocketAddr) -> impl Future<Output = io::Result<Self::Bound>> + Send;
}

/// Sockets that queries arrive at.
pub trait Bound: Send + 'static {
    /// The address, with its port where 0 was asked for.
    fn local_addr(&self) -> SocketAddr;
    /// Answers by `dns` until dropped. It tells `dns` where it listens ([`Dns::listens_at`]).
    ///
    /// # Errors
    /// Those after which nothing more can be received.
    fn run(self, dns: Dns) -> impl Future<Output = io::Result<()>> + Send;
}
