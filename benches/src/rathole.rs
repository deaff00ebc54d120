//! rathole, the peer: where its program is, how to get it, how it is set up.

use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use e2e::{Process, Stand};

/// The version that is measured: figures of different runs are of the same program.
const VERSION: &str = "0.5.0";
/// What `cargo install` is told. Plain TCP needs neither rathole's TLS nor its noise.
const FEATURES: &str = "server,client";

/// Finds the program, or builds it where that is wanted. `own` is where this program lies, such as `target/release`.
/// `None`: it is not there, which was said on standard error.
///
/// # Errors
/// Where the named program is not there, or the build fails.
pub(crate) fn find(named: Option<PathBuf>, own: &Path, install: bool) -> Result<Option<PathBuf>> {
    if let Some(named) = named {
        ensure!(named.is_file(), "--rathole {}: no such file", named.display());
        return Ok(Some(named));
    }
    let root = own.parent().unwrap_or(own).join("peers");
    let built = root.join("bin/rathole");
    if built.is_file() {
        return Ok(Some(built));
    }
    if let Some(found) = on_path(std::env::var_os("PATH").as_deref()) {
        return Ok(Some(found));
    }
    if install {
        eprintln!("building rathole {VERSION} into {}", root.display());
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let done =
            Command::new(cargo).args(install_arguments(&root)).status().context("cargo does not start")?;
        ensure!(done.success(), "cargo install rathole failed: {done}");
        ensure!(built.is_file(), "cargo install made no {}", built.display());
        return Ok(Some(built));
    }
    let arguments: Vec<String> =
        install_arguments(&root).iter().map(|arg| arg.to_string_lossy().into_owned()).collect();
    eprintln!(
        "rathole is not there, so nothing is compared with it. Run with --install-peers to build it, or by hand:\n  cargo {}",
        arguments.join(" ")
    );
    Ok(None)
}

fn install_arguments(root: &Path) -> Vec<OsString> {
    // Not --locked: the lock file that it ships pins a `time` that today's Rust does not compile.
    let words = ["install", "rathole", "--version", VERSION, "--no-default-features", "--features", FEATURES];
    words.iter().map(OsString::from).chain(["--root".into(), root.into()]).collect()
}

fn on_path(path: Option<&OsStr>) -> Option<PathBuf> {
    let mut directories = std::env::split_paths(path?);
    directories.find_map(|dir| Some(dir.join("rathole")).filter(|program| program.is_file()))
}

/// Starts its server and its client in front of a service: where visitors connect, and the two processes.
///
/// # Errors
/// Where one of them does not start.
pub(crate) fn start(
    stand: &Stand,
    program: &Path,
    service: SocketAddr,
) -> Result<(SocketAddr, [Process; 2])> {
    let (control, visitors) = (stand.free_port()?, stand.free_port()?);
    if control == visitors {
        bail!("no two free ports");
    }
    let run = |role: &str, config: String| -> Result<Process> {
        let file = stand.dir().join(format!("rathole-{role}.toml"));
        std::fs::write(&file, config)?;
        let mut command = Command::new(program);
        Process::start(stand.dir(), &format!("rathole-{role}"), command.arg(format!("--{role}")).arg(file))
    };
    let server = run(
        "server",
        format!(
            "[server]\nbind_addr = \"{control}\"\ndefault_token = \"t\"\n\n\
             [server.services.bench]\nbind_addr = \"{visitors}\"\n"
        ),
    )?;
    let client = run(
        "client",
        format!(
            "[client]\nremote_addr = \"{control}\"\ndefault_token = \"t\"\n\n\
             [client.services.bench]\nlocal_addr = \"{service}\"\n"
        ),
    )?;
    Ok((visitors, [server, client]))
}
