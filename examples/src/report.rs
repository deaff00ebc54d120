//! What the demo prints: numbered steps, and under each what was seen and measured.

use std::fmt::Display;
use std::io::Write;
use std::time::{Duration, Instant};

/// The demo's output.
pub struct Report {
    started: Instant,
    number: usize,
    title: String,
}

impl Default for Report {
    fn default() -> Self {
        Self { started: Instant::now(), number: 0, title: "preparing".to_owned() }
    }
}

/// Writes a line. Nobody reads it where the output is closed, and the demo goes on.
fn print(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

impl Report {
    /// Begins a step.
    pub fn step(&mut self, title: &str) {
        self.number += 1;
        self.title = title.to_owned();
        print(format_args!("\n{}. {title}", self.number));
    }

    /// A line of text.
    pub fn say(&self, text: impl Display) {
        print(format_args!("   {text}"));
    }

    /// What was seen, and what was measured.
    pub fn measured(&self, what: impl Display, value: impl Display) {
        print(format_args!("   {:<64} {:>14}", what.to_string(), value.to_string()));
    }

    /// A line of its own, outside of the steps.
    pub fn headline(&self, text: impl Display) {
        print(text);
    }

    /// The step that runs, as `4 (TCP)`.
    pub fn current(&self) -> String {
        format!("{} ({})", self.number, self.title)
    }

    /// How long the demo has run.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

/// A duration as people read it: `0.21 ms`, `35 ms`, `3.1 s`.
pub fn time(duration: Duration) -> String {
    let ms = duration.as_secs_f64() * 1e3;
    match ms {
        ms if ms < 10.0 => format!("{ms:.2} ms"),
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        ms => format!("{:.1} s", ms / 1e3),
    }
}

/// Bytes in a duration as MB/s, a MB being 10^6 bytes.
pub fn rate(bytes: u64, duration: Duration) -> String {
    format!("{:.0} MB/s", bytes as f64 / 1e6 / duration.as_secs_f64().max(1e-9))
}

/// Bytes as MB.
pub fn size(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_units() {
        assert_eq!(time(Duration::from_micros(210)), "0.21 ms");
        assert_eq!(time(Duration::from_millis(35)), "35 ms");
        assert_eq!(time(Duration::from_millis(3_060)), "3.1 s");
        assert_eq!(rate(64_000_000, Duration::from_millis(500)), "128 MB/s");
        assert_eq!(size(1_500_000), "1.5 MB");
    }
}
