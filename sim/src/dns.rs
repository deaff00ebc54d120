//! DNS in the simulation: how the sidecar serves it, and how an application asks.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use servicekeel_runtime::net::{Datagrams, Net};
use servicekeel_sidecar::dns::{Bound, Dns, Serve, Transport, serve_stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::net::{SimDatagrams, SimListener, SimNet};

/// How long a resolver waits for one answer, and how often it asks (resolv.conf(5), impatient).
const TRY: Duration = Duration::from_secs(1);
const TRIES: usize = 3;

/// Serves DNS on the sockets of a pod.
pub struct SimDns(pub SimNet);

/// The sockets of one address.
pub struct SimDnsBound {
    udp: SimDatagrams,
    tcp: SimListener,
    addr: SocketAddr,
}

impl Serve for SimDns {
    type Bound = SimDnsBound;

    async fn bind(&self, addr: SocketAddr) -> io::Result<SimDnsBound> {
        let udp = self.0.bind_udp(addr)?;
        let addr = udp.local_addr()?;
        let tcp = self.0.listen(addr).await?;
        Ok(SimDnsBound { udp, tcp, addr })
    }
}

impl Bound for SimDnsBound {
    fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    #[allow(clippy::manual_async_fn, reason = "the trait asks for a future that is Send")]
    fn run(self, dns: Dns) -> impl Future<Output = io::Result<()>> + Send {
        async move {
            dns.listens_at(self.addr);
            let datagrams = async {
                let mut buf = vec![0; usize::from(u16::MAX)];
                loop {
                    let (len, from) = self.udp.recv_from(&mut buf).await?;
                    if let Some(answer) = dns.answer(&buf[..len], from, Transport::Udp).await {
                        // A client that is gone is no error of the server.
                        let _ = self.udp.send_to(&answer, from).await;
                    }
                }
            };
            tokio::select! {
                biased;
                ended = datagrams => ended,
                ended = serve_stream(self.tcp, dns.clone()) => ended,
            }
        }
    }
}

/// What a resolver heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// NOERROR, NXDOMAIN and the others.
    pub code: ResponseCode,
    /// The addresses of A records.
    pub addresses: Vec<IpAddr>,
    /// The shortest TTL of the answers.
    pub ttl: Duration,
    /// The ports of SRV records.
    pub ports: Vec<u16>,
}

/// Asks a pod's server for a name, over UDP or TCP.
///
/// # Errors
/// The socket's, [`io::ErrorKind::TimedOut`], or [`io::ErrorKind::InvalidData`] for what is no answer to the question.
pub async fn ask(
    net: &SimNet,
    server: SocketAddr,
    name: &str,
    kind: RecordType,
    transport: Transport,
    id: u16,
) -> io::Result<Answer> {
    let invalid = |e: &dyn std::fmt::Display| io::Error::new(io::ErrorKind::InvalidData, e.to_string());
    let name = Name::from_ascii(format!("{name}.")).map_err(|e| invalid(&e))?;
    let mut query = Message::new(id, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(name.clone(), kind));
    let query = query.to_vec().map_err(|e| invalid(&e))?;
    let bytes = match transport {
        Transport::Udp => over_udp(net, server, &query).await?,
        Transport::Tcp => timeout(TRY * TRIES as u32, over_tcp(net, server, &query))
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??,
    };
    let answer = Message::from_vec(&bytes).map_err(|e| invalid(&e))?;
    let [question] = answer.queries.as_slice() else { return Err(invalid(&"no question")) };
    if answer.metadata.id != id || *question.name() != name || question.query_type() != kind {
        return Err(invalid(&format_args!("an answer to another question: {answer}")));
    }
    let data = || answer.answers.iter().map(|record| &record.data);
    Ok(Answer {
        code: answer.metadata.response_code,
        addresses: data()
            .filter_map(|data| match data {
                RData::A(a) => Some(IpAddr::V4(a.0)),
                _ => None,
            })
            .collect(),
        ttl: Duration::from_secs(answer.answers.iter().map(|record| record.ttl).min().unwrap_or(0).into()),
        ports: data()
            .filter_map(|data| match data {
                RData::SRV(srv) => Some(srv.port),
                _ => None,
            })
            .collect(),
    })
}

async fn over_udp(net: &SimNet, server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let socket = net.bind_udp("127.0.0.1:0".parse().map_err(io::Error::other)?)?;
    socket.connect(server).await?;
    let mut buf = vec![0; usize::from(u16::MAX)];
    for _ in 0..TRIES {
        // Refused: the server is not up yet.
        let asked = async {
            socket.send_to(query, server).await?;
            socket.recv_from(&mut buf).await
        };
        match timeout(TRY, asked).await {
            Ok(Ok((len, _))) => return Ok(buf[..len].into()),
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => return Err(error),
            Ok(Err(error)) => return Err(error),
            Err(_) => {}
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

async fn over_tcp(net: &SimNet, server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = net.connect(&server.to_string()).await?;
    let len = u16::try_from(query.len()).map_err(io::Error::other)?;
    stream.write_all(&len.to_be_bytes()).await?;
    stream.write_all(query).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}
