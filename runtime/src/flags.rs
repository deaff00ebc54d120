//! What the command line of a program says that it can't do.

use std::io::{self, Write};
use std::process::ExitCode;

/// The exit code of a program that was called in a wrong way.
const USAGE: u8 = 2;

/// Tells on stderr, under the program's own name, why its flags can't be used, and gives the exit code. `text` is clap's
/// own, which does not say whose error it is; with it go its hints.
pub fn refuse(program: &str, text: &str) -> ExitCode {
    // The last resort is gone where stderr is; the exit code says it too.
    let _ = io::stderr().write_all(named(program, text).as_bytes());
    ExitCode::from(USAGE)
}

fn named(program: &str, text: &str) -> String {
    match text.strip_prefix("error: ") {
        Some(text) => format!("{program}: {text}"),
        // The help, where a subcommand is missing.
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_the_programs_name_and_the_help_is_as_it_is() {
        assert_eq!(
            named("keel", "error: unexpected argument\n\nUsage: keel\n"),
            "keel: unexpected argument\n\nUsage: keel\n"
        );
        assert_eq!(named("keel", "Usage: keel <COMMAND>\n"), "Usage: keel <COMMAND>\n");
    }
}
