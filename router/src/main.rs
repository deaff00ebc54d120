//! The router's program. `servicekeel-router --help` tells the rest.

use std::process::ExitCode;

use clap::Parser;
use servicekeel_router::command::Arguments;
use servicekeel_runtime::flags;

fn main() -> ExitCode {
    match Arguments::try_parse() {
        Ok(arguments) => arguments.run(),
        Err(error) if error.use_stderr() => flags::refuse("servicekeel-router", &error.to_string()),
        // What was asked for.
        Err(help) => help.exit(),
    }
}
