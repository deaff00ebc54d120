//! Runs the router.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use ring::rand::{SecureRandom, SystemRandom};
use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::{fatal, limit, logs, signal};
use tokio::runtime::Builder;
use tracing::info;

use crate::settings::{self, follow::Follow};

/// How long what still resolves names may hold up the end of the process.
const LAST_WAIT: std::time::Duration = std::time::Duration::from_millis(100);

/// Runs the router by a config file until a signal ends it.
pub(super) fn run(config: PathBuf) -> ExitCode {
    match logs::init().map_err(anyhow::Error::msg).and_then(|()| serve(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            fatal!("servicekeel-router", &format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn serve(config: PathBuf) -> anyhow::Result<()> {
    if !config.try_exists().unwrap_or(true) {
        bail!("{}: not found; pass a config with --config FILE (--help has an example)", config.display());
    }
    limit::raise_open_files();
    limit::raise_threads();
    let mut seed = [0; 8];
    SystemRandom::new().fill(&mut seed).ok().context("no random numbers from the system")?;
    let runtime = Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    let served = runtime.block_on(async {
        let (follow, receiver) = Follow::start(config, settings::host())?;
        let asked = signal::shutdown();
        let shutdown = async {
            let signal = asked.await;
            info!("shutting down on {signal}");
        };
        let run = Box::pin(crate::run(receiver, OsNet::new(), u64::from_ne_bytes(seed), shutdown));
        tokio::select! {
            biased;
            ended = run => ended.map_err(anyhow::Error::from),
            () = follow.run() => Ok(()),
        }
    });
    runtime.shutdown_timeout(LAST_WAIT);
    served
}
