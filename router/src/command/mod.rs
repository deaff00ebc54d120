//! The command line: the router itself, and its tools.

mod check;
mod manifest;
mod pki;
mod start;
mod status;

use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::settings::DEFAULT_PATH;

/// ServiceKeel's router: one on each node. It carries flows between the pods of its node, and to other routers over
/// mutual TLS. Without a subcommand it runs.
#[derive(Debug, Parser)]
#[command(version, after_long_help = EXAMPLES)]
pub struct Arguments {
    /// The config file. It is watched while the router runs.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make an authority for a cluster, and certificates for its nodes.
    #[command(subcommand, after_long_help = pki::EXAMPLES)]
    Pki(pki::Command),
    /// Ask a router that runs how it is.
    #[command(after_long_help = status::WORDS, after_help = status::WORDS)]
    Status(status::Arguments),
    /// Say what is wrong with a config, an annotation or a manifest.
    Check(check::Arguments),
}

/// Where configs and authorities come from, in the order of a first start.
const EXAMPLES: &str = "\
A first start, on one node of the cluster cluster-a.local:

  servicekeel-router pki init --cluster cluster-a.local --dir pki
  servicekeel-router pki issue --dir pki --node node-1 --out .
  servicekeel-router check router.yaml
  servicekeel-router --config router.yaml
  servicekeel-router status --config router.yaml

The config, with what stands where nothing is said. Only `cluster` is required; without `identity` the router serves \
its own node only:

  cluster: cluster-a.local
  node: node-1                         # the host's name
  listen:
    sidecars: unix:///tmp/router.sock
    peers: 0.0.0.0:7443                # TCP; off: nobody can dial this router
    admin: 127.0.0.1:7480              # /livez /readyz /metrics /status and a page; off
  peers:                               # routers to dial; one that dials nobody only accepts
    - address: hub.example:7443
  identity: { ca: ca.crt, cert: node.crt, key: node.key }
  trust:                               # other clusters' authorities (see `pki bundle`)
    - { cluster: cluster-b.local, ca: cluster-b-ca.crt }
  state: /var/lib/servicekeel/router   # reserved: nothing is kept there yet

Changes of `peers`, `identity`, `trust` and of the certificates take effect at once, those of `cluster`, `node` and \
`listen` at the next start. A change for the worse is told in the log, and the last good settings stay.

The log goes to stderr. SERVICEKEEL_LOG=debug shows more of it, SERVICEKEEL_LOG_FORMAT=json suits machines.";

impl Arguments {
    /// Does what they say.
    pub fn run(self) -> ExitCode {
        match self.command {
            None => start::run(self.config),
            Some(Command::Pki(command)) => ended(command.run()),
            Some(Command::Status(arguments)) => ended(arguments.run(&self.config)),
            Some(Command::Check(arguments)) => ended(arguments.run()),
        }
    }
}

/// What a shell says of a program that writes to a pipe without a reader: 128 and the number of SIGPIPE.
const CLOSED_PIPE: u8 = 141;

/// Tells the error, if any, on stderr; but not that who read stdout has read enough.
fn ended(outcome: anyhow::Result<ExitCode>) -> ExitCode {
    outcome.unwrap_or_else(|error| {
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe) {
            return ExitCode::from(CLOSED_PIPE);
        }
        // The last resort is gone where stderr is; the exit code says it too.
        let _ = writeln!(io::stderr(), "servicekeel-router: {error:#}");
        ExitCode::FAILURE
    })
}

/// Prints to stdout.
///
/// # Errors
/// Such as a pipe whose reader is gone.
fn print(text: std::fmt::Arguments<'_>) -> anyhow::Result<()> {
    Ok(io::stdout().lock().write_fmt(text)?)
}
