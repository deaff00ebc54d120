//! The program; see the library.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use kube::{Client, Config};
use servicekeel_controller::args::Args;
use servicekeel_runtime::{logs, signal};

/// What look-ups of names that are under way get to end.
const GRACE: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let settings = Args::parse().settings();
    if let Err(error) = logs::init() {
        // Where stderr is gone, the exit code says it.
        let _ = writeln!(std::io::stderr(), "servicekeel-controller: {error}");
        return ExitCode::FAILURE;
    }
    let shutdown = signal::shutdown();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!("can't start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        let config = Config::infer().await.map_err(|error| {
            format!(
                "no cluster is known: set KUBECONFIG, or run in a pod that has a service account ({error})"
            )
        })?;
        let client = Client::try_from(config)
            .map_err(|error| format!("the cluster's config can't be used: {error}"))?;
        let output = Box::new(std::io::stdout());
        servicekeel_controller::run(settings, client, output, shutdown)
            .await
            .map_err(|error| error.to_string())
    });
    runtime.shutdown_timeout(GRACE);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}
