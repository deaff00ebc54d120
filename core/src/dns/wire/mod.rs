//! DNS messages as bytes (RFC 1035 §4).
//!
//! Only what must be understood is read: the header, the one question, where each record begins and ends, and the
//! names that an answer hinges on. All else passes through unread, so that what a client would understand never fails
//! because we do not. Everything here takes any bytes: what cannot be read is `None`, never a panic.

mod case;
mod name;
mod outgoing;
mod query;
mod records;
mod reply;
mod response;
mod strip;
#[cfg(test)]
mod tests;

pub use name::WireName;
pub use outgoing::{Manner, Outgoing, UPSTREAM_UDP};
pub use query::{Edns, Query, QueryError};
pub use records::{Record, Records, Section};
pub use reply::{Age, Reply};
pub use response::{Alias, Heard, Response};

/// Bytes of a message's header.
pub const HEADER: usize = 12;

/// The flags of a header, in its second 16 bits (RFC 1035 §4.1.1, RFC 4035 §3).
pub mod flag {
    /// A response.
    pub const QR: u16 = 0x8000;
    /// The opcode's bits; 0 is QUERY.
    pub const OPCODE: u16 = 0x7800;
    /// An answer of an authority.
    pub const AA: u16 = 0x0400;
    /// Truncated.
    pub const TC: u16 = 0x0200;
    /// Recursion desired.
    pub const RD: u16 = 0x0100;
    /// Recursion available.
    pub const RA: u16 = 0x0080;
    /// Authentic data.
    pub const AD: u16 = 0x0020;
    /// Checking disabled.
    pub const CD: u16 = 0x0010;
    /// The response code's lower four bits.
    pub const RCODE: u16 = 0x000f;
}

/// Response codes (RFC 1035 §4.1.1, RFC 6891 §9).
pub mod code {
    /// An answer.
    pub const NO_ERROR: u16 = 0;
    /// The query could not be read.
    pub const FORM_ERR: u16 = 1;
    /// The server failed.
    pub const SERV_FAIL: u16 = 2;
    /// The name does not exist.
    pub const NX_DOMAIN: u16 = 3;
    /// Not what this server does.
    pub const NOT_IMP: u16 = 4;
    /// Not for this client.
    pub const REFUSED: u16 = 5;
    /// An unknown version of EDNS; beyond four bits, so its upper part stands in the OPT record.
    pub const BAD_VERS: u16 = 16;
}

/// Types of records that have a meaning for the message itself.
pub(crate) mod rtype {
    pub(crate) const CNAME: u16 = 5;
    pub(crate) const SOA: u16 = 6;
    pub(crate) const OPT: u16 = 41;
    pub(crate) const ANY: u16 = 255;
}

/// The class of the Internet.
pub const CLASS_IN: u16 = 1;

/// The header of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// By which an answer is told from others.
    pub id: u16,
    /// See [`flag`].
    pub flags: u16,
    /// Of questions, answers, authorities and additional records.
    pub counts: [u16; 4],
}

impl Header {
    /// `None` for less than [`HEADER`] bytes.
    pub fn read(packet: &[u8]) -> Option<Self> {
        let at = |index: usize| u16_at(packet, index * 2);
        Some(Self { id: at(0)?, flags: at(1)?, counts: [at(2)?, at(3)?, at(4)?, at(5)?] })
    }

    /// As it is on the wire.
    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let words = [self.id, self.flags].into_iter().chain(self.counts);
        for (to, word) in bytes.chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&word.to_be_bytes());
        }
        bytes
    }

    fn write(self, packet: &mut [u8]) {
        if let Some(head) = packet.first_chunk_mut() {
            *head = self.to_bytes();
        }
    }
}

/// The one question of a message, whose name is spelled out (nothing stands before it that a pointer could lead to).
#[derive(Debug, Clone, Copy)]
pub struct Question {
    /// What is asked for.
    pub name: WireName,
    /// The type.
    pub qtype: u16,
    /// The class.
    pub qclass: u16,
}

impl Question {
    /// The first question behind the header, and where it ends.
    pub fn read(packet: &[u8]) -> Option<(Self, usize)> {
        let (name, end) = WireName::read(packet, HEADER)?;
        if end != HEADER + name.as_bytes().len() {
            return None;
        }
        Some((Self { name, qtype: u16_at(packet, end)?, qclass: u16_at(packet, end + 2)? }, end + 4))
    }
}

fn u16_at(packet: &[u8], at: usize) -> Option<u16> {
    packet.get(at..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

fn u32_at(packet: &[u8], at: usize) -> Option<u32> {
    packet.get(at..)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}
