//! Annotations: parsed, and compared with the ones before.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a bench whose stage is not there has nothing to measure"
)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use servicekeel_core::annotation::{diff, parse_imports, render};

mod pod;

const SIZES: [usize; 3] = [10, 100, 1000];

fn parse(c: &mut Criterion) {
    let mut group = c.benchmark_group("annotation/parse");
    let defaults = pod::defaults();
    for entries in SIZES {
        let imports = pod::imports(entries);
        let text = render::imports(&imports, &defaults);
        assert_eq!(parse_imports(&text, &defaults).unwrap().entries, imports);
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_with_input(BenchmarkId::from_parameter(entries), &text, |b, text| {
            b.iter(|| parse_imports(black_box(text), &defaults));
        });
    }
}

/// One Service goes and another one comes.
fn compare(c: &mut Criterion) {
    let mut group = c.benchmark_group("annotation/diff");
    for entries in SIZES {
        let (mut old, mut new) = (pod::imports(entries + 1), pod::imports(entries + 1));
        old.remove(0);
        new.remove(entries / 2);
        assert_eq!(diff::imports(&old, &new).len(), 4);
        group.throughput(Throughput::Elements(entries as u64));
        group.bench_with_input(BenchmarkId::from_parameter(entries), &(old, new), |b, (old, new)| {
            b.iter(|| diff::imports(black_box(old), black_box(new)));
        });
    }
}

criterion_group! { name = benches; config = pod::criterion(); targets = parse, compare }
criterion_main!(benches);
