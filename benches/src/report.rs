//! The report, as Markdown.

use std::fmt::Write;
use std::time::Duration;

use crate::load::{AllSamples, OPENERS, median, quantile};
use crate::memory::{FLOWS, Memory};
use crate::paths::{Kind, Role};
use crate::targets::Target;

/// A run and what came of it.
pub(crate) struct Run<'a> {
    pub(crate) length: Duration,
    pub(crate) rounds: u64,
    pub(crate) samples: &'a AllSamples,
    pub(crate) memory: &'a [Memory],
    pub(crate) targets: &'a [Target],
}

/// Prints the report.
#[allow(clippy::print_stdout, reason = "the report is what the program is for")]
pub(crate) fn print(run: &Run<'_>) {
    print!("{}", render(run));
}

fn render(run: &Run<'_>) -> String {
    let mut text = String::new();
    // A String takes every byte.
    let _ = write(run, &mut text);
    text
}

fn write(run: &Run<'_>, out: &mut String) -> std::fmt::Result {
    let Run { length, rounds, samples, memory, targets } = run;
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let system = rustix::system::uname();
    writeln!(
        out,
        "Medians of {rounds} rounds of {} s for each figure; {cores} cores, Linux {}, all programs on this machine{}.\n",
        length.as_secs(),
        system.release().to_string_lossy(),
        if cfg!(debug_assertions) { "; a DEBUG build, so the figures say nothing" } else { "" }
    )?;
    writeln!(
        out,
        "| path | 1 flow Gbit/s | 8 flows Gbit/s | new flows/s ({OPENERS} clients) | connect p50 µs | connect p99 µs | relays' CPU s/GB |"
    )?;
    writeln!(out, "|---|---:|---:|---:|---:|---:|---:|")?;
    for (kind, path) in *samples {
        write!(
            out,
            "| {kind} | {:.2} | {:.2} | {:.0} | {:.0} | {:.0} |",
            median(&path.one_flow) * 8e-9,
            median(&path.eight_flows) * 8e-9,
            median(&path.new_flows),
            quantile(&path.latency, 0.5) * 1e6,
            quantile(&path.latency, 0.99) * 1e6,
        )?;
        match kind {
            Kind::Direct => writeln!(out, " – |")?,
            _ => writeln!(out, " {:.2} |", median(&path.cpu_each_gb))?,
        }
    }
    if !memory.is_empty() {
        writeln!(
            out,
            "\n| program | idle KiB | with {FLOWS} idle flows KiB | KiB a flow |\n|---|---:|---:|---:|"
        )?;
    }
    for program in *memory {
        let Memory { name, role, idle, busy } = program;
        write!(out, "| {name} | {} | {} |", idle / 1024, busy / 1024)?;
        match role {
            Role::Sidecar => writeln!(out, " – |")?,
            Role::Router | Role::Rathole => writeln!(out, " {:.1} |", program.each_flow() / 1024.0)?,
        }
    }
    writeln!(out, "\n| target | wanted | measured | of the rounds | met |\n|---|---|---:|---:|---|")?;
    for target in *targets {
        let Target { what, wanted, measured, range } = target;
        let measured = measured.map_or("not measured".to_owned(), |value| format!("{value:.2}"));
        let range = range.map_or("–".to_owned(), |(low, high)| format!("{low:.2} to {high:.2}"));
        let met = if target.is_met() { "yes" } else { "**no**" };
        writeln!(out, "| {what} | {wanted} | {measured} | {range} | {met} |")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Samples;
    use crate::memory::FLOWS;
    use crate::targets;

    #[test]
    fn each_row_has_the_columns_of_its_table() {
        let path = || Samples {
            one_flow: vec![1e9],
            eight_flows: vec![2e9],
            new_flows: vec![3000.0],
            latency: vec![0.000_25; 10],
            cpu_each_gb: vec![0.5],
        };
        let samples = AllSamples::from([(Kind::Direct, path()), (Kind::SameNode, path())]);
        let memory = [Memory {
            name: "router",
            role: Role::Router,
            idle: 1 << 20,
            busy: (1 << 20) + FLOWS as u64 * 10 * 1024,
        }];
        let targets = targets::judge(&samples, &memory);
        let length = Duration::from_secs(3);
        let text = render(&Run { length, rounds: 1, samples: &samples, memory: &memory, targets: &targets });
        assert!(text.contains("| same node | 8.00 | 16.00 | 3000 | 250 | 250 | 0.50 |"), "{text}");
        let router = format!("| router | 1024 | {} | 10.0 |", 1024 + FLOWS * 10);
        assert!(text.contains(&router), "{text}");
        for table in text.split("\n\n").filter(|part| part.starts_with('|')) {
            let columns = |line: &str| line.matches('|').count();
            assert!(
                table.lines().all(|line| columns(line) == columns(table.lines().next().unwrap())),
                "{table}"
            );
        }
        assert_eq!(text.matches("| **no** |").count(), 2, "{text}");
    }
}
