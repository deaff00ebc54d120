//! Leases: a reload that changes one Service, a range that fills up, and a start from what was kept.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a bench whose stage is not there has nothing to measure"
)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ipnet::Ipv4Net;
use servicekeel_core::lease::Leases;
use servicekeel_core::name::ServiceName;

mod pod;

const REST: Duration = Duration::from_secs(60);

/// A range, and how many Services are imported from it: a /24 full to the brim, a /16 with the most that an annotation
/// holds.
fn cases() -> [(Ipv4Net, usize); 2] {
    [("127.0.66.0/24".parse().unwrap(), 254), ("127.66.0.0/16".parse().unwrap(), 4096)]
}

fn services(n: usize) -> Vec<ServiceName> {
    pod::imports(n).into_iter().map(|import| import.service).collect()
}

fn empty(range: Ipv4Net) -> Leases {
    Leases::new(range, REST, &[]).unwrap()
}

fn assign(c: &mut Criterion) {
    let now = Instant::now();
    let mut group = c.benchmark_group("leases/assign-all");
    for (range, n) in cases() {
        let wanted = services(n);
        assert!(empty(range).assign(&wanted, now).is_empty());
        group.throughput(Throughput::Elements(n as u64));
        group.bench_function(BenchmarkId::from_parameter(range), |b| {
            b.iter_batched_ref(
                || empty(range),
                |leases| leases.assign(black_box(&wanted), now),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();

    let mut group = c.benchmark_group("leases/assign-one-changed");
    for (range, n) in cases() {
        let mut wanted = services(n);
        let mut leases = empty(range);
        assert!(leases.assign(&wanted[1..], now).is_empty());
        wanted.pop();
        group.bench_function(BenchmarkId::from_parameter(range), |b| {
            b.iter_batched_ref(
                || leases.clone(),
                |leases| assert!(leases.assign(black_box(&wanted), now).is_empty()),
                BatchSize::SmallInput,
            );
        });
    }
}

fn restore(c: &mut Criterion) {
    let now = Instant::now();
    let mut group = c.benchmark_group("leases/restore");
    for (range, n) in cases() {
        let mut leases = empty(range);
        leases.assign(&services(n), now);
        let snapshot = leases.snapshot();
        assert_eq!(snapshot.leases.len(), n);
        group.throughput(Throughput::Elements(n as u64));
        group.bench_function(BenchmarkId::from_parameter(range), |b| {
            b.iter(|| Leases::restore(range, REST, &[], black_box(&snapshot), now).unwrap());
        });
    }
}

criterion_group! { name = benches; config = pod::criterion(); targets = assign, restore }
criterion_main!(benches);
