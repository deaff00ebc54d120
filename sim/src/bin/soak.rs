//! `soak`: many seeds of every scenario, each run in a process of its own, as many at once as there are cores.
//!
//! A process of its own, since one that hangs, aborts or eats the memory is a failure of its seed and not of the rest.
//! What it runs is the tests of this room as `cargo test` builds them, so that a failure is repeated by one line.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde_json::Value;

/// How often it is told how far it is.
const TELL: Duration = Duration::from_secs(10);
/// How often it is looked whether a run has ended.
const LOOK: Duration = Duration::from_millis(3);
/// Lines of a failure that are shown.
const SHOWN: usize = 12;

/// Runs the scenarios of the simulation with many seeds, and says how to repeat what fails.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many seeds.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// No run begins after so many seconds.
    #[arg(long)]
    seconds: Option<u64>,
    /// Only scenarios whose name, such as `mixed::whatever_happens_every_promise_is_kept`, contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// A run that takes longer than so many seconds hangs.
    #[arg(long, default_value_t = 180)]
    hang: u64,
    /// How many runs at once; as many as cores where it is not said.
    #[arg(long)]
    jobs: Option<usize>,
}

/// One test that takes its seed from the environment.
struct Scenario {
    program: PathBuf,
    /// The file of the tests.
    file: String,
    test: String,
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}", self.file, self.test)
    }
}

/// What all workers share.
struct Soak {
    arguments: Arguments,
    scenarios: Vec<Scenario>,
    began: Instant,
    /// Numbers of runs: each seed has one for each scenario.
    next: AtomicU64,
    done: AtomicU64,
    steps: AtomicU64,
    failed: Mutex<Vec<String>>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let mut scenarios = scenarios()?;
    scenarios.retain(|scenario| scenario.to_string().contains(&arguments.only));
    ensure!(!scenarios.is_empty(), "no scenario has {:?} in its name", arguments.only);
    let workers = match arguments.jobs {
        Some(jobs) => jobs.max(1),
        None => thread::available_parallelism()?.get(),
    };
    let soak = Soak {
        arguments,
        scenarios,
        began: Instant::now(),
        next: AtomicU64::new(0),
        done: AtomicU64::new(0),
        steps: AtomicU64::new(0),
        failed: Mutex::default(),
    };
    let Arguments { seeds, from, .. } = soak.arguments;
    say(format_args!("{} scenarios, {seeds} seeds from {from}, {workers} at once", soak.scenarios.len()));
    let errors: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(|| soak.work())).collect();
        let mut told = Instant::now();
        while workers.iter().any(|worker| !worker.is_finished()) {
            thread::sleep(Duration::from_millis(50));
            if told.elapsed() >= TELL {
                told = Instant::now();
                say(format_args!("{soak}"));
            }
        }
        workers.into_iter().filter_map(|worker| worker.join().map_or(None, Result::err)).collect()
    });
    say(format_args!("{soak}"));
    let failed = soak.failed();
    failed.iter().for_each(|line| say(format_args!("failed: {line}")));
    if let Some(error) = errors.into_iter().next() {
        return Err(error);
    }
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[expect(clippy::print_stdout, reason = "it is a program for a terminal")]
fn say(what: fmt::Arguments<'_>) {
    println!("soak: {what}");
}

/// Builds the tests, in the profile that the environment says, and asks them for their names.
fn scenarios() -> Result<Vec<Scenario>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["test", "--locked", "--quiet", "--package", "sim", "--test", "*", "--no-run"])
        .args(["--message-format", "json"])
        .stderr(Stdio::inherit())
        .output()
        .context("cargo does not start")?;
    ensure!(built.status.success(), "the tests cannot be built: {}", built.status);
    let mut scenarios = Vec::new();
    for line in built.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let message: Value = serde_json::from_slice(line)?;
        let (Some(program), Some(file)) =
            (message["executable"].as_str(), message["target"]["name"].as_str())
        else {
            continue;
        };
        let list = Command::new(program).args(["--list", "--format", "terse"]).output()?;
        for test in String::from_utf8_lossy(&list.stdout).lines().filter_map(|l| l.strip_suffix(": test")) {
            let (program, file, test) = (program.into(), file.to_owned(), test.to_owned());
            scenarios.push(Scenario { program, file, test });
        }
    }
    scenarios.sort_by_key(Scenario::to_string);
    Ok(scenarios)
}

impl Soak {
    fn failed(&self) -> MutexGuard<'_, Vec<String>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn runs(&self) -> u64 {
        self.arguments.seeds.saturating_mul(self.scenarios.len() as u64)
    }

    /// Takes one run after the other until there is none, or no time.
    fn work(&self) -> Result<()> {
        let limit = self.arguments.seconds.map(Duration::from_secs);
        while limit.is_none_or(|limit| self.began.elapsed() < limit) {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.runs() {
                break;
            }
            let of = self.scenarios.len() as u64;
            let (seed, scenario) =
                (self.arguments.from + number / of, &self.scenarios[(number % of) as usize]);
            let (outcome, steps) = self.run(scenario, seed)?;
            self.steps.fetch_add(steps, Ordering::Relaxed);
            self.done.fetch_add(1, Ordering::Relaxed);
            if let Err(wrong) = outcome {
                let Scenario { file, test, .. } = scenario;
                let again = format!("SEED={seed} cargo test --locked -p sim --test {file} -- --exact {test}");
                let mut failed = self.failed();
                say(format_args!("FAILED, seed {seed} of {scenario}:\n{wrong}\n    {again}"));
                failed.push(again);
            }
        }
        Ok(())
    }

    /// Runs one seed of one scenario: whether it held, and its steps.
    fn run(&self, scenario: &Scenario, seed: u64) -> Result<(Result<(), String>, u64)> {
        let mut output = tempfile::tempfile()?;
        let mut child = Command::new(&scenario.program)
            .args(["--exact", &scenario.test, "--nocapture", "--test-threads", "1"])
            .env("SEED", seed.to_string())
            .env("RUST_BACKTRACE", "0")
            .env_remove("SEEDS")
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output.try_clone()?)
            .spawn()
            .with_context(|| scenario.to_string())?;
        let end = Instant::now() + Duration::from_secs(self.arguments.hang);
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break Some(status);
            }
            if Instant::now() > end {
                child.kill()?;
                child.wait()?;
                break None;
            }
            thread::sleep(LOOK);
        };
        let text = read(&mut output)?;
        let steps = text.lines().filter_map(steps_of).sum();
        Ok((judge(status, &text, self.arguments.hang), steps))
    }
}

/// How many steps a line of [`sim::simulation::simulate`] counts. The first one is behind the test's name.
fn steps_of(line: &str) -> Option<u64> {
    line.rsplit_once("seed ")?.1.split_once(": ")?.1.strip_suffix(" steps")?.parse().ok()
}

fn read(output: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    output.seek(SeekFrom::Start(0))?;
    output.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Whether a run held. `status`: `None` where it hung.
fn judge(status: Option<ExitStatus>, text: &str, hang: u64) -> Result<(), String> {
    // A thread that panics need not fail the test.
    let panicked = text.contains("panicked at ");
    let what = match status {
        None => format!("it hangs: no end after {hang} s"),
        Some(status) if !status.success() => status.to_string(),
        Some(_) if panicked => "a thread panicked".to_owned(),
        Some(_) => return Ok(()),
    };
    let from = text.find("panicked at ").map_or(0, |at| text[..at].rfind('\n').map_or(0, |line| line + 1));
    let lines = text[from..].lines().take(SHOWN).map(|line| format!("\n    {line}"));
    Err(format!("    {what}{}", lines.collect::<String>()))
}

impl fmt::Display for Soak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (done, steps) = (self.done.load(Ordering::Relaxed), self.steps.load(Ordering::Relaxed));
        let took = self.began.elapsed();
        let of = self.scenarios.len() as u64;
        let rate = done as f64 / took.as_secs_f64();
        write!(f, "{done} of {} runs ({} whole seeds), {steps} steps, ", self.runs(), done / of)?;
        write!(f, "{} failed, {rate:.1} runs a second for {} s", self.failed().len(), took.as_secs())?;
        let left = Duration::try_from_secs_f64((self.runs() - done) as f64 / rate).unwrap_or(Duration::MAX);
        let limit = self.arguments.seconds.map(Duration::from_secs);
        let left = limit.map_or(left, |limit| left.min(limit.saturating_sub(took)));
        if left.is_zero() { Ok(()) } else { write!(f, ", {} s left", left.as_secs()) }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn steps_are_counted() {
        let line = sim::simulation::counted(288, 4711);
        assert_eq!(steps_of(&line), Some(4711));
        assert_eq!(steps_of(&format!("test a_test ... {line}")), Some(4711));
        assert_eq!(steps_of("seed 1: it broke"), None);
    }

    #[test]
    fn an_exit_a_panic_and_a_hang_are_failures() {
        let ended = |code: i32| Some(ExitStatus::from_raw(code << 8));
        assert_eq!(judge(ended(0), "seed 1: 7 steps\n", 60), Ok(()));
        assert!(judge(ended(101), "", 60).unwrap_err().contains("101"));
        let panic = "seed 1: 7 steps\nthread 'x' (1) panicked at sim/src/x.rs:1:1:\nwhy\n";
        let said = judge(ended(0), panic, 60).unwrap_err();
        assert!(said.contains("a thread panicked") && said.contains("\n    why") && !said.contains("seed 1"));
        assert!(judge(None, "", 60).unwrap_err().contains("hangs"));
        assert!(judge(Some(ExitStatus::from_raw(6)), "", 60).unwrap_err().contains("signal"));
    }
}
