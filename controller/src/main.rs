//! The program; see the library.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use kube::config::KubeConfigOptions;
use kube::{Client, Config};
use servicekeel_controller::args::Args;
use servicekeel_runtime::{fatal, flags, logs, signal};

/// What look-ups of names that are under way get to end.
const GRACE: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if error.use_stderr() => {
            return flags::refuse("servicekeel-controller", &error.to_string());
        }
        // What was asked for.
        Err(help) => help.exit(),
    };
    if let Err(error) = logs::init() {
        return failed(&error);
    }
    let shutdown = signal::shutdown();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&format!("cannot start: {error}")),
    };
    let result = runtime.block_on(async {
        let config = cluster().await?;
        let settings = args.settings(config.cluster_url.to_string());
        let client =
            Client::try_from(config).map_err(|error| format!("cannot use the cluster config: {error}"))?;
        let output = Box::new(std::io::stdout());
        servicekeel_controller::run(settings, client, output, shutdown)
            .await
            .map_err(|error| error.to_string())
    });
    runtime.shutdown_timeout(GRACE);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn failed(why: &str) -> ExitCode {
    fatal!("servicekeel-controller", why);
    ExitCode::FAILURE
}

/// Where the API is. What KUBECONFIG names counts alone: who names a cluster wants no other.
async fn cluster() -> Result<Config, String> {
    if let Some(path) = std::env::var_os("KUBECONFIG").filter(|path| !path.is_empty()) {
        let read = Config::from_kubeconfig(&KubeConfigOptions::default()).await;
        return read.map_err(|error| format!("cannot use KUBECONFIG={}: {error}", path.display()));
    }
    Config::infer().await.map_err(|error| {
        format!("no cluster configured: set KUBECONFIG, or run in a pod with a service account ({error})")
    })
}
