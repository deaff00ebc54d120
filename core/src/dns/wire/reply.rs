//! The reply to a client's query, as bytes.

use super::query::reply_flags;
use super::{CLASS_IN, HEADER, Header, Query, Records, Response, Section, WireName, case, code, flag, rtype};
use crate::dns::cache::{MAX_TTL, STALE_TTL_SECONDS};
use crate::dns::{Answer, Record, TTL_SECONDS, record_type};

/// The code of an extended DNS error among EDNS options (RFC 8914 §2).
const EXTENDED_ERROR: u16 = 15;
/// A pointer reaches this far (RFC 1035 §4.1.4).
const MAX_POINTER: usize = 0x3fff;
/// Transaction signatures (RFC 8945): their TTL is 0 by law.
const TSIG: u16 = 250;

/// How old an upstream's answer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Age {
    /// So many seconds, which its TTLs have lost.
    Seconds(u32),
    /// Its TTL is over and no upstream answers (RFC 8767).
    Stale,
}

impl Age {
    /// What is left of a TTL, in seconds. One with the highest bit set is zero (RFC 2181 §8).
    pub fn left(self, ttl: u32) -> u32 {
        match self {
            Self::Stale => STALE_TTL_SECONDS,
            Self::Seconds(_) if ttl > i32::MAX as u32 => 0,
            Self::Seconds(age) => ttl.min(MAX_TTL.as_secs() as u32).saturating_sub(age),
        }
    }
}

/// A reply while it is made: NOERROR without records at first.
#[derive(Debug)]
pub struct Reply {
    packet: Vec<u8>,
    header: Header,
    /// The most bytes over UDP and DO, as the client's OPT record has them (RFC 6891 §7: no OPT without one).
    edns: Option<(u16, bool)>,
    code: u16,
    explanation: Option<(u16, &'static str)>,
}

impl Reply {
    /// With the query's id and question, in the client's case. `payload` is the most that this server offers.
    pub fn new(query: &Query<'_>, payload: u16) -> Self {
        let asked = query.header();
        let header = Header { id: asked.id, flags: reply_flags(asked.flags), counts: [1, 0, 0, 0] };
        let mut packet = Vec::with_capacity(query.head().len() + 64);
        packet.extend_from_slice(query.head());
        let edns = query.edns().map(|edns| (edns.payload.min(payload), edns.signatures));
        Self { packet, header, edns, code: code::NO_ERROR, explanation: None }
    }

    /// Says this code.
    pub fn set_code(&mut self, code: u16) {
        self.code = code;
    }

    /// The code so far.
    pub fn code(&self) -> u16 {
        self.code
    }

    /// Says that nobody vouches for it, or that somebody does (AD).
    pub fn set_validated(&mut self, validated: bool) {
        self.header.flags = self.header.flags & !flag::AD | if validated { flag::AD } else { 0 };
    }

    /// Adds an extended error (RFC 8914), where the query had EDNS.
    pub fn explain(&mut self, code: u16, reason: &'static str) {
        self.explanation = Some((code, reason));
    }

    /// Answers as the authority.
    pub fn set_authoritative(&mut self) {
        self.header.flags |= flag::AA;
    }

    /// Adds what the zone says of the name that was asked for. False where the zone says nothing.
    pub fn add_own(&mut self, answer: Answer<'_>) -> bool {
        self.add_own_at(HEADER, answer)
    }

    /// Adds what the zone says of the name that is spelled out at `name` of this message.
    fn add_own_at(&mut self, name: usize, answer: Answer<'_>) -> bool {
        match answer {
            Answer::NotOurs => return false,
            Answer::Record(Record::A(address)) => {
                self.add(Section::Answer, name, record_type::A, TTL_SECONDS, |packet| {
                    packet.extend(address.octets())
                });
            }
            Answer::Record(Record::Srv { port, target, address }) => {
                let Some(target) = WireName::of_text(target) else { return false };
                let mut target_at = 0;
                self.add(Section::Answer, name, record_type::SRV, TTL_SECONDS, |packet| {
                    // Priority and weight choose among targets; there is one. Its name is not compressed (RFC 2782).
                    packet.extend([0; 4]);
                    packet.extend(port.get().to_be_bytes());
                    target_at = packet.len();
                    packet.extend(target.as_bytes());
                });
                self.add(Section::Additional, target_at, record_type::A, TTL_SECONDS, |packet| {
                    packet.extend(address.octets());
                });
            }
            Answer::Record(Record::Ptr(target)) => {
                let Some(target) = WireName::of_text(target) else { return false };
                self.add(Section::Answer, name, record_type::PTR, TTL_SECONDS, |packet| {
                    packet.extend(target.as_bytes());
                });
            }
            Answer::NoData { apex } => {
                self.code = code::NO_ERROR;
                self.add_soa(name, apex);
            }
            Answer::NoName { apex } => {
                self.code = code::NX_DOMAIN;
                self.add_soa(name, apex);
            }
        }
        true
    }

    /// The SOA of a negative answer, which bounds how long it is kept (RFC 2308 §3); its owner is so many last labels
    /// of the name at `name`. Nobody transfers the zone, so what it says of that is what empty zones say
    /// (RFC 6303 §3).
    fn add_soa(&mut self, name: usize, apex: u8) {
        let Some((spelled, _)) = WireName::read(&self.packet, name) else { return };
        let before = spelled.labels().count().saturating_sub(apex.into());
        let owner = name + spelled.labels().take(before).map(|label| label.len() + 1).sum::<usize>();
        let Some(nobody) = WireName::of_text("nobody.invalid") else { return };
        self.add(Section::Authority, owner, rtype::SOA, TTL_SECONDS, |packet| {
            packet.extend((0xc000 | owner as u16).to_be_bytes());
            packet.extend(nobody.as_bytes());
            for number in [1, 3600, 1200, 604_800, TTL_SECONDS] {
                packet.extend(number.to_be_bytes());
            }
        });
    }

    /// Adds a record whose owner is the name that is spelled out at `owner`. Sections come in their order.
    fn add(&mut self, section: Section, owner: usize, rtype: u16, ttl: u32, data: impl FnOnce(&mut Vec<u8>)) {
        debug_assert!(owner <= MAX_POINTER, "names are spelled out at the beginning");
        self.packet.extend((0xc000 | owner as u16).to_be_bytes());
        self.packet.extend(rtype.to_be_bytes());
        self.packet.extend(CLASS_IN.to_be_bytes());
        self.packet.extend(ttl.to_be_bytes());
        let length = self.packet.len();
        self.packet.extend([0; 2]);
        data(&mut self.packet);
        let len = (self.packet.len() - length - 2) as u16;
        self.packet[length..length + 2].copy_from_slice(&len.to_be_bytes());
        self.header.counts[section.count()] += 1;
    }

    /// Adds all that an upstream said, unchanged but for the TTLs and the case of the name that was asked for.
    pub fn add_response(&mut self, response: &Response, age: Age, asked: &WireName) {
        let from = self.packet.len();
        self.packet.extend_from_slice(response.body());
        let counts = response.counts();
        self.header.counts[1..].copy_from_slice(&counts);
        if response.is_truncated() {
            self.header.flags |= flag::TC;
        }
        self.code = response.code();
        // The walk reads the counts.
        self.header.write(&mut self.packet);
        let mut at = from;
        loop {
            let mut records = Records::new(&self.packet, at);
            let Some(record) = records.next() else { break };
            let next = records.position();
            if record.rtype != TSIG {
                let left = age.left(record.ttl).to_be_bytes();
                self.packet[record.ttl_at..record.ttl_at + 4].copy_from_slice(&left);
            }
            case::restore(&mut self.packet, record.at, asked);
            at = next;
            if at >= self.packet.len() {
                break;
            }
        }
    }

    /// Adds an upstream's aliases up to the first whose target `ours` answers, and that answer. False, and nothing is
    /// added, where no target is ours.
    pub fn add_aliases<'z>(
        &mut self,
        response: &Response,
        age: Age,
        ours: impl Fn(&WireName) -> Option<Answer<'z>>,
    ) -> bool {
        let found = response.aliases().enumerate().find_map(|(at, alias)| Some((at, ours(&alias.target)?)));
        let Some((last, answer)) = found else { return false };
        let mut owner = HEADER;
        for alias in response.aliases().take(last + 1) {
            let mut target = 0;
            self.add(Section::Answer, owner, rtype::CNAME, age.left(alias.ttl), |packet| {
                target = packet.len();
                packet.extend(alias.target.as_bytes());
            });
            owner = target;
        }
        self.code = code::NO_ERROR;
        self.add_own_at(owner, answer)
    }

    /// The packet, of so many bytes at the most. What does not fit is cut at a record, from the end, and the answer is
    /// marked as truncated unless what it lacks is only what might have helped (RFC 2181 §9).
    pub fn finish(mut self, limit: usize) -> Vec<u8> {
        self.header.flags = self.header.flags & !flag::RCODE | self.code & flag::RCODE;
        let mut opt = self.opt();
        self.header.write(&mut self.packet);
        if self.packet.len() + opt.len() > limit {
            // The reason goes before any record does.
            self.explanation = None;
            opt = self.opt();
        }
        if self.packet.len() + opt.len() > limit {
            self.cut(limit.saturating_sub(opt.len()));
        }
        if !opt.is_empty() {
            self.packet.extend(opt);
            self.header.counts[3] = self.header.counts[3].saturating_add(1);
        }
        self.header.write(&mut self.packet);
        self.packet
    }

    fn cut(&mut self, limit: usize) {
        let Some((_, questions_end)) = super::Question::read(&self.packet) else { return };
        let asked = self.header.counts;
        let mut counts = [asked[0], 0, 0, 0];
        let mut end = questions_end;
        for record in Records::new(&self.packet, questions_end) {
            if record.data.end > limit {
                break;
            }
            counts[record.section.count()] += 1;
            end = record.data.end;
        }
        self.packet.truncate(end);
        self.header.counts = counts;
        if counts[..3] != asked[..3] || asked[1] == 0 {
            self.header.flags |= flag::TC;
        }
    }

    /// The OPT record (RFC 6891 §6.1.2).
    fn opt(&self) -> Vec<u8> {
        let Some((payload, signatures)) = self.edns else { return Vec::new() };
        let mut opt = Vec::with_capacity(64);
        opt.push(0);
        opt.extend(rtype::OPT.to_be_bytes());
        opt.extend(payload.to_be_bytes());
        opt.extend([(self.code >> 4) as u8, 0, if signatures { 0x80 } else { 0 }, 0]);
        let reason = self.explanation.map_or("", |(_, reason)| reason).as_bytes();
        let option = if self.explanation.is_some() { 6 + reason.len() } else { 0 };
        opt.extend((option as u16).to_be_bytes());
        if let Some((code, _)) = self.explanation {
            opt.extend(EXTENDED_ERROR.to_be_bytes());
            opt.extend((option as u16 - 4).to_be_bytes());
            opt.extend(code.to_be_bytes());
            opt.extend(reason);
        }
        opt
    }
}
