//! One question to the upstreams.
//!
//! - They are asked in their order. One that is silent for its turn is not given up when the next one is asked: the
//!   first answer of any counts. A refusal, by code or because nobody listens, ends a turn at once.
//! - NOERROR and NXDOMAIN are answers. Any other code is passed on only if no other upstream does better.
//! - Within a turn the query is sent again, each time as a new one, and plainer: without EDNS, then without a random
//!   case. An error to a query that was not plain is answered by a plain one. What an upstream does not bear is
//!   remembered ([`Servers`]).
//! - An answer that is truncated, torn or in another case is asked for over TCP. Where that fails, a truncated one is
//!   an answer if no other upstream has all of it, and one in another case is asked for once more in lower case.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::Failure;
use super::servers::Servers;
use crate::dns::wire::{Heard, Manner, Response, code};

/// How often a datagram is sent to one upstream, errors and doubts aside.
const SENT: u8 = 4;
/// How often the whole list is gone through, where time is left.
const ROUNDS: u8 = 3;
const PLAIN: Manner = Manner { edns: false, mixed_case: false };

/// The bounds of a question's time.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// How long one upstream may take, before the next one is asked as well.
    pub one_try: Duration,
    /// How long all tries may take together.
    pub all_tries: Duration,
}

/// The number of a try.
pub type TryId = usize;

/// A query to send, and to listen for until the question ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Send {
    /// By which its outcome is told.
    pub id: TryId,
    /// To whom.
    pub to: SocketAddr,
    /// How.
    pub manner: Manner,
    /// Over TCP.
    pub stream: bool,
}

/// Why a try has ended without a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nobody listens there, or no way leads there.
    Refused,
    /// A connection broke, or this system has no socket to ask by.
    Broken,
}

/// See the module.
#[derive(Debug)]
pub struct Asking {
    times: Times,
    end: Instant,
    targets: Vec<Target>,
    tries: Vec<Try>,
    sends: VecDeque<Send>,
    /// Whose turn it is.
    at: usize,
    round: u8,
    turn_ends: Instant,
    again: Option<Instant>,
    /// The first code that was no answer.
    said: Option<u16>,
    outcome: Option<Result<Response, Failure>>,
}

#[derive(Debug, Clone, Copy)]
struct Try {
    target: usize,
    manner: Manner,
    stream: bool,
}

/// One upstream, for one question.
#[derive(Debug)]
struct Target {
    server: usize,
    sent: u8,
    /// Nothing more is expected of it.
    done: bool,
    /// How the query was put that got an error.
    blamed: Option<Manner>,
    stream: Stream,
    /// An answer came in another case, and TCP did not settle it.
    in_doubt: bool,
    /// A truncated answer.
    truncated: Option<Response>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Unused,
    Open,
    Failed,
}

impl Asking {
    /// Begins to ask.
    pub fn new(servers: &Servers, times: Times, now: Instant) -> Self {
        let targets = servers.order(now).into_iter().map(|server| Target {
            server,
            sent: 0,
            done: false,
            blamed: None,
            stream: Stream::Unused,
            in_doubt: false,
            truncated: None,
        });
        let end = now + times.all_tries;
        let mut asking = Self {
            times,
            end,
            targets: targets.collect(),
            tries: Vec::new(),
            sends: VecDeque::new(),
            at: 0,
            round: 0,
            turn_ends: end,
            again: None,
            said: None,
            outcome: None,
        };
        asking.begin_turn(servers, now);
        asking
    }

    /// The next query to send.
    pub fn poll_send(&mut self) -> Option<Send> {
        self.sends.pop_front()
    }

    /// What came of it, once it is known.
    pub fn poll_outcome(&mut self) -> Option<Result<Response, Failure>> {
        self.outcome.take()
    }

    #[cfg(test)]
    pub(super) fn is_over(&self) -> bool {
        self.outcome.is_some()
    }

    /// When [`Self::handle_timeout`] is to be called.
    pub fn poll_timeout(&self) -> Instant {
        self.again.map_or(self.turn_ends, |again| again.min(self.turn_ends)).min(self.end)
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, servers: &mut Servers, now: Instant) {
        if now >= self.turn_ends || now >= self.end {
            self.again = None;
            if let Some(target) = self.targets.get(self.at).filter(|target| !target.done) {
                servers.silent(target.server, now);
            }
            if now >= self.end {
                return self.finish();
            }
            if let Some(target) = self.targets.get_mut(self.at).filter(|target| target.truncated.is_some()) {
                // TCP is silent. Another may have all of it.
                target.done = true;
            }
            self.at += 1;
            self.begin_turn(servers, now);
        } else if self.again.is_some_and(|again| now >= again) {
            self.send_again(servers, now);
        }
    }

    /// A response came to a try.
    pub fn handle_heard(&mut self, servers: &mut Servers, id: TryId, heard: Heard, now: Instant) {
        let Some(tried) = self.tries.get(id).copied() else { return };
        servers.answered(self.targets[tried.target].server, now);
        match heard {
            Heard::Answer { response, kept_case, .. } => {
                self.handle_answer(servers, tried, response, kept_case, now)
            }
            Heard::Code { .. } if tried.stream => self.handle_stream_failed(servers, tried.target, now),
            Heard::Code { code, edns } => self.handle_code(servers, tried, code, edns, now),
        }
    }

    /// A try has ended without a response.
    pub fn handle_fault(&mut self, servers: &mut Servers, id: TryId, fault: Fault, now: Instant) {
        let Some(tried) = self.tries.get(id).copied() else { return };
        let target = &mut self.targets[tried.target];
        if tried.stream {
            return self.handle_stream_failed(servers, tried.target, now);
        }
        if target.done || target.stream == Stream::Open {
            return;
        }
        target.done = true;
        if fault == Fault::Refused {
            servers.refused(target.server, now);
        }
        self.end_turn_of(servers, tried.target, now);
    }

    fn handle_answer(
        &mut self,
        servers: &mut Servers,
        tried: Try,
        response: Response,
        kept_case: bool,
        now: Instant,
    ) {
        let target = &mut self.targets[tried.target];
        if !tried.stream {
            let other_case = tried.manner.mixed_case && !kept_case;
            if !other_case && response.is_truncated() {
                target.truncated = Some(response.clone());
                learn(servers, target, tried, kept_case, now);
            }
            if other_case || response.is_truncated() {
                match target.stream {
                    Stream::Unused => {
                        target.stream = Stream::Open;
                        self.send(servers, tried.target, tried.manner, true);
                    }
                    Stream::Failed if !other_case => self.handle_stream_failed(servers, tried.target, now),
                    // A forger may have guessed everything but the case: not believed without TCP.
                    Stream::Open | Stream::Failed => {}
                }
                return;
            }
        }
        learn(servers, target, tried, kept_case, now);
        self.outcome = Some(Ok(response));
    }

    fn handle_code(&mut self, servers: &mut Servers, tried: Try, code: u16, edns: bool, now: Instant) {
        let target = &mut self.targets[tried.target];
        let about_manner = matches!(code, code::FORM_ERR | code::NOT_IMP | code::SERV_FAIL | code::REFUSED);
        let proven = servers.proven(target.server);
        // One that bears EDNS says so in its errors, too (RFC 6891 §7).
        let edns_in_doubt = tried.manner.edns && (!proven.edns || !edns || code == code::FORM_ERR);
        let case_in_doubt = tried.manner.mixed_case && !proven.mixed_case;
        if about_manner && (edns_in_doubt || case_in_doubt) && target.blamed.is_none() {
            target.blamed = Some(tried.manner);
            return self.send(servers, tried.target, PLAIN, false);
        }
        if target.blamed.is_some() && tried.manner != PLAIN {
            // The plain query is on its way; this is an earlier one.
            return;
        }
        target.done = true;
        self.said.get_or_insert(code);
        self.end_turn_of(servers, tried.target, now);
    }

    fn handle_stream_failed(&mut self, servers: &Servers, at: usize, now: Instant) {
        let target = &mut self.targets[at];
        target.stream = Stream::Failed;
        if target.truncated.is_some() {
            // What fitted is an answer where no other upstream has all of it.
            target.done = true;
            if self.at >= self.targets.len() {
                return self.finish();
            }
            self.end_turn_of(servers, at, now);
        } else if !target.in_doubt {
            target.in_doubt = true;
            self.send(servers, at, Manner { mixed_case: false, ..self.first_manner(at) }, false);
        }
    }

    /// How the first query to a target was put.
    fn first_manner(&self, at: usize) -> Manner {
        self.tries.iter().find(|tried| tried.target == at).map_or(PLAIN, |tried| tried.manner)
    }

    /// The next one's turn, if it was this one's.
    fn end_turn_of(&mut self, servers: &Servers, at: usize, now: Instant) {
        if at == self.at {
            self.at += 1;
            self.begin_turn(servers, now);
        }
    }

    fn begin_turn(&mut self, servers: &Servers, now: Instant) {
        self.again = None;
        loop {
            match self.targets.get(self.at) {
                Some(target) if target.done => self.at += 1,
                Some(_) => break,
                None => {
                    let all_done = self.targets.iter().all(|target| target.done);
                    let truncated = self.targets.iter().any(|target| target.truncated.is_some());
                    if all_done || truncated || self.said.is_some() {
                        return self.finish();
                    }
                    self.round += 1;
                    if self.round >= ROUNDS {
                        self.turn_ends = self.end;
                        return;
                    }
                    self.at = 0;
                }
            }
        }
        self.turn_ends = self.end.min(now + self.times.one_try);
        self.send_again(servers, now);
    }

    /// Sends to the one whose turn it is, if it has not got all its datagrams, and plans the next.
    fn send_again(&mut self, servers: &Servers, now: Instant) {
        self.again = None;
        let Some(target) = self.targets.get_mut(self.at) else { return };
        if target.sent >= SENT || target.stream == Stream::Open || target.blamed.is_some() {
            return;
        }
        let (fullest, proven) = (servers.manner(target.server, now), servers.proven(target.server));
        let manner = match target.sent {
            0 => fullest,
            2 => PLAIN,
            _ => Manner { edns: fullest.edns && proven.edns, ..fullest },
        };
        target.sent += 1;
        self.send(servers, self.at, manner, false);
        self.again = Some(now + self.times.one_try * 2 / 5);
    }

    fn send(&mut self, servers: &Servers, target: usize, manner: Manner, stream: bool) {
        let id = self.tries.len();
        self.tries.push(Try { target, manner, stream });
        let to = servers.addr(self.targets[target].server);
        self.sends.push_back(Send { id, to, manner, stream });
    }

    /// Ends with the best that came.
    fn finish(&mut self) {
        let truncated = self.targets.iter_mut().find_map(|target| target.truncated.take());
        self.outcome = Some(match (truncated, self.said) {
            (Some(response), _) => Ok(response),
            (None, Some(code)) => Err(Failure::Said(code)),
            (None, None) => Err(Failure::Unreachable),
        });
    }
}

/// Remembers what an answer shows of its upstream.
fn learn(servers: &mut Servers, target: &Target, tried: Try, kept_case: bool, now: Instant) {
    let (server, manner) = (target.server, tried.manner);
    if manner.edns {
        servers.bears_edns(server);
    }
    if manner.mixed_case && kept_case {
        servers.keeps_case(server);
    }
    if manner.mixed_case && !kept_case {
        // Over a stream, which nobody forges.
        servers.avoid_mixed_case(server, now);
    }
    match target.blamed {
        // One at a time; the next question finds the other.
        Some(blamed) if manner == PLAIN && blamed.edns => servers.avoid_edns(server, now),
        Some(blamed) if manner == PLAIN && blamed.mixed_case => servers.avoid_mixed_case(server, now),
        Some(_) => {}
        // Fuller ones were sent before it, without an answer; or with one in another case.
        None => {
            let fullest = servers.manner(server, now);
            if !manner.edns && fullest.edns && target.sent > 1 {
                servers.avoid_edns(server, now);
            }
            if !manner.mixed_case && fullest.mixed_case && (target.sent > 1 || target.in_doubt) {
                servers.avoid_mixed_case(server, now);
            }
        }
    }
}
