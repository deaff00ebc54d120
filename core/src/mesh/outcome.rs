//! What the outcome of an attempt at a candidate means: for its health, and for who waits. TCP and UDP, out of this node
//! and into it, all ask here.

use crate::flow::frame::Cause;

/// How an attempt to open a flow or a UDP session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The endpoint took the flow, or answered a datagram.
    Taken,
    /// The connection was refused, by the endpoint, its network or the path to its router; or an ICMP message said so of
    /// a datagram.
    Refused,
    /// No answer came in time. The endpoint may be slow.
    Silent,
    /// The router has no way into the pod just now, such as while its sidecar restarts.
    Away,
    /// The candidate's router said no.
    Rejected(Cause),
}

/// What an outcome says of the candidate's health.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It works: its failures are forgotten.
    Alive,
    /// It does not: it is tried last for a while, longer each time.
    Dead,
    /// Nothing. It is tried last for a moment, since the same is likely to happen again.
    Unknown,
}

impl Outcome {
    /// What it says of the candidate. A refusal for policy, or for want of room, is none of its endpoint.
    pub fn health(self) -> Health {
        match self {
            Self::Taken => Health::Alive,
            Self::Refused | Self::Silent | Self::Away | Self::Rejected(Cause::Unreachable) => Health::Dead,
            Self::Rejected(Cause::NotExported | Cause::NotAllowed | Cause::Busy) => Health::Unknown,
        }
    }

    /// Whether it is an answer, so that who asked need not wait for a change: an endpoint whose sidecar restarts gives
    /// none.
    pub fn is_answer(self) -> bool {
        self != Self::Away
    }

    /// Whether the same candidate may do better if it is given more time.
    pub fn is_slow(self) -> bool {
        self == Self::Silent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_that_is_none_of_the_endpoints_counts_no_failure() {
        for cause in [Cause::NotAllowed, Cause::NotExported, Cause::Busy] {
            assert_eq!(Outcome::Rejected(cause).health(), Health::Unknown, "{cause:?}");
        }
        for dead in [Outcome::Refused, Outcome::Silent, Outcome::Away, Outcome::Rejected(Cause::Unreachable)]
        {
            assert_eq!(dead.health(), Health::Dead, "{dead:?}");
        }
        assert_eq!(Outcome::Taken.health(), Health::Alive);
    }
}
