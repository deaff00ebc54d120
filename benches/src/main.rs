//! `compare`: ServiceKeel's data path beside direct loopback and beside rathole, in one run on one machine.
//!
//! Client, service, both routers and both sidecars run here, each as its own process. The paths:
//!
//! - `direct`: client → service, loopback;
//! - `same node`: client → router (splice) → service;
//! - `across`: client → router → TLS 1.3 → router → service;
//! - `rathole`: client → rathole server → plain TCP → rathole client → service.
//!
//! Rounds are interleaved and medians compared, since machines are noisy. Ratios count, not absolute numbers.

mod load;
mod memory;
mod paths;
mod service;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::paths::Paths;

/// Measures ServiceKeel side by side with direct loopback and rathole.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Where the release programs are.
    #[arg(long, default_value = "target/release")]
    programs: PathBuf,
    /// The rathole program; without it that path is left out.
    #[arg(long)]
    rathole: Option<PathBuf>,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// How often each path is measured; the median counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Leave out memory with 1,000 flows.
    #[arg(long)]
    no_memory: bool,
    /// Exit with 1 where a target of the project is missed.
    #[arg(long)]
    check: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The service that is measured: sends as many bytes as it is asked for.
    #[command(hide = true)]
    Serve { addr: SocketAddr },
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(Command::Serve { addr }) = arguments.command {
        return service::serve(addr).map(|()| ExitCode::SUCCESS);
    }
    let paths = Paths::start(&arguments.programs, arguments.rathole.as_deref())?;
    let length = Duration::from_secs(arguments.seconds);
    let rows = load::measure(&paths, length, arguments.rounds)?;
    load::print(&rows);
    let mut missed = load::missed(&rows);
    if !arguments.no_memory {
        missed.extend(memory::measure(&paths)?);
    }
    for miss in &missed {
        eprintln!("missed: {miss}");
    }
    Ok(if arguments.check && !missed.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
