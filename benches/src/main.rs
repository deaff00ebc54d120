//! `compare`: ServiceKeel's data path beside direct loopback and beside rathole, in one run on one machine.

mod load;
mod memory;
mod paths;
mod rathole;
mod report;
mod service;
mod targets;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::paths::Paths;

/// Measures ServiceKeel side by side with direct loopback and with rathole; prints Markdown tables.
///
/// Client, service, routers and sidecars run on this machine, each as a process of its own.
/// The paths:
///
///   direct     client → service, over loopback
///   same node  client → router (splice) → service
///   across     client → router → TLS 1.3 → router → service
///   rathole    client → rathole server → plain TCP → rathole client → service
///
/// Each path is measured once a round: one flow, eight flows, connections one after the other,
/// and 16 clients that open flows as fast as they can. The medians of the rounds are shown,
/// and ratios are taken round by round: machines are noisy, so ratios count, not absolute
/// numbers. Memory is measured first, with programs that have carried nothing yet.
#[derive(Debug, Parser)]
#[command(name = "compare", version, verbatim_doc_comment, after_help = AFTER)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Where servicekeel-router and servicekeel-sidecar are [default: where this program is].
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// The rathole program [default: target/peers/bin/rathole, else the one on the PATH].
    #[arg(long, value_name = "FILE")]
    rathole: Option<PathBuf>,
    /// Where rathole is not there, build it from crates.io into target/peers; takes a minute or two.
    #[arg(long)]
    install_peers: bool,
    /// How long each measurement takes, 1 to 60.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// How often each path is measured, 1 to 100.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=100))]
    rounds: u64,
    /// Leave memory out.
    #[arg(long)]
    no_memory: bool,
    /// Exit with 1 where a target is missed, or was not measured.
    #[arg(long)]
    check: bool,
}

const AFTER: &str = "\
Examples:
  cargo build --release --locked -p servicekeel-router -p servicekeel-sidecar -p benches
  target/release/compare --install-peers           all of it, about five minutes
  target/release/compare --seconds 1 --rounds 1    a look
  target/release/compare --check > figures.md      exit 1 where a target is missed

Leave the machine alone meanwhile: a build beside it makes the figures worthless.";

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
    let descriptors = raise_descriptors()?;
    let own = std::env::current_exe()?;
    let own = own.parent().context("a program without a directory")?;
    let programs = arguments.programs.unwrap_or_else(|| own.to_owned());
    let rathole = rathole::find(arguments.rathole, own, arguments.install_peers)?;
    if cfg!(debug_assertions) {
        eprintln!("This is a debug build: its figures say nothing. Build with --release.");
    }

    let start = || {
        Paths::start(&programs, rathole.as_deref())
            .context("the paths cannot be laid (compare --help says how the programs are built)")
    };
    let memory = if arguments.no_memory {
        Vec::new()
    } else {
        eprintln!("memory: idle, and with {} open flows", memory::FLOWS);
        memory::measure(&start()?, descriptors)?
    };
    let paths = start()?;
    let (length, rounds) = (Duration::from_secs(arguments.seconds), arguments.rounds);
    let samples = load::measure(&paths, length, rounds)?;
    let targets = targets::judge(&samples, &memory);
    report::print(&report::Run { length, rounds, samples: &samples, memory: &memory, targets: &targets });

    let missed = targets.iter().filter(|target| !target.is_met());
    missed.clone().for_each(|target| eprintln!("missed: {target}"));
    Ok(if arguments.check && missed.count() > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Raises the limit of open files to what the system lets this user have, for the programs started here, too: a
/// thousand flows take several thousand descriptors of a relay. Says what the limit is.
fn raise_descriptors() -> Result<u64> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).context("cannot raise the open file limit")?;
    Ok(limit.current.unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_sound() {
        Arguments::command().debug_assert();
        assert!(Arguments::try_parse_from(["compare", "--seconds", "0"]).is_err());
        assert!(Arguments::try_parse_from(["compare", "--rounds", "101"]).is_err());
    }
}
