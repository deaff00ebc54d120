//! Where a program or a piece of a test runs: this machine's own network, or a namespace of it.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Where `ip netns` keeps its namespaces (ip-netns(8)).
const NAMESPACES: &str = "/run/netns";

/// This machine's own network, or a network namespace of it (ip-netns(8)).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// The namespace; `None`: the machine's own.
    pub netns: Option<String>,
    /// The user that programs run as there, without any capability; `None`: the test's own.
    pub user: Option<u32>,
    /// How many files a program may have open (RLIMIT_NOFILE); `None`: as many as the test.
    pub open_files: Option<u32>,
}

impl Place {
    /// A command that runs a program there.
    pub fn command(&self, program: &Path) -> Command {
        let mut words: Vec<OsString> = Vec::new();
        if let Some(name) = &self.netns {
            words.extend(["ip", "netns", "exec", name].map(OsString::from));
        }
        if let Some(user) = self.user {
            let (user, group) = (format!("--reuid={user}"), format!("--regid={user}"));
            let nothing = ["--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"];
            words.extend(["setpriv", &user, &group].map(OsString::from));
            words.extend(nothing.map(OsString::from));
        }
        if let Some(limit) = self.open_files {
            words.extend(["prlimit".to_owned(), format!("--nofile={limit}")].map(OsString::from));
        }
        words.push(program.into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        command
    }

    /// Runs a piece of the test there. Its sockets, and those of the threads that it starts, belong to the place.
    ///
    /// # Errors
    /// Its own, and those of setns(2).
    pub fn run<T: Send>(&self, piece: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let Some(name) = &self.netns else { return piece() };
        std::thread::scope(|scope| {
            // A thread of its own: it stays in the namespace until it ends.
            let inside = scope.spawn(move || {
                let namespace = File::open(Path::new(NAMESPACES).join(name))
                    .with_context(|| format!("the namespace {name}"))?;
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                    .with_context(|| format!("entering the namespace {name}"))?;
                piece()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}
