//! An upstream's response.

use std::sync::Arc;
use std::time::Duration;

use super::strip::{extended, strip};
use super::{HEADER, Header, Question, Record, Records, Section, WireName, code, flag, rtype, u32_at};
use crate::dns::cache::{negative_ttl, positive_ttl};

/// How many CNAME records are followed from the name that was asked for. A chain that goes round ends here.
const MAX_ALIASES: usize = 16;
/// Among how many of an answer's first records they are looked for.
const MAX_LOOKED_AT: usize = 128;

/// What an upstream said to a query of ours.
#[derive(Debug, Clone)]
pub enum Heard {
    /// NOERROR or NXDOMAIN.
    Answer {
        /// It.
        response: Response,
        /// Whether it has the name in the case in which it was asked for.
        kept_case: bool,
        /// Whether it came with an OPT record.
        edns: bool,
    },
    /// Another code.
    Code {
        /// The code; those beyond four bits, which are about EDNS between us and it, are SERVFAIL.
        code: u16,
        /// Whether it came with an OPT record.
        edns: bool,
    },
}

impl Heard {
    /// Reads a packet as the response to the query `sent`; `None` where it is none: another id, another question.
    /// A server that cannot read a query may leave the question out, so an error needs none.
    pub fn read(packet: &[u8], sent: &[u8]) -> Option<Self> {
        let (header, asked) = (Header::read(packet)?, Header::read(sent)?);
        if header.id != asked.id || header.flags & flag::QR == 0 || header.flags & flag::OPCODE != 0 {
            return None;
        }
        let low = header.flags & flag::RCODE;
        if header.counts[0] == 0 {
            return (low != code::NO_ERROR && low != code::NX_DOMAIN)
                .then_some(Self::Code { code: low, edns: false });
        }
        let ((said, end), (question, _)) = (Question::read(packet)?, Question::read(sent)?);
        if header.counts[0] != 1
            || (said.qtype, said.qclass) != (question.qtype, question.qclass)
            || !said.name.is(&question.name)
        {
            return None;
        }
        let extended = extended(packet, end);
        let edns = extended.is_some();
        match low | extended.unwrap_or_default() {
            code::NO_ERROR | code::NX_DOMAIN => {
                let kept_case = said.name.as_bytes() == question.name.as_bytes();
                Some(Self::Answer { response: Response::new(packet, end), kept_case, edns })
            }
            code if code > flag::RCODE => Some(Self::Code { code: code::SERV_FAIL, edns }),
            code => Some(Self::Code { code, edns }),
        }
    }
}

/// An upstream's answer as it is kept: its bytes, but for its OPT records. It has one question, and all records that
/// it counts; where some were missing, it is truncated.
#[derive(Debug, Clone)]
pub struct Response {
    packet: Arc<[u8]>,
    questions_end: usize,
}

/// A CNAME record that leads on from the name that was asked for.
#[derive(Debug, Clone, Copy)]
pub struct Alias {
    /// Where it leads.
    pub target: WireName,
    /// Its TTL, in seconds.
    pub ttl: u32,
}

impl Response {
    fn new(packet: &[u8], questions_end: usize) -> Self {
        let mut kept = strip(packet, questions_end);
        let mut records = Records::new(packet, questions_end);
        records.by_ref().for_each(drop);
        if !records.is_whole()
            && let Some(mut header) = Header::read(&kept)
        {
            header.flags |= flag::TC;
            header.write(&mut kept);
        }
        Self { packet: kept.into(), questions_end }
    }

    fn flags(&self) -> u16 {
        Header::read(&self.packet).map_or(0, |header| header.flags)
    }

    /// The response code, [`code::NO_ERROR`] or [`code::NX_DOMAIN`].
    pub fn code(&self) -> u16 {
        self.flags() & flag::RCODE
    }

    /// Whether it lacks something.
    pub fn is_truncated(&self) -> bool {
        self.flags() & flag::TC != 0
    }

    /// Whether it has records that answer the question.
    pub fn has_answers(&self) -> bool {
        self.counts()[0] > 0
    }

    /// Whether the upstream vouches for it (AD).
    pub fn is_validated(&self) -> bool {
        self.flags() & flag::AD != 0
    }

    /// Its bytes.
    pub fn len(&self) -> usize {
        self.packet.len()
    }

    /// Whether it has no bytes; it always has.
    pub fn is_empty(&self) -> bool {
        self.packet.is_empty()
    }

    /// What stands behind the header and the question.
    pub(super) fn body(&self) -> &[u8] {
        self.packet.get(self.questions_end..).unwrap_or_default()
    }

    /// How many records each section has.
    pub(super) fn counts(&self) -> [u16; 3] {
        Header::read(&self.packet)
            .map_or([0; 3], |header| [header.counts[1], header.counts[2], header.counts[3]])
    }

    fn records(&self) -> Records<'_> {
        Records::new(&self.packet, self.questions_end)
    }

    /// How long it counts as fresh. What lacks something is not kept (RFC 2181 §9).
    pub fn lifetime(&self, qtype: u16) -> Duration {
        if self.is_truncated() {
            return Duration::ZERO;
        }
        let answers = || self.records().filter(|record| record.section == Section::Answer);
        let ttls = || answers().map(|record| record.ttl);
        let asked = |record: Record| qtype == rtype::ANY || record.rtype == qtype;
        if self.code() == code::NO_ERROR && answers().any(asked) {
            return positive_ttl(ttls());
        }
        // A negative answer without a SOA is not kept (RFC 2308 §5). CNAMEs may lead to one that has one.
        let negative = self.records().find_map(|record| self.minimum(&record)).unwrap_or_default();
        if answers().next().is_none() { negative } else { negative.min(positive_ttl(ttls())) }
    }

    /// For how long a SOA record among the authorities says that a negative answer holds.
    fn minimum(&self, record: &Record) -> Option<Duration> {
        // Two names, of a byte at the least, and five numbers.
        let is_soa =
            record.section == Section::Authority && record.rtype == rtype::SOA && record.data.len() >= 22;
        let minimum = is_soa.then(|| u32_at(&self.packet, record.data.end - 4))??;
        Some(negative_ttl(record.ttl, minimum))
    }

    /// The CNAME records that lead on from the name that was asked for, in the order in which they lead.
    pub fn aliases(&self) -> impl Iterator<Item = Alias> {
        let mut from = WireName::read(&self.packet, HEADER).map(|(name, _)| name);
        std::iter::from_fn(move || {
            let owner = from?;
            let alias = self.records().take(MAX_LOOKED_AT).find_map(|record| {
                let leads = record.section == Section::Answer
                    && record.rtype == rtype::CNAME
                    && WireName::read(&self.packet, record.at).is_some_and(|(name, _)| name.is(&owner));
                let (target, end) = leads.then(|| WireName::read(&self.packet, record.data.start))??;
                (end == record.data.end).then_some(Alias { target, ttl: record.ttl })
            });
            from = alias.map(|alias| alias.target);
            alias
        })
        .take(MAX_ALIASES)
    }
}
