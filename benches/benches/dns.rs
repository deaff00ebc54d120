//! DNS answers: what the zone decides for a name.

use std::hint::black_box;
use std::net::Ipv4Addr;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use servicekeel_core::dns::{Answer, Name, Record, Zone, record_type};

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

fn changes(c: &mut Criterion) {
    let mut group = c.benchmark_group("dns/new-zone");
    for n in [10, 1000] {
        group.bench_function(BenchmarkId::from_parameter(n), |b| b.iter(|| zone(black_box(n))));
    }
}

criterion_group! { name = benches; config = pod::criterion(); targets = answers, changes }
criterion_main!(benches);
