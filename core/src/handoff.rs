//! The conversation between a sidecar and its router, over a Unix socket of type SEQPACKET.
//!
//! - The sidecar opens with [`ToRouter::Hello`]; the router answers [`ToSidecar::Welcome`] with the
//!   cluster and node that it serves, or closes.
//! - For each port of each import the sidecar sends [`ToRouter::Import`] with one socket of its network
//!   namespace: a listening TCP socket, or a bound UDP socket. The router accepts on it from then on.
//!   [`ToRouter::Unimport`] takes it back.
//! - For each port of each export it sends [`ToRouter::Export`]; [`ToRouter::Unexport`] withdraws it.
//! - The router may answer that it does not serve one of them, [`ToSidecar::Refused`], such as for want of room: the
//!   sidecar sends it again after a while, with the same number.
//! - The router asks for unconnected sockets with [`ToSidecar::More`]; the sidecar sends them with
//!   [`ToRouter::Stock`]. The router connects them to the exported ports.
//! - [`ToRouter::Bye`] says that the sidecar was told to end: with its pod, or to be started again. The router
//!   withdraws its exports at once and serves its imports for a while, since connections are not to be refused
//!   in between. A connection that closes without it is a sidecar that restarts: all its sockets are kept for a
//!   while.
//!
//! - A sidecar that has heard nothing for a while sends [`ToRouter::Ping`], and the router answers [`ToSidecar::Pong`]:
//!   a router that hangs keeps its connections. A router whose Welcome is of a version before [`PINGS`] does not know
//!   it, and is not asked.
//!
//! All sockets of a conversation are of one network namespace; one of another is refused.
//!
//! One message is one packet, CBOR, at most [`MAX_MESSAGE`] bytes and [`MAX_DESCRIPTORS`] descriptors.
//! Fields are numbered and may be added; a message of an unknown number is skipped.

use std::fmt;
use std::net::IpAddr;

use minicbor::{Decode, Encode};

use crate::name::{AllowRule, ClusterName, Label, Protocol, ServicePort};
use crate::reason;
use crate::rules;
pub use crate::rules::MAX_RULES;

/// The version of this conversation, as a router says it in Welcome. It speaks with sidecars of this and older ones.
pub const VERSION: u32 = 2;
/// The oldest version of a router that a sidecar can do with, as it says it in Hello.
pub const LEAST: u32 = 1;
/// From this version on a router answers [`ToRouter::Ping`].
pub const PINGS: u32 = 2;
/// The most bytes in one message.
pub const MAX_MESSAGE: usize = 16 * 1024;
/// The most descriptors beside one message (the kernel's SCM_MAX_FD is 253).
pub const MAX_DESCRIPTORS: usize = 64;
/// The most imported ports, and the most exported ports, of one sidecar.
pub const MAX_SOCKETS: usize = 4096;

/// What a descriptor must be; the receiver asks the kernel whether it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DescriptorKind {
    /// A listening TCP socket.
    TcpListener,
    /// A TCP socket that is neither connected nor listening.
    TcpUnconnected,
    /// A UDP socket bound to an address.
    UdpBound,
    /// A UDP socket that is neither bound nor connected.
    UdpUnconnected,
}

impl fmt::Display for DescriptorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TcpListener => "a listening TCP socket",
            Self::TcpUnconnected => "an unconnected TCP socket",
            Self::UdpBound => "a bound UDP socket",
            Self::UdpUnconnected => "an unconnected UDP socket",
        })
    }
}

/// Names one import or export of one conversation; chosen by the sidecar.
pub type SocketId = u64;

/// From the sidecar to the router.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ToRouter {
    /// The first message.
    #[n(0)]
    Hello {
        /// [`LEAST`] of the sidecar.
        #[n(0)]
        version: u32,
        /// The pod, as it calls itself. A claim, for logs and status.
        #[n(1)]
        pod: Pod,
        /// The pod's addresses, where its exports are dialled before its loopback.
        #[n(2)]
        addresses: Vec<IpAddr>,
    },
    /// One imported port; with one descriptor, [`DescriptorKind::TcpListener`] or [`DescriptorKind::UdpBound`].
    #[n(1)]
    Import {
        /// The import's number.
        #[n(0)]
        id: SocketId,
        /// What is wanted.
        #[n(1)]
        wanted: ServicePort,
    },
    /// An import that is over.
    #[n(2)]
    Unimport {
        /// Its number.
        #[n(0)]
        id: SocketId,
    },
    /// One exported port.
    #[n(3)]
    Export {
        /// The export's number. The same number again replaces it.
        #[n(0)]
        id: SocketId,
        /// What is offered.
        #[n(1)]
        offered: ServicePort,
        /// The container's port.
        #[n(2)]
        target: std::num::NonZeroU16,
        /// Who may use it, at most [`MAX_RULES`]; `None`: every member of the mesh.
        #[cbor(n(3), decode_with = "rules::read", nil = "rules::none")]
        allow: Option<Vec<AllowRule>>,
    },
    /// An export that is over.
    #[n(4)]
    Unexport {
        /// Its number.
        #[n(0)]
        id: SocketId,
    },
    /// Unconnected sockets; with `tcp` + `udp` descriptors, the TCP ones first.
    #[n(5)]
    Stock {
        /// How many [`DescriptorKind::TcpUnconnected`].
        #[n(0)]
        tcp: u16,
        /// How many [`DescriptorKind::UdpUnconnected`].
        #[n(1)]
        udp: u16,
    },
    /// The sidecar was told to end.
    #[n(6)]
    Bye,
    /// Whether the router answers. Only to one of version [`PINGS`] or later.
    #[n(7)]
    Ping,
}

/// The pod that a sidecar says it serves.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Pod {
    /// Its name; empty where unknown. Decoded, as [`reason::shown`].
    #[cbor(n(0), decode_with = "reason::read")]
    pub name: String,
    /// Its namespace.
    #[n(1)]
    pub namespace: Label,
    /// Its uid; empty where unknown. A sidecar that comes back with the same uid, and sockets of the same network
    /// namespace, takes its place again; where neither has a uid, with the same namespace and name.
    #[cbor(n(2), decode_with = "reason::read")]
    pub uid: String,
}

/// From the router to the sidecar.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ToSidecar {
    /// The answer to Hello.
    #[n(0)]
    Welcome {
        /// [`VERSION`] of the router.
        #[n(0)]
        version: u32,
        /// The cluster that the router belongs to.
        #[n(1)]
        cluster: ClusterName,
        /// The router's node.
        #[n(2)]
        node: ClusterName,
    },
    /// An import or export that the router does not serve.
    #[n(1)]
    Refused {
        /// Its number; `None`: the conversation as a whole, which the router then closes.
        #[n(0)]
        id: Option<SocketId>,
        /// Why, for the log and the status. Decoded, as [`reason::shown`].
        #[cbor(n(1), decode_with = "reason::read")]
        reason: String,
    },
    /// The router wants this many more unconnected sockets, [`MAX_DESCRIPTORS`] at most.
    #[n(2)]
    More {
        /// TCP sockets.
        #[n(0)]
        tcp: u16,
        /// UDP sockets.
        #[n(1)]
        udp: u16,
    },
    /// The answer to Ping.
    #[n(3)]
    Pong,
}

/// Why a message can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Longer than [`MAX_MESSAGE`].
    #[error("a message of {0} bytes; the limit is {MAX_MESSAGE}")]
    TooLong(usize),
    /// Not a message of this version.
    #[error("not a handoff message: {0}")]
    Malformed(String),
    /// Descriptors that do not fit the message.
    #[error("a message with {got} descriptors, expected {want}")]
    Descriptors {
        /// How many came.
        got: usize,
        /// How many belong to it.
        want: usize,
    },
    /// More descriptors than belong to it, which is so many.
    #[error("a message with more descriptors than the {0} that belong to it")]
    MoreDescriptors(usize),
}

impl ToRouter {
    /// The descriptors that belong to this message, in their order.
    pub fn descriptors(&self) -> impl Iterator<Item = DescriptorKind> + use<> {
        let (first, n, second, m) = match self {
            Self::Import { wanted, .. } => match wanted.protocol {
                Protocol::Tcp => (DescriptorKind::TcpListener, 1, DescriptorKind::TcpListener, 0),
                Protocol::Udp => (DescriptorKind::UdpBound, 1, DescriptorKind::UdpBound, 0),
            },
            Self::Stock { tcp, udp } => {
                (DescriptorKind::TcpUnconnected, *tcp, DescriptorKind::UdpUnconnected, *udp)
            }
            _ => (DescriptorKind::TcpListener, 0, DescriptorKind::TcpListener, 0),
        };
        std::iter::repeat_n(first, n.into()).chain(std::iter::repeat_n(second, m.into()))
    }

    /// Reads a message. How many descriptors come with it is for the receiver to compare with
    /// [`ToRouter::descriptors`].
    ///
    /// # Errors
    /// [`MessageError`] where the bytes are no message, or one with more than [`MAX_DESCRIPTORS`].
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let message: Self = decode(bytes)?;
        let want = message.descriptors().count();
        if want > MAX_DESCRIPTORS {
            return Err(MessageError::Descriptors { got: MAX_DESCRIPTORS, want });
        }
        Ok(message)
    }

    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }
}

impl ToSidecar {
    /// Reads a message.
    ///
    /// # Errors
    /// [`MessageError`] where the bytes are no message.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        decode(bytes)
    }

    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }
}

fn decode<'b, T: Decode<'b, ()>>(bytes: &'b [u8]) -> Result<T, MessageError> {
    if bytes.len() > MAX_MESSAGE {
        return Err(MessageError::TooLong(bytes.len()));
    }
    minicbor::decode(bytes).map_err(|e| MessageError::Malformed(e.to_string()))
}

fn encode<T: Encode<()>>(message: &T) -> Vec<u8> {
    minicbor::to_vec(message).expect("a Vec takes every byte, and no message has a custom encoder that fails")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export(rules: usize) -> ToRouter {
        let offered = ServicePort {
            service: crate::name::ServiceName {
                name: "web".parse().unwrap(),
                namespace: "default".parse().unwrap(),
                cluster: "a.local".parse().unwrap(),
            },
            port: std::num::NonZeroU16::MIN,
            protocol: Protocol::Tcp,
        };
        let rule = AllowRule { cluster: "a".parse().unwrap(), namespace: None };
        ToRouter::Export { id: 1, offered, target: std::num::NonZeroU16::MIN, allow: Some(vec![rule; rules]) }
    }

    #[test]
    fn what_a_pod_calls_itself_is_made_fit_to_be_shown() {
        let name = "web\n\u{1b}[2J".to_owned() + &"x".repeat(5000);
        let pod = Pod { name: name.clone(), namespace: "default".parse().unwrap(), uid: name };
        let hello = ToRouter::Hello { version: LEAST, pod, addresses: Vec::new() };
        let Ok(ToRouter::Hello { pod, .. }) = ToRouter::decode(&hello.encode()) else { panic!() };
        for text in [&pod.name, &pod.uid] {
            assert!(text.starts_with(r"web\n\u{1b}[2Jxxx") && text.len() <= reason::MAX_REASON, "{text:?}");
        }
        let refused = ToSidecar::Refused { id: None, reason: "no\rroom".into() };
        let told = ToSidecar::Refused { id: None, reason: r"no\rroom".into() };
        assert_eq!(ToSidecar::decode(&refused.encode()), Ok(told));
    }

    #[test]
    fn rules_are_bounded_while_they_are_read() {
        let most = export(MAX_RULES);
        assert_eq!(ToRouter::decode(&most.encode()).unwrap(), most);
        // As many as a message holds.
        let many = export(5_400).encode();
        assert!(many.len() <= MAX_MESSAGE);
        let error = ToRouter::decode(&many).unwrap_err().to_string();
        assert!(error.contains("more than 1024 rules"), "{error}");
        // None at all, in both forms; and all of the others.
        let ToRouter::Export { id, offered, target, .. } = most else { panic!() };
        let open = ToRouter::Export { id, offered, target, allow: None };
        let (short, mut long) = (open.encode(), open.encode());
        assert_eq!((long[2], long.last()), (0x83, Some(&1)));
        long[2] = 0x84;
        long.push(0xf6);
        for bytes in [short, long] {
            assert_eq!(ToRouter::decode(&bytes).unwrap(), open);
        }
    }
}
