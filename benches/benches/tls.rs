//! What TLS costs: a handshake of two routers, and frames sealed and opened, without a kernel between them.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a bench whose stage is not there has nothing to measure"
)]

use std::time::{Duration, SystemTime};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use servicekeel_core::flow::frame::{Kind, MAX_DATA};
use servicekeel_core::name::RouterId;
use servicekeel_router::identity::Identity;
use servicekeel_router::pki::Authority;
use servicekeel_router::tls::{BufferPool, Channel, accept, connect};
use tokio::io::{DuplexStream, duplex};
use tokio::runtime::{Builder, Runtime};

/// Frames that one side sends before the other one reads: they fit the connection's buffer.
const BATCH: usize = 4;

/// The routers of two clusters that trust each other.
fn identities() -> (Identity, Identity) {
    let now = SystemTime::now();
    let authority = |cluster: &str| Authority::generate(&cluster.parse().unwrap(), 2, now).unwrap();
    let (a, b) = (authority("a.local"), authority("b.local"));
    let identity = |own: &Authority, node: &str, other: &Authority| {
        let id = RouterId { cluster: own.cluster().clone(), node: node.parse().unwrap() };
        let material = own.material(&id.node, &[other], now).unwrap();
        Identity::from_pem(id, &material).unwrap()
    };
    (identity(&a, "a-1", &b), identity(&b, "b-1", &a))
}

async fn channels(a: &Identity, b: &Identity) -> (Channel<DuplexStream>, Channel<DuplexStream>) {
    let (near, far) = duplex(256 * 1024);
    let (dialled, accepted) = tokio::join!(
        connect(near, a.client(), BufferPool::new()),
        accept(far, b.server(), BufferPool::new()),
    );
    (dialled.unwrap().0, accepted.unwrap().0)
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Both sides of a mutual handshake.
fn handshake(c: &mut Criterion) {
    let (a, b) = identities();
    c.bench_function("tls/handshake", |bencher| bencher.to_async(runtime()).iter(|| channels(&a, &b)));
}

/// Full frames from one side to the other: sealed, copied twice by the memory between, opened.
fn frames(c: &mut Criterion) {
    let mut group = c.benchmark_group("tls/frames");
    let runtime = runtime();
    let (a, b) = identities();
    for size in [100, MAX_DATA] {
        let (mut near, mut far) = runtime.block_on(channels(&a, &b));
        let payload = vec![0x5a; size];
        group.throughput(Throughput::Bytes((BATCH * size) as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| {
                runtime.block_on(async {
                    for _ in 0..BATCH {
                        near.send_payload(Kind::Data, 0, &payload).unwrap();
                    }
                    near.flush().await.unwrap();
                    for _ in 0..BATCH {
                        let (header, got) = far.recv().await.unwrap().unwrap();
                        assert!(header.kind == Kind::Data && got.len() == size);
                    }
                });
            });
        });
    }
}

fn criterion() -> Criterion {
    Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2))
}

criterion_group! { name = benches; config = criterion(); targets = handshake, frames }
criterion_main!(benches);
