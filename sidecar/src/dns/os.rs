//! DNS on the kernel's sockets.

use std::io;
use std::net::SocketAddr;

use servicekeel_runtime::net::Net;
use servicekeel_runtime::net::os::{OsListener, OsNet};
use tokio::net::UdpSocket;

use super::datagrams::{Datagrams, serve_datagrams};
use super::serve::{Bound, Serve};
use super::{Dns, serve_stream};

/// How often another port is tried, where any will do: UDP and TCP must get the same one.
const PORTS: usize = 16;

/// Serves on the kernel's sockets.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsDns;

/// The sockets of one address.
#[derive(Debug)]
pub struct OsDnsBound {
    udp: Datagrams,
    tcp: OsListener,
    addr: SocketAddr,
}

impl Serve for OsDns {
    type Bound = OsDnsBound;

    async fn bind(&self, addr: SocketAddr) -> io::Result<OsDnsBound> {
        let mut tries = if addr.port() == 0 { PORTS } else { 1 };
        loop {
            tries -= 1;
            match bind(addr).await {
                Err(e) if e.kind() == io::ErrorKind::AddrInUse && tries > 0 => {}
                outcome => return outcome,
            }
        }
    }
}

async fn bind(addr: SocketAddr) -> io::Result<OsDnsBound> {
    let udp = UdpSocket::bind(addr).await.map_err(|e| explain(addr, "UDP", &e))?;
    let addr = udp.local_addr()?;
    let tcp = OsNet::new().listen(addr).await.map_err(|e| explain(addr, "TCP", &e))?;
    let udp = Datagrams::new(udp).map_err(|e| explain(addr, "UDP", &e))?;
    Ok(OsDnsBound { udp, tcp, addr })
}

fn explain(addr: SocketAddr, transport: &str, error: &io::Error) -> io::Error {
    let remedy = match error.kind() {
        io::ErrorKind::PermissionDenied if addr.port() < 1024 => {
            "; without root this needs the sysctl net.ipv4.ip_unprivileged_port_start at or below the port"
        }
        io::ErrorKind::AddrInUse => "; it is in use by another server or another sidecar of this pod",
        io::ErrorKind::AddrNotAvailable => "; the pod has no such address",
        _ => "",
    };
    io::Error::new(error.kind(), format!("cannot serve DNS at {addr} over {transport}: {error}{remedy}"))
}

impl Bound for OsDnsBound {
    fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    async fn run(self, dns: Dns) -> io::Result<()> {
        dns.listens_at(self.addr);
        tokio::select! {
            // In no order: a flood over the one must not keep the other from its turn.
            () = serve_datagrams(self.udp, dns.clone()) => Ok(()),
            ended = serve_stream(self.tcp, dns) => ended,
        }
    }
}
