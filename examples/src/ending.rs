//! The end of the demo from outside: Ctrl-C and its like end the programs that it started, and then the demo.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};

/// How long the programs have to end by a signal that may have reached them, too: a terminal's Ctrl-C does. A second
/// signal would cut their end short.
pub const HEARD: Duration = Duration::from_millis(500);

/// The demo is to end.
#[derive(Debug, thiserror::Error)]
#[error("ended by {0}")]
pub struct Ended(pub &'static str);

#[derive(Default)]
struct State {
    by: Option<&'static str>,
    programs: Vec<u32>,
}

/// Whether the demo is to end, and which programs then end with it.
#[derive(Default)]
pub struct Ending {
    state: Mutex<State>,
    changed: Condvar,
}

impl Ending {
    /// Listens for SIGINT, SIGTERM and SIGHUP from now on.
    ///
    /// # Errors
    /// Where the system does not let it.
    pub fn listen() -> Result<Arc<Self>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let (mut int, mut term, mut hup) = {
            let _in_runtime = runtime.enter();
            (
                signal(SignalKind::interrupt())?,
                signal(SignalKind::terminate())?,
                signal(SignalKind::hangup())?,
            )
        };
        let ending = Arc::new(Self::default());
        let ended = ending.clone();
        std::thread::spawn(move || {
            let by = runtime.block_on(async {
                tokio::select! {
                    biased;
                    _ = int.recv() => "SIGINT",
                    _ = term.recv() => "SIGTERM",
                    _ = hup.recv() => "SIGHUP",
                }
            });
            ended.end(by);
        });
        Ok(ending)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, by: &'static str) {
        self.lock().by = Some(by);
        self.changed.notify_all();
        std::thread::sleep(HEARD);
        for pid in &self.lock().programs {
            // One that has ended already is not reaped yet: its number is still its own.
            if let Some(pid) = i32::try_from(*pid).ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::TERM);
            }
        }
    }

    /// The signal by which the demo is to end, if it is.
    pub fn by(&self) -> Option<&'static str> {
        self.lock().by
    }

    /// A program that is to end with the demo, until [`Self::release`].
    ///
    /// # Errors
    /// [`Ended`], where the demo is to end already: the caller drops the program.
    pub fn adopt(&self, program: u32) -> Result<(), Ended> {
        let mut state = self.lock();
        state.programs.push(program);
        state.by.map_or(Ok(()), |by| Err(Ended(by)))
    }

    /// The programs are about to be dropped.
    pub fn release(&self) {
        self.lock().programs.clear();
    }

    /// Goes on unless the demo is to end.
    ///
    /// # Errors
    /// [`Ended`].
    pub fn check(&self) -> Result<(), Ended> {
        self.by().map_or(Ok(()), |by| Err(Ended(by)))
    }

    /// Waits until the demo is to end.
    pub fn wait(&self) {
        let state = self.lock();
        let waited = self.changed.wait_while(state, |state| state.by.is_none());
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}
