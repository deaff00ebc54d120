//! The oracle: what must hold whatever happens, checked with every byte, datagram, answer and step.
//!
//! - A flow's bytes come in order, once, and completely, or it is reset: an end says that all has come.
//! - What a side wrote before it reset a flow reaches the other one, where that reads and no fault came meanwhile.
//! - A reader that is slow stops its writer: what is on its way is bounded.
//! - A flow and a datagram reach the Service that was meant, at most once; a datagram is one that was sent, whole, and
//!   its answer comes to its sender.
//! - An address that DNS gave for one Service is not given for another while anybody may remember it.
//! - What was quiet for [`SETTLED`] works.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use servicekeel_core::flow::machine::WINDOW;
use tracing::{debug, error, info};

use crate::content::Content;

/// After so long without a change, a name that has a reachable endpoint works.
pub const SETTLED: Duration = Duration::from_secs(5);
/// The most bytes of one direction that are said and not heard yet: what the routers let pass unacknowledged, and the
/// sockets' buffers around it.
const UNDER_WAY: u64 = WINDOW + (1 << 20);
/// Number, Service and length before the content of a datagram.
pub(crate) const DATAGRAM_HEADER: usize = 16;

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
}

struct Datagram {
    client: u64,
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
        state.flows.insert(
            number,
            Flow { service, accepted: false, heard: [0; 2], began: now(), broken_off: false },
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

    /// A number for a client of datagrams.
    pub(crate) fn begin_client(&self) -> u64 {
        let mut state = self.lock();
        state.next += 1;
        state.next
    }

    /// A datagram for a Service, `len` bytes long: its number and its bytes.
    pub(crate) fn send_datagram(&self, client: u64, service: Service, len: usize) -> (u64, Vec<u8>) {
        let mut state = self.lock();
        state.tally.datagrams += 1;
        state.next += 1;
        let number = state.next;
        if len < DATAGRAM_HEADER {
            state.short.entry((service, len)).or_default().0 += 1;
            return (number, short(len));
        }
        state.datagrams.insert(number, Datagram { client, service, len, received: false, answered: false });
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
    pub(crate) fn receive_answer(&self, client: u64, service: Service, bytes: &[u8]) -> Option<u64> {
        let answered = self.answered(client, service, bytes);
        match answered {
            Ok(number) => Some(number),
            Err(wrong) => {
                self.violate(format_args!("an answer of {} bytes from {service:?}: {wrong}", bytes.len()));
                None
            }
        }
    }

    fn answered(&self, client: u64, service: Service, bytes: &[u8]) -> Result<u64, String> {
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
        if datagram.client != client {
            return Err(format!("number {number} was sent by another client"));
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
    direction: u64,
    content: Content,
    total: u64,
    received: u64,
}

impl<'a> Incoming<'a> {
    pub(crate) fn new(oracle: &'a Oracle, number: u64, direction: u64, total: u64) -> Self {
        Self { oracle, number, direction, content: Content::new(number, direction), total, received: 0 }
    }

    /// Bytes came.
    pub(crate) fn take(&mut self, bytes: &[u8]) {
        self.oracle.hear(self.number, self.direction, bytes.len() as u64);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// How many violations there are more than at the last call.
    struct Seen(Oracle, usize);

    impl Seen {
        fn more(&mut self) -> usize {
            let all = self.0.violations().len();
            all - std::mem::replace(&mut self.1, all)
        }
    }

    fn watched() -> (Oracle, Seen, Service, Service) {
        let oracle = Oracle::default();
        let (one, other) = (oracle.service("one"), oracle.service("other"));
        (oracle.clone(), Seen(oracle, 0), one, other)
    }

    #[test]
    fn a_flow_that_goes_astray_is_seen() {
        let (oracle, mut seen, one, other) = watched();
        let number = oracle.begin_flow(one);
        oracle.accept_flow(number, one.0, other);
        assert_eq!(seen.more(), 1);
        oracle.accept_flow(number, other.0, one);
        assert_eq!(seen.more(), 1);
        oracle.accept_flow(number + 1, one.0, one);
        assert_eq!(seen.more(), 1);
        oracle.accept_flow(number, one.0, one);
        assert_eq!(seen.more(), 0);
        oracle.accept_flow(number, one.0, one);
        assert_eq!(seen.more(), 1);
    }

    #[test]
    fn bytes_that_are_changed_missing_too_many_or_unread_are_seen() {
        let (oracle, mut seen, one, _) = watched();
        let number = oracle.begin_flow(one);
        let content = Content::new(number, 0);
        let mut incoming = Incoming::new(&oracle, number, 0, 100);
        incoming.take(content.at(0, 60));
        assert_eq!(seen.more(), 0);
        incoming.end();
        assert_eq!(seen.more(), 1);
        incoming.take(content.at(59, 40));
        assert_eq!(seen.more(), 1);
        incoming.end();
        assert_eq!(seen.more(), 0);
        incoming.take(content.at(100, 1));
        assert_eq!(seen.more(), 1);
        oracle.said(number, 0, 101 + UNDER_WAY);
        assert_eq!(seen.more(), 0);
        oracle.said(number, 0, 102 + UNDER_WAY);
        assert_eq!(seen.more(), 1);
    }

    #[test]
    fn last_words_that_are_lost_are_seen() {
        let (oracle, mut seen, one, _) = watched();
        let number = oracle.begin_flow(one);
        let mut incoming = Incoming::new(&oracle, number, 1, 200);
        incoming.take(Content::new(number, 1).at(0, 99));
        oracle.reset(number, 1, 100);
        assert_eq!(seen.more(), 0, "nobody meant to reset it");
        oracle.break_off(number);
        oracle.reset(number, 1, 99);
        assert_eq!(seen.more(), 0);
        oracle.reset(number, 1, 100);
        assert_eq!(seen.more(), 1);
    }

    #[test]
    fn a_datagram_that_is_not_what_was_sent_or_comes_elsewhere_is_seen() {
        let (oracle, mut seen, one, other) = watched();
        let (number, bytes) = oracle.send_datagram(7, one, 500);
        assert_eq!(oracle.receive_answer(7, one, &bytes), None);
        assert_eq!(seen.more(), 1);
        oracle.receive_datagram(other, &bytes);
        oracle.receive_datagram(one, &bytes[..499]);
        oracle.receive_datagram(one, &[&bytes[..499], &[!bytes[499]]].concat());
        assert_eq!(seen.more(), 3);
        oracle.receive_datagram(one, &bytes);
        assert_eq!(seen.more(), 0);
        oracle.receive_datagram(one, &bytes);
        assert_eq!(seen.more(), 1);
        assert_eq!(oracle.receive_answer(8, one, &bytes), None);
        assert_eq!(oracle.receive_answer(7, other, &bytes), None);
        assert_eq!(seen.more(), 2);
        assert_eq!(oracle.receive_answer(7, one, &bytes), Some(number));
        assert_eq!(seen.more(), 0);
        assert_eq!(oracle.receive_answer(7, one, &bytes), None);
        assert_eq!(seen.more(), 1);
        oracle.receive_datagram(one, &[]);
        assert_eq!(seen.more(), 1);
    }

    #[test]
    fn an_address_that_may_be_remembered_for_another_service_is_seen() {
        let (oracle, mut seen, ..) = watched();
        let (address, ttl) = (IpAddr::from([127, 0, 66, 1]), Duration::from_secs(5));
        oracle.answer("pod", "one", address, ttl);
        oracle.answer("pod", "one", address, ttl);
        oracle.answer("another pod", "other", address, ttl);
        assert_eq!(seen.more(), 0);
        oracle.answer("pod", "other", address, ttl);
        assert_eq!(seen.more(), 1);
        oracle.forget_leases("pod");
        oracle.answer("pod", "one", address, ttl);
        assert_eq!(seen.more(), 0);
    }
}
