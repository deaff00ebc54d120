//! Resident memory of each program: idle, and with 500 open flows that carry nothing.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::load;
use crate::paths::{Kind, Paths, Role};

/// Open flows: one consumer behind another router may have as many at 20,000 open files and more (docs/architecture.md).
pub(crate) const FLOWS: usize = 500;
/// Descriptors that a program may need for them: two sockets a flow, and its own.
const DESCRIPTORS: u64 = 2 * FLOWS as u64 + 200;
/// For what opening them left behind to settle.
const SETTLE: Duration = Duration::from_secs(1);

/// One program's memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    pub(crate) name: &'static str,
    pub(crate) role: Role,
    /// Bytes resident with no flow (`VmRSS` of proc_pid_status(5), the pages of its file included).
    pub(crate) idle: u64,
    /// Bytes resident with [`FLOWS`] open flows.
    pub(crate) busy: u64,
}

impl Memory {
    /// Bytes for each flow.
    pub(crate) fn each_flow(&self) -> f64 {
        (self.busy as f64 - self.idle as f64) / FLOWS as f64
    }
}

/// Measures the programs between two routers, and rathole's where they run. `paths` must have carried nothing yet:
/// memory that a flow has given back would be taken by these.
///
/// # Errors
/// Where a flow does not open, or `descriptors`, the limit of open files, is too low.
pub(crate) fn measure(paths: &Paths, descriptors: u64) -> Result<Vec<Memory>> {
    ensure!(
        descriptors >= DESCRIPTORS,
        "{FLOWS} flows need {DESCRIPTORS} open files and the limit is {descriptors}: raise it (ulimit -Hn), or measure without memory (--no-memory)"
    );
    let mut all = Vec::new();
    for (kind, addr) in paths.all.iter().filter(|(kind, _)| matches!(kind, Kind::Across | Kind::Rathole)) {
        let resident = || -> Result<Vec<u64>> {
            paths.on(*kind).map(|program| Ok(program.process.resident_kib()? * 1024)).collect()
        };
        let idle = resident()?;
        let flows: Vec<_> = (1..=FLOWS)
            .map(|n| load::open(*addr).with_context(|| format!("flow {n} of {FLOWS}")))
            .collect::<Result<_>>()
            .with_context(|| format!("{kind}: {}", paths.logs(*kind)))?;
        std::thread::sleep(SETTLE);
        let busy = resident()?;
        drop(flows);
        for ((program, idle), busy) in paths.on(*kind).zip(idle).zip(busy) {
            all.push(Memory { name: program.name, role: program.role, idle, busy });
        }
    }
    Ok(all)
}
