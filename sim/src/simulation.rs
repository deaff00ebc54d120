//! Runs one simulation, step by step, under the oracle's eyes.

use std::cell::Cell;
use std::future::Future;
use std::net::IpAddr;
use std::panic;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::{Duration, SystemTime};

use turmoil::Sim;

use crate::net::wire::CAPACITY;
use crate::network::Network;
use crate::oracle::{Oracle, Tally};
use crate::random::Random;
use crate::stage::Stage;
use crate::trace::Trace;
use crate::world::World;

/// When each simulation begins: 2025-01-01.
pub(crate) const EPOCH: Duration = Duration::from_secs(1_735_689_600);
/// A simulation that takes longer than this hangs.
const LONGEST: Duration = Duration::from_secs(2400);
/// How often the network hands over what has arrived.
const TICK: Duration = Duration::from_millis(5);
/// Lines of the trace that a failure shows.
const SHOWN: usize = 40;

/// Something that is done to the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// See [`Network::cut`].
    Cut(&'static str, &'static str),
    /// See [`Network::heal`].
    Heal(&'static str, &'static str),
    /// See [`Network::forget`].
    Forget(&'static str, &'static str),
    /// The latency between two nodes, at the most.
    Latency(&'static str, &'static str, Duration),
}

/// Faults that wait for the next step. Clones are the same queue.
#[derive(Clone, Default)]
pub(crate) struct Faults(Arc<Mutex<Vec<Fault>>>);

impl Faults {
    pub(crate) fn push(&self, fault: Fault) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(fault);
    }

    fn take(&self) -> Vec<Fault> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How a simulation went.
pub struct Report {
    /// What happened, line by line.
    pub trace: Vec<u8>,
    /// The oracle's count.
    pub tally: Tally,
    /// Steps of the network, each of 5 ms.
    pub steps: u64,
    /// The longest that the window of a connection between nodes was closed to bytes that waited.
    pub closed_window: Duration,
}

/// What [`simulate`] says of a simulation that held.
pub fn counted(seed: u64, steps: u64) -> String {
    format!("seed {seed}: {steps} steps")
}

/// Runs the simulation of a seed to the end of its script, and closes everything.
///
/// # Panics
/// Where something is not as it must be, with the seed and the end of the trace.
#[expect(clippy::print_stdout, reason = "for tests, which show it where they fail or are asked to")]
pub fn simulate<S, F>(seed: u64, stage: &Stage, script: S) -> Report
where
    S: FnOnce(Arc<World>) -> F + 'static,
    F: Future<Output = ()> + 'static,
{
    let trace = Trace::new();
    let oracle = Oracle::default();
    watch_panics();
    PANICKED.set(false);
    let elsewhere = ELSEWHERE.load(Ordering::SeqCst);
    let outcome =
        tracing::subscriber::with_default(trace.subscriber(), || run(seed, stage, script, &trace, &oracle));
    let mut wrong = oracle.violations();
    let (steps, closed_window) = outcome.unwrap_or_else(|error| {
        wrong.push(error);
        (0, Duration::ZERO)
    });
    if PANICKED.get() {
        wrong.push("a task panicked".into());
    }
    if ELSEWHERE.load(Ordering::SeqCst) != elsewhere {
        wrong.push("a thread of a runtime panicked".into());
    }
    if !wrong.is_empty() {
        let name = format!("servicekeel-sim-{seed}-{}.trace", std::process::id());
        let file = std::env::temp_dir().join(name);
        let whole = match std::fs::write(&file, trace.bytes()) {
            Ok(()) => format!("The whole trace is in {}.", file.display()),
            Err(error) => format!("The trace cannot be kept: {error}."),
        };
        let (what, end) = (wrong.join("; "), trace.tail(SHOWN));
        panic!("seed {seed}: {what}\n{end}\n{whole} Run it again: SEED={seed} cargo test -p sim");
    }
    println!("{}", counted(seed, steps));
    Report { trace: trace.bytes(), tally: oracle.tally(), steps, closed_window }
}

/// Its steps, and the longest that a window was closed.
fn run<S, F>(
    seed: u64,
    stage: &Stage,
    script: S,
    trace: &Trace,
    oracle: &Oracle,
) -> Result<(u64, Duration), String>
where
    S: FnOnce(Arc<World>) -> F + 'static,
    F: Future<Output = ()> + 'static,
{
    let mut random = Random::new(seed);
    let least = random.millis(0..12);
    let mut sim = turmoil::Builder::new()
        .rng_seed(random.draw())
        .epoch(SystemTime::UNIX_EPOCH + EPOCH)
        .simulation_duration(LONGEST)
        .tick_duration(TICK)
        .tcp_capacity(CAPACITY)
        .min_message_latency(least)
        .max_message_latency(least + random.millis(1..60))
        .enable_random_order()
        .build();
    let mut network = Network::new(stage.tcp);
    let faults = Faults::default();
    let (world, hosts) = World::new(&mut random, stage, &network, &faults, oracle);
    let world = Arc::new(world);
    for (name, host) in hosts {
        sim.host(name, move || host.clone().run());
    }
    sim.client("script", async move {
        script(world.clone()).await;
        world.end().await;
        Ok(())
    });
    let mut steps = 0;
    loop {
        steps += 1;
        let finished = sim.step().map_err(|error| format!("the simulation broke: {error}"))?;
        network.step(&sim);
        for fault in faults.take() {
            trace.note(sim.elapsed(), format_args!("FAULT {fault:?}"));
            apply(&mut network, &sim, fault);
        }
        if finished || PANICKED.get() || !oracle.violations().is_empty() {
            return Ok((steps, network.closed_window()));
        }
    }
}

fn apply(network: &mut Network, sim: &Sim<'_>, fault: Fault) {
    let ips = |a, b| -> (IpAddr, IpAddr) { (sim.lookup(a), sim.lookup(b)) };
    match fault {
        Fault::Cut(a, b) => {
            let (a, b) = ips(a, b);
            network.cut(sim, a, b);
        }
        Fault::Heal(a, b) => {
            let (a, b) = ips(a, b);
            network.heal(sim, a, b);
        }
        Fault::Forget(a, b) => {
            let (a, b) = ips(a, b);
            network.forget(a, b);
        }
        Fault::Latency(a, b, most) => sim.set_link_max_message_latency(a, b, most),
    }
}

thread_local! {
    static PANICKED: Cell<bool> = const { Cell::new(false) };
}

/// Panics of the threads to which the programs' runtimes give what blocks: which simulation has them is not known.
static ELSEWHERE: AtomicU64 = AtomicU64::new(0);

/// What tokio calls those threads.
const BLOCKING: &str = "tokio-";

/// A panic of a task that the programs own reaches nobody else.
fn watch_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            PANICKED.set(true);
            if std::thread::current().name().is_some_and(|name| name.starts_with(BLOCKING)) {
                ELSEWHERE.fetch_add(1, Ordering::SeqCst);
            }
            before(info);
        }));
    });
}
