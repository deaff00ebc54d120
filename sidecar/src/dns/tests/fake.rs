//! An upstream that says what a test wants, over UDP and TCP of one port of loopback.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::SOA;
use hickory_proto::rr::{RData, Record};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};
use tokio::task::JoinSet;

use super::{Transport, a_record, name};

/// A query, whence it came and how.
type Asked = (Vec<u8>, SocketAddr, Transport);

/// Ends when dropped: then the kernel refuses what is sent to it.
pub(super) struct Fake {
    pub(super) addr: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    _serving: JoinSet<()>,
}

impl Fake {
    /// Answers each query with what `script` gives: nothing, or one or more messages.
    pub(super) async fn new(
        script: impl Fn(&Message, Transport) -> Vec<Message> + Send + Sync + 'static,
    ) -> Self {
        Self::at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), script).await
    }

    /// At a given address.
    pub(super) async fn at(
        addr: SocketAddr,
        script: impl Fn(&Message, Transport) -> Vec<Message> + Send + Sync + 'static,
    ) -> Self {
        Self::serve(addr, true, move |query, transport| {
            let query = Message::from_vec(query).unwrap();
            script(&query, transport).iter().map(|answer| answer.to_vec().unwrap()).collect()
        })
        .await
    }

    /// Answers each query's bytes with what `script` gives.
    pub(super) async fn raw(
        script: impl Fn(&[u8], Transport) -> Vec<Vec<u8>> + Send + Sync + 'static,
    ) -> Self {
        Self::serve(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), true, script).await
    }

    /// The same, where TCP is refused.
    pub(super) async fn without_tcp(
        script: impl Fn(&[u8], Transport) -> Vec<Vec<u8>> + Send + Sync + 'static,
    ) -> Self {
        Self::serve(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), false, script).await
    }

    async fn serve(
        addr: SocketAddr,
        over_tcp: bool,
        script: impl Fn(&[u8], Transport) -> Vec<Vec<u8>> + Send + Sync + 'static,
    ) -> Self {
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind(addr).await.unwrap();
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        let addr = udp.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let script = Arc::new(script);
        let mut serving = JoinSet::new();
        serving.spawn({
            let (script, asked) = (script.clone(), asked.clone());
            async move {
                let mut buf = [0; 4096];
                loop {
                    let (len, from) = udp.recv_from(&mut buf).await.unwrap();
                    asked.lock().unwrap().push((buf[..len].to_vec(), from, Transport::Udp));
                    for answer in script(&buf[..len], Transport::Udp) {
                        udp.send_to(&answer, from).await.unwrap();
                    }
                }
            }
        });
        if !over_tcp {
            drop(tcp);
            return Self { addr, asked, _serving: serving };
        }
        serving.spawn({
            let asked = asked.clone();
            async move {
                loop {
                    let (mut stream, from) = tcp.accept().await.unwrap();
                    while let Ok(len) = stream.read_u16().await {
                        let mut packet = vec![0; len.into()];
                        stream.read_exact(&mut packet).await.unwrap();
                        asked.lock().unwrap().push((packet.clone(), from, Transport::Tcp));
                        for answer in script(&packet, Transport::Tcp) {
                            stream.write_u16(answer.len() as u16).await.unwrap();
                            stream.write_all(&answer).await.unwrap();
                        }
                    }
                }
            }
        });
        Self { addr, asked, _serving: serving }
    }

    /// What it was asked so far.
    pub(super) fn asked(&self) -> Vec<(Message, Transport)> {
        let asked = self.asked.lock().unwrap();
        asked.iter().map(|(query, _, transport)| (Message::from_vec(query).unwrap(), *transport)).collect()
    }

    /// The same, as it came, and whence.
    pub(super) fn packets(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

/// An answer without records.
pub(super) fn reply(query: &Message, code: ResponseCode) -> Message {
    let mut answer = query.clone().into_response();
    answer.metadata.recursion_available = true;
    answer.metadata.authentic_data = false;
    answer.metadata.response_code = code;
    answer
}

/// An answer with A records.
pub(super) fn answer(query: &Message, ttl: u32, addresses: &[[u8; 4]]) -> Message {
    let mut answer = reply(query, ResponseCode::NoError);
    let owner = query.queries[0].name().clone();
    answer.add_answers(addresses.iter().map(|address| a_record(&owner, ttl, (*address).into())));
    answer
}

/// An answer with one record, kept for an hour.
pub(super) fn fine(query: &Message) -> Vec<Message> {
    vec![answer(query, 3600, &[[192, 0, 2, 1]])]
}

/// NXDOMAIN or NODATA, kept for so many seconds.
pub(super) fn negative(query: &Message, code: ResponseCode, ttl: u32) -> Message {
    let mut answer = reply(query, code);
    let soa = SOA::new(name("ns.example"), name("root.example"), 1, 3600, 1200, 604_800, ttl);
    answer.add_authority(Record::from_rdata(name("example"), 3600, RData::SOA(soa)));
    answer
}
