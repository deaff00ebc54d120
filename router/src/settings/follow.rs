//! Follows the files: what changes for the good is passed on, what changes for the bad is told and changes nothing.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use servicekeel_core::name::ClusterName;
use servicekeel_runtime::watch::FileWatch;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{error, info, warn};

use super::problem::{Problem, Problems};
use super::read::{Bad, Good, Reading, read};
use super::{Config, Pending, Refused, Settings};
use crate::identity::{Date, Identity, Material, Untimely};

/// How often the end of the own certificate is looked at, at the least.
const LOOK: Duration = Duration::from_secs(600);
/// How often a certificate that is not valid now is tried again: the clock of a machine that boots is set late.
const RETRY: Duration = Duration::from_secs(10);

/// Follows one config and the files that it names.
pub struct Follow {
    path: PathBuf,
    host: String,
    sender: watch::Sender<Arc<Settings>>,
    /// As the router started: names and sockets stay until it starts anew.
    started: Config,
    /// As the files said when they were good last.
    good: (Config, Option<Material>),
    told: Vec<Problem>,
    warned: Vec<Problem>,
    /// What was told to wait for a new start.
    waiting: Vec<&'static str>,
    /// When the files were read that are in use.
    in_use: SystemTime,
    /// Only the certificate's time is wrong.
    untimely: bool,
    validity: Validity,
    watch: FileWatch,
    files: Vec<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Validity {
    Fine,
    Soon,
    Ended,
}

impl Follow {
    /// Reads the files and starts to watch them. The receiver has the settings to start by.
    ///
    /// Where only the own certificate's time is wrong, the router starts without an identity, and gets one as soon as
    /// it is valid: the own node is served meanwhile.
    ///
    /// # Errors
    /// All that is wrong with the files.
    pub fn start(path: PathBuf, host: String) -> Result<(Self, watch::Receiver<Arc<Settings>>), Problems> {
        // Watched before they are read, so that no change is missed.
        let mut watch = FileWatch::new(std::slice::from_ref(&path));
        let mut reading = read(&path, &host);
        if reading.files.len() > 1 {
            watch.set(&reading.files);
            let files = std::mem::take(&mut reading.files);
            reading = Reading { files, ..read(&path, &host) };
        }
        for warning in &reading.warnings {
            warn!("{warning}");
        }
        let (settings, good, untimely) = match reading.outcome {
            Ok(Good { settings, material }) => {
                let config = Config::clone(&settings.config);
                (settings, (config, material), None)
            }
            Err(Bad { problems, without_identity: Some((config, untimely)) }) => {
                let settings = Settings {
                    config: Arc::new(Config::clone(&config)),
                    identity: None,
                    untimely: Some(untimely),
                    pending: Pending::default(),
                };
                (settings, (*config, None), Some(problems))
            }
            Err(Bad { problems, .. }) => return Err(problems),
        };
        let (sender, receiver) = watch::channel(Arc::new(settings));
        let mut follow = Self {
            path,
            host,
            sender,
            started: good.0.clone(),
            good,
            told: Vec::new(),
            warned: reading.warnings,
            waiting: Vec::new(),
            in_use: SystemTime::now(),
            untimely: untimely.is_some(),
            validity: Validity::Fine,
            watch,
            files: reading.files,
        };
        if let Some(problems) = untimely {
            follow.tell(problems, "serving this node only until then");
        }
        follow.look(SystemTime::now());
        Ok((follow, receiver))
    }

    /// Follows for ever.
    pub async fn run(mut self) {
        loop {
            let pause = if self.untimely { RETRY } else { self.next_look(SystemTime::now()) };
            tokio::select! {
                biased;
                () = self.watch.changed() => self.read(),
                () = sleep(pause) => {
                    if self.untimely {
                        self.read();
                    }
                }
            }
            self.look(SystemTime::now());
        }
    }

    fn read(&mut self) {
        let mut reading = read(&self.path, &self.host);
        // A config that can't be read names no files: those of the last good one are watched on.
        let new = reading.files.iter().any(|file| !self.files.contains(file));
        if new || reading.outcome.is_ok() {
            self.files.clone_from(&reading.files);
            self.watch.set(&self.files);
        }
        if new {
            // What changed between reading and watching would be missed.
            reading = read(&self.path, &self.host);
        }
        self.take(reading);
    }

    /// Takes what was read.
    fn take(&mut self, reading: Reading) {
        let Good { settings, material } = match reading.outcome {
            Ok(good) => good,
            Err(bad) => {
                let untimely = bad.without_identity.map(|(_, untimely)| untimely);
                self.untimely = untimely.is_some();
                self.note(untimely);
                self.refuse(&bad.problems, untimely);
                return self.tell(bad.problems, "keeping the last good config");
            }
        };
        self.untimely = false;
        self.in_use = SystemTime::now();
        if !std::mem::take(&mut self.told).is_empty() {
            info!(file = %self.path.display(), "config is valid again");
        }
        if reading.warnings != self.warned {
            reading.warnings.iter().for_each(|warning| warn!("{warning}"));
            self.warned = reading.warnings;
        }
        let config = Config::clone(&settings.config);
        let changes = changes(&self.good, (&config, &material));
        let Settings { mut identity, .. } = settings;
        self.good = (config.clone(), material);
        if changes.is_empty() {
            return self.pend(Pending { refused: None, at_next_start: self.waiting.clone() });
        }
        let waits = waits(&self.started, &config);
        if waits != self.waiting && !waits.is_empty() {
            warn!(changed = waits.join(", "), "change takes effect after a restart");
        }
        self.waiting = waits;
        let pending = Pending { refused: None, at_next_start: self.waiting.clone() };
        let Config { cluster, node, listen, .. } = self.started.clone();
        if (&cluster, &node) != (&config.cluster, &config.node) {
            // The new certificate is of a name that the router does not have yet; whom it believes is not.
            identity = identity.and_then(|_| self.with_new_trust(&config.cluster));
        }
        info!(changed = changes.join(", "), "config reloaded");
        let config = Config { cluster, node, listen, peers: config.peers, revoked: config.revoked };
        let untimely = None;
        self.sender.send_replace(Arc::new(Settings {
            config: Arc::new(config),
            identity,
            untimely,
            pending,
        }));
    }

    /// The identity in use, with the trust and the revocations of settings for another name.
    fn with_new_trust(&self, cluster: &ClusterName) -> Option<Arc<Identity>> {
        let current = self.sender.borrow().identity.clone()?;
        match self.good.1.as_ref().map(|material| current.with_trust_of(cluster, material)) {
            Some(Ok(identity)) => Some(Arc::new(identity)),
            // Read for the new name, they are good.
            Some(Err(error)) => {
                error!(%error, "the new trust cannot be applied until the router restarts");
                Some(current)
            }
            None => None,
        }
    }

    /// Why there is no identity, where another certificate than before is out of its time.
    fn note(&self, untimely: Option<Untimely>) {
        self.sender.send_if_modified(|settings| {
            let news = untimely.is_some() && settings.identity.is_none() && settings.untimely != untimely;
            if news {
                *settings = Arc::new(Settings { untimely, ..Settings::clone(settings) });
            }
            news
        });
    }

    /// Keeps what is wrong for the status, beside what is in use.
    fn refuse(&self, problems: &Problems, untimely: Option<Untimely>) {
        let (since, alone) = {
            let settings = self.sender.borrow();
            (settings.pending.refused.as_ref().map(|refused| refused.since), settings.identity.is_none())
        };
        // Where nothing but the certificate's time keeps the own identity away, the status says that already.
        let refused = match problems.0.as_slice() {
            [first, more @ ..] if !(untimely.is_some() && alone) => {
                let more =
                    if more.is_empty() { String::new() } else { format!(" (and {} more)", more.len()) };
                Some(Refused {
                    since: since.unwrap_or_else(SystemTime::now),
                    in_use: self.in_use,
                    reason: format!("{first}{more}"),
                })
            }
            _ => None,
        };
        self.pend(Pending { refused, at_next_start: self.waiting.clone() });
    }

    fn pend(&self, pending: Pending) {
        self.sender.send_if_modified(|settings| {
            let news = settings.pending != pending;
            if news {
                *settings = Arc::new(Settings { pending, ..Settings::clone(settings) });
            }
            news
        });
    }

    /// Says what is wrong, once.
    fn tell(&mut self, problems: Problems, meanwhile: &str) {
        if problems.0 == self.told {
            return;
        }
        for problem in &problems.0 {
            error!("{problem} ({meanwhile})");
        }
        self.told = problems.0;
    }

    /// How long until the own certificate is looked at: its end is told when it comes.
    fn next_look(&self, now: SystemTime) -> Duration {
        let ends = self.sender.borrow().identity.as_ref().map(|identity| identity.not_after());
        let left = ends.and_then(|ends| ends.duration_since(now).ok()).unwrap_or(LOOK);
        left.min(LOOK) + Duration::from_millis(100)
    }

    /// Says when the own certificate nears its end.
    fn look(&mut self, now: SystemTime) {
        let Some(identity) = self.sender.borrow().identity.clone() else { return };
        let ends = identity.not_after();
        let validity = match ends.duration_since(now) {
            Err(_) => Validity::Ended,
            Ok(_) if identity.is_due(now) => Validity::Soon,
            Ok(_) => Validity::Fine,
        };
        if validity != self.validity {
            let ends = Date::from(ends);
            match validity {
                Validity::Fine => info!(expires = %ends, "certificate renewed"),
                Validity::Soon => {
                    warn!(expires = %ends, "this router's certificate expires soon: renew it with `servicekeel-router pki issue --force`");
                }
                Validity::Ended => error!(
                    expired = %ends,
                    "this router's certificate has expired: existing flows continue, new flows to and from other routers fail; renew it with `servicekeel-router pki issue --force`"
                ),
            }
            self.validity = validity;
        }
    }
}

/// What changed.
fn changes(old: &(Config, Option<Material>), new: (&Config, &Option<Material>)) -> Vec<&'static str> {
    let own = |material: &Option<Material>| {
        material.as_ref().map(|m| (m.ca.clone(), m.certificate.clone(), m.key.clone()))
    };
    let trust = |material: &Option<Material>| material.as_ref().map(|m| m.trust.clone());
    let mut changes = waits(&old.0, new.0);
    if old.0.peers != new.0.peers {
        changes.push("peers");
    }
    if old.0.revoked != new.0.revoked {
        changes.push("revoked");
    }
    if own(&old.1) != own(new.1) {
        changes.push("identity");
    }
    if trust(&old.1) != trust(new.1) {
        changes.push("trust");
    }
    changes
}

/// What differs and waits for a new start.
fn waits(old: &Config, new: &Config) -> Vec<&'static str> {
    let differs = [
        ("cluster", old.cluster != new.cluster),
        ("node", old.node != new.node),
        ("listen.sidecars", old.listen.sidecars != new.listen.sidecars),
        ("listen.peers", old.listen.peers != new.listen.peers),
        ("listen.admin", old.listen.admin != new.listen.admin),
    ];
    differs.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect()
}

#[cfg(test)]
mod tests;
