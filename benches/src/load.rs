//! Load on a path: throughput, latency, new flows a second; in rounds, each path once a round.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::paths::{Kind, Paths};

/// Clients that open flows at the same time.
pub(crate) const OPENERS: usize = 16;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// After each measurement, for what it left behind to settle.
const PAUSE: Duration = Duration::from_millis(200);
/// Before the first round flows are opened for so long: pools of connections fill.
const WARM_UP: Duration = Duration::from_millis(500);

/// What was measured of one path: a figure for each round, the latencies of all.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples {
    /// Bytes a second.
    pub(crate) one_flow: Vec<f64>,
    /// Bytes a second of all together.
    pub(crate) eight_flows: Vec<f64>,
    /// Flows a second, by [`OPENERS`] clients.
    pub(crate) new_flows: Vec<f64>,
    /// From connect to the first byte of the service, by one client alone; seconds.
    pub(crate) latency: Vec<f64>,
    /// Processor seconds of the programs on the path for each 10^9 bytes, during one flow.
    pub(crate) cpu_each_gb: Vec<f64>,
}

/// What was measured of each path.
pub(crate) type AllSamples = BTreeMap<Kind, Samples>;

pub(crate) fn connect(addr: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&addr, CONNECT_TIMEOUT).map_err(|error| match error.kind() {
        ErrorKind::AddrNotAvailable => {
            anyhow::anyhow!("no local port is free for {addr} ({error}): wait a minute, or raise net.ipv4.ip_local_port_range")
        }
        _ => anyhow::anyhow!("connecting to {addr}: {error}"),
    })?;
    stream.set_read_timeout(Some(READ_TIMEOUT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A new flow that has carried one byte back: it is open on its whole way.
pub(crate) fn open(addr: SocketAddr) -> Result<TcpStream> {
    let mut stream = connect(addr)?;
    stream.write_all(&1_u64.to_be_bytes())?;
    stream.read_exact(&mut [0]).context("no byte came back")?;
    Ok(stream)
}

/// Opens a flow and closes it.
pub(crate) fn ping(addr: SocketAddr) -> Result<()> {
    open(addr).map(drop)
}

/// Runs `n` clients at the same time and gives what each returns.
fn clients<T: Send>(n: usize, client: impl Fn() -> Result<T> + Sync) -> Result<Vec<T>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..n).map(|_| scope.spawn(&client)).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|result| result.map_err(|_| anyhow::anyhow!("a client panicked"))?).collect()
    })
}

/// What `flows` clients receive together: bytes, and bytes a second.
fn throughput(addr: SocketAddr, flows: usize, length: Duration) -> Result<(f64, f64)> {
    let start = Instant::now();
    let received = clients(flows, || {
        let mut stream = connect(addr)?;
        // More than it can receive in the time; closing ends it.
        stream.write_all(&(1_u64 << 50).to_be_bytes())?;
        let mut buf = vec![0; 256 * 1024];
        let mut received = 0;
        while start.elapsed() < length {
            let n = stream.read(&mut buf)?;
            ensure!(n > 0, "the flow ended early");
            received += n as u64;
        }
        Ok(received)
    })?;
    let bytes = received.iter().sum::<u64>() as f64;
    Ok((bytes, bytes / start.elapsed().as_secs_f64()))
}

/// How long each flow took from connect to its first byte, in seconds, one after the other.
fn latencies(addr: SocketAddr, length: Duration) -> Result<Vec<f64>> {
    let start = Instant::now();
    let mut times = Vec::new();
    while start.elapsed() < length {
        let begin = Instant::now();
        let stream = open(addr)?;
        times.push(begin.elapsed().as_secs_f64());
        drop(stream);
    }
    Ok(times)
}

/// Flows a second that [`OPENERS`] clients open, use for one byte, and close.
fn openings(addr: SocketAddr, length: Duration) -> Result<f64> {
    let start = Instant::now();
    let opened = clients(OPENERS, || {
        let mut opened = 0_u64;
        while start.elapsed() < length {
            ping(addr)?;
            opened += 1;
        }
        Ok(opened)
    })?;
    Ok(opened.iter().sum::<u64>() as f64 / start.elapsed().as_secs_f64())
}

/// Measures every path, round by round; `length` for each measurement.
pub(crate) fn measure(paths: &Paths, length: Duration, rounds: u64) -> Result<AllSamples> {
    let mut all = AllSamples::new();
    for round in 0..=rounds {
        for (kind, addr) in &paths.all {
            let measured = if round == 0 {
                openings(*addr, WARM_UP).map(drop)
            } else {
                eprintln!("round {round} of {rounds}: {kind}");
                one_round(paths, *kind, *addr, length, all.entry(*kind).or_default())
            };
            measured.with_context(|| format!("measuring {kind}; {}", paths.logs(*kind)))?;
        }
    }
    Ok(all)
}

fn one_round(
    paths: &Paths,
    kind: Kind,
    addr: SocketAddr,
    length: Duration,
    samples: &mut Samples,
) -> Result<()> {
    let pause = || std::thread::sleep(PAUSE);
    let before = paths.cpu_seconds(kind)?;
    let (bytes, rate) = throughput(addr, 1, length)?;
    pause();
    samples.cpu_each_gb.push((paths.cpu_seconds(kind)? - before) / (bytes / 1e9));
    samples.one_flow.push(rate);
    samples.eight_flows.push(throughput(addr, 8, length)?.1);
    pause();
    samples.latency.extend(latencies(addr, length)?);
    pause();
    samples.new_flows.push(openings(addr, length)?);
    pause();
    Ok(())
}

/// The value below which a share `q` (0 to 1) of the values lies; NaN where there are none.
pub(crate) fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(((values.len() as f64 - 1.0) * q).round() as usize).copied().unwrap_or(f64::NAN)
}

/// The middle value; NaN where there are none.
pub(crate) fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles() {
        let values: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        assert_eq!((quantile(&values, 0.0), median(&values), quantile(&values, 0.99)), (0.0, 50.0, 99.0));
        assert_eq!(median(&[7.0]), 7.0);
        assert!(median(&[]).is_nan());
    }
}
