//! One query to one upstream, on a socket of its own: with it come a fresh id, a fresh source port and a fresh case of
//! the name, so that who has seen one query, or guessed it, knows nothing of the next (RFC 5452 §9.2).

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};

use servicekeel_core::dns::upstream::{Fault, Send};
use servicekeel_core::dns::wire::{Heard, Outgoing};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpStream, UdpSocket};

/// The longest datagram, and message over TCP, in bytes. What is longer than announced is taken too.
const LONGEST: usize = 65_535;

/// Where datagrams of all queries are received: each is read before the next one comes.
#[derive(Debug)]
pub(super) struct Buffer(Mutex<Box<[u8]>>);

impl Default for Buffer {
    fn default() -> Self {
        Self(Mutex::new(vec![0; LONGEST].into()))
    }
}

/// Sends a query, and listens until its response comes, however long that takes.
pub(super) async fn exchange(buffer: &Buffer, question: &Outgoing, send: Send) -> Result<Heard, Fault> {
    let (mut id, mut bits) = ([0; 2], [0; 32]);
    getrandom::fill(&mut id).and_then(|()| getrandom::fill(&mut bits)).map_err(|_| Fault::Broken)?;
    let packet = question.packet(send.manner, u16::from_be_bytes(id), &bits);
    let heard =
        if send.stream { stream(send.to, &packet).await } else { datagram(buffer, send.to, &packet).await };
    heard.map_err(|error| fault(&error))
}

fn fault(error: &io::Error) -> Fault {
    match error.kind() {
        io::ErrorKind::ConnectionRefused
        | io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable
        | io::ErrorKind::NetworkDown
        | io::ErrorKind::AddrNotAvailable
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::PermissionDenied => Fault::Refused,
        _ => Fault::Broken,
    }
}

/// The socket is connected. So the kernel takes datagrams from the upstream alone, and an upstream that is gone is
/// known by its ICMP refusal at once and not by a timeout.
async fn datagram(buffer: &Buffer, to: SocketAddr, packet: &[u8]) -> io::Result<Heard> {
    // The kernel's range of ports, which servers of the pod keep clear of.
    let local = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(local, 0)).await?;
    socket.connect(to).await?;
    socket.send(packet).await?;
    loop {
        // A refusal comes as an error alone, which does not make a socket readable.
        if socket.ready(Interest::READABLE | Interest::ERROR).await?.is_error() {
            if let Some(error) = socket.take_error()? {
                return Err(error);
            }
            // Read already: this makes tokio forget it.
            let _ = socket.try_io(Interest::ERROR, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
        }
        let mut buffer = buffer.0.lock().unwrap_or_else(PoisonError::into_inner);
        match socket.try_recv(&mut buffer) {
            Ok(len) => {
                if let Some(heard) = Heard::read(&buffer[..len], packet) {
                    return Ok(heard);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

async fn stream(to: SocketAddr, packet: &[u8]) -> io::Result<Heard> {
    let mut stream = TcpStream::connect(to).await?;
    let mut framed = Vec::with_capacity(packet.len() + 2);
    // A query has a few hundred bytes.
    framed.extend((packet.len() as u16).to_be_bytes());
    framed.extend(packet);
    stream.write_all(&framed).await?;
    let len = stream.read_u16().await?;
    // Grows with what comes, not with what is announced.
    let mut response = Vec::new();
    stream.take(len.into()).read_to_end(&mut response).await?;
    Heard::read(&response, packet).ok_or_else(|| io::Error::other("the answer does not match the question"))
}
