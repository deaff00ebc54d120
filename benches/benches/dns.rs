//! DNS answers: what the zone decides for a name, and a query's whole way from packet to packet.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a bench whose stage is not there has nothing to measure"
)]

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name as WireName, RecordType};
use servicekeel_core::dns::{Answer, Name, Record, Zone, record_type};
use servicekeel_sidecar::dns::{Dns, Limits, Transport};
use tokio::runtime::Builder;

mod pod;

/// A zone of `n` imports.
fn zone(n: u32) -> Zone {
    let search = ["default.svc.b.local", "svc.b.local", "b.local"].map(|domain| domain.parse().unwrap());
    let first = u32::from(Ipv4Addr::new(127, 66, 0, 1));
    let addresses = (first..).map(Ipv4Addr::from);
    let imports: Vec<_> = pod::imports(n as usize).into_iter().zip(addresses).collect();
    Zone::new(&pod::defaults(), &search, "127.66.0.0/16".parse().unwrap(), &imports)
}

fn answers(c: &mut Criterion) {
    for n in [10, 1000] {
        let zone = zone(n);
        let mut group = c.benchmark_group(format!("dns/zone-of-{n}"));
        let mut bench = |what: &str, name: &str, qtype, right: fn(&Answer<'_>) -> bool| {
            let name: Name = name.parse().unwrap();
            let answer = zone.answer(&name, qtype);
            assert!(right(&answer), "{what}: {answer:?}");
            group.bench_function(what, |b| b.iter(|| black_box(&zone).answer(black_box(&name), qtype)));
        };
        let found = |answer: &Answer<'_>| matches!(answer, Answer::Record(Record::A(_)));
        bench("short", "service-7.team-0", record_type::A, found);
        bench("long", "service-7.team-0.svc.c.example", record_type::A, found);
        bench("searched", "service-7.team-0.svc.b.local", record_type::A, found);
        bench("aaaa", "service-7.team-0", 28, |answer| matches!(answer, Answer::NoData { .. }));
        bench("foreign", "www.example.org", record_type::A, |answer| matches!(answer, Answer::NotOurs));
    }
}

/// A query as a packet, answered by the sidecar's server as a packet. No socket is between.
fn packets(c: &mut Criterion) {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let from = SocketAddr::from((Ipv4Addr::LOCALHOST, 40_000));
    let mut group = c.benchmark_group("dns/packet");
    let dns = Dns::new(Vec::new(), Limits::default());
    dns.set_zone(zone(1000));
    for (what, qtype, answers) in [("a", RecordType::A, 1), ("aaaa", RecordType::AAAA, 0)] {
        let name = WireName::from_ascii("service-7.team-0.svc.c.example.").unwrap();
        let mut query = Message::new(7, MessageType::Query, OpCode::Query);
        query.metadata.recursion_desired = true;
        query.add_query(Query::query(name, qtype));
        let query = query.to_vec().unwrap();
        let answer = || dns.answer(black_box(&query), from, Transport::Udp);
        let got = Message::from_vec(&runtime.block_on(answer()).unwrap()).unwrap();
        assert!(got.metadata.response_code == ResponseCode::NoError && got.answers.len() == answers, "{got}");
        group.bench_function(what, |b| b.to_async(&runtime).iter(answer));
    }
}

fn changes(c: &mut Criterion) {
    let mut group = c.benchmark_group("dns/new-zone");
    for n in [10, 1000] {
        group.bench_function(BenchmarkId::from_parameter(n), |b| b.iter(|| zone(black_box(n))));
    }
}

criterion_group! { name = benches; config = pod::criterion(); targets = answers, packets, changes }
criterion_main!(benches);
