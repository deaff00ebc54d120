//! Runs the router.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use ring::rand::{SecureRandom, SystemRandom};
use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::{limit, logs, signal};
use tokio::runtime::Builder;
use tracing::{error, info};

use crate::settings::{self, follow::Follow};

/// How long what still resolves names may hold up the end of the process.
const LAST_WAIT: std::time::Duration = std::time::Duration::from_millis(100);

/// Runs the router by a config file until a signal ends it.
pub(super) fn run(config: PathBuf) -> ExitCode {
    if let Err(error) = logs::init() {
        return super::ended(Err(anyhow::Error::msg(error)));
    }
    match serve(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // What is wrong with the files is told a line each.
            format!("{error:#}").lines().for_each(|line| error!("{line}"));
            ExitCode::FAILURE
        }
    }
}

fn serve(config: PathBuf) -> anyhow::Result<()> {
    limit::raise_open_files();
    let mut seed = [0; 8];
    SystemRandom::new().fill(&mut seed).ok().context("the system gives no random numbers")?;
    let runtime = Builder::new_multi_thread().enable_all().build().context("can't start threads")?;
    let served = runtime.block_on(async {
        let (follow, receiver) = Follow::start(config, settings::host())?;
        let asked = signal::shutdown();
        let shutdown = async {
            let signal = asked.await;
            info!(signal, "asked to end");
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
