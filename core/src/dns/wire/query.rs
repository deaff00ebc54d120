//! A client's query.

use std::borrow::Cow;

use super::{HEADER, Header, Question, Records, WireName, code, flag, rtype, u16_at};

/// The least that every client takes over UDP, in bytes (RFC 1035 §4.2.1).
const LEAST_PAYLOAD: u16 = 512;

/// What the OPT record of a query says (RFC 6891 §6.1). Its options are not ours to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edns {
    /// The most bytes that the client takes over UDP; 512 at the least.
    pub payload: u16,
    /// The version.
    pub version: u8,
    /// The client wants signatures (DO, RFC 3225).
    pub signatures: bool,
}

/// Why a packet is no query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueryError {
    /// Shorter than a header, or a response: nobody is answered.
    Noise,
    /// Only its header can be read; [`QueryError::reply`] answers it.
    Malformed(Header),
}

impl QueryError {
    /// FORMERR without a question, where there is anybody to answer.
    pub fn reply(self) -> Option<Vec<u8>> {
        match self {
            Self::Noise => None,
            Self::Malformed(header) => Some(error(header, code::FORM_ERR).to_vec()),
        }
    }
}

/// A query with one question.
#[derive(Debug, Clone)]
pub struct Query<'p> {
    /// The header and the question.
    head: Cow<'p, [u8]>,
    header: Header,
    question: Question,
    edns: Option<Edns>,
}

impl<'p> Query<'p> {
    /// Reads a packet.
    ///
    /// # Errors
    /// [`QueryError`] for noise, for a torn packet, for no question or several, and for two OPT records
    /// (RFC 6891 §6.1.1).
    pub fn read(packet: &'p [u8]) -> Result<Self, QueryError> {
        let header =
            Header::read(packet).filter(|header| header.flags & flag::QR == 0).ok_or(QueryError::Noise)?;
        let malformed = QueryError::Malformed(header);
        if header.counts[0] != 1 {
            return Err(malformed);
        }
        let (question, end) = Question::read(packet).ok_or(malformed)?;
        let mut records = Records::new(packet, end);
        let mut edns = None;
        for record in records.by_ref() {
            if record.rtype != rtype::OPT {
                continue;
            }
            let Some(class) = u16_at(packet, record.ttl_at - 2).filter(|_| edns.is_none()) else {
                return Err(malformed);
            };
            edns = Some(Edns {
                payload: class.max(LEAST_PAYLOAD),
                version: (record.ttl >> 16) as u8,
                signatures: record.ttl & 0x8000 != 0,
            });
        }
        if !records.is_whole() {
            return Err(malformed);
        }
        Ok(Self { head: Cow::Borrowed(&packet[..end]), header, question, edns })
    }

    /// The same, on its own.
    pub fn into_owned(self) -> Query<'static> {
        Query { head: Cow::Owned(self.head.into_owned()), ..self }
    }

    /// The header.
    pub fn header(&self) -> Header {
        self.header
    }

    /// Whether it asks a question (opcode QUERY), and no other service of a server.
    pub fn is_question(&self) -> bool {
        self.header.flags & flag::OPCODE == 0
    }

    /// Whether a flag of [`flag`] is set.
    pub fn has(&self, flag: u16) -> bool {
        self.header.flags & flag != 0
    }

    /// The question.
    pub fn question(&self) -> &Question {
        &self.question
    }

    /// The name in the client's case.
    pub fn name(&self) -> &WireName {
        &self.question.name
    }

    /// The OPT record, where there is one.
    pub fn edns(&self) -> Option<Edns> {
        self.edns
    }

    /// The most bytes that the client takes over UDP.
    pub fn payload(&self) -> u16 {
        self.edns.map_or(LEAST_PAYLOAD, |edns| edns.payload)
    }

    /// The header and the question, as they came.
    pub(super) fn head(&self) -> &[u8] {
        &self.head
    }
}

/// The flags of a reply to a query with these: its opcode, RD and CD stay (RFC 1035 §4.1.1, RFC 4035 §3.1.6).
pub(super) fn reply_flags(asked: u16) -> u16 {
    asked & (flag::OPCODE | flag::RD | flag::CD) | flag::QR | flag::RA
}

fn error(header: Header, code: u16) -> [u8; HEADER] {
    Header { id: header.id, flags: reply_flags(header.flags) | code, counts: [0; 4] }.to_bytes()
}
