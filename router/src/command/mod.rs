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
use servicekeel_core::reason::shown_lines;

use crate::settings::DEFAULT_PATH;

/// The ServiceKeel router, which runs on each node. It carries flows between the pods of its node, and to other routers
/// over mutual TLS. Without a subcommand it starts the router.
#[derive(Debug, Parser)]
#[command(version, after_long_help = EXAMPLES)]
pub struct Arguments {
    /// The config file. Changes take effect while the router runs.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create a cluster's certificate authority, and issue certificates for its nodes.
    #[command(subcommand, after_long_help = pki::EXAMPLES)]
    Pki(pki::Command),
    /// Show the status of a running router.
    #[command(after_long_help = status::WORDS, after_help = status::WORDS)]
    Status(status::Arguments),
    /// Validate a config, an annotation or a manifest.
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

The config, with its defaults. Only `cluster` is required; without `identity` the router serves only its own node:

  cluster: cluster-a.local
  node: node-1                         # the host's name
  listen:
    sidecars: unix:///tmp/router.sock
    peers: 0.0.0.0:7443                # TCP; off: no router can dial this one
    admin: 127.0.0.1:7480              # /livez /readyz /metrics /status and a page; off
  peers:                               # routers to dial; may be empty on a router that is dialled
    - address: hub.example:7443
  identity: { ca: ca.crt, cert: node.crt, key: node.key }
  trust:                               # other clusters' authorities (see `pki bundle`)
    - { cluster: cluster-b.local, ca: cluster-b-ca.crt }
  revoked: []                          # cut off at once: cluster/node, or a SHA-256 fingerprint
  state: /var/lib/servicekeel/router   # reserved: nothing is kept there yet

Changes to `peers`, `identity`, `trust`, `revoked` and the certificates take effect at once, changes to `cluster`, `node` \
and `listen` after a restart. An invalid change is logged, and the last good config stays in use.

Logs go to stderr. SERVICEKEEL_LOG sets the level (error, warn, info, debug; default info), SERVICEKEEL_LOG_FORMAT the \
format (text, json).";

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

/// Prints lines to stdout. What comes from elsewhere, such as what a pod calls itself, may be among them: nothing of it is
/// obeyed by a terminal.
///
/// # Errors
/// Such as a pipe whose reader is gone.
fn print(text: std::fmt::Arguments<'_>) -> anyhow::Result<()> {
    Ok(io::stdout().lock().write_all(shown_lines(&text.to_string()).as_bytes())?)
}
