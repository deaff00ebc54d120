//! The oracle: what must hold whatever happens, checked with every byte, datagram, answer and step.
//!
//! - A flow's bytes come in order, once, and completely, or it is reset: an end says that all has come.
//! - What a side wrote before it reset a flow reaches the other one, where that reads and no fault came meanwhile.
//! - A reader that is slow stops its writer: what is on its way is bounded.
//! - A flow and a datagram reach the Service that was meant, at most once; a datagram is one that was sent, whole, and
//!   its answer comes to its sender.
//! - An address that DNS gave for one Service is not given for another while anybody may remember it.
//! - What was quiet for [`SETTLED`] works.
//!
//! Whoever means harm ([`crate::hostile`]) changes nothing of this for the others: it is told of no such deed.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use servicekeel_core::flow::machine::WINDOW;
use tracing::{debug, error, info};

mod datagrams;
mod incoming;

use datagrams::Datagram;
pub(crate) use incoming::Incoming;

/// After so long without a change, a name that has a reachable endpoint works.
pub const SETTLED: Duration = Duration::from_secs(5);
/// The same where a path forgets its connections: the side that dials may be the one that does not use the link, and asks
/// for up to 7 s before it is dead. That it is to the other side does not help: nobody tells.
pub const FORGOTTEN: Duration = Duration::from_secs(8);
/// The most bytes of one direction that are said and not heard yet: what the routers let pass unacknowledged, and the
/// sockets' buffers around it.
const UNDER_WAY: u64 = WINDOW + (1 << 20);

/// A port of a Service, as the applications know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Service(pub(crate) u32);

struct Flow {
    service: Service,
    accepted: bool,
    /// Bytes that came, up and down.
    heard: [u64; 2],
    began: Duration,
    /// One of its sides resets it, as it planned. One that was not accepted yet is reset by others.
    broken_off: bool,
    /// An application of its Service was killed meanwhile, whose kernel says then what it says at an end.
    cut_short: bool,
}

/// What happened so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Flows that an application began.
    pub flows: u64,
    /// Flows that a service accepted.
    pub accepted: u64,
    /// Bytes that came, in both directions.
    pub bytes: u64,
    /// The most that were on their way in one direction of a flow.
    pub under_way: u64,
    /// Datagrams that were sent to a Service.
    pub datagrams: u64,
    /// Datagrams that it received.
    pub datagrams_received: u64,
    /// Answers to them that came back.
    pub datagrams_answered: u64,
    /// Flows that were reset, and whose bytes before that had to come.
    pub last_words: u64,
    /// Checks that something quiet works.
    pub probes: u64,
    /// Answers of DNS that gave an address.
    pub answers: u64,
}

#[derive(Default)]
struct State {
    services: Vec<String>,
    flows: BTreeMap<u64, Flow>,
    datagrams: BTreeMap<u64, Datagram>,
    /// Datagrams too short for a number: sent and received.
    short: BTreeMap<(Service, usize), (u64, u64)>,
    /// For whom an address was given last, and until when that may be remembered.
    leases: BTreeMap<(String, IpAddr), (String, Duration)>,
    tally: Tally,
    next: u64,
    changed: Duration,
    /// When all of it is to be mended.
    settled: Duration,
    violations: Vec<String>,
}

/// Watches one simulation. Clones are the same one.
#[derive(Clone, Default)]
pub struct Oracle(Arc<Mutex<State>>);

impl Oracle {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something that must not be.
    pub fn violate(&self, what: impl fmt::Display) {
        error!("VIOLATION: {what}");
        self.lock().violations.push(what.to_string());
    }

    /// What must not be and was.
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    /// What happened so far.
    pub fn tally(&self) -> Tally {
        self.lock().tally
    }

    /// The Service of a name.
    pub fn service(&self, name: &str) -> Service {
        let mut state = self.lock();
        let known = state.services.iter().position(|known| known == name);
        let index = known.unwrap_or_else(|| {
            state.services.push(name.to_owned());
            state.services.len() - 1
        });
        Service(index as u32)
    }

    /// Its name.
    pub fn name(&self, service: Service) -> String {
        self.lock().services.get(service.0 as usize).cloned().unwrap_or_else(|| format!("{service:?}"))
    }

    /// Something changed in the network or in what is wanted of it.
    pub fn change(&self, what: impl fmt::Display) {
        self.change_that_settles_within(SETTLED, what);
    }

    /// The same, of what takes so long to be mended.
    pub fn change_that_settles_within(&self, time: Duration, what: impl fmt::Display) {
        info!("{what}");
        let mut state = self.lock();
        state.changed = now();
        state.settled = state.settled.max(now() + time);
    }

    /// How long nothing has changed.
    pub fn quiet(&self) -> Duration {
        now().saturating_sub(self.lock().changed)
    }

    /// Whether something was tried after all that changed had its time, in quiet that lasted until now, so that it must have worked.
    pub fn must_have_worked(&self, began: Duration) -> bool {
        let mut state = self.lock();
        let settled = state.settled <= began;
        state.tally.probes += u64::from(settled);
        settled
    }

    /// An application begins a flow: its number.
    pub(crate) fn begin_flow(&self, service: Service) -> u64 {
        let mut state = self.lock();
        state.next += 1;
        state.tally.flows += 1;
        let number = state.next;
        state.flows.insert(
            number,
            Flow {
                service,
                accepted: false,
                heard: [0; 2],
                began: now(),
                broken_off: false,
                cut_short: false,
            },
        );
        number
    }

    /// A service accepts a flow that says which number it has and which Service it wants.
    pub(crate) fn accept_flow(&self, number: u64, wanted: u32, own: Service) {
        let wrong = {
            let mut state = self.lock();
            match state.flows.get_mut(&number) {
                None => Some(format!("flow {number} reaches a service and nobody began it")),
                Some(flow) if flow.service.0 != wanted => Some(format!(
                    "flow {number} says that it wants {wanted}, and began for {:?}",
                    flow.service
                )),
                Some(flow) if flow.service != own => {
                    Some(format!("flow {number} for {:?} reaches {own:?}", flow.service))
                }
                Some(flow) if flow.accepted => Some(format!("flow {number} reaches a service twice")),
                Some(flow) => {
                    flow.accepted = true;
                    state.tally.accepted += 1;
                    None
                }
            }
        };
        match wrong {
            Some(wrong) => self.violate(wrong),
            None => debug!(number, service = %self.name(own), "a flow is accepted"),
        }
    }

    /// A side has said so many bytes by now.
    pub(crate) fn said(&self, number: u64, direction: u64, bytes: u64) {
        let under_way = {
            let mut state = self.lock();
            let Some(flow) = state.flows.get(&number) else { return };
            let under_way = bytes.saturating_sub(flow.heard[direction as usize]);
            state.tally.under_way = state.tally.under_way.max(under_way);
            under_way
        };
        if under_way > UNDER_WAY {
            self.violate(format_args!("flow {number}: {under_way} bytes are on their way to a slow reader"));
        }
    }

    /// A side has said half of it and resets the flow.
    pub(crate) fn break_off(&self, number: u64) {
        if let Some(flow) = self.lock().flows.get_mut(&number) {
            flow.broken_off = true;
        }
    }

    /// An application of a Service is killed: the flows that it may have had are cut short.
    pub(crate) fn kill_application(&self, service: Service) {
        self.lock()
            .flows
            .values_mut()
            .filter(|flow| flow.service == service)
            .for_each(|f| f.cut_short = true);
    }

    /// Whether an end of a flow says that all has come.
    pub(crate) fn is_end_honest(&self, number: u64) -> bool {
        self.lock().flows.get(&number).is_none_or(|flow| !flow.cut_short)
    }

    /// A flow ended by the reset of its sender, who had written so many bytes before it.
    pub(crate) fn reset(&self, number: u64, direction: u64, written: u64) {
        let heard = {
            let mut state = self.lock();
            let Some(flow) = state.flows.get(&number) else { return };
            let (heard, quiet) =
                (flow.heard[direction as usize], flow.broken_off && state.changed <= flow.began);
            if !quiet {
                return;
            }
            state.tally.last_words += 1;
            heard
        };
        if heard < written {
            self.violate(format_args!("flow {number}: reset after {heard} of the {written} bytes before it"));
        }
    }

    fn hear(&self, number: u64, direction: u64, n: u64) {
        let mut state = self.lock();
        state.tally.bytes += n;
        if let Some(flow) = state.flows.get_mut(&number) {
            flow.heard[direction as usize] += n;
        }
    }

    /// A pod's sidecar begins anew and knows nothing of what it gave.
    pub(crate) fn forget_leases(&self, pod: &str) {
        self.lock().leases.retain(|(other, _), _| other != pod);
    }

    /// DNS gave an application of a pod an address for a Service (without its port), to be remembered for `ttl`.
    pub fn answer(&self, pod: &str, service: &str, address: IpAddr, ttl: Duration) {
        let before = {
            let mut state = self.lock();
            state.tally.answers += 1;
            let until = now() + ttl;
            let before = state.leases.insert((pod.into(), address), (service.into(), until));
            before.filter(|(other, until)| other != service && *until > now())
        };
        if let Some((other, until)) = before {
            self.violate(format_args!(
                "{pod} has {address} for {service}, which may be remembered for {other} {:?} more",
                until - now()
            ));
        }
    }
}

/// The simulated time.
pub fn now() -> Duration {
    turmoil::sim_elapsed().unwrap_or_default()
}

#[cfg(test)]
mod tests;
