//! The conversation with the router: when it is opened, what has been said in it and what is still to be said.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::time::{Duration, Instant};

use crate::handoff::{MAX_DESCRIPTORS, PINGS, SocketId};
use crate::name::RouterId;

/// How long after the loss of the router it is dialled again; doubled from then on ...
pub const FIRST_RETRY: Duration = Duration::from_millis(50);
/// ... up to this.
pub const LAST_RETRY: Duration = Duration::from_secs(1);
/// How long after it refused this sidecar as a whole, such as for its version.
pub const REFUSED_RETRY: Duration = Duration::from_secs(10);
/// How long the router may take to answer Hello.
pub const WELCOME_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the router may say nothing until it is asked whether it answers ...
pub const PING_AFTER: Duration = Duration::from_secs(5);
/// ... and how long its answer may take: what came before the question is handled first, and messages are paced.
pub const PONG_WITHIN: Duration = Duration::from_secs(10);
/// A conversation that lasted this long was a good one: the next is dialled without delay.
const GOOD: Duration = Duration::from_secs(1);
/// How long after a socket could not be made or passed on it is tried again.
const RESOURCE_RETRY: Duration = Duration::from_secs(1);
/// The most unconnected sockets of a kind that are owed to a router.
const MAX_OWED: u16 = 1024;
/// How long after the router refused an import or export it is asked again: it may have been short of room. Doubled from
/// then on, while it takes none of what it refused ...
pub const FIRST_ASK: Duration = Duration::from_secs(1);
/// ... up to this.
pub const LAST_ASK: Duration = Duration::from_secs(15);
/// A router that says nothing against it for so long has taken it.
const ANSWER: Duration = Duration::from_secs(1);
/// How many are asked for at once: a router bounds how many messages of a sidecar it handles.
pub(super) const ASKED_AT_ONCE: usize = 64;

/// How the conversation stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    /// There is none; the router is dialled at that time.
    Away { until: Instant },
    /// The router is being dialled.
    Connecting,
    /// Hello is on its way, or its answer; which comes until that time or not at all.
    Greeting { hello: bool, until: Instant },
    /// The router has said Welcome.
    Up { router: RouterId, since: Instant },
}

/// The next thing to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Hello,
    Stock { tcp: u16, udp: u16 },
    Ping,
    Unimport(SocketId),
    Unexport(SocketId),
    Import(SocketId),
    Export(SocketId),
    Bye,
}

/// What the router knows of imports, or of exports. Each number is in at most one of `untold`, `unsent` and `told`,
/// save an altered export, and what was refused: they are told and to be told again.
#[derive(Debug, Default)]
pub(super) struct Side {
    untold: BTreeSet<SocketId>,
    told: BTreeSet<SocketId>,
    /// Could not be sent, and wait to be tried again.
    unsent: BTreeSet<SocketId>,
    /// The router knows them, and they are over. Bounded by what it was told, since nothing new is told before these.
    over: VecDeque<SocketId>,
    /// The router does not serve these.
    refused: BTreeMap<SocketId, Refusal>,
    /// The last that was asked for again.
    asked: SocketId,
}

/// That the router does not serve something.
#[derive(Debug)]
struct Refusal {
    reason: String,
    /// It is to be told again, or was, and there is no answer yet.
    asked: bool,
}

impl Side {
    /// The router is to hear of it; where it has already, anew.
    pub(super) fn tell(&mut self, id: SocketId) {
        self.unsent.remove(&id);
        self.untold.insert(id);
    }

    /// It is over.
    pub(super) fn end(&mut self, id: SocketId) {
        self.untold.remove(&id);
        self.unsent.remove(&id);
        self.refused.remove(&id);
        if self.told.remove(&id) {
            self.over.push_back(id);
        }
    }

    /// It could not be sent after all.
    fn unsent(&mut self, id: SocketId) -> bool {
        let told = self.told.remove(&id);
        if told {
            self.unsent.insert(id);
        }
        told
    }

    /// `None` where that is not known; whether it is news.
    fn refuse(&mut self, id: SocketId, reason: &str) -> Option<bool> {
        let known = self.told.contains(&id);
        known.then(|| self.refused.insert(id, Refusal { reason: reason.to_owned(), asked: false }).is_none())
    }

    /// Of what was refused up to `most` are to be told again at once, each in its turn. Says how many are.
    fn ask(&mut self, most: usize) -> usize {
        let asked = self.refused.values().filter(|refusal| refusal.asked).count();
        let behind = self.refused.range((Bound::Excluded(self.asked), Bound::Unbounded));
        let all = behind.chain(self.refused.range(..=self.asked));
        let ids = all.filter(|(_, refusal)| !refusal.asked).map(|(id, _)| *id);
        let ids: Vec<_> = ids.take(most.saturating_sub(asked)).collect();
        for id in &ids {
            self.refused.entry(*id).and_modify(|refusal| refusal.asked = true);
            self.untold.insert(*id);
            self.asked = *id;
        }
        asked + ids.len()
    }

    /// What was asked for again, heard, and not refused again.
    fn take_accepted(&mut self) -> Vec<SocketId> {
        let (untold, unsent, mut accepted) = (&self.untold, &self.unsent, Vec::new());
        self.refused.retain(|id, refusal| {
            let taken = refusal.asked && !untold.contains(id) && !unsent.contains(id);
            accepted.extend(taken.then_some(*id));
            !taken
        });
        accepted
    }

    /// The router knows nothing any more.
    fn forget(&mut self) {
        self.untold.append(&mut self.told);
        self.untold.append(&mut self.unsent);
        self.over.clear();
        self.refused.clear();
        self.asked = 0;
    }

    /// How many are known here, besides those that are over.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.untold.union(&self.told).count() + self.unsent.len()
    }

    fn next_told(&mut self) -> Option<SocketId> {
        let id = self.untold.pop_first()?;
        self.told.insert(id);
        // One that was altered is another now.
        if self.refused.get(&id).is_some_and(|refusal| !refusal.asked) {
            self.refused.remove(&id);
        }
        Some(id)
    }

    /// Whether the router has heard of it, in its last form.
    pub(super) fn is_told(&self, id: SocketId) -> bool {
        self.told.contains(&id) && !self.untold.contains(&id)
    }

    /// Why the router does not serve it.
    pub(super) fn refusal(&self, id: SocketId) -> Option<&str> {
        self.refused.get(&id).map(|refusal| refusal.reason.as_str())
    }

    /// What the router refuses, and why.
    pub(super) fn refusals(&self) -> impl ExactSizeIterator<Item = (SocketId, &str)> {
        self.refused.iter().map(|(id, refusal)| (*id, refusal.reason.as_str()))
    }
}

/// Whether a router that has said Welcome still lives: one that is stopped, or hangs, keeps its connections.
#[derive(Debug)]
struct Pulse {
    heard: Instant,
    /// It is to be asked.
    ask: bool,
    /// Since when an answer is waited for.
    asked: Option<Instant>,
    /// There was none in time.
    silent: bool,
}

impl Pulse {
    /// Of one that was heard just now.
    const fn new(heard: Instant) -> Self {
        Self { heard, ask: false, asked: None, silent: false }
    }

    /// When [`Self::handle_timeout`] has something to do.
    fn poll_timeout(&self) -> Option<Instant> {
        match self.asked {
            None => Some(self.heard + PING_AFTER),
            Some(asked) => (!self.silent).then_some(asked + PONG_WITHIN),
        }
    }

    /// True where it has not answered in time, once. It is not asked again: what was asked waits to be read.
    fn handle_timeout(&mut self, now: Instant) -> bool {
        if self.poll_timeout().is_none_or(|at| at > now) {
            return false;
        }
        if self.asked.is_none() {
            (self.ask, self.asked) = (true, Some(now));
            return false;
        }
        self.silent = true;
        true
    }
}

#[derive(Debug)]
pub(super) struct Conversation {
    phase: Phase,
    /// Of a router that answers when it is asked.
    pulse: Option<Pulse>,
    delay: Duration,
    /// Why there is no conversation, since that was last told.
    down: Option<String>,
    /// Since when there is none.
    since: Instant,
    pub(super) imports: Side,
    pub(super) exports: Side,
    /// Unconnected sockets that the router has asked for.
    owed_tcp: u16,
    owed_udp: u16,
    /// What could not be made or sent is tried again at this time.
    again: Option<Instant>,
    asking: Asking,
    ending: bool,
    said_bye: bool,
}

/// When the router is asked again for what it refused.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Asking {
    /// It refuses nothing.
    #[default]
    Never,
    /// At that time, after so long a wait.
    At(Instant, Duration),
    /// It was asked, and its answer is looked at then.
    Answer(Instant, Duration),
}

impl Asking {
    fn at(self) -> Option<Instant> {
        match self {
            Self::Never => None,
            Self::At(at, _) | Self::Answer(at, _) => Some(at),
        }
    }
}

impl Conversation {
    /// None yet; the router is to be dialled at `now`.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            phase: Phase::Away { until: now },
            pulse: None,
            delay: FIRST_RETRY,
            down: None,
            since: now,
            imports: Side::default(),
            exports: Side::default(),
            owed_tcp: 0,
            owed_udp: 0,
            again: None,
            asking: Asking::Never,
            ending: false,
            said_bye: false,
        }
    }

    pub(super) fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Why there is no conversation.
    pub(super) fn down(&self) -> Option<&str> {
        self.down.as_deref()
    }

    /// Since when there is no conversation; of use while that is so.
    pub(super) fn down_since(&self) -> Instant {
        self.since
    }

    /// Whether the router is to be dialled now; it counts as being dialled from then on.
    pub(super) fn poll_connect(&mut self, now: Instant) -> bool {
        let due = !self.ending && matches!(self.phase, Phase::Away { until } if until <= now);
        if due {
            self.phase = Phase::Connecting;
        }
        due
    }

    pub(super) fn handle_connected(&mut self, now: Instant) {
        if self.phase == Phase::Connecting {
            self.phase = Phase::Greeting { hello: false, until: now + WELCOME_TIMEOUT };
        }
    }

    /// The answer to Hello of a router of this version. False where that does not belong here.
    pub(super) fn handle_welcome(&mut self, router: RouterId, version: u32, now: Instant) -> bool {
        let expected = matches!(self.phase, Phase::Greeting { hello: true, .. });
        if expected {
            self.phase = Phase::Up { router, since: now };
            self.pulse = (version >= PINGS).then_some(Pulse::new(now));
            self.down = None;
        }
        expected
    }

    /// The router said something, whatever it was. For how long it had been silent, where that was told.
    pub(super) fn handle_received(&mut self, now: Instant) -> Option<Duration> {
        let pulse = self.pulse.as_mut()?;
        let silent = pulse.silent.then(|| now.saturating_duration_since(pulse.heard));
        *pulse = Pulse::new(now);
        silent
    }

    /// Since when the router has said nothing, where it does not answer.
    pub(super) fn silent_since(&self) -> Option<Instant> {
        self.pulse.as_ref().filter(|pulse| pulse.silent).map(|pulse| pulse.heard)
    }

    /// True where it is found now that the router does not answer.
    pub(super) fn handle_silence(&mut self, now: Instant) -> bool {
        self.pulse.as_mut().is_some_and(|pulse| pulse.handle_timeout(now))
    }

    /// The router wants more unconnected sockets.
    pub(super) fn handle_more(&mut self, tcp: u16, udp: u16) {
        if matches!(self.phase, Phase::Up { .. }) {
            self.owed_tcp = self.owed_tcp.saturating_add(tcp).min(MAX_OWED);
            self.owed_udp = self.owed_udp.saturating_add(udp).min(MAX_OWED);
        }
    }

    /// The router does not serve one import or export. True where that is news.
    pub(super) fn handle_refused(&mut self, id: SocketId, reason: &str, now: Instant) -> bool {
        let refused = self.imports.refuse(id, reason).or_else(|| self.exports.refuse(id, reason));
        if refused.is_some() && self.asking == Asking::Never {
            self.asking = Asking::At(now + FIRST_ASK, FIRST_ASK);
        }
        refused == Some(true)
    }

    /// What the router refused, was asked for again and has not refused since. Asks for the next where it is time.
    pub(super) fn ask_again(&mut self, now: Instant) -> Vec<SocketId> {
        let mut accepted = Vec::new();
        match self.asking {
            Asking::At(at, wait) if at <= now => {
                let imports = self.imports.ask(ASKED_AT_ONCE);
                self.exports.ask(ASKED_AT_ONCE.saturating_sub(imports));
                let refused = self.imports.refusals().len() + self.exports.refusals().len();
                self.asking = if refused == 0 { Asking::Never } else { Asking::Answer(now + ANSWER, wait) };
            }
            Asking::Answer(at, wait) if at <= now => {
                accepted = self.imports.take_accepted();
                accepted.append(&mut self.exports.take_accepted());
                let wait = if accepted.is_empty() { (wait * 2).min(LAST_ASK) } else { FIRST_ASK };
                self.asking = Asking::At(now + wait, wait);
            }
            _ => {}
        }
        accepted
    }

    /// So many unconnected sockets could not be made. They are tried again.
    pub(super) fn handle_short(&mut self, tcp: u16, udp: u16, now: Instant) {
        self.handle_more(tcp, udp);
        self.again = Some(now + RESOURCE_RETRY);
    }

    /// A message could not be sent since its socket could not be shared. It is tried again.
    pub(super) fn handle_unsent(&mut self, id: SocketId, now: Instant) {
        if self.imports.unsent(id) || self.exports.unsent(id) {
            self.again.get_or_insert(now + RESOURCE_RETRY);
        }
    }

    /// There is no conversation any more, or the dial failed. True where that is news.
    pub(super) fn handle_down(&mut self, reason: String, refused: bool, now: Instant) -> bool {
        if matches!(self.phase, Phase::Away { .. }) {
            return false;
        }
        if matches!(self.phase, Phase::Up { .. }) {
            self.since = now;
        }
        if let Phase::Up { since, .. } = self.phase
            && now.saturating_duration_since(since) >= GOOD
        {
            self.delay = FIRST_RETRY;
        }
        let delay = if refused { REFUSED_RETRY } else { self.delay };
        self.delay = (self.delay * 2).min(LAST_RETRY);
        self.phase = Phase::Away { until: now + delay };
        self.pulse = None;
        self.imports.forget();
        self.exports.forget();
        (self.owed_tcp, self.owed_udp, self.again) = (0, 0, None);
        self.asking = Asking::Never;
        let news = self.down.is_none();
        self.down = Some(reason);
        news
    }

    /// The sidecar is to end: what is still to be said is Bye.
    pub(super) fn handle_shutdown(&mut self) {
        self.ending = true;
    }

    /// True where the router has not answered in time.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> bool {
        if self.again.is_some_and(|again| again <= now) {
            self.again = None;
            let Side { untold, unsent, .. } = &mut self.imports;
            untold.append(unsent);
            let Side { untold, unsent, .. } = &mut self.exports;
            untold.append(unsent);
        }
        matches!(self.phase, Phase::Greeting { until, .. } if until <= now)
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let phase = match self.phase {
            Phase::Away { until } if !self.ending => Some(until),
            Phase::Greeting { until, .. } => Some(until),
            _ => None,
        };
        let pulse = self.pulse.as_ref().filter(|_| !self.ending).and_then(Pulse::poll_timeout);
        phase.into_iter().chain(self.again).chain(self.asking.at()).chain(pulse).min()
    }

    /// What to say next; it counts as said.
    pub(super) fn poll_turn(&mut self) -> Option<Turn> {
        match &mut self.phase {
            Phase::Away { .. } | Phase::Connecting => return None,
            Phase::Greeting { hello: false, .. } if self.ending => return None,
            Phase::Greeting { hello: said @ false, .. } => {
                *said = true;
                return Some(Turn::Hello);
            }
            _ if self.ending => {
                return (!std::mem::replace(&mut self.said_bye, true)).then_some(Turn::Bye);
            }
            Phase::Greeting { .. } => return None,
            Phase::Up { .. } => {}
        }
        if let Some(pulse) = &mut self.pulse
            && std::mem::take(&mut pulse.ask)
        {
            return Some(Turn::Ping);
        }
        // Flows wait for these.
        if self.again.is_none() && self.owed_tcp + self.owed_udp > 0 {
            let most = MAX_DESCRIPTORS as u16;
            let tcp = self.owed_tcp.min(most);
            let udp = self.owed_udp.min(most - tcp);
            self.owed_tcp -= tcp;
            self.owed_udp -= udp;
            return Some(Turn::Stock { tcp, udp });
        }
        if let Some(id) = self.imports.over.pop_front() {
            return Some(Turn::Unimport(id));
        }
        if let Some(id) = self.exports.over.pop_front() {
            return Some(Turn::Unexport(id));
        }
        if let Some(id) = self.imports.next_told() {
            return Some(Turn::Import(id));
        }
        self.exports.next_told().map(Turn::Export)
    }
}
