use std::net::IpAddr;
use std::time::Duration;

use super::*;
use crate::content::Content;

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
    let number = oracle.begin_flow(one);
    let incoming = Incoming::new(&oracle, number, 0, 100);
    oracle.kill_application(one);
    incoming.end();
    assert_eq!(seen.more(), 0, "it was killed");
    let number = oracle.begin_flow(one);
    Incoming::new(&oracle, number, 0, 100).end();
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
