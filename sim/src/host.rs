//! A node's host in turmoil: it runs the node's programs as tasks that can be killed one by one.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

/// Commands that wait for the next step.
const COMMANDS: usize = 1024;

type Program = Pin<Box<dyn Future<Output = ()> + Send>>;

enum Command {
    Start(String, Program),
    Kill(String, oneshot::Sender<()>),
}

/// Starts and kills the programs of one host. Clones are the same one.
#[derive(Clone)]
pub(crate) struct Programs(mpsc::Sender<Command>);

/// What the host runs.
#[derive(Clone)]
pub(crate) struct Host(Arc<Mutex<Option<mpsc::Receiver<Command>>>>);

pub(crate) fn host() -> (Programs, Host) {
    let (sender, receiver) = mpsc::channel(COMMANDS);
    (Programs(sender), Host(Arc::new(Mutex::new(Some(receiver)))))
}

impl Programs {
    /// Starts a program, in place of an earlier one of the name.
    pub(crate) async fn start(&self, name: &str, program: impl Future<Output = ()> + Send + 'static) {
        // The host ends with the simulation only.
        let _ = self.0.send(Command::Start(name.into(), Box::pin(program))).await;
    }

    /// Kills a program, as SIGKILL does: what it held is closed when this returns.
    pub(crate) async fn kill(&self, name: &str) {
        let (done, killed) = oneshot::channel();
        let _ = self.0.send(Command::Kill(name.into(), done)).await;
        let _ = killed.await;
    }
}

impl Host {
    /// Runs for ever.
    pub(crate) async fn run(self) -> turmoil::Result {
        let receiver = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut commands = receiver.ok_or("a host of this simulation is not started twice")?;
        let mut running: BTreeMap<String, JoinSet<()>> = BTreeMap::new();
        while let Some(command) = commands.recv().await {
            match command {
                Command::Start(name, program) => {
                    let mut tasks = JoinSet::new();
                    tasks.spawn(program);
                    running.insert(name, tasks);
                }
                Command::Kill(name, done) => {
                    if let Some(mut tasks) = running.remove(&name) {
                        tasks.shutdown().await;
                    }
                    // The tasks that the program had started end at their next turn, all before this one's.
                    tokio::task::yield_now().await;
                    tokio::task::yield_now().await;
                    let _ = done.send(());
                }
            }
        }
        Ok(())
    }
}
