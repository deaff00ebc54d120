//! What the machine has its driver do, send and log.

use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

use super::{Annotation, ClusterSource, Saved};
use crate::dns::Zone;
use crate::handoff::{self, DescriptorKind, SocketId, ToRouter};
use crate::lease::LeaseError;
use crate::name::{ClusterName, RouterId, ServicePort};

/// Why a well-written entry is not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unserved {
    /// The range is full.
    #[error(transparent)]
    NoAddress(#[from] LeaseError),
    /// Too many sockets.
    #[error(
        "too many ports in the annotation; the limit is {}, and the entries before this one leave too few",
        handoff::MAX_SOCKETS
    )]
    TooManyPorts,
    /// Its rules do not fit into a message to the router.
    #[error(
        "its `allow` takes {bytes} bytes; the limit is {}: write fewer rules, such as whole clusters",
        handoff::MAX_MESSAGE
    )]
    TooLong {
        /// With all its rules.
        bytes: usize,
    },
}

impl Unserved {
    /// The reason as of `now`: with the seconds that are left where it ends by itself.
    pub fn at(&self, now: Instant) -> String {
        match self {
            Self::NoAddress(LeaseError::Resting { until, .. }) => {
                let left = until.saturating_duration_since(now).as_millis().div_ceil(1000);
                format!("{self} in {left} s")
            }
            _ => self.to_string(),
        }
    }
}

/// Something to do, at once and in the order in which it comes.
#[derive(Debug)]
pub enum Command {
    /// Make a socket, and say what came of it by [`super::Sidecar::handle_made`].
    Make {
        /// Its number from now on.
        id: SocketId,
        /// [`DescriptorKind::TcpListener`] or [`DescriptorKind::UdpBound`].
        kind: DescriptorKind,
        /// Where it is bound.
        addr: SocketAddrV4,
        /// What is imported there.
        port: ServicePort,
    },
    /// Close a socket.
    Close {
        /// Its number.
        id: SocketId,
    },
    /// Answer DNS from this zone from now on.
    SetZone(Zone),
    /// Keep this for the next start.
    Save(Saved),
    /// Dial the router; say what came of it by [`super::Sidecar::handle_connected`] or [`super::Sidecar::handle_disconnected`].
    Connect,
    /// Close the connection to the router.
    Disconnect,
}

/// Something to send to the router.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outgoing {
    /// A message.
    Plain(ToRouter),
    /// A message with the socket of this number.
    WithSocket(ToRouter, SocketId),
    /// So many unconnected sockets, to be made for it. What can't be made is said by [`super::Sidecar::handle_short`].
    Stock {
        /// TCP sockets.
        tcp: u16,
        /// UDP sockets.
        udp: u16,
    },
}

/// Something that changed, for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// There is no file of annotations. What was served still is.
    Absent,
    /// Another text of this annotation is in service, or the same one means something else. See [`super::Sidecar::findings`].
    Applied(Annotation),
    /// A new text of this annotation can't be used as a whole, and the last good one stays. See
    /// [`super::Sidecar::findings`].
    Unusable(Annotation),
    /// The same entries, and other Services of them than before are not served. See [`super::Sidecar::findings`].
    Unserved(Annotation),
    /// The pod counts itself to this cluster.
    Cluster(ClusterName, ClusterSource),
    /// The router serves another cluster than the one that is configured.
    OtherCluster {
        /// The router's.
        router: ClusterName,
    },
    /// The socket of an import can't be made.
    MakeFailed {
        /// The import.
        port: ServicePort,
        /// Where its socket should be.
        addr: SocketAddrV4,
        /// Why.
        reason: String,
        /// When it is tried again, from now.
        retry: Duration,
    },
    /// The socket of an import is there, after it could not be made.
    Made {
        /// The import.
        port: ServicePort,
    },
    /// There is a conversation with this router.
    RouterUp(RouterId),
    /// The router does not answer, and has said nothing for so long. The conversation goes on where it does again.
    RouterSilent {
        /// Which.
        router: RouterId,
        /// For how long.
        lasts: Duration,
    },
    /// It says something again, after so long.
    RouterAnswers {
        /// For how long it had not.
        silent: Duration,
    },
    /// The conversation ended, or there was none at the start.
    RouterDown(String),
    /// The router does not serve an import or export. It is asked again, which is told no more.
    Refused {
        /// Which.
        port: ServicePort,
        /// Why.
        reason: String,
    },
    /// The router serves one that it had refused.
    Accepted {
        /// Which.
        port: ServicePort,
    },
    /// Leases of an earlier run are not kept.
    LeasesDropped {
        /// How many.
        count: usize,
        /// The first of them, each with its reason.
        first: Vec<String>,
    },
}
