//! The mesh: what neighbours tell each other, and which endpoint a flow takes.

pub mod keepalive;
pub mod outcome;
pub mod table;

use minicbor::{Decode, Encode};

use crate::name::{AllowRule, ServicePort};

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
}

/// One port that a router offers to its neighbours.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Offer {
    /// What is offered; its cluster is the offering router's.
    #[n(0)]
    pub port: ServicePort,
    /// Who may use it; `None`: every member of the mesh. The offering router decides; this spares tries.
    #[n(1)]
    pub allow: Option<Vec<AllowRule>>,
}
