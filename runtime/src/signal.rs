//! The signals that end a program: the first asks, the second insists. And those that do not: SIGHUP, SIGUSR1, SIGUSR2.

use std::future::Future;
use std::io::{self, IsTerminal};
use std::sync::mpsc;
use std::thread;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

const TERMINATE: (&str, i32) = ("SIGTERM", 15);
const INTERRUPT: (&str, i32) = ("SIGINT", 2);
const HANGUP: (&str, i32) = ("SIGHUP", 1);

/// Listens from the call on, and resolves at the first SIGTERM or SIGINT with its name. The next one ends the process
/// at once, with the exit code that a shell gives for it (128 + its number), even if the program hangs.
///
/// SIGHUP asks likewise where the terminal of an interactive program is gone. Elsewhere it is what operators send to have
/// files read anew: these are watched, so that it is logged and does nothing. So do SIGUSR1 and SIGUSR2, which operators send
/// to other programs for a new log file or a dump.
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
                tracing::error!(%error, "cannot listen for signals; no graceful shutdown");
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
    listening_rx.recv().unwrap_or_else(|_| Err(io::Error::other("thread exited")))?;
    Ok(first_rx)
}

#[allow(clippy::disallowed_methods, reason = "asked twice: what has not shut down by now is what hangs")]
fn end((name, number): (&'static str, i32)) -> ! {
    tracing::warn!("exiting immediately on {name}");
    std::process::exit(128 + number)
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user: [Signal; 2],
    interactive: bool,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            user: [signal(SignalKind::user_defined1())?, signal(SignalKind::user_defined2())?],
            interactive: io::stdin().is_terminal(),
        })
    }

    async fn next(&mut self) -> (&'static str, i32) {
        let [user_1, user_2] = &mut self.user;
        loop {
            tokio::select! {
                biased;
                Some(()) = self.terminate.recv() => return TERMINATE,
                Some(()) = self.interrupt.recv() => return INTERRUPT,
                Some(()) = self.hangup.recv() => {
                    if self.interactive {
                        return HANGUP;
                    }
                    tracing::info!("SIGHUP ignored: config files are watched and reloaded automatically");
                }
                Some(()) = user_1.recv() => tracing::info!("SIGUSR1 ignored: it has no meaning here"),
                Some(()) = user_2.recv() => tracing::info!("SIGUSR2 ignored: it has no meaning here"),
                else => std::future::pending().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, ChildStdout, Command, Stdio};
    use std::time::Duration;

    use rustix::process::{Pid, Signal, kill_process};

    use super::*;

    const ROLE: &str = "SERVICEKEEL_TEST_SIGNAL";

    /// Not a test: what the tests start as a process of its own. It says what it does and then does as its role says.
    #[test]
    fn role() {
        let Ok(role) = std::env::var(ROLE) else { return };
        let asked = shutdown();
        let asked = Some(asked).filter(|_| role != "gave up");
        println!("listening");
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        match role.as_str() {
            "clean" => println!("asked by {}", runtime.block_on(asked.unwrap())),
            "hangs" => {
                println!("asked by {}", runtime.block_on(asked.unwrap()));
                thread::sleep(Duration::from_secs(60));
            }
            "stuck" | "gave up" => thread::sleep(Duration::from_secs(60)),
            other => panic!("no role {other}"),
        }
    }

    struct Program {
        process: Child,
        says: BufReader<ChildStdout>,
    }

    impl Program {
        fn start(role: &str) -> Self {
            let mut process = Command::new(std::env::current_exe().unwrap())
                .args(["signal::tests::role", "--exact", "--nocapture", "--test-threads=1"])
                .env(ROLE, role)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let says = BufReader::new(process.stdout.take().unwrap());
            let mut program = Self { process, says };
            program.says("listening");
            program
        }

        /// Reads on to a line that ends so.
        fn says(&mut self, what: &str) {
            let mut said = String::new();
            while !said.trim_end().ends_with(what) {
                let from = said.len();
                assert_ne!(self.says.read_line(&mut said).unwrap(), 0, "{what:?} was not said, but {said:?}");
                if from > 1 << 16 {
                    panic!("{said}");
                }
            }
        }

        fn send(&self, signal: Signal) {
            kill_process(Pid::from_child(&self.process), signal).unwrap();
        }

        fn exit_code(mut self) -> Option<i32> {
            let status = self.process.wait().unwrap();
            assert_eq!(status.signal(), None);
            status.code()
        }
    }

    #[test]
    fn the_first_asks() {
        for (signal, name) in [(Signal::TERM, "SIGTERM"), (Signal::INT, "SIGINT")] {
            let mut program = Program::start("clean");
            program.send(signal);
            program.says(&format!("asked by {name}"));
            assert_eq!(program.exit_code(), Some(0));
        }
    }

    #[test]
    fn the_second_insists() {
        let mut program = Program::start("hangs");
        program.send(Signal::TERM);
        program.says("asked by SIGTERM");
        program.send(Signal::INT);
        assert_eq!(program.exit_code(), Some(130));
    }

    #[test]
    fn a_hangup_without_a_terminal_asks_nothing() {
        let mut program = Program::start("clean");
        program.send(Signal::HUP);
        program.send(Signal::TERM);
        program.says("asked by SIGTERM");
        assert_eq!(program.exit_code(), Some(0));
    }

    #[test]
    fn signals_without_a_meaning_end_nothing() {
        let mut program = Program::start("clean");
        program.send(Signal::USR1);
        program.send(Signal::USR2);
        program.send(Signal::TERM);
        program.says("asked by SIGTERM");
        assert_eq!(program.exit_code(), Some(0));
    }

    /// The first may still be on its way to the thread when the second comes: then the kernel makes them one.
    #[test]
    fn insists_where_nobody_polls_or_waits() {
        let program = Program::start("stuck");
        program.send(Signal::TERM);
        program.send(Signal::INT);
        assert!(matches!(program.exit_code(), Some(130 | 143)));
        let program = Program::start("gave up");
        program.send(Signal::TERM);
        assert_eq!(program.exit_code(), Some(143));
    }
}
