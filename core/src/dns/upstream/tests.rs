use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::dns::wire::{Heard, Manner, Outgoing, Query, code};

const TIMES: Times = Times { one_try: Duration::from_secs(2), all_tries: Duration::from_secs(5) };
const FULL: Manner = Manner { edns: true, mixed_case: true };
const NO_EDNS: Manner = Manner { edns: false, mixed_case: true };
const PLAIN: Manner = Manner { edns: false, mixed_case: false };

fn start() -> Instant {
    // The one clock reading: an Instant has no other origin.
    #[allow(clippy::disallowed_methods)]
    Instant::now()
}

fn addr(last: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, last], 53))
}

fn servers(count: u8) -> Servers {
    Servers::new((1..=count).map(addr))
}

/// An answer without records.
fn answer(truncated: bool, kept_case: bool) -> Heard {
    let packet = b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x03www\x07example\0\0\x01\0\x01";
    let sent = Outgoing::new(&Query::read(packet).unwrap()).packet(PLAIN, 7, &[0; 32]);
    let mut said = sent.clone();
    said[2] |= 0x80 | if truncated { 2 } else { 0 };
    match Heard::read(&said, &sent) {
        Some(Heard::Answer { response, edns, .. }) => Heard::Answer { response, kept_case, edns },
        other => panic!("{other:?}"),
    }
}

fn error(code: u16) -> Heard {
    Heard::Code { code, edns: false }
}

/// A question, and the time.
struct Stage {
    servers: Servers,
    asking: Asking,
    now: Instant,
    started: Instant,
}

impl Stage {
    fn new(servers: Servers, now: Instant) -> Self {
        let asking = Asking::new(&servers, TIMES, now);
        Self { servers, asking, now, started: now }
    }

    /// Lets time pass until there is something to send, or the end: what is sent, and when, in milliseconds.
    fn sent(&mut self) -> Option<(u128, Send)> {
        loop {
            if let Some(send) = self.asking.poll_send() {
                return Some(((self.now - self.started).as_millis(), send));
            }
            if self.asking.is_over() {
                return None;
            }
            self.now = self.now.max(self.asking.poll_timeout());
            self.asking.handle_timeout(&mut self.servers, self.now);
        }
    }

    fn heard(&mut self, id: TryId, heard: Heard) {
        self.asking.handle_heard(&mut self.servers, id, heard, self.now);
    }

    fn fault(&mut self, id: TryId, fault: Fault) {
        self.asking.handle_fault(&mut self.servers, id, fault, self.now);
    }

    fn outcome(&mut self) -> Option<Result<bool, Failure>> {
        self.asking.poll_outcome().map(|outcome| outcome.map(|response| response.is_truncated()))
    }
}

#[test]
fn a_silent_one_is_asked_ever_plainer() {
    let mut stage = Stage::new(servers(1), start());
    let mut sent = Vec::new();
    while let Some((at, send)) = stage.sent() {
        assert!(!send.stream);
        sent.push((at, send.manner));
    }
    assert_eq!(sent, [(0, FULL), (800, NO_EDNS), (1600, PLAIN), (2000, NO_EDNS)]);
    assert_eq!((stage.now - stage.started), TIMES.all_tries);
    assert_eq!(stage.outcome(), Some(Err(Failure::Unreachable)));
    assert_eq!(stage.servers.take_failures(), 3);
}

#[test]
fn each_has_its_turn_and_the_first_answer_counts() {
    let mut stage = Stage::new(servers(2), start());
    let mut first = None;
    while let Some((at, send)) = stage.sent() {
        first.get_or_insert(send);
        if send.to == addr(2) {
            assert_eq!(at, 2000);
            break;
        }
    }
    // The first one's first datagram is answered in the second one's turn.
    stage.heard(first.unwrap().id, answer(false, true));
    assert_eq!(stage.outcome(), Some(Ok(false)));
    assert_eq!(stage.servers.status(stage.now).map(|status| status.1).collect::<Vec<_>>(), [Health::Good; 2]);
}

#[test]
fn a_refusal_ends_a_turn_at_once() {
    let now = start();
    let mut stage = Stage::new(servers(3), now);
    let (_, first) = stage.sent().unwrap();
    stage.fault(first.id, Fault::Refused);
    let (at, second) = stage.sent().unwrap();
    assert_eq!((at, second.to), (0, addr(2)));
    // By code: once more without EDNS, then the next.
    stage.heard(second.id, error(code::REFUSED));
    let (at, again) = stage.sent().unwrap();
    assert_eq!((at, again.to, again.manner), (0, addr(2), PLAIN));
    stage.heard(again.id, error(code::REFUSED));
    let (at, third) = stage.sent().unwrap();
    assert_eq!((at, third.to), (0, addr(3)));
    stage.fault(third.id, Fault::Refused);
    assert_eq!(stage.outcome(), Some(Err(Failure::Said(code::REFUSED))));
    // Those that nobody listens at are not asked for a moment; where that is all, nobody is.
    let mut next = Stage::new(stage.servers, now);
    let (_, only) = next.sent().unwrap();
    assert_eq!(only.to, addr(2));
    next.fault(only.id, Fault::Refused);
    assert_eq!(next.outcome(), Some(Err(Failure::Unreachable)));
    let mut none = Stage::new(next.servers, now);
    assert!(none.asking.poll_send().is_none());
    assert_eq!(none.outcome(), Some(Err(Failure::Unreachable)));
}

#[test]
fn what_is_learnt_is_used() {
    let now = start();
    let first_manner = |servers| {
        let mut stage = Stage::new(servers, now);
        (stage.sent().unwrap().1.manner, stage.servers)
    };
    for blame in [code::FORM_ERR, code::NOT_IMP, code::SERV_FAIL, code::REFUSED] {
        let mut stage = Stage::new(servers(1), now);
        let (_, full) = stage.sent().unwrap();
        stage.heard(full.id, error(blame));
        let (_, plain) = stage.sent().unwrap();
        stage.heard(plain.id, answer(false, true));
        assert_eq!(stage.outcome(), Some(Ok(false)));
        assert_eq!(stage.servers.poll_news(), Some(News::NoEdns(addr(1))));
        let (manner, servers) = first_manner(stage.servers);
        assert_eq!(manner, NO_EDNS);
        // It dislikes the case, too.
        let mut stage = Stage::new(servers, now);
        let (_, mixed) = stage.sent().unwrap();
        stage.heard(mixed.id, error(blame));
        let (_, plain) = stage.sent().unwrap();
        stage.heard(plain.id, answer(false, true));
        assert_eq!(stage.servers.poll_news(), Some(News::NoCase(addr(1))));
        assert_eq!(first_manner(stage.servers).0, PLAIN);
    }
    // One that bears both, and has an error of its own: it is asked once.
    let mut stage = Stage::new(servers(1), now);
    let (_, full) = stage.sent().unwrap();
    stage.heard(full.id, answer(false, true));
    let mut stage = Stage::new(stage.servers, now);
    let (_, full) = stage.sent().unwrap();
    stage.heard(full.id, Heard::Code { code: code::SERV_FAIL, edns: true });
    assert!(stage.sent().is_none());
    assert_eq!(stage.outcome(), Some(Err(Failure::Said(code::SERV_FAIL))));
    assert_eq!(first_manner(stage.servers).0, FULL);
}

#[test]
fn in_doubt_tcp_decides() {
    let now = start();
    // Truncated; TCP has it all.
    let mut stage = Stage::new(servers(1), now);
    let (_, datagram) = stage.sent().unwrap();
    stage.heard(datagram.id, answer(true, true));
    let (_, stream) = stage.sent().unwrap();
    assert!(stream.stream);
    stage.heard(stream.id, answer(false, true));
    assert_eq!(stage.outcome(), Some(Ok(false)));
    // TCP breaks: another has it all, or what fitted is an answer.
    for whole in [true, false] {
        let mut stage = Stage::new(servers(2), now);
        let (_, datagram) = stage.sent().unwrap();
        stage.heard(datagram.id, answer(true, true));
        let (_, stream) = stage.sent().unwrap();
        stage.fault(stream.id, Fault::Refused);
        assert_eq!(stage.outcome(), None, "the other was not asked");
        let (_, second) = stage.sent().unwrap();
        assert_eq!((second.to, second.stream), (addr(2), false));
        if whole {
            stage.heard(second.id, answer(false, true));
        } else {
            stage.fault(second.id, Fault::Refused);
        }
        assert_eq!(stage.outcome(), Some(Ok(!whole)));
    }
    // TCP hangs at one, and at the other all is well.
    let mut stage = Stage::new(servers(2), now);
    let (_, datagram) = stage.sent().unwrap();
    stage.heard(datagram.id, answer(true, true));
    assert!(stage.sent().unwrap().1.stream);
    let (at, second) = stage.sent().unwrap();
    assert_eq!((second.to, at), (addr(2), TIMES.one_try.as_millis()));
    stage.heard(second.id, answer(false, true));
    assert_eq!(stage.outcome(), Some(Ok(false)));
    // TCP is silent.
    let mut stage = Stage::new(servers(1), now);
    let (_, datagram) = stage.sent().unwrap();
    stage.heard(datagram.id, answer(true, true));
    assert!(stage.sent().unwrap().1.stream);
    assert!(stage.sent().is_none());
    assert_eq!((stage.outcome(), stage.now - now), (Some(Ok(true)), TIMES.one_try));
    // In another case, which TCP shows to be its way.
    let mut stage = Stage::new(servers(1), now);
    let (_, datagram) = stage.sent().unwrap();
    stage.heard(datagram.id, answer(false, false));
    assert_eq!(stage.outcome(), None, "a forger's?");
    let (_, stream) = stage.sent().unwrap();
    assert!(stream.stream);
    stage.heard(stream.id, answer(false, false));
    assert_eq!(stage.outcome(), Some(Ok(false)));
    assert_eq!(stage.servers.poll_news(), Some(News::NoCase(addr(1))));
    // Where TCP is refused, it is asked in lower case; nothing forged in another case is believed meanwhile.
    let mut stage = Stage::new(servers(1), now);
    let (_, datagram) = stage.sent().unwrap();
    stage.heard(datagram.id, answer(false, false));
    let (_, stream) = stage.sent().unwrap();
    stage.fault(stream.id, Fault::Refused);
    stage.heard(datagram.id, answer(false, false));
    assert_eq!(stage.outcome(), None);
    let (at, lower) = stage.sent().unwrap();
    assert_eq!((at, lower.manner, lower.stream), (0, Manner { edns: true, mixed_case: false }, false));
    stage.heard(lower.id, answer(false, true));
    assert_eq!(stage.outcome(), Some(Ok(false)));
    assert_eq!(stage.servers.poll_news(), Some(News::NoCase(addr(1))));
}

#[derive(Debug, Clone)]
enum Event {
    Wait(u64),
    Answer { truncated: bool, kept_case: bool },
    Error(u16),
    Fault(Fault),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (0..3000u64).prop_map(Event::Wait),
        1 => any::<(bool, bool)>().prop_map(|(truncated, kept_case)| Event::Answer { truncated, kept_case }),
        2 => (1..17u16).prop_map(Event::Error),
        2 => prop_oneof![Just(Fault::Refused), Just(Fault::Broken)].prop_map(Event::Fault),
    ]
}

proptest! {
    /// Whatever the upstreams do: a question ends in time, with few queries, and its table stays usable.
    #[test]
    fn every_question_ends(
        count in 0..4u8,
        questions in prop::collection::vec(prop::collection::vec((event(), any::<prop::sample::Index>()), 0..20), 1..6),
    ) {
        let mut now = start();
        let mut table = servers(count);
        for events in questions {
            let mut stage = Stage::new(table, now);
            let mut sends = Vec::new();
            let mut outcomes = 0;
            let mut events = events.into_iter();
            while outcomes == 0 {
                while let Some(send) = stage.asking.poll_send() {
                    prop_assert_eq!(send.id, sends.len());
                    sends.push(send);
                }
                if stage.outcome().is_some() {
                    outcomes += 1;
                    continue;
                }
                prop_assert!(stage.asking.poll_timeout() <= stage.started + TIMES.all_tries);
                match events.next() {
                    Some((Event::Answer { truncated, kept_case }, at)) if !sends.is_empty() => {
                        stage.heard(sends[at.index(sends.len())].id, answer(truncated, kept_case));
                    }
                    Some((Event::Error(code), at)) if !sends.is_empty() => {
                        stage.heard(sends[at.index(sends.len())].id, error(code));
                    }
                    Some((Event::Fault(fault), at)) if !sends.is_empty() => {
                        stage.fault(sends[at.index(sends.len())].id, fault);
                    }
                    Some((Event::Wait(ms), _)) => {
                        stage.now = (stage.now + Duration::from_millis(ms)).min(stage.asking.poll_timeout());
                        stage.asking.handle_timeout(&mut stage.servers, stage.now);
                    }
                    _ => {
                        stage.now = stage.now.max(stage.asking.poll_timeout());
                        stage.asking.handle_timeout(&mut stage.servers, stage.now);
                    }
                }
            }
            prop_assert!(stage.now <= stage.started + TIMES.all_tries);
            // Four datagrams, one for an error, one for a doubt, and TCP.
            prop_assert!(sends.len() <= 7 * usize::from(count), "{} sends", sends.len());
            while stage.servers.poll_news().is_some() {}
            (now, table) = (stage.now, stage.servers);
        }
    }
}
