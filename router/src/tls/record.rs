//! TLS 1.3 records (RFC 8446 §5), sealed and opened in place. No I/O.
//!
//! rustls makes the handshake and gives the traffic keys, as it does for a kernel with kTLS; from there on the records
//! are made here, in buffers of the router's own.

use ring::aead::{AES_128_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use rustls::{AlertDescription, ConnectionTrafficSecrets};

/// Bytes of a record's header.
pub(crate) const RECORD_HEADER: usize = 5;
/// Bytes behind a record's plaintext: the inner content type and the AEAD's tag.
pub(crate) const RECORD_TRAILER: usize = 1 + 16;
/// The most bytes of plaintext in a record.
pub(crate) const MAX_PLAINTEXT: usize = 16_384;
/// The most bytes of a whole record: the plaintext may be padded and the ciphertext is at most 256 bytes longer.
pub(crate) const MAX_RECORD: usize = RECORD_HEADER + MAX_PLAINTEXT + 256;
/// Records under one key before it is updated. AES-GCM's limit is 2^24.5 full records (RFC 8446 §5.5).
pub(crate) const KEY_RECORDS: u64 = 1 << 23;
/// Key updates of the peer without a byte of data between them. RFC 8446 §4.6.3 bounds them not, and each costs this side
/// a new key; BoringSSL has the same bound.
pub(crate) const MAX_KEY_UPDATES: u32 = 32;

const APPLICATION_DATA: u8 = 23;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const KEY_UPDATE: u8 = 24;

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    Data,
    /// close_notify: the peer sends no more.
    Close,
    /// A KeyUpdate; whether the peer wants one back.
    KeyUpdate {
        wanted: bool,
    },
}

/// Why a record is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The header is no TLS 1.3 application record's.
    #[error("not a TLS record (it starts with {0:02x} {1:02x})")]
    Header(u8, u8),
    /// Longer than a record may be.
    #[error("a TLS record of {0} bytes")]
    TooLong(usize),
    /// It was changed on its way, or is none of this connection's.
    #[error("a TLS record that cannot be decrypted: it was modified in transit")]
    Sealed,
    /// The peer's alert (RFC 8446 §6).
    #[error("{}", super::refused(AlertDescription::from(*.0)))]
    Alert(u8),
    /// A message that does not belong behind a handshake.
    #[error("an unexpected TLS message of type {0}")]
    Unexpected(u8),
    /// A cipher suite that was never offered.
    #[error("an unexpected cipher suite")]
    Suite,
    /// Nothing but new keys.
    #[error("more than {MAX_KEY_UPDATES} TLS key updates in a row, with no data between them")]
    KeyUpdates,
    /// No more records can be sealed under this key.
    #[error("the TLS key has reached its limit")]
    Exhausted,
}

/// One direction's key and the number of its next record.
pub(crate) struct Key {
    key: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
    /// Where the key of this number of records ends.
    limit: u64,
}

impl Key {
    pub(crate) fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, RecordError> {
        let (algorithm, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(RecordError::Suite),
        };
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| RecordError::Suite)?;
        let iv = iv.as_ref().try_into().map_err(|_| RecordError::Suite)?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence, limit: KEY_RECORDS })
    }

    /// Wears the key out after so many records.
    pub(crate) fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
    }

    /// Whether the key should be updated before the next record.
    pub(crate) fn is_worn(&self) -> bool {
        self.sequence >= self.limit
    }

    fn nonce(&mut self) -> Result<Nonce, RecordError> {
        let mut nonce = self.iv;
        for (byte, n) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= n;
        }
        self.sequence = self.sequence.checked_add(1).ok_or(RecordError::Exhausted)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    /// Makes a record of `buf`, whose first [`RECORD_HEADER`] bytes and last [`RECORD_TRAILER`] are room for what
    /// belongs around the plaintext between them (at most [`MAX_PLAINTEXT`] bytes).
    fn seal_as(&mut self, kind: u8, buf: &mut [u8]) -> Result<(), RecordError> {
        let sealed = buf.len() - RECORD_HEADER;
        let (header, body) = buf.split_at_mut(RECORD_HEADER);
        let length = u16::try_from(sealed).map_err(|_| RecordError::TooLong(sealed))?.to_be_bytes();
        header.copy_from_slice(&[APPLICATION_DATA, 3, 3, length[0], length[1]]);
        let (inner, room) = body.split_at_mut(sealed - 16);
        if let Some(last) = inner.last_mut() {
            *last = kind;
        }
        let nonce = self.nonce()?;
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(&*header), inner)
            .map_err(|_| RecordError::Exhausted)?;
        room.copy_from_slice(tag.as_ref());
        Ok(())
    }

    /// Seals application data in place; see [`Self::seal_as`].
    pub(crate) fn seal(&mut self, buf: &mut [u8]) -> Result<(), RecordError> {
        self.seal_as(APPLICATION_DATA, buf)
    }

    /// The record of a close_notify alert.
    pub(crate) fn close_notify(&mut self) -> Result<Vec<u8>, RecordError> {
        self.small(ALERT, &[1, 0])
    }

    /// The record of a KeyUpdate that asks for none back; the next record is under the next key.
    pub(crate) fn key_update(&mut self) -> Result<Vec<u8>, RecordError> {
        self.small(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 0])
    }

    pub(super) fn small(&mut self, kind: u8, content: &[u8]) -> Result<Vec<u8>, RecordError> {
        let mut buf = vec![0; RECORD_HEADER + content.len() + RECORD_TRAILER];
        buf[RECORD_HEADER..RECORD_HEADER + content.len()].copy_from_slice(content);
        self.seal_as(kind, &mut buf)?;
        Ok(buf)
    }

    /// Opens the record that `buf` starts with: its whole length, what it holds, and where in `buf` the plaintext lies
    /// then; `None` where it is not whole yet.
    pub(crate) fn open(
        &mut self,
        buf: &mut [u8],
    ) -> Result<Option<(usize, Content, std::ops::Range<usize>)>, RecordError> {
        let Some((header, _)) = buf.split_first_chunk::<RECORD_HEADER>() else { return Ok(None) };
        let header = *header;
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if header[0] != APPLICATION_DATA || header[1] != 3 {
            return Err(RecordError::Header(header[0], header[1]));
        }
        let whole = RECORD_HEADER + length;
        if whole > MAX_RECORD {
            return Err(RecordError::TooLong(length));
        }
        let Some(body) = buf.get_mut(RECORD_HEADER..whole) else { return Ok(None) };
        let nonce = self.nonce()?;
        let inner =
            self.key.open_in_place(nonce, Aad::from(&header), body).map_err(|_| RecordError::Sealed)?;
        // The content type is the last byte that is not padding.
        let end = inner.iter().rposition(|byte| *byte != 0).ok_or(RecordError::Unexpected(0))?;
        let (kind, inner) = (inner[end], &inner[..end]);
        if inner.len() > MAX_PLAINTEXT {
            return Err(RecordError::TooLong(inner.len()));
        }
        let content = match (kind, inner) {
            (APPLICATION_DATA, _) => Content::Data,
            (ALERT, [_, 0]) => Content::Close,
            (ALERT, [_, alert]) => return Err(RecordError::Alert(*alert)),
            (HANDSHAKE, [KEY_UPDATE, 0, 0, 1, wanted @ (0 | 1)]) => {
                Content::KeyUpdate { wanted: *wanted == 1 }
            }
            (HANDSHAKE, [kind, ..]) => return Err(RecordError::Unexpected(*kind)),
            (kind, _) => return Err(RecordError::Unexpected(kind)),
        };
        Ok(Some((whole, content, RECORD_HEADER..RECORD_HEADER + end)))
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}
