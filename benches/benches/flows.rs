//! What the core does for each frame of a flow: its header, and the machine's step.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a bench whose stage is not there has nothing to measure"
)]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use servicekeel_core::flow::frame::{self, Cause, Header, Kind, MAX_DATA, Open, Refused};
use servicekeel_core::flow::machine::{Flow, Received};
use servicekeel_core::name::{Protocol, ServiceName, ServicePort};

mod pod;

const DATA: Header = Header { kind: Kind::Data, len: MAX_DATA as u16, offset: 1 << 40 };

fn headers(c: &mut Criterion) {
    let mut group = c.benchmark_group("frame");
    group.bench_function("encode-header", |b| b.iter(|| black_box(DATA).encode()));
    let bytes = DATA.encode();
    assert_eq!(Header::decode(&bytes), Ok(Some(DATA)));
    group.bench_function("decode-header", |b| b.iter(|| Header::decode(black_box(&bytes))));

    let service = ServiceName {
        name: "web".parse().unwrap(),
        namespace: "default".parse().unwrap(),
        cluster: "a.local".parse().unwrap(),
    };
    let wanted = ServicePort { service, port: 80.try_into().unwrap(), protocol: Protocol::Tcp };
    let open = Open { flow: u64::MAX, wanted, namespace: None, consumer: None };
    group.bench_function("encode-open", |b| b.iter(|| frame::encode_frame(Kind::Open, 0, black_box(&open))));
    let payload = frame::encode_frame(Kind::Open, 0, &open).unwrap()[frame::HEADER..].to_vec();
    assert_eq!(frame::decode_payload::<Open>(&payload).unwrap(), open);
    group.bench_function("decode-open", |b| b.iter(|| frame::decode_payload::<Open>(black_box(&payload))));
    let refused = Refused { cause: Cause::Unreachable, reason: "no endpoint takes the connection".into() };
    group.bench_function("encode-refused", |b| {
        b.iter(|| frame::encode_frame(Kind::Refused, 0, black_box(&refused)))
    });
}

/// Both machines of a flow: one full frame from one to the other, with the acknowledgements that fall due.
fn machine(c: &mut Criterion) {
    let mut group = c.benchmark_group("flow");
    group.throughput(Throughput::Bytes(MAX_DATA as u64));
    let (mut from, mut to) = (Flow::default(), Flow::default());
    group.bench_function("one-frame", |b| {
        b.iter(|| {
            assert!(from.may_send() >= MAX_DATA as u64);
            let offset = from.handle_local_bytes(MAX_DATA as u64);
            let received = to.handle_frame(Header { offset, ..DATA });
            assert_eq!(received, Ok(Received::Deliver));
            to.handle_delivered(MAX_DATA as u64);
            while let Some(header) = to.poll_transmit() {
                from.handle_frame(header).unwrap();
            }
            black_box(from.poll_end())
        });
    });
}

criterion_group! { name = benches; config = pod::criterion(); targets = headers, machine }
criterion_main!(benches);
