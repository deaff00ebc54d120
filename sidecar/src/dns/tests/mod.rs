//! What the tests share: a zone, questions, and a fake upstream.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use servicekeel_core::annotation::{Defaults, Import, Port};
use servicekeel_core::dns::Zone;
use servicekeel_core::name::{ClusterName, Protocol, ServiceName};

use super::{Dns, Limits, Transport};

mod aliases;
mod bytes;
mod dig;
mod fake;
mod foreign;
mod manners;
mod own;
mod packets;
mod sockets;
mod upstreams;

const CLIENT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 40000);
const OWN: Ipv4Addr = Ipv4Addr::new(127, 0, 66, 2);

/// Of pod `default` in `cluster-a.local`, with `simple-server.default` of the given cluster at 127.0.66.2.
fn zone_of(cluster: &str) -> Zone {
    let port = |name: Option<&str>, number, protocol| {
        let number = NonZeroU16::new(number).unwrap();
        Port { name: name.map(|name| name.parse().unwrap()), port: number, protocol, target: number }
    };
    let service = ServiceName {
        name: "simple-server".parse().unwrap(),
        namespace: "default".parse().unwrap(),
        cluster: cluster.parse().unwrap(),
    };
    let ports = vec![port(Some("http"), 8080, Protocol::Tcp), port(None, 9090, Protocol::Tcp)];
    let pod = Defaults { namespace: "default".parse().unwrap(), cluster: "cluster-a.local".parse().unwrap() };
    let search: Vec<ClusterName> =
        ["default.svc.cluster-a.local", "corp.example"].map(|domain| domain.parse().unwrap()).into();
    Zone::new(&pod, &search, "127.0.66.0/24".parse().unwrap(), &[(Import { service, ports }, OWN)])
}

/// Limits that let a test end soon.
fn limits() -> Limits {
    Limits {
        one_try: Duration::from_millis(300),
        all_tries: Duration::from_millis(900),
        patience: Duration::from_millis(150),
        ..Limits::default()
    }
}

/// A server with a zone.
fn dns(upstreams: &[SocketAddr]) -> Dns {
    dns_within(upstreams, limits())
}

fn dns_within(upstreams: &[SocketAddr], limits: Limits) -> Dns {
    let dns = Dns::new(upstreams.to_vec(), limits);
    dns.set_zone(zone_of("cluster-b.local"));
    dns
}

fn name(text: &str) -> Name {
    Name::from_ascii(format!("{}.", text.trim_end_matches('.'))).unwrap()
}

fn query(text: &str, qtype: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name(text), qtype));
    message
}

fn with_edns(mut query: Message, payload: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(payload);
    query.set_edns(edns);
    query
}

/// Asks, and checks what holds for every answer.
async fn ask_over(dns: &Dns, query: &Message, transport: Transport) -> Message {
    let packet = dns.answer(&query.to_vec().unwrap(), CLIENT, transport).await.expect("no answer");
    if transport == Transport::Udp {
        assert!(packet.len() <= query.max_payload().into(), "{} bytes", packet.len());
    }
    let answer = Message::from_vec(&packet).unwrap();
    assert_eq!(answer.id, query.id);
    assert_eq!(answer.message_type, hickory_proto::op::MessageType::Response);
    assert_eq!(answer.queries, query.queries);
    for (asked, said) in query.queries.iter().zip(&answer.queries) {
        assert!(asked.name().eq_case(said.name()), "{} for {}", said.name(), asked.name());
    }
    assert_eq!(answer.recursion_desired, query.recursion_desired);
    assert!(answer.recursion_available);
    assert_eq!(answer.edns.is_some(), query.edns.is_some());
    answer
}

async fn ask(dns: &Dns, query: &Message) -> Message {
    ask_over(dns, query, Transport::Udp).await
}

async fn ask_a(dns: &Dns, text: &str) -> Message {
    ask(dns, &query(text, RecordType::A)).await
}

/// The addresses of an answer, and the TTL of the first record.
fn addresses(answer: &Message) -> Vec<Ipv4Addr> {
    answer
        .answers
        .iter()
        .filter_map(|record| match record.data {
            RData::A(a) => Some(a.0),
            _ => None,
        })
        .collect()
}

fn a_record(owner: &Name, ttl: u32, address: Ipv4Addr) -> Record {
    Record::from_rdata(owner.clone(), ttl, RData::A(address.into()))
}

/// The code of the extended error of an answer.
fn explanation(answer: &Message) -> Option<u16> {
    let edns = answer.edns.as_ref()?;
    match edns.option(15.into())? {
        hickory_proto::rr::rdata::opt::EdnsOption::Unknown(_, data) => {
            data.first_chunk().map(|code| u16::from_be_bytes(*code))
        }
        _ => None,
    }
}

fn code(answer: &Message) -> ResponseCode {
    answer.response_code
}
