//! DNS on the kernel's sockets, by hickory-server.

use std::io;
use std::net::SocketAddr;

use async_trait::async_trait;
use hickory_proto::op::{Header, HeaderCounts};
use hickory_server::Server;
use hickory_server::net::runtime::Time;
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use servicekeel_runtime::net::Net;
use servicekeel_runtime::net::os::{OsListener, OsNet};
use tokio::net::UdpSocket;

use super::serve::{Bound, Serve};
use super::{Dns, serve_stream};

/// How often another port is tried, where any will do: UDP and TCP must get the same one.
const PORTS: usize = 16;

/// Serves on the kernel's sockets.
#[derive(Debug, Clone, Copy, Default)]
pub struct Hickory;

/// The sockets of one address.
#[derive(Debug)]
pub struct HickoryBound {
    udp: UdpSocket,
    tcp: OsListener,
    addr: SocketAddr,
}

impl Serve for Hickory {
    type Bound = HickoryBound;

    async fn bind(&self, addr: SocketAddr) -> io::Result<HickoryBound> {
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

async fn bind(addr: SocketAddr) -> io::Result<HickoryBound> {
    let udp = UdpSocket::bind(addr).await.map_err(|e| explain(addr, "UDP", &e))?;
    let addr = udp.local_addr()?;
    let tcp = OsNet::new().listen(addr).await.map_err(|e| explain(addr, "TCP", &e))?;
    Ok(HickoryBound { udp, tcp, addr })
}

fn explain(addr: SocketAddr, transport: &str, error: &io::Error) -> io::Error {
    let remedy = match error.kind() {
        io::ErrorKind::PermissionDenied if addr.port() < 1024 => {
            "; a process that is not root needs the sysctl net.ipv4.ip_unprivileged_port_start at or below the port"
        }
        io::ErrorKind::AddrInUse => "; another server has it, or another sidecar of this pod",
        io::ErrorKind::AddrNotAvailable => "; the pod has no such address",
        _ => "",
    };
    io::Error::new(error.kind(), format!("cannot serve DNS at {addr} over {transport}: {error}{remedy}"))
}

impl Bound for HickoryBound {
    fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    async fn run(self, dns: Dns) -> io::Result<()> {
        dns.listens_at(self.addr);
        let mut server = Server::new(Handler(dns.clone()));
        server.register_socket(self.udp);
        tokio::select! {
            biased;
            ended = server.block_until_done() => {
                Err(io::Error::other(ended.err().map_or_else(|| "DNS over UDP ended".into(), |e| e.to_string())))
            }
            ended = serve_stream(self.tcp, dns) => ended,
        }
    }
}

/// What hickory-server calls for each query that it could read.
struct Handler(Dns);

#[async_trait]
impl RequestHandler for Handler {
    async fn handle_request<R: ResponseHandler, T: Time>(
        &self,
        request: &Request,
        mut response_handle: R,
    ) -> ResponseInfo {
        let mut reply = self.0.reply(request).await;
        reply.fit(request);
        match response_handle.send_response(reply.response(request)).await {
            Ok(sent) => sent,
            Err(error) => {
                tracing::debug!(%error, client = %request.src(), "a DNS answer could not be sent");
                ResponseInfo::from(Header { metadata: reply.metadata, counts: HeaderCounts::default() })
            }
        }
    }
}
