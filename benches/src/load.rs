//! Load on a path: throughput, new flows a second, latency; interleaved rounds, medians.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::paths::Paths;

/// Clients that open flows at the same time.
const OPENERS: usize = 16;

/// The medians of one path.
pub(crate) struct Row {
    name: &'static str,
    one_flow: f64,
    eight_flows: f64,
    flows_a_second: f64,
    connect_p50: f64,
    connect_p99: f64,
    cpu_seconds_a_gb: f64,
}

fn connect(addr: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&addr, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// One byte there and back.
pub(crate) fn ping(addr: SocketAddr) -> Result<()> {
    let mut stream = connect(addr)?;
    stream.write_all(&1_u64.to_be_bytes())?;
    stream.read_exact(&mut [0])?;
    Ok(())
}

/// Bytes a second that `flows` clients receive together.
fn throughput(addr: SocketAddr, flows: usize, length: Duration) -> Result<f64> {
    let received = AtomicU64::new(0);
    let end = Instant::now() + length;
    let start = Instant::now();
    std::thread::scope(|scope| -> Result<()> {
        let clients: Vec<_> = (0..flows)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    let mut stream = connect(addr)?;
                    // More than it can receive in the time; closing ends it.
                    stream.write_all(&(1_u64 << 50).to_be_bytes())?;
                    let mut buf = vec![0; 256 * 1024];
                    while Instant::now() < end {
                        let n = stream.read(&mut buf)?;
                        anyhow::ensure!(n > 0, "the flow ended early");
                        received.fetch_add(n as u64, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        clients.into_iter().try_for_each(|client| client.join().map_err(|_| anyhow::anyhow!("a client panicked"))?)
    })?;
    Ok(received.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64())
}

/// New flows a second, and how long each took from connect to its first byte, in milliseconds.
fn openings(addr: SocketAddr, length: Duration) -> Result<(f64, Vec<f64>)> {
    let end = Instant::now() + length;
    let start = Instant::now();
    let mut all = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let clients: Vec<_> = (0..OPENERS)
            .map(|_| {
                scope.spawn(|| -> Result<Vec<f64>> {
                    let mut times = Vec::new();
                    while Instant::now() < end {
                        let begin = Instant::now();
                        ping(addr)?;
                        times.push(begin.elapsed().as_secs_f64() * 1e3);
                    }
                    Ok(times)
                })
            })
            .collect();
        for client in clients {
            all.extend(client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??);
        }
        Ok(())
    })?;
    Ok((all.len() as f64 / start.elapsed().as_secs_f64(), all))
}

fn median(values: &mut [f64]) -> f64 {
    quantile(values, 0.5)
}

fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(((values.len() as f64 - 1.0) * q).round() as usize).copied().unwrap_or(f64::NAN)
}

/// Measures every path, round by round.
pub(crate) fn measure(paths: &Paths, length: Duration, rounds: usize) -> Result<Vec<Row>> {
    let n = paths.named.len();
    let mut results = vec![(Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new()); n];
    for round in 1..=rounds {
        for ((name, addr), result) in paths.named.iter().zip(&mut results) {
            eprintln!("round {round} of {rounds}: {name}");
            let context = || format!("measuring {name:?}");
            let cpu = || -> Result<u64> { paths.routers.iter().map(|(_, r)| r.process.cpu_ticks()).sum() };
            let before = cpu()?;
            let one = throughput(*addr, 1, length).with_context(context)?;
            result.4.push((cpu()? - before) as f64 / 100.0 / (one * length.as_secs_f64() / 1e9));
            result.0.push(one);
            result.1.push(throughput(*addr, 8, length).with_context(context)?);
            let (rate, times) = openings(*addr, length).with_context(context)?;
            result.2.push(rate);
            result.3.extend(times);
            // What the flows left behind settles.
            std::thread::sleep(Duration::from_millis(300));
        }
    }
    let rows = paths.named.iter().zip(results).map(|((name, _), (mut one, mut eight, mut rate, mut times, mut cpu))| Row {
        name,
        one_flow: median(&mut one),
        eight_flows: median(&mut eight),
        flows_a_second: median(&mut rate),
        connect_p50: quantile(&mut times, 0.5),
        connect_p99: quantile(&mut times, 0.99),
        cpu_seconds_a_gb: median(&mut cpu),
    });
    Ok(rows.collect())
}

/// Prints the table, for people and for Markdown.
#[allow(clippy::print_stdout, reason = "the table is what the program is for")]
pub(crate) fn print(rows: &[Row]) {
    println!("| path | 1 flow Gbit/s | 8 flows Gbit/s | new flows/s | connect p50 ms | p99 ms | routers' CPU s/GB |");
    println!("|---|---:|---:|---:|---:|---:|---:|");
    for row in rows {
        println!(
            "| {} | {:.2} | {:.2} | {:.0} | {:.2} | {:.2} | {:.2} |",
            row.name,
            row.one_flow * 8e-9,
            row.eight_flows * 8e-9,
            row.flows_a_second,
            row.connect_p50,
            row.connect_p99,
            row.cpu_seconds_a_gb
        );
    }
    println!();
    for (what, value, target) in ratios(rows) {
        println!("{what}: {value:.2} (target: at least {target})");
    }
}

fn ratios(rows: &[Row]) -> Vec<(&'static str, f64, f64)> {
    let find = |name| rows.iter().find(|row| row.name == name);
    let mut ratios = Vec::new();
    if let (Some(direct), Some(near)) = (find("direct"), find("same node")) {
        ratios.push(("same node / direct, one flow", near.one_flow / direct.one_flow, 0.4));
    }
    if let (Some(across), Some(rathole)) = (find("across"), find("rathole")) {
        ratios.push(("across (TLS) / rathole (plain), one flow", across.one_flow / rathole.one_flow, 1.0));
        let flows = across.flows_a_second / rathole.flows_a_second;
        ratios.push(("across (TLS) / rathole (plain), new flows", flows, 0.8));
    }
    ratios
}

/// The targets that were missed.
pub(crate) fn missed(rows: &[Row]) -> Vec<String> {
    let missed = ratios(rows).into_iter().filter(|(_, value, target)| value < target);
    missed.map(|(what, value, target)| format!("{what}: {value:.2}, wanted {target}")).collect()
}
