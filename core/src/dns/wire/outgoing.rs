//! A query for an upstream.

use super::{CLASS_IN, HEADER, Header, Query, WireName, case, flag, rtype};

/// The size of answers over UDP that upstreams are asked for: what passes every network in one piece
/// (RFC 9715 §3).
pub const UPSTREAM_UDP: u16 = 1232;

/// How a question is put to an upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Manner {
    /// With an OPT record.
    pub edns: bool,
    /// With the name in a random case, which the answer must keep.
    pub mixed_case: bool,
}

/// A question of class IN, with those of the client's wishes that change the answer.
#[derive(Debug, Clone)]
pub struct Outgoing {
    name: WireName,
    qtype: u16,
    recursion: bool,
    no_checking: bool,
    signatures: bool,
}

impl Outgoing {
    /// What the client's query asks.
    pub fn new(query: &Query<'_>) -> Self {
        Self {
            name: query.question().name,
            qtype: query.question().qtype,
            recursion: query.has(flag::RD),
            no_checking: query.has(flag::CD),
            signatures: query.edns().is_some_and(|edns| edns.signatures),
        }
    }

    /// The type that is asked for.
    pub fn qtype(&self) -> u16 {
        self.qtype
    }

    /// The name that is asked for.
    pub fn name(&self) -> &WireName {
        &self.name
    }

    /// By what it is known: name without case, type, RD, DO and CD.
    pub fn key(&self) -> Vec<u8> {
        let name = self.name.as_bytes();
        let mut key = Vec::with_capacity(name.len() + 3);
        key.push(u8::from(self.recursion) | u8::from(self.no_checking) << 1 | u8::from(self.signatures) << 2);
        key.extend(self.qtype.to_be_bytes());
        key.extend(name.iter().map(u8::to_ascii_lowercase));
        key
    }

    /// The packet. `id` and `bits` are random, fresh for each. AD is always set: whether a client hears of it is
    /// decided later, so that one kept answer serves both kinds.
    pub fn packet(&self, manner: Manner, id: u16, bits: &[u8; 32]) -> Vec<u8> {
        let wishes = [(self.recursion, flag::RD), (self.no_checking, flag::CD)];
        let flags =
            wishes.into_iter().filter(|(set, _)| *set).fold(flag::AD, |flags, (_, flag)| flags | flag);
        let header = Header { id, flags, counts: [1, 0, 0, u16::from(manner.edns)] };
        let name = self.name.as_bytes();
        let mut packet = Vec::with_capacity(HEADER + name.len() + 15);
        packet.extend(header.to_bytes());
        packet.extend(name.iter().map(u8::to_ascii_lowercase));
        if manner.mixed_case {
            case::mix(&mut packet, name.len(), bits);
        }
        packet.extend(self.qtype.to_be_bytes());
        packet.extend(CLASS_IN.to_be_bytes());
        if manner.edns {
            packet.push(0);
            packet.extend(rtype::OPT.to_be_bytes());
            packet.extend(UPSTREAM_UDP.to_be_bytes());
            packet.extend([0, 0, if self.signatures { 0x80 } else { 0 }, 0, 0, 0]);
        }
        packet
    }
}
