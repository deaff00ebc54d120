//! Frames: what travels inside a TLS connection between two routers.
//!
//! A connection starts with a [`Preface`] from each side, in a frame of kind [`Kind::Preface`]. What follows depends
//! on its [`Purpose`]:
//! - `Link`: [`Kind::Message`] frames, each one [`crate::mesh::LinkMessage`].
//! - `Flows`: one flow at a time. The opener sends `Open`; the other side answers `Opened` or `Refused`. Then
//!   both send `Data` (offset of its first byte), `Ack` (bytes delivered to the application's socket), `Fin`
//!   (offset of the end) or `Reset`. A flow that ended on both sides leaves the connection free for the next.
//! - `Datagrams`: many UDP sessions. `Open` with a session number, then `Datagram` frames each way, `Close`. `Refused`, at
//!   any time, ends a session for which no endpoint takes datagrams (any more); `Opened` says that one does which has not
//!   answered, and may be left out.
//!
//! Every frame has a header of [`HEADER`] bytes, big endian:
//!
//! | bytes | field |
//! |---|---|
//! | 0 | kind |
//! | 1 | zero |
//! | 2–3 | length of the payload, 0 to 65,535 |
//! | 4–11 | `offset`: Data, Fin: bytes of the flow before this frame. Ack: bytes delivered. Others: the session number, or zero |
//!
//! A payload of Data has at most [`MAX_DATA`] bytes, so that a frame fills one TLS record (RFC 8446 §5.1).

use minicbor::{Decode, Encode};

use crate::name::{Label, RouterId, ServicePort};
use crate::reason;

/// Bytes in a frame's header.
pub const HEADER: usize = 12;
/// The most bytes of a flow in one Data frame: a TLS record's 16,384 less the header.
pub const MAX_DATA: usize = 16_384 - HEADER;
/// The most bytes in any payload.
pub const MAX_PAYLOAD: usize = u16::MAX as usize;
/// The version of frames and messages.
pub const VERSION: u32 = 1;
/// The protocol's name in the TLS handshake (ALPN, RFC 7301).
pub const ALPN: &[u8] = b"servicekeel/1";

/// The kinds of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A [`Preface`].
    Preface = 1,
    /// A message of a link.
    Message = 2,
    /// An [`Open`].
    Open = 3,
    /// The flow is connected.
    Opened = 4,
    /// The flow is not: a [`Refused`].
    Refused = 5,
    /// Bytes of the flow.
    Data = 6,
    /// Bytes delivered so far.
    Ack = 7,
    /// No more bytes from this side.
    Fin = 8,
    /// The flow is broken off. Each side sends one; when both did, the connection is free.
    Reset = 9,
    /// One whole datagram of the session in `offset`.
    Datagram = 10,
    /// The session in `offset` is over.
    Close = 11,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Preface,
            2 => Self::Message,
            3 => Self::Open,
            4 => Self::Opened,
            5 => Self::Refused,
            6 => Self::Data,
            7 => Self::Ack,
            8 => Self::Fin,
            9 => Self::Reset,
            10 => Self::Datagram,
            11 => Self::Close,
            _ => return None,
        })
    }
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// Bytes of payload behind the header.
    pub len: u16,
    /// See the table above.
    pub offset: u64,
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A kind that this version does not know.
    #[error("a frame of the unknown kind {0}")]
    Kind(u8),
    /// The second byte is not zero.
    #[error("a frame with the flags {0:#04x}; this version supports none")]
    Flags(u8),
    /// A payload that this kind can't have.
    #[error("a {kind:?} frame with a payload of {len} bytes")]
    Length {
        /// The frame's kind.
        kind: Kind,
        /// The length that it gives.
        len: u16,
    },
}

impl Header {
    /// The header as bytes.
    pub fn encode(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0] = self.kind as u8;
        bytes[2..4].copy_from_slice(&self.len.to_be_bytes());
        bytes[4..].copy_from_slice(&self.offset.to_be_bytes());
        bytes
    }

    /// Reads a header from the first [`HEADER`] bytes; `None` where there are not that many yet.
    ///
    /// # Errors
    /// [`FrameError`] where no frame starts like this.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, FrameError> {
        let Some((head, _)) = bytes.split_first_chunk::<HEADER>() else { return Ok(None) };
        let kind = Kind::from_byte(head[0]).ok_or(FrameError::Kind(head[0]))?;
        if head[1] != 0 {
            return Err(FrameError::Flags(head[1]));
        }
        let len = u16::from_be_bytes([head[2], head[3]]);
        let fits = match kind {
            Kind::Data => (1..=MAX_DATA).contains(&len.into()),
            Kind::Opened | Kind::Ack | Kind::Fin | Kind::Reset | Kind::Close => len == 0,
            Kind::Preface | Kind::Message | Kind::Open | Kind::Refused | Kind::Datagram => true,
        };
        if !fits {
            return Err(FrameError::Length { kind, len });
        }
        let [_, _, _, _, offset @ ..] = *head;
        Ok(Some(Self { kind, len, offset: u64::from_be_bytes(offset) }))
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Purpose {
    /// Control between neighbours.
    #[n(0)]
    Link,
    /// TCP flows, opened by the side that dialled.
    #[n(1)]
    Flows,
    /// TCP flows, opened by the side that was dialled, which had asked for a dial back.
    #[n(2)]
    FlowsBack,
    /// UDP sessions, opened by the side that dialled.
    #[n(3)]
    Datagrams,
    /// UDP sessions, opened by the side that was dialled.
    #[n(4)]
    DatagramsBack,
}

/// The first frame from each side.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Preface {
    /// [`VERSION`] of the sender.
    #[n(0)]
    pub version: u32,
    /// What the connection is for; the dialler's word counts.
    #[n(1)]
    pub purpose: Purpose,
    /// The sender, which must be whom its certificate names.
    #[n(2)]
    pub sender: RouterId,
    /// Drawn anew at each start of the sender: connections of an earlier run are dead.
    #[n(3)]
    pub boot: u64,
}

/// Asks for a flow or a session.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Open {
    /// Names the flow in logs of both sides, and for resumption.
    #[n(0)]
    pub flow: u64,
    /// What is wanted.
    #[n(1)]
    pub wanted: ServicePort,
    /// The consumer's namespace, as the first router says. Nothing attests it yet, so it lets nobody in.
    #[n(2)]
    pub namespace: Option<Label>,
    /// Whoever opens it, by a number that the first router has for it: so the last router can share what it has for the
    /// first one out among its consumers. Routers of before say none.
    #[n(3)]
    pub consumer: Option<u64>,
}

/// Why a flow was not opened.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Refused {
    /// What kind of refusal.
    #[n(0)]
    pub cause: Cause,
    /// In words, for the log and the status; decoded, as [`reason::shown`].
    #[cbor(n(1), decode_with = "reason::read")]
    pub reason: String,
}

/// The kinds of refusals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Cause {
    /// Nothing here exports it (any more).
    #[n(0)]
    NotExported,
    /// `allow` does not let the consumer in.
    #[n(1)]
    NotAllowed,
    /// No endpoint took the connection.
    #[n(2)]
    Unreachable,
    /// A bound of the router is reached.
    #[n(3)]
    Busy,
}

/// Why a payload can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a malformed payload: {reason}")]
pub struct PayloadError {
    reason: String,
    unknown: bool,
}

impl PayloadError {
    /// Whether it may be a message of a later version, to be skipped.
    pub fn is_unknown(&self) -> bool {
        self.unknown
    }
}

/// Reads a payload of CBOR.
///
/// # Errors
/// [`PayloadError`] where the bytes are something else.
pub fn decode_payload<'b, T: Decode<'b, ()>>(bytes: &'b [u8]) -> Result<T, PayloadError> {
    minicbor::decode(bytes).map_err(|e: minicbor::decode::Error| PayloadError {
        reason: reason::shown(&e.to_string()),
        unknown: e.is_unknown_variant(),
    })
}

/// A whole frame of CBOR; `None` where the payload would be longer than [`MAX_PAYLOAD`].
pub fn encode_frame<T: Encode<()>>(kind: Kind, offset: u64, payload: &T) -> Option<Vec<u8>> {
    let mut bytes = vec![0; HEADER];
    minicbor::encode(payload, &mut bytes).ok()?;
    let len = u16::try_from(bytes.len() - HEADER).ok()?;
    bytes[..HEADER].copy_from_slice(&Header { kind, len, offset }.encode());
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::LinkMessage;

    #[test]
    fn what_a_peer_says_of_a_refusal_is_made_fit_to_be_shown() {
        let mut hostile = "x\n2026 ERROR forged\u{1b}[31mRED\u{7}\u{202e}".to_owned();
        hostile.push_str(&"A".repeat(60_000));
        let refused = Refused { cause: Cause::Unreachable, reason: hostile.clone() };
        let Refused { reason, .. } = decode_payload(&minicbor::to_vec(refused).unwrap()).unwrap();
        assert!(reason.starts_with(r"x\n2026 ERROR forged\u{1b}[31mRED\u{7}\u{202e}AAA"), "{reason:?}");
        assert!(reason.len() <= reason::MAX_REASON, "{}", reason.len());
        let declined = minicbor::to_vec(LinkMessage::Declined { reason: hostile }).unwrap();
        assert_eq!(decode_payload(&declined), Ok(LinkMessage::Declined { reason }));
    }
}
