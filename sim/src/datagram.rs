//! UDP applications: a service that sends back what it gets, and a client. Each says what it sees to the oracle.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use servicekeel_runtime::net::Datagrams;
use tokio::time::{Instant, timeout_at};

use crate::net::{SimDatagrams, SimNet};
use crate::oracle::{Oracle, Service};

/// Serves a Service at an address for ever.
///
/// # Errors
/// Those of bind(2).
pub async fn serve(net: SimNet, at: SocketAddr, service: Service, oracle: Oracle) -> io::Result<()> {
    let socket = net.bind_udp(at)?;
    let mut buf = vec![0; usize::from(u16::MAX)];
    loop {
        let (len, from) = socket.recv_from(&mut buf).await?;
        oracle.receive_datagram(service, &buf[..len]);
        socket.send_to(&buf[..len], from).await?;
    }
}

/// A client with a socket of its own; a clone is the same.
#[derive(Clone)]
pub struct Client {
    socket: Arc<SimDatagrams>,
    number: u64,
    oracle: Oracle,
    buf: Vec<u8>,
}

impl Client {
    /// A client in a pod.
    ///
    /// # Errors
    /// Those of bind(2).
    pub fn new(net: &SimNet, oracle: &Oracle) -> io::Result<Self> {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let (number, buf) = (oracle.begin_client(), vec![0; usize::from(u16::MAX)]);
        Ok(Self { socket: Arc::new(net.bind_udp(any)?), number, oracle: oracle.clone(), buf })
    }

    /// Sends a datagram of `len` bytes and waits for its answer; false where none comes within `patience`.
    ///
    /// # Errors
    /// The socket's.
    pub async fn exchange(
        &mut self,
        to: SocketAddr,
        service: Service,
        len: usize,
        patience: Duration,
    ) -> io::Result<bool> {
        let (number, bytes) = self.oracle.send_datagram(self.number, service, len);
        let until = Instant::now() + patience;
        self.socket.send_to(&bytes, to).await?;
        loop {
            let Ok(received) = timeout_at(until, self.socket.recv_from(&mut self.buf)).await else {
                return Ok(false);
            };
            let (got, from) = received?;
            if from != to {
                self.oracle.violate(format_args!("what was sent to {to} is answered by {from}"));
            }
            match self.oracle.receive_answer(self.number, service, &self.buf[..got]) {
                // A late answer to an earlier one is fine.
                Some(answered) if answered != number && answered != 0 => {}
                Some(0) if got != len => {}
                _ => return Ok(true),
            }
        }
    }
}
