//! The router's program. `servicekeel-router --help` tells the rest.

use std::process::ExitCode;

use clap::Parser;
use servicekeel_router::command::Arguments;

fn main() -> ExitCode {
    Arguments::parse().run()
}
