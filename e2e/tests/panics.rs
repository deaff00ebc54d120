//! A program that panics fails its test, also where it goes on and all else is well.
#![allow(clippy::unwrap_used, clippy::panic, reason = "whatever fails here is a test that fails")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::time::Duration;

use e2e::{Process, output, wait_for};

/// Tells the child, which is this test program again.
const CHILD: &str = "E2E_CHILD";
const WORDS: &str = "a thread of the child ends by this";

fn child(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "the_child", "--nocapture"]).env(CHILD, role);
    command
}

/// No test by itself: what the other tests start.
#[test]
fn the_child() {
    let Ok(role) = std::env::var(CHILD) else { return };
    if role != "sound" {
        let thread = std::thread::spawn(|| panic!("{WORDS}"));
        assert!(thread.join().is_err());
    }
    println!("it goes on");
    if role != "short" {
        std::thread::sleep(Duration::from_secs(60));
    }
}

fn started(role: &str) -> (tempfile::TempDir, Process) {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path(), "child", &mut child(role)).unwrap();
    let limit = Duration::from_secs(20);
    wait_for("the child", limit, || Ok(process.log().contains("it goes on").then_some(()))).unwrap();
    (dir, process)
}

#[test]
fn a_thread_that_panics_fails_the_test_at_the_end_of_the_program() {
    let (_dir, process) = started("running");
    let failed = catch_unwind(AssertUnwindSafe(|| drop(process))).unwrap_err();
    let said = failed.downcast::<String>().unwrap();
    assert!(said.starts_with("child panicked:") && said.contains(WORDS), "{said}");
}

#[test]
fn a_later_run_is_not_blamed_for_an_earlier_one() {
    let (dir, process) = started("running");
    catch_unwind(AssertUnwindSafe(|| drop(process))).unwrap_err();
    let later = Process::start(dir.path(), "child", &mut child("sound")).unwrap();
    let times = || later.log().matches("it goes on").count();
    wait_for("the child", Duration::from_secs(20), || Ok((times() == 2).then_some(()))).unwrap();
}

#[test]
fn a_program_that_is_waited_for_fails_the_test_too() {
    let error = output(&mut child("short")).unwrap_err();
    assert!(error.to_string().contains(WORDS), "{error:#}");
}
