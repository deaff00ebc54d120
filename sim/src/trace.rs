//! The trace of a simulation: what the programs log, and what the oracle sees, each with its simulated time.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::fmt::{MakeWriter, Subscriber};

/// What belongs to the trace. turmoil's own span says which node speaks.
const TARGETS: &str = "off,sim=debug,servicekeel_router=debug,servicekeel_sidecar=debug,\
                       servicekeel_runtime=debug,turmoil::sim=info";

/// The lines of one simulation. Clones write to the same one.
#[derive(Debug, Clone)]
pub struct Trace {
    lines: Arc<Mutex<Vec<u8>>>,
    shown: bool,
}

impl Trace {
    /// An empty trace. With `SHOW` in the environment it goes to stderr too, as it grows.
    #[expect(clippy::new_without_default, reason = "it reads the environment")]
    pub fn new() -> Self {
        Self { lines: Arc::default(), shown: std::env::var_os("SHOW").is_some() }
    }

    fn append(&self, bytes: &[u8]) {
        self.lock().extend_from_slice(bytes);
        if self.shown {
            // It is a convenience.
            let _ = io::Write::write_all(&mut io::stderr(), bytes);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything so far.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().clone()
    }

    /// The last lines.
    pub fn tail(&self, lines: usize) -> String {
        let text = String::from_utf8_lossy(&self.lock()).into_owned();
        let skip = text.lines().count().saturating_sub(lines);
        text.lines().skip(skip).fold(String::new(), |all, line| all + line + "\n")
    }

    /// A line about what is done to the simulation from outside of it.
    pub(crate) fn note(&self, at: Duration, what: fmt::Arguments<'_>) {
        let line = format!("{} {what}\n", Seconds(at));
        self.append(line.as_bytes());
    }

    /// Writes events into this trace.
    pub(crate) fn subscriber(&self) -> impl tracing::Subscriber + Send + Sync + use<> {
        Subscriber::builder()
            .with_env_filter(EnvFilter::new(TARGETS))
            .with_ansi(false)
            .with_timer(SimulatedTime)
            .with_writer(self.clone())
            .finish()
    }
}

impl<'a> MakeWriter<'a> for Trace {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

/// Writes to a trace.
pub struct Line<'a>(&'a Trace);

impl io::Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.append(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>4}.{:06}", self.0.as_secs(), self.0.subsec_micros())
    }
}

/// The time since the start of the simulation.
struct SimulatedTime;

impl FormatTime for SimulatedTime {
    fn format_time(&self, w: &mut Writer<'_>) -> fmt::Result {
        match turmoil::sim_elapsed() {
            Some(at) => write!(w, "{}", Seconds(at)),
            None => w.write_str("   -.------"),
        }
    }
}
