//! What a client hears: of our zone, of what the upstreams said, or of neither.

use servicekeel_core::dns::upstream::Failure;
use servicekeel_core::dns::wire::{Age, Query, Reply, WireName, code, flag};
use servicekeel_core::dns::{Answer, Zone};

use super::foreign::{Found, Kept};
use super::metrics::Outcome;
use super::{MAX_UDP, explanation};

/// The types whose question an alias answers itself: CNAME and ANY.
const ALIAS_ITSELF: [u16; 2] = [5, 255];

/// A reply, and how its query ended.
pub(super) type Replied = (Vec<u8>, Outcome);

/// Not what we do.
pub(super) fn refusal(query: &Query<'_>, code: u16, limit: u16) -> Replied {
    let mut reply = Reply::new(query, MAX_UDP);
    reply.set_code(code);
    (reply.finish(limit.into()), Outcome::Refused)
}

/// There is no zone yet.
pub(super) fn starting(query: &Query<'_>, limit: u16) -> Replied {
    failed(Reply::new(query, MAX_UDP), explanation::NOT_READY, "the sidecar is starting", limit)
}

/// What the zone says; `None` where it says nothing.
pub(super) fn own(query: &Query<'_>, answer: Answer<'_>, limit: u16) -> Option<Replied> {
    if answer == Answer::NotOurs {
        return None;
    }
    let mut reply = Reply::new(query, MAX_UDP);
    reply.set_authoritative();
    let outcome = if matches!(answer, Answer::Record(_)) { Outcome::Own } else { Outcome::OwnNegative };
    reply.add_own(answer).then(|| (reply.finish(limit.into()), outcome))
}

/// What was found of another server's name.
///
/// - An alias to a name of ours is followed into our zone, whatever the upstream said of that name.
/// - Under a search domain that is not the cluster's, our name is what is found where the upstreams have none.
/// - A name above ours exists, whatever the upstream says (RFC 8020).
pub(super) fn found(query: &Query<'_>, found: &Found, zone: &Zone, limit: u16) -> Replied {
    let qtype = query.question().qtype;
    let fallback = |name: &WireName| zone.fallback(&name.to_name()?, qtype).found();
    let kept = match found {
        Found::Answer(kept) => kept,
        Found::Failed(failure) => {
            let own = fallback(query.name()).and_then(|answer| own(query, answer, limit));
            return own.unwrap_or_else(|| unanswered(query, *failure, limit));
        }
    };
    let response = &kept.response;
    if limit == u16::MAX && response.is_truncated() && !response.has_answers() {
        // Over TCP a client takes it for all there is (RFC 2181 §9): that there is nothing, which nobody said.
        return unanswered(query, Failure::Unreachable, limit);
    }
    let missing = response.code() == code::NX_DOMAIN;
    if missing
        && response.aliases().next().is_none()
        && let Some(own) = fallback(query.name()).and_then(|answer| own(query, answer, limit))
    {
        return own;
    }
    let mut reply = Reply::new(query, MAX_UDP);
    let ours = |name: &WireName| {
        let answer = zone.answer(&name.to_name()?, qtype).found();
        answer.or_else(|| if missing { fallback(name) } else { None })
    };
    let itself = ALIAS_ITSELF.contains(&qtype);
    if itself || !reply.add_aliases(response, kept.age, ours) {
        reply.add_response(response, kept.age, query.name());
        let wanted = query.has(flag::AD) || query.edns().is_some_and(|edns| edns.signatures);
        reply.set_validated(wanted && response.is_validated() && kept.age != Age::Stale);
        // An alias that answers is there itself, whatever it leads to (RFC 6604 §3).
        let alias = itself && response.aliases().next().is_some();
        if missing && (alias || query.name().to_name().is_some_and(|name| zone.is_above_ours(&name))) {
            reply.set_code(code::NO_ERROR);
            reply.set_validated(false);
        }
    }
    explain_stale(&mut reply, kept);
    (reply.finish(limit.into()), kept.outcome)
}

fn explain_stale(reply: &mut Reply, kept: &Kept) {
    if kept.age == Age::Stale {
        let missing = reply.code() == code::NX_DOMAIN;
        let explanation = if missing { explanation::STALE_NXDOMAIN } else { explanation::STALE_ANSWER };
        reply.explain(explanation, "no upstream responded");
    }
}

fn unanswered(query: &Query<'_>, failure: Failure, limit: u16) -> Replied {
    let mut reply = Reply::new(query, MAX_UDP);
    match failure {
        Failure::NoUpstream => failed(reply, explanation::OTHER, "no upstream is configured", limit),
        Failure::Busy => failed(reply, explanation::OTHER, "too many queries in progress", limit),
        Failure::Unreachable => {
            failed(reply, explanation::NO_REACHABLE_AUTHORITY, "no upstream responded", limit)
        }
        Failure::Said(code) => {
            reply.set_code(code);
            (reply.finish(limit.into()), Outcome::Failed)
        }
    }
}

/// SERVFAIL, with the reason where the client can read it.
fn failed(mut reply: Reply, explanation: u16, reason: &'static str, limit: u16) -> Replied {
    reply.set_code(code::SERV_FAIL);
    reply.explain(explanation, reason);
    (reply.finish(limit.into()), Outcome::Failed)
}
