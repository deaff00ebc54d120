//! Routers and sidecars that run, and what they say of themselves.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{Place, Process, get, wait_for};

/// A router that runs.
pub struct Router {
    /// The process.
    pub process: Process,
    /// Where its admin endpoint listens.
    pub admin: SocketAddr,
    /// Its config file.
    pub config: PathBuf,
    /// The sidecars' socket.
    pub socket: PathBuf,
    pub(crate) place: Place,
    pub(crate) name: String,
}

/// A sidecar that runs.
pub struct Sidecar {
    /// The process.
    pub process: Process,
    /// Where its admin endpoint listens.
    pub admin: SocketAddr,
    /// Where its annotations are.
    pub config: PathBuf,
    /// Where it answers DNS.
    pub dns: SocketAddr,
    pub(crate) variables: Vec<(&'static str, String)>,
    pub(crate) place: Place,
    pub(crate) name: String,
}

/// Fetches a page of an admin endpoint in its place.
fn page(place: &Place, addr: SocketAddr, path: &str) -> Result<(u16, String)> {
    place.run(|| get(addr, path))
}

/// Waits until a program is ready. One that has ended never will be.
fn ready(process: &mut Process, place: &Place, admin: SocketAddr) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let last = page(place, admin, "/readyz");
        if matches!(last, Ok((200, _))) {
            return Ok(());
        }
        if let Some(status) = process.ended()? {
            bail!("{} ended before it was ready, with {status}; its log:\n{}", process.name(), process.log());
        }
        if Instant::now() > end {
            bail!("{} is not ready after 20 s: {last:?}; its log:\n{}", process.name(), process.log());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Router {
    pub(crate) fn wait_ready(&mut self) -> Result<()> {
        ready(&mut self.process, &self.place, self.admin)
    }

    /// What `/status` says.
    ///
    /// # Errors
    /// Where it says nothing.
    pub fn status(&self) -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&page(&self.place, self.admin, "/status")?.1)?)
    }

    /// Waits until another router offers a port, such as `web.default.a.local:80/TCP`.
    ///
    /// # Errors
    /// Where none does within 20 s; with the log.
    pub fn wait_for_offer(&self, port: &str) -> Result<()> {
        wait_for("an offer", Duration::from_secs(20), || {
            let status = self.status()?;
            let offers = status["offers"].as_array().context("no offers in the status")?;
            Ok(offers.iter().any(|offer| offer["service"] == port).then_some(()))
        })
        .with_context(|| self.process.log())
    }
}

impl Sidecar {
    pub(crate) fn wait_ready(&mut self) -> Result<()> {
        ready(&mut self.process, &self.place, self.admin)
    }

    /// What `/status` says.
    ///
    /// # Errors
    /// Where it says nothing.
    pub fn status(&self) -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&page(&self.place, self.admin, "/status")?.1)?)
    }

    /// Writes the annotation of its imports anew, as the kubelet does: a new file in the old one's place.
    ///
    /// # Errors
    /// Where the file can't be written.
    pub fn set_imports(&self, text: &str) -> Result<()> {
        self.set("imported-services-config.yaml", text)
    }

    /// Writes the annotation of its exports anew.
    ///
    /// # Errors
    /// Where the file can't be written.
    pub fn set_exports(&self, text: &str) -> Result<()> {
        self.set("exported-services-config.yaml", text)
    }

    fn set(&self, file: &str, text: &str) -> Result<()> {
        let new = self.config.join(".new");
        std::fs::write(&new, text)?;
        std::fs::rename(new, self.config.join(file))?;
        Ok(())
    }
}
