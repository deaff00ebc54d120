//! The program; see the library.

use std::process::ExitCode;
use std::time::Duration;

use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::{fatal, flags, limit, logs, signal};
use servicekeel_sidecar::dns::OsDns;
use servicekeel_sidecar::settings::args::Args;
use servicekeel_sidecar::source::Files;
use tracing::info;

fn main() -> ExitCode {
    let args = match Args::of(std::env::args_os()) {
        Ok(args) => args,
        Err(error) if error.use_stderr() => return flags::refuse("servicekeel-sidecar", &error.to_string()),
        // What was asked for.
        Err(help) => help.exit(),
    };
    match logs::init().map_err(anyhow::Error::msg).and_then(|()| serve(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            fatal!("servicekeel-sidecar", &format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn serve(args: Args) -> anyhow::Result<()> {
    let directory = args.config_dir().to_owned();
    let settings = args.settings()?;
    limit::raise_open_files();
    // One thread is enough for what a pod asks, and a pod pays for each.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let shutdown = signal::shutdown();
        let (files, annotations) = Files::new(&directory);
        if annotations.borrow().is_absent() {
            info!("no annotations at {} yet; waiting for them", directory.display());
        }
        let ended = async {
            let signal = shutdown.await;
            info!("shutting down on {signal}");
        };
        tokio::select! {
            biased;
            result = servicekeel_sidecar::run(settings, OsNet::new(), OsDns, annotations, ended) => result,
            () = files.run() => Ok(()),
        }
    });
    // A disk that hangs does not keep the program.
    runtime.shutdown_timeout(Duration::from_millis(100));
    Ok(result?)
}
