//! Answers of the zone as records.

use hickory_proto::op::{LowerQuery, ResponseCode};
use hickory_proto::rr::rdata::{A, PTR, SOA, SRV};
use hickory_proto::rr::{Name as RecordName, RData, Record as DnsRecord};
use servicekeel_core::dns::{Answer, Name, Record, TTL_SECONDS, Zone};

use super::metrics::Outcome;
use super::reply::Reply;

/// Fills `reply` with what the zone says of a name; `None` where the name is another server's.
pub(super) fn answer(zone: &Zone, name: &Name, query: &LowerQuery, reply: &mut Reply) -> Option<Outcome> {
    let asked = query.original().name();
    let outcome = match zone.answer(name, query.query_type().into()) {
        Answer::NotOurs => return None,
        Answer::Record(Record::A(address)) => {
            reply.answers.push(record(asked.clone(), RData::A(A(address))));
            Outcome::Own
        }
        Answer::Record(Record::Srv { port, target, address }) => {
            let target = record_name(target)?;
            // Priority and weight choose among targets; there is one (RFC 2782).
            let srv = SRV::new(0, 0, port.get(), target.clone());
            reply.answers.push(record(asked.clone(), RData::SRV(srv)));
            reply.additionals.push(record(target, RData::A(A(address))));
            Outcome::Own
        }
        Answer::Record(Record::Ptr(target)) => {
            reply.answers.push(record(asked.clone(), RData::PTR(PTR(record_name(target)?))));
            Outcome::Own
        }
        Answer::NoData { apex } => {
            reply.authorities.push(soa(asked, apex));
            Outcome::OwnNegative
        }
        Answer::NoName { apex } => {
            reply.metadata.response_code = ResponseCode::NXDomain;
            reply.authorities.push(soa(asked, apex));
            Outcome::OwnNegative
        }
    };
    reply.metadata.authoritative = true;
    Some(outcome)
}

fn record(owner: RecordName, data: RData) -> DnsRecord {
    DnsRecord::from_rdata(owner, TTL_SECONDS, data)
}

/// A name of the zone. They all are names of DNS.
fn record_name(text: &str) -> Option<RecordName> {
    RecordName::from_labels(text.split('.').map(str::as_bytes)).ok()
}

/// The SOA of a negative answer, which bounds how long it is kept (RFC 2308 §3). Nobody transfers the zone, so
/// what it says of that is what empty zones say (RFC 6303 §3).
fn soa(asked: &RecordName, apex: u8) -> DnsRecord {
    let apex = asked.trim_to(apex.into());
    let nobody = record_name("nobody.invalid").unwrap_or_default();
    let soa = SOA::new(apex.clone(), nobody, 1, 3600, 1200, 604_800, TTL_SECONDS);
    record(apex, RData::SOA(soa))
}
