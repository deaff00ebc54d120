//! The laws of [`Net`], and what is this network's own.

mod descriptors;
mod handoffs;
mod streams;
mod wires;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::*;
use servicekeel_runtime::net::Listener;
use tokio::time::timeout;

servicekeel_runtime::net_laws!(pod());

/// The pod's own address.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);
const SOON: Duration = Duration::from_secs(5);

fn pod() -> SimNet {
    SimNet::pod(&Kernel::new(64 << 10), &[ADDRESS.into()])
}

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

async fn pair(net: &SimNet) -> (SimStream, SimStream) {
    let listener = net.listen(loopback()).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (near, far) = tokio::join!(net.connect(&address), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(SOON, future).await.expect("stuck")
}
