//! The program; see the library.

use std::process::ExitCode;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::{logs, signal};
use servicekeel_sidecar::dns::Hickory;
use servicekeel_sidecar::settings::args::Args;
use servicekeel_sidecar::source::Files;
use tracing::{info, warn};

fn main() -> ExitCode {
    let args = Args::read();
    match logs::init().map_err(anyhow::Error::msg).and_then(|()| serve(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("servicekeel-sidecar: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(args: Args) -> anyhow::Result<()> {
    let directory = args.config_dir().to_owned();
    let settings = args.settings()?;
    raise_file_limit();
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
            info!(signal, "told to end");
        };
        tokio::select! {
            biased;
            result = servicekeel_sidecar::run(settings, OsNet::new(), Hickory, annotations, ended) => result,
            () = files.run() => Ok(()),
        }
    });
    // A disk that hangs does not keep the program.
    runtime.shutdown_timeout(Duration::from_millis(100));
    Ok(result?)
}

/// A socket for each imported port may be more than the 1,024 that a process has at first.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, raised)
    {
        warn!(%error, "the limit of open files stays at {:?}", limit.current);
    }
}
