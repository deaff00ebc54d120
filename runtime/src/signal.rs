//! The signals that end a program: the first asks, the second insists.

use std::future::Future;
use std::io;
use std::sync::mpsc;
use std::thread;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

const TERMINATE: (&str, i32) = ("SIGTERM", 15);
const INTERRUPT: (&str, i32) = ("SIGINT", 2);

/// Listens from the call on, and resolves at the first SIGTERM or SIGINT with its name. The next one ends the process
/// at once, with the exit code that a shell gives for it (128 + its number), even if the program hangs.
///
/// The first one ends the process likewise if nobody awaits the future any more. If the system refuses to listen,
/// the error is logged, the future never resolves, and the signals keep what they do by default.
pub fn shutdown() -> impl Future<Output = &'static str> + Send + 'static {
    let listening = listen();
    async move {
        match listening {
            Ok(first) => match first.await {
                Ok(name) => name,
                Err(_) => std::future::pending().await,
            },
            Err(error) => {
                tracing::error!(%error, "no clean shutdown: cannot listen for signals");
                std::future::pending().await
            }
        }
    }
}

/// A thread and a reactor of its own: the second signal must count when every worker of the program is stuck.
fn listen() -> io::Result<oneshot::Receiver<&'static str>> {
    let (first_tx, first_rx) = oneshot::channel();
    let (listening_tx, listening_rx) = mpsc::sync_channel(1);
    thread::Builder::new().name("signals".to_owned()).stack_size(128 * 1024).spawn(move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().build() {
            Ok(runtime) => runtime,
            Err(error) => return drop(listening_tx.send(Err(error))),
        };
        runtime.block_on(async {
            let mut signals = match Signals::new() {
                Ok(signals) => signals,
                Err(error) => return drop(listening_tx.send(Err(error))),
            };
            drop(listening_tx.send(Ok(())));
            let mut last = signals.next().await;
            if first_tx.send(last.0).is_ok() {
                last = signals.next().await;
            }
            end(last);
        });
    })?;
    listening_rx.recv().unwrap_or_else(|_| Err(io::Error::other("the thread has ended")))?;
    Ok(first_rx)
}

#[allow(clippy::disallowed_methods, reason = "asked twice: what has not shut down by now is what hangs")]
fn end((name, number): (&'static str, i32)) -> ! {
    tracing::warn!("ending at once: {name}");
    std::process::exit(128 + number)
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> (&'static str, i32) {
        tokio::select! {
            biased;
            Some(()) = self.terminate.recv() => TERMINATE,
            Some(()) = self.interrupt.recv() => INTERRUPT,
            else => std::future::pending().await,
        }
    }
}
