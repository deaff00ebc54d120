//! Frames over the records of one TLS connection.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use rustls::ExtractedSecrets;
use servicekeel_core::flow::frame::{FrameError, HEADER, Header};
use servicekeel_runtime::net::Stream;
use tokio::io::{AsyncWrite, ReadBuf};

use super::BufferPool;
use super::handshake::Rekey;
use super::pool::BUFFER;
use super::record::{Content, KEY_RECORDS, Key, MAX_KEY_UPDATES, MAX_RECORD, RecordError};
use crate::flow::Waiting;

mod send;

/// So many records and frames are looked at in one turn: of the largest a read brings eight.
const MANY: usize = 256;

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The network.
    #[error("connection broken: {0}")]
    Io(#[from] io::Error),
    /// A record.
    #[error("{0}")]
    Record(#[from] RecordError),
    /// A frame.
    #[error("{0}")]
    Frame(#[from] FrameError),
    /// The next keys.
    #[error("cannot update the TLS keys: {0}")]
    Keys(rustls::Error),
    /// It ended without close_notify or within a frame: cut, not closed.
    #[error("connection closed unexpectedly")]
    Cut,
    /// So many bytes are more than a frame holds, or than what may wait to be sent.
    #[error("{0} bytes that no frame holds, or that the peer is too slow for")]
    TooLong(usize),
    /// The peer broke the rules of a flow.
    #[error("{0}")]
    Flow(#[from] servicekeel_core::flow::machine::Violation),
    /// The peer sent something else than what was due.
    #[error("{0}")]
    Protocol(String),
    /// More waits for applications than may be held for the peer.
    #[error("too much data queued for applications that do not read")]
    Crowded,
    /// More frames have begun and not ended, on connections without a flow, than may be held for the peer.
    #[error("too many connections with a frame that has begun and not ended")]
    Begun,
    /// No path to the peer for too long, or the peer has restarted.
    #[error("lost the path to the peer")]
    Lost,
}

impl ChannelError {
    /// Whether the other side has said why it closes.
    pub(crate) fn is_alert(&self) -> bool {
        matches!(self, Self::Record(RecordError::Alert(_)))
    }
}

/// Where the payload of a frame lies.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// In the buffer of what was received; good until more is read.
    Received(Range<usize>),
    /// Put together from several records; good until the next frame.
    Assembled,
}

/// A frame that came.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    pub(crate) header: Header,
    pub(crate) place: Place,
}

/// What happens on a channel.
pub(crate) enum Next<'c> {
    /// A frame came.
    Frame(Header, &'c [u8]),
    /// What waited to be sent has gone out: there is room for more.
    Flushed,
    /// The peer has closed.
    Closed,
}

/// A TLS 1.3 connection that carries frames.
pub struct Channel<S> {
    stream: S,
    buffers: Arc<BufferPool>,
    seal: Key,
    open: Key,
    rekey: Box<dyn Rekey>,
    /// What was received: `start..end` is still sealed, `plain` is opened and not yet taken.
    input: Option<Box<[u8]>>,
    start: usize,
    end: usize,
    plain: Range<usize>,
    /// A frame that spans records, as far as it came.
    partial: Vec<u8>,
    /// Where what has come of a frame counts.
    begun: Option<Waiting>,
    /// Records and frames since the last read, or since others had their turn.
    looked_at: usize,
    /// The whole of it, until the next frame.
    assembled: Vec<u8>,
    /// What is to be sent: `sent..filled`.
    output: Option<Box<[u8]>>,
    sent: usize,
    filled: usize,
    closed: bool,
    used: bool,
    /// Records under one key.
    key_records: u64,
    key_updates: u64,
    /// Key updates of the peer since its last data.
    updates_in_a_row: u32,
    /// A key update that it asked for waits to be sent: it answers further ones too (RFC 8446 §4.6.3).
    update_waits: bool,
}

impl<S> std::fmt::Debug for Channel<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").field("closed", &self.closed).finish_non_exhaustive()
    }
}

impl<S: Stream> Channel<S> {
    /// See [`Stream::come_here`].
    ///
    /// # Errors
    /// [`ChannelError::Io`]: the channel is of no use any more.
    pub(crate) fn come_here(&mut self) -> Result<(), ChannelError> {
        Ok(self.stream.come_here()?)
    }

    /// A channel over a stream whose handshake is done; `behind` came behind it.
    pub(super) fn new(
        stream: S,
        secrets: &ExtractedSecrets,
        rekey: Box<dyn Rekey>,
        behind: Vec<u8>,
        buffers: Arc<BufferPool>,
    ) -> Result<Self, RecordError> {
        let (seal, open) = (Key::new(secrets.tx.0, &secrets.tx.1)?, Key::new(secrets.rx.0, &secrets.rx.1)?);
        let mut channel = Self {
            stream,
            buffers,
            seal,
            open,
            rekey,
            input: None,
            start: 0,
            end: 0,
            plain: 0..0,
            partial: Vec::new(),
            begun: None,
            looked_at: 0,
            assembled: Vec::new(),
            output: None,
            sent: 0,
            filled: 0,
            closed: false,
            used: false,
            key_records: KEY_RECORDS,
            key_updates: 0,
            updates_in_a_row: 0,
            update_waits: false,
        };
        if !behind.is_empty() {
            if behind.len() > BUFFER {
                return Err(RecordError::TooLong(behind.len()));
            }
            let mut input = channel.buffers.take();
            input[..behind.len()].copy_from_slice(&behind);
            channel.end = behind.len();
            channel.input = Some(input);
        }
        Ok(channel)
    }

    /// The next frame of what was received; `None` where more must be read first, or others have their turn: then
    /// [`Self::poll_fill`] says when to ask again.
    pub(crate) fn next_frame(&mut self) -> Result<Option<Frame>, ChannelError> {
        if self.looked_at >= MANY {
            return Ok(None);
        }
        self.looked_at += 1;
        loop {
            if self.plain.is_empty() && !self.open_record()? {
                return Ok(None);
            }
            let Some(input) = &self.input else { return Ok(None) };
            let plain = &input[self.plain.clone()];
            if self.partial.is_empty()
                && let Some(header) = Header::decode(plain)?
            {
                let whole = HEADER + usize::from(header.len);
                if plain.len() >= whole {
                    let payload = self.plain.start + HEADER..self.plain.start + whole;
                    self.plain.start += whole;
                    return Ok(Some(Frame { header, place: Place::Received(payload) }));
                }
            }
            // The frame goes on in the next record: a header says how much is missing.
            let known = HEADER.saturating_sub(self.partial.len());
            let header_part = known.min(plain.len());
            self.partial.extend_from_slice(&plain[..header_part]);
            self.plain.start += header_part;
            let Some(header) = Header::decode(&self.partial)? else { continue };
            let missing = HEADER + usize::from(header.len) - self.partial.len();
            let plain = &input[self.plain.clone()];
            let part = missing.min(plain.len());
            self.partial.extend_from_slice(&plain[..part]);
            self.plain.start += part;
            if part == missing {
                self.assembled = std::mem::take(&mut self.partial);
                return Ok(Some(Frame { header, place: Place::Assembled }));
            }
        }
    }

    /// Opens the next whole record of application data; false where there is none.
    fn open_record(&mut self) -> Result<bool, ChannelError> {
        while !self.closed && self.start < self.end && self.looked_at < MANY {
            let Some(input) = &mut self.input else { break };
            let Some((whole, content, plain)) = self.open.open(&mut input[self.start..self.end])? else {
                break;
            };
            let at = self.start;
            self.start += whole;
            self.looked_at += 1;
            match content {
                Content::Data if plain.is_empty() => {}
                Content::Data => {
                    self.plain = at + plain.start..at + plain.end;
                    self.updates_in_a_row = 0;
                    return Ok(true);
                }
                Content::Close => self.closed = true,
                Content::KeyUpdate { wanted } => {
                    self.updates_in_a_row += 1;
                    if self.updates_in_a_row > MAX_KEY_UPDATES {
                        return Err(RecordError::KeyUpdates.into());
                    }
                    let (sequence, secrets) = self.rekey.next_rx().map_err(ChannelError::Keys)?;
                    self.open = Key::new(sequence, &secrets)?;
                    self.key_updates += 1;
                    if wanted && !std::mem::replace(&mut self.update_waits, true) {
                        self.update_key()?;
                    }
                }
            }
        }
        Ok(false)
    }

    /// The payload of a frame.
    pub(crate) fn payload(&self, place: &Place) -> &[u8] {
        match place {
            Place::Received(range) => {
                self.input.as_deref().and_then(|input| input.get(range.clone())).unwrap_or(&[])
            }
            Place::Assembled => self.assembled.get(HEADER..).unwrap_or(&[]),
        }
    }

    /// Reads more. The frames that were taken before are gone then. Ready(false): the peer has closed.
    pub(crate) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, ChannelError>> {
        if self.closed {
            return Poll::Ready(Ok(false));
        }
        if std::mem::take(&mut self.looked_at) >= MANY {
            // tokio counts reads, and one may bring thousands of frames that say nothing.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.assembled = Vec::new();
        let mut input = self.input.take().unwrap_or_else(|| self.buffers.take());
        // Plaintext that was not taken yet lies before the sealed rest: the caller takes all frames first.
        debug_assert!(self.plain.is_empty());
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 && BUFFER - self.end < MAX_RECORD {
            input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let mut buf = ReadBuf::new(&mut input[self.end..]);
        let read = Pin::new(&mut self.stream).poll_read(cx, &mut buf);
        let n = buf.filled().len();
        self.end += n;
        if self.end == 0 {
            self.buffers.give(input);
        } else {
            self.input = Some(input);
        }
        match ready!(read) {
            Err(error) => Poll::Ready(Err(error.into())),
            Ok(()) if n == 0 => {
                self.closed = true;
                // Without close_notify the end may be an attacker's (RFC 8446 §6.1).
                Poll::Ready(Err(ChannelError::Cut))
            }
            Ok(()) => Poll::Ready(Ok(true)),
        }
    }

    /// The next frame, with its payload; `None` when the peer has closed. What waits to be sent is sent meanwhile.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// [`ChannelError`]: the connection is of no use any more.
    pub async fn recv(&mut self) -> Result<Option<(Header, &[u8])>, ChannelError> {
        let frame = poll_fn(|cx| self.poll_frame(cx)).await?;
        Ok(frame.map(|frame| (frame.header, self.payload(&frame.place))))
    }

    /// What happens next on a channel that is written to at the same time.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// [`ChannelError`]: the connection is of no use any more.
    pub(crate) async fn next(&mut self) -> Result<Next<'_>, ChannelError> {
        let waits = !self.is_flushed();
        let frame = poll_fn(|cx| match self.poll_frame(cx) {
            Poll::Pending if waits && self.is_flushed() => Poll::Ready(Ok(None)),
            polled => polled.map_ok(Some),
        });
        Ok(match frame.await? {
            None => Next::Flushed,
            Some(None) => Next::Closed,
            Some(Some(frame)) => Next::Frame(frame.header, self.payload(&frame.place)),
        })
    }

    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Frame>, ChannelError>> {
        loop {
            if let Some(frame) = self.next_frame()? {
                return Poll::Ready(Ok(Some(frame)));
            }
            if let Poll::Ready(Err(error)) = self.poll_flush(cx) {
                return Poll::Ready(Err(error));
            }
            let filled = self.poll_fill(cx);
            if filled.is_pending() {
                let has_begun = self.input.is_some() || !self.partial.is_empty();
                if self.begun.as_mut().is_some_and(|begun| !begun.count(has_begun)) {
                    return Poll::Ready(Err(ChannelError::Begun));
                }
            }
            if !ready!(filled)? {
                let whole = self.partial.is_empty();
                return Poll::Ready(if whole { Ok(None) } else { Err(ChannelError::Cut) });
            }
        }
    }

    /// What has come of a frame that is waited for counts there from now on.
    pub(crate) fn count_begun(&mut self, begun: Waiting) {
        self.begun = Some(begun);
    }

    pub(crate) fn count_nothing(&mut self) {
        self.begun = None;
    }

    /// Whether nothing came and nothing waits: an unused connection that is not so is dead, or its peer broke the rules.
    pub fn is_quiet(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.looked_at = 0;
        let empty = self.sent == self.filled && self.plain.is_empty() && self.start == self.end;
        empty && self.stream.is_idle() && self.poll_fill(&mut cx).is_pending()
    }

    /// Whether the other side's system has acknowledged all that was sent.
    pub(crate) fn is_taken(&self) -> bool {
        self.sent == self.filled && self.stream.is_taken()
    }

    /// After how long the system sends again what is not acknowledged; `None` where this can't be told.
    pub(crate) fn retransmits_after(&self) -> Option<Duration> {
        self.stream.retransmits_after()
    }

    /// Whether what was sent finds no answer, so that the path must be dead.
    pub(crate) fn is_dead(&self) -> bool {
        self.stream.is_dead()
    }

    /// Whether it has carried a flow.
    pub fn was_used(&self) -> bool {
        self.used
    }

    /// It carries a flow.
    pub(crate) fn mark_used(&mut self) {
        self.used = true;
    }

    /// Whether nothing waits to be sent.
    pub(crate) fn is_flushed(&self) -> bool {
        self.sent == self.filled && self.output.is_none()
    }

    pub(crate) fn buffers(&self) -> Arc<BufferPool> {
        self.buffers.clone()
    }

    /// Writes payloads to an application's socket from where they lie.
    pub(crate) fn poll_deliver<A: AsyncWrite + Unpin>(
        &self,
        cx: &mut Context<'_>,
        app: &mut A,
        places: &[Range<usize>],
    ) -> Poll<io::Result<usize>> {
        let Some(input) = &self.input else { return Poll::Ready(Ok(0)) };
        let mut slices = [IoSlice::new(&[]); 16];
        let n = places.len().min(slices.len());
        for (slice, place) in slices.iter_mut().zip(places) {
            *slice = IoSlice::new(&input[place.clone()]);
        }
        Pin::new(app).poll_write_vectored(cx, &slices[..n])
    }
}

#[cfg(test)]
impl<S: Stream> Channel<S> {
    pub(crate) fn flip_a_sealed_bit(&mut self) {
        self.output.as_mut().unwrap()[self.filled - 20] ^= 1;
    }

    pub(crate) fn update_key_every(&mut self, records: u64) {
        self.key_records = records;
        self.seal.set_limit(records);
    }

    /// Puts bytes to what is sent as they are.
    pub(crate) fn put_raw(&mut self, bytes: &[u8]) {
        self.put(bytes).unwrap();
    }

    /// Puts a record of any kind.
    pub(crate) fn put_sealed(&mut self, kind: u8, content: &[u8]) {
        let record = self.seal.small(kind, content).unwrap();
        self.put(&record).unwrap();
    }

    /// Puts a key update, and goes over to the next key.
    pub(crate) fn put_key_update(&mut self, wanted: u8) {
        self.put_sealed(22, &[24, 0, 0, 1, wanted]);
        let (sequence, secrets) = self.rekey.next_tx().unwrap();
        self.seal = Key::new(sequence, &secrets).unwrap();
    }

    pub(crate) fn key_updates(&self) -> u64 {
        self.key_updates
    }
}

impl<S> Drop for Channel<S> {
    fn drop(&mut self) {
        for buffer in [self.input.take(), self.output.take()].into_iter().flatten() {
            self.buffers.give(buffer);
        }
    }
}
