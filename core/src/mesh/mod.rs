//! The mesh: what neighbours tell each other, and which endpoint a flow takes.

pub mod announce;
mod exports;
pub mod keepalive;
pub mod outcome;
pub mod table;

use minicbor::{Decode, Encode};

use crate::name::{AllowRule, ClusterName, ServicePort, allows};
pub use crate::rules::MAX_RULES;
use crate::{reason, rules};

/// A message on a link between neighbours. Numbers may be added; an unknown one is skipped.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum LinkMessage {
    /// The sender offers this port. The same port again replaces the offer.
    #[n(0)]
    Offer(#[n(0)] Offer),
    /// The sender does not offer this port any more.
    #[n(1)]
    Withdraw(#[n(0)] ServicePort),
    /// All offers that the sender has were sent: what it offered on an earlier link and not on this is gone.
    #[n(2)]
    Synced,
    /// Answer with Pong.
    #[n(3)]
    Ping,
    /// The answer to Ping.
    #[n(4)]
    Pong,
    /// Please dial: the sender wants this many connections that it opens flows on.
    #[n(5)]
    DialBack {
        /// Connections for TCP flows.
        #[n(0)]
        flows: u16,
        /// Connections for UDP sessions.
        #[n(1)]
        datagrams: u16,
    },
    /// The sender ends: no new flows to it, please.
    #[n(6)]
    Goodbye,
    /// Not all that the receiver of this offers is taken. It may offer it again after a while.
    #[n(7)]
    Declined {
        /// Why, for the log and the status. Decoded, as [`reason::shown`].
        #[cbor(n(0), decode_with = "reason::read")]
        reason: String,
    },
    /// The sender does not take the link, and closes it: then it comes first. Or it does not keep it any longer: then it
    /// comes last.
    #[n(8)]
    Rejected(#[n(0)] NoLink),
}

/// Why a link is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, thiserror::Error)]
#[cbor(index_only)]
pub enum NoLink {
    /// There are as many as one neighbour may have.
    #[n(0)]
    #[error("there are too many links between the two routers")]
    TooMany,
    /// A router of this name is linked, and alive.
    #[n(1)]
    #[error("another router with this name is already linked: issue each node its own certificate")]
    Twin,
    /// The sender knows as many routers of the receiver's cluster as it may.
    #[n(2)]
    #[error("as many routers of this cluster are known there as may be beside others")]
    TooManyRouters,
    /// The receiver has as many connections there as it may that carry no flow.
    #[n(3)]
    #[error("there are as many connections that carry no flow as may be beside others")]
    TooManyConnections,
    /// The sender does not trust the receiver's certificate, or does not any more.
    #[n(4)]
    #[error("the certificate of this router is no longer trusted there: see the peer's log")]
    Distrusted,
}

/// One port that a router offers to its neighbours.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Offer {
    /// What is offered; its cluster is the offering router's.
    #[n(0)]
    pub port: ServicePort,
    /// Who may use it, at most [`MAX_RULES`]; `None`: whoever is told. A router tells a neighbour only what its cluster
    /// may use, so that it says no more than that; earlier versions told everybody, with all rules.
    #[cbor(n(1), decode_with = "rules::read", nil = "rules::none")]
    pub allow: Option<Vec<AllowRule>>,
}

impl Offer {
    /// Whether the consumers of a cluster may use it. A namespace is attested by nobody.
    pub fn is_open_to(&self, cluster: &ClusterName) -> bool {
        allows(self.allow.as_deref(), cluster, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::frame::{MAX_PAYLOAD, decode_payload};
    use crate::name::{Protocol, ServiceName};

    fn offer(rules: usize) -> Vec<u8> {
        let service = ServiceName {
            name: "web".parse().unwrap(),
            namespace: "default".parse().unwrap(),
            cluster: "b.local".parse().unwrap(),
        };
        let port = ServicePort { service, port: std::num::NonZeroU16::MIN, protocol: Protocol::Tcp };
        let rule = AllowRule { cluster: "a".parse().unwrap(), namespace: None };
        let allow = Some(vec![rule; rules]);
        minicbor::to_vec(LinkMessage::Offer(Offer { port, allow })).unwrap()
    }

    #[test]
    fn a_rejection_for_a_reason_of_a_later_version_is_skipped() {
        use NoLink::{Distrusted, TooMany, TooManyConnections, TooManyRouters, Twin};
        for reason in [TooMany, Twin, TooManyRouters, TooManyConnections, Distrusted] {
            let bytes = minicbor::to_vec(LinkMessage::Rejected(reason)).unwrap();
            assert_eq!(decode_payload::<LinkMessage>(&bytes), Ok(LinkMessage::Rejected(reason)));
        }
        let error = decode_payload::<LinkMessage>(&[0x82, 8, 0x81, 9]).unwrap_err();
        assert!(error.is_unknown(), "{error}");
    }

    #[test]
    fn rules_are_bounded_while_they_are_read() {
        let most = offer(MAX_RULES);
        let Ok(LinkMessage::Offer(read)) = decode_payload(&most) else { panic!() };
        assert_eq!(read.allow.unwrap().len(), MAX_RULES);
        // As many as a frame holds.
        let many = offer(16_000);
        assert!(many.len() < MAX_PAYLOAD);
        let error = decode_payload::<LinkMessage>(&many).unwrap_err().to_string();
        assert!(error.contains("more than 1024 rules"), "{error}");
        // With an array of unknown length, too.
        let mut endless = most.clone();
        let at = endless.windows(3).position(|bytes| bytes == [0x99, 0x04, 0x00]).unwrap();
        endless.splice(at..at + 3, [0x9f]);
        assert!(decode_payload::<LinkMessage>(&endless).is_err());
        // And none at all, in both forms.
        for bytes in [&[0x82, 0x00, 0x81, 0x82][..], &[0x82, 0x00, 0x81, 0x81]] {
            let port = minicbor::to_vec(&read.port).unwrap();
            let end: &[u8] = if bytes[3] == 0x82 { &[0xf6] } else { &[] };
            let read_again: LinkMessage = decode_payload(&[bytes, &port, end].concat()).unwrap();
            assert_eq!(read_again, LinkMessage::Offer(Offer { port: read.port.clone(), allow: None }));
        }
    }
}
