//! DNS queries, as a resolver sends them.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, ensure};
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};

/// What a DNS server answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The response code, as a number (RFC 1035 §4.1.1).
    pub code: u16,
    /// The addresses.
    pub addresses: Vec<Ipv4Addr>,
}

/// Asks over UDP.
///
/// # Errors
/// Where no answer comes within 2 s, or it is no answer to the question.
pub fn ask(server: SocketAddr, name: &str, kind: RecordType) -> Result<Answer> {
    let mut query = Message::new(0x5ee1, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(Name::from_str(&format!("{name}."))?, kind));
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.send_to(&query.to_vec()?, server)?;
    let mut buf = [0; 4096];
    let (n, from) = socket.recv_from(&mut buf)?;
    ensure!(from == server, "an answer from {from}, not {server}");
    let answer = Message::from_vec(&buf[..n])?;
    ensure!(answer.metadata.id == 0x5ee1, "an answer to another question");
    let addresses = answer.answers.iter().filter_map(|record| match &record.data {
        RData::A(a) => Some(a.0),
        _ => None,
    });
    let addresses = addresses.collect();
    let code: ResponseCode = answer.metadata.response_code;
    Ok(Answer { code: code.into(), addresses })
}
