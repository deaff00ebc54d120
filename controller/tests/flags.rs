//! The program by its flags alone.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::process::Command;

#[test]
fn a_wrong_flag_is_told_under_the_programs_name() {
    let program = env!("CARGO_BIN_EXE_servicekeel-controller");
    let done = Command::new(program).arg("--nonsense").output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(2), "{said}");
    assert!(said.starts_with("servicekeel-controller: unexpected argument '--nonsense' found"), "{said}");
    assert!(said.contains("Usage: servicekeel-controller") && said.contains("'--help'"), "{said}");
    let done = Command::new(program).arg("--version").output().unwrap();
    assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
}
