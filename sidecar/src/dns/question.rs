//! A question for the upstreams, and by what it is known to the cache.

use std::sync::Arc;

use hickory_proto::op::{Edns, LowerQuery, Message, Query};
use hickory_proto::rr::RecordType;
use hickory_server::server::Request;

use super::exchange::UPSTREAM_UDP;

/// A question of class IN, with those of the client's wishes that change the answer.
#[derive(Debug, Clone)]
pub(super) struct Question {
    /// The name in the case in which it was asked, and the type.
    pub(super) query: Query,
    /// The client wants recursion (RD, RFC 1035).
    pub(super) recursion: bool,
    /// The client wants no validation (CD, RFC 4035).
    pub(super) no_checking: bool,
    /// The client wants signatures (DO, RFC 3225).
    pub(super) signatures: bool,
    /// The client wants to know whether the answer was validated (AD or DO, RFC 6840 §5.7).
    pub(super) wants_validated: bool,
}

/// What makes two questions the same: name without case, type, RD, DO and CD. One small allocation, cheap to
/// clone.
pub(super) type Key = Arc<[u8]>;

impl Question {
    pub(super) fn new(query: &LowerQuery, request: &Request) -> Self {
        let signatures = request.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok);
        Self {
            query: query.original().clone(),
            recursion: request.metadata.recursion_desired,
            no_checking: request.metadata.checking_disabled,
            signatures,
            wants_validated: signatures || request.metadata.authentic_data,
        }
    }

    pub(super) fn qtype(&self) -> RecordType {
        self.query.query_type()
    }

    pub(super) fn key(&self) -> Key {
        let name = self.query.name();
        let mut key = Vec::with_capacity(name.len() + 4);
        key.push(u8::from(self.recursion) | u8::from(self.no_checking) << 1 | u8::from(self.signatures) << 2);
        key.extend(u16::from(self.qtype()).to_be_bytes());
        for label in name.iter() {
            // A label is at most 63 bytes.
            key.push(label.len() as u8);
            key.extend(label.iter().map(u8::to_ascii_lowercase));
        }
        key.into()
    }

    /// The query for an upstream, with an id of its own. AD is always set: whether a client hears of it is decided
    /// later, so that one kept answer serves both kinds.
    pub(super) fn message(&self, with_edns: bool) -> Message {
        let mut message = Message::query();
        message.metadata.recursion_desired = self.recursion;
        message.metadata.checking_disabled = self.no_checking;
        message.metadata.authentic_data = true;
        message.add_query(self.query.clone());
        if with_edns {
            let mut edns = Edns::new();
            edns.set_max_payload(UPSTREAM_UDP).set_dnssec_ok(self.signatures);
            message.set_edns(edns);
        }
        message
    }
}
