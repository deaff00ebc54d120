//! The oracle: what must hold whatever happens, checked with every byte, datagram, answer and step.
//!
//! - A flow's bytes come in order, once, and completely, or it is reset: an end says that all has come.
//! - A flow and a datagram reach the Service that was meant, at most once; a datagram is one that was sent, whole.
//! - An address that DNS gave for one Service is not given for another while anybody may remember it.
//! - What was quiet for [`SETTLED`] works.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use servicekeel_core::sidecar::REST;
use tracing::{debug, error, info};

use crate::content::Content;

/// After so long without a change, a name that has a reachable endpoint works.
pub const SETTLED: Duration = Duration::from_secs(5);
/// Number, Service and length before the content of a datagram.
pub(crate) const DATAGRAM_HEADER: usize = 16;

/// A port of a Service, as the applications know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Service(pub(crate) u32);

struct Flow {
    service: Service,
    accepted: bool,
}

struct Datagram {
    service: Service,
    len: usize,
    received: bool,
    answered: bool,
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
    /// Datagrams that were sent to a Service.
    pub datagrams: u64,
    /// Datagrams that it received.
    pub datagrams_received: u64,
    /// Answers to them that came back.
    pub datagrams_answered: u64,
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
    leases: BTreeMap<(String, IpAddr), (String, Duration)>,
    tally: Tally,
    next: u64,
    changed: Duration,
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
        info!("{what}");
        self.lock().changed = now();
    }

    /// How long nothing has changed.
    pub fn quiet(&self) -> Duration {
        now().saturating_sub(self.lock().changed)
    }

    /// Whether something was tried after [`SETTLED`] of quiet that lasted until now, so that it must have worked.
    pub fn must_have_worked(&self, began: Duration) -> bool {
        let mut state = self.lock();
        let settled = state.changed + SETTLED <= began;
        state.tally.probes += u64::from(settled);
        settled
    }

    /// An application begins a flow: its number.
    pub(crate) fn begin_flow(&self, service: Service) -> u64 {
        let mut state = self.lock();
        state.next += 1;
        state.tally.flows += 1;
        let number = state.next;
        state.flows.insert(number, Flow { service, accepted: false });
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

    fn count_bytes(&self, n: usize) {
        self.lock().tally.bytes += n as u64;
    }

    /// A datagram for a Service, `len` bytes long: its bytes.
    pub(crate) fn send_datagram(&self, service: Service, len: usize) -> (u64, Vec<u8>) {
        let mut state = self.lock();
        state.tally.datagrams += 1;
        state.next += 1;
        let number = state.next;
        if len < DATAGRAM_HEADER {
            state.short.entry((service, len)).or_default().0 += 1;
            return (number, short(len));
        }
        state.datagrams.insert(number, Datagram { service, len, received: false, answered: false });
        let mut bytes = Vec::with_capacity(len);
        bytes.extend(number.to_be_bytes());
        bytes.extend(service.0.to_be_bytes());
        bytes.extend((len as u32).to_be_bytes());
        let content = Content::new(number, 0);
        while bytes.len() < len {
            bytes.extend(content.at((bytes.len() - DATAGRAM_HEADER) as u64, len - bytes.len()));
        }
        (number, bytes)
    }

    /// A service received a datagram.
    pub(crate) fn receive_datagram(&self, own: Service, bytes: &[u8]) {
        if let Err(wrong) = self.received(own, bytes) {
            self.violate(format_args!("a datagram of {} bytes at {own:?}: {wrong}", bytes.len()));
        }
    }

    fn received(&self, own: Service, bytes: &[u8]) -> Result<(), String> {
        let mut state = self.lock();
        state.tally.datagrams_received += 1;
        if bytes.len() < DATAGRAM_HEADER {
            if bytes != short(bytes.len()) {
                return Err("not what was sent".into());
            }
            let (sent, received) = state.short.entry((own, bytes.len())).or_default();
            *received += 1;
            return if received > sent { Err("more of them than were sent".into()) } else { Ok(()) };
        }
        let number = whole(bytes)?;
        let datagram = state.datagrams.get_mut(&number).ok_or("nobody sent it")?;
        if datagram.len != bytes.len() {
            return Err(format!("number {number} was sent with {} bytes", datagram.len));
        }
        if datagram.service != own {
            return Err(format!("number {number} was sent to {:?}", datagram.service));
        }
        if std::mem::replace(&mut datagram.received, true) {
            return Err(format!("number {number} comes twice"));
        }
        debug!(number, len = bytes.len(), "a datagram is received");
        Ok(())
    }

    /// The sender of a datagram received an answer: the number of what it answers.
    pub(crate) fn receive_answer(&self, service: Service, bytes: &[u8]) -> Option<u64> {
        let answered = self.answered(service, bytes);
        match answered {
            Ok(number) => Some(number),
            Err(wrong) => {
                self.violate(format_args!("an answer of {} bytes from {service:?}: {wrong}", bytes.len()));
                None
            }
        }
    }

    fn answered(&self, service: Service, bytes: &[u8]) -> Result<u64, String> {
        let mut state = self.lock();
        state.tally.datagrams_answered += 1;
        if bytes.len() < DATAGRAM_HEADER {
            return if bytes == short(bytes.len()) { Ok(0) } else { Err("not what was sent".into()) };
        }
        let number = whole(bytes)?;
        let datagram = state.datagrams.get_mut(&number).ok_or("nobody sent it")?;
        if datagram.service != service || datagram.len != bytes.len() || !datagram.received {
            return Err(format!("number {number} was sent to {:?}", datagram.service));
        }
        if std::mem::replace(&mut datagram.answered, true) {
            return Err(format!("number {number} is answered twice"));
        }
        Ok(number)
    }

    /// A pod's sidecar begins anew and knows nothing of what it gave.
    pub(crate) fn forget_leases(&self, pod: &str) {
        self.lock().leases.retain(|(other, _), _| other != pod);
    }

    /// DNS gave an application of a pod an address for a Service (without its port).
    pub fn answer(&self, pod: &str, service: &str, address: IpAddr) {
        let before = {
            let mut state = self.lock();
            state.tally.answers += 1;
            let before = state.leases.insert((pod.into(), address), (service.into(), now()));
            before.filter(|(other, last)| other != service && *last + REST > now())
        };
        if let Some((other, last)) = before {
            self.violate(format_args!(
                "{pod} has {address} for {service}, which was for {other} {:?} ago",
                now() - last
            ));
        }
    }
}

/// What a datagram says of itself, where its content is whole.
fn whole(bytes: &[u8]) -> Result<u64, String> {
    let (header, content) = bytes.split_at(DATAGRAM_HEADER);
    let number = u64::from_be_bytes(header[..8].try_into().map_err(|_| "no number")?);
    let len = u32::from_be_bytes(header[12..].try_into().map_err(|_| "no length")?) as usize;
    if len != bytes.len() {
        return Err(format!("number {number} was sent with {len} bytes"));
    }
    match Content::new(number, 0).differs(0, content) {
        Some(at) => Err(format!("number {number} differs at byte {at}")),
        None => Ok(number),
    }
}

fn short(len: usize) -> Vec<u8> {
    Content::new(len as u64, 1).at(0, len).into()
}

/// The simulated time.
pub fn now() -> Duration {
    turmoil::sim_elapsed().unwrap_or_default()
}

/// One direction of a flow, as it comes.
pub(crate) struct Incoming<'a> {
    oracle: &'a Oracle,
    number: u64,
    content: Content,
    total: u64,
    received: u64,
}

impl<'a> Incoming<'a> {
    pub(crate) fn new(oracle: &'a Oracle, number: u64, direction: u64, total: u64) -> Self {
        Self { oracle, number, content: Content::new(number, direction), total, received: 0 }
    }

    /// Bytes came.
    pub(crate) fn take(&mut self, bytes: &[u8]) {
        self.oracle.count_bytes(bytes.len());
        if let Some(at) = self.content.differs(self.received, bytes) {
            self.oracle.violate(format_args!("flow {}: byte {at} is another than was sent", self.number));
        }
        self.received += bytes.len() as u64;
        if self.received > self.total {
            self.oracle.violate(format_args!(
                "flow {}: {} bytes came where {} were sent",
                self.number, self.received, self.total
            ));
        }
    }

    /// The end came.
    pub(crate) fn end(&self) {
        if self.received < self.total {
            self.oracle.violate(format_args!(
                "flow {}: ends as if complete after {} of {} bytes",
                self.number, self.received, self.total
            ));
        }
    }

    pub(crate) fn received(&self) -> u64 {
        self.received
    }
}
