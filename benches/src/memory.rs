//! Resident memory: idle, and with 1,000 open flows that carry nothing.

use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::paths::Paths;

const FLOWS: usize = 1000;
/// KiB that an idle sidecar may have resident.
const SIDECAR_KIB: u64 = 8 * 1024;
/// KiB of a router for each idle flow.
const FLOW_KIB: f64 = 40.0;

/// Prints what each program takes; gives the targets that were missed.
#[allow(clippy::print_stdout, reason = "the table is what the program is for")]
pub(crate) fn measure(paths: &Paths) -> Result<Vec<String>> {
    let (_, across) = paths.named.iter().find(|(name, _)| *name == "across").context("no such path")?;
    let routers = || -> Result<Vec<u64>> { paths.routers.iter().map(|(_, r)| r.process.resident_kib()).collect() };
    let sidecars = || -> Result<Vec<u64>> { paths.sidecars.iter().map(|(_, s)| s.process.resident_kib()).collect() };
    let (routers_idle, sidecars_idle) = (routers()?, sidecars()?);
    let mut flows: Vec<TcpStream> = Vec::new();
    for _ in 0..FLOWS {
        let mut stream = TcpStream::connect_timeout(across, Duration::from_secs(5))?;
        // One byte, so that the flow is open on its whole way.
        std::io::Write::write_all(&mut stream, &1_u64.to_be_bytes())?;
        std::io::Read::read_exact(&mut stream, &mut [0])?;
        flows.push(stream);
    }
    std::thread::sleep(Duration::from_secs(1));
    let (routers_busy, sidecars_busy) = (routers()?, sidecars()?);
    drop(flows);

    let mut missed = Vec::new();
    println!("\n| program | idle KiB | with {FLOWS} idle flows KiB | KiB a flow |\n|---|---:|---:|---:|");
    for ((name, _), (idle, busy)) in paths.routers.iter().zip(routers_idle.iter().zip(&routers_busy)) {
        let each = (*busy as f64 - *idle as f64) / FLOWS as f64;
        println!("| {name} | {idle} | {busy} | {each:.1} |");
        if each > FLOW_KIB {
            missed.push(format!("{name}: {each:.1} KiB for each idle flow, wanted {FLOW_KIB}"));
        }
    }
    for ((name, _), (idle, busy)) in paths.sidecars.iter().zip(sidecars_idle.iter().zip(&sidecars_busy)) {
        println!("| {name} | {idle} | {busy} | |");
        if *idle > SIDECAR_KIB {
            missed.push(format!("{name}: {idle} KiB idle, wanted {SIDECAR_KIB}"));
        }
        // A page or two for its own counters and log lines is no growth by connections.
        if *busy > idle + 64 {
            missed.push(format!("{name}: grew from {idle} to {busy} KiB with {FLOWS} flows"));
        }
    }
    Ok(missed)
}
