//! The data path of production routers: throughput of one and eight flows, and new flows, on the same node and across.
//!
//! Client, service and both routers share one process and its cores, so the figures are for comparing one commit with
//! another; `compare` measures the programs as they run.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a bench whose stage is not there has nothing to measure"
)]

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;

use self::mesh::{Client, Mesh, ping};

mod mesh;

/// Bytes that an iteration carries, by all its flows together.
const BYTES: u64 = 32 << 20;

fn start() -> (Runtime, Mesh) {
    let runtime = Builder::new_multi_thread().enable_all().build().unwrap();
    let mesh = runtime.block_on(Mesh::start());
    (runtime, mesh)
}

fn throughput(c: &mut Criterion) {
    let (runtime, mesh) = start();
    let mut group = c.benchmark_group("proxy/throughput");
    group.throughput(Throughput::Bytes(BYTES)).sampling_mode(SamplingMode::Flat);
    for (path, addr) in [("direct", mesh.direct), ("same-node", mesh.same_node), ("across", mesh.across)] {
        for flows in [1, 8] {
            group.bench_function(BenchmarkId::new(path, flows), |b| {
                b.iter_custom(|times| {
                    runtime.block_on(async {
                        let mut clients = Vec::new();
                        for _ in 0..flows {
                            clients.push(Client::connect(addr).await);
                        }
                        let start = Instant::now();
                        let mut tasks = JoinSet::new();
                        for mut client in clients {
                            tasks.spawn(async move {
                                for _ in 0..times {
                                    client.fetch(BYTES / flows).await;
                                }
                            });
                        }
                        while let Some(done) = tasks.join_next().await {
                            done.unwrap();
                        }
                        start.elapsed()
                    })
                });
            });
        }
    }
}

/// One client that opens, uses for a byte, and closes one flow after the other.
fn new_flows(c: &mut Criterion) {
    let (runtime, mesh) = start();
    let mut group = c.benchmark_group("proxy/new-flow");
    for (path, addr) in [("direct", mesh.direct), ("same-node", mesh.same_node), ("across", mesh.across)] {
        group.bench_function(path, |b| b.to_async(&runtime).iter(async || ping(addr).await.unwrap()));
    }
}

fn criterion() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .sample_size(20)
}

criterion_group! { name = benches; config = criterion(); targets = throughput, new_flows }
criterion_main!(benches);
