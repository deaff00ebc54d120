//! Panics of the programs under test. One of a task or a thread ends that alone, and the program goes on: its log is
//! where it is found.

use std::sync::{Mutex, PoisonError};

/// What the standard library's hook writes of a panic, after the thread's name.
const PANICKED: &str = "panicked at ";
/// Lines of a panic that are shown: its place, its text, and some of its backtrace.
const SHOWN: usize = 30;

/// The first panic of a log, with what comes behind it.
pub(crate) fn panic_in(log: &[u8]) -> Option<String> {
    let log = String::from_utf8_lossy(log);
    let lines = || log.lines();
    let first = lines().position(|line| line.contains(PANICKED))?;
    Some(lines().skip(first).take(SHOWN).map(|line| format!("{line}\n")).collect())
}

/// Fails the test for the panic of a program.
///
/// # Panics
/// Always, but where the test fails already: then it is told beside that.
#[allow(clippy::panic, reason = "a test fails by it")]
pub(crate) fn fail(program: &str, panic: &str) {
    // Several may be told at once, one by each of several programs.
    static TOLD: Mutex<()> = Mutex::new(());
    let _told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    if std::thread::panicking() {
        eprintln!("{program} panicked too:\n{panic}");
    } else {
        panic!("{program} panicked:\n{panic}");
    }
}
