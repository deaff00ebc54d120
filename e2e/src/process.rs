//! A program of the project that runs, with its log.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::panics::{fail, panic_in};
use crate::wait_for;

/// A running program. Killed when dropped, and where it has panicked, in whatever thread or task, the test fails then.
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
    /// What this run writes; `None` where nothing can be read back.
    written: Option<File>,
}

/// Runs a command to its end.
///
/// # Errors
/// Where it can't be started, or panics.
pub fn output(command: &mut Command) -> Result<Output> {
    let done = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    if let Some(panic) = panic_in(&done.stderr) {
        bail!("{command:?} panicked:\n{panic}");
    }
    Ok(done)
}

impl Process {
    /// Starts a command whose output goes to a file of `dir`, after what an earlier run wrote there.
    ///
    /// # Errors
    /// Where the program can't be started.
    pub fn start(dir: &Path, name: &str, command: &mut Command) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        // Of /dev/full there is no end.
        let mut written = file.metadata()?.is_file().then(|| File::open(&log)).transpose()?;
        if let Some(written) = &mut written {
            written.seek(SeekFrom::End(0))?;
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("{name}: {command:?} does not start; was it built?"))?;
        Ok(Self { child, name: name.to_owned(), log, written })
    }

    /// What it was started as.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        let is_file = std::fs::metadata(&self.log).is_ok_and(|log| log.is_file());
        is_file.then(|| std::fs::read_to_string(&self.log).ok()).flatten().unwrap_or_default()
    }

    /// From its next start on, each line that it logs fails as on a full disk.
    ///
    /// # Errors
    /// Where the log can't be replaced.
    pub fn fill_log(&self) -> Result<()> {
        std::fs::remove_file(&self.log)?;
        Ok(std::os::unix::fs::symlink("/dev/full", &self.log)?)
    }

    /// Whether it has ended, and how.
    ///
    /// # Errors
    /// Where the system does not say.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    /// Where it still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > end {
                bail!("{} still runs after {limit:?}; its log:\n{}", self.name, self.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends SIGTERM.
    ///
    /// # Errors
    /// Where `kill` fails.
    pub fn terminate(&self) -> Result<()> {
        let done = Command::new("kill").arg("-TERM").arg(self.pid().to_string()).status()?;
        if !done.success() {
            bail!("kill -TERM {} failed: {done}", self.name);
        }
        Ok(())
    }

    /// Kills it, as a crash would.
    ///
    /// # Errors
    /// Where the system refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Resident memory in KiB (`VmRSS` of proc_pid_status(5)).
    ///
    /// # Errors
    /// Where the process is gone.
    pub fn resident_kib(&self) -> Result<u64> {
        self.status("VmRSS:")
    }

    /// Memory of its own in KiB: `RssAnon` of proc_pid_status(5), without the pages of its file.
    ///
    /// # Errors
    /// Where the process is gone.
    pub fn anonymous_kib(&self) -> Result<u64> {
        self.status("RssAnon:")
    }

    fn status(&self, field: &str) -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = text.lines().find(|line| line.starts_with(field)).context("no such line")?;
        Ok(line.split_whitespace().nth(1).context("no number")?.parse()?)
    }

    /// How many descriptors it has open.
    ///
    /// # Errors
    /// Where the process is gone.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.pid()))?.count())
    }

    /// How many descriptors it has open once their number has stayed for a quarter of a second: what ended has been
    /// closed by then.
    ///
    /// # Errors
    /// Where it goes on changing, or the process is gone.
    pub fn settled_descriptors(&self) -> Result<usize> {
        let mut last = (self.descriptors()?, Instant::now());
        wait_for("descriptors that stay", Duration::from_secs(10), || {
            let count = self.descriptors()?;
            if count != last.0 {
                last = (count, Instant::now());
            }
            Ok((last.1.elapsed() >= Duration::from_millis(250)).then_some(count))
        })
    }

    /// User and system time so far, in clock ticks of 10 ms.
    ///
    /// # Errors
    /// Where the process is gone.
    pub fn cpu_ticks(&self) -> Result<u64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        let (_, rest) = stat.rsplit_once(')').context("no command")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let number = |i: usize| -> Result<u64> { Ok(fields.get(i).context("short")?.parse()?) };
        Ok(number(11)? + number(12)?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ended already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mut written = Vec::new();
        if let Some(mut log) = self.written.take() {
            let _ = log.read_to_end(&mut written);
        }
        if let Some(panic) = panic_in(&written) {
            fail(&self.name, &panic);
        }
    }
}
