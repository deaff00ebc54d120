//! The sending half of a channel: frames into sealed records, records to the stream.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use minicbor::Encode;
use servicekeel_core::flow::frame::{self, HEADER, Header, Kind, MAX_PAYLOAD};
use servicekeel_runtime::net::Stream;

use super::{Channel, ChannelError};
use crate::tls::pool::BUFFER;
use crate::tls::record::{Key, MAX_PLAINTEXT, MAX_RECORD, RECORD_HEADER, RECORD_TRAILER};

/// Bytes that wait to be sent before [`Channel::is_full`]. What must go out (such as one more frame) still may.
const FULL: usize = BUFFER - 2 * MAX_RECORD;

impl<S: Stream> Channel<S> {
    /// Whether there is room for a record of `n` bytes of plaintext.
    pub(crate) fn has_room(&self, n: usize) -> bool {
        let filled = if self.sent == self.filled { 0 } else { self.filled };
        filled + RECORD_HEADER + n + RECORD_TRAILER <= BUFFER
    }

    /// Where a record's plaintext of at most `n` bytes goes; then [`Self::seal_record`]. `None` where there is no room.
    pub(crate) fn room(&mut self, n: usize) -> Option<&mut [u8]> {
        debug_assert!(n <= MAX_PLAINTEXT);
        if self.sent == self.filled {
            (self.sent, self.filled) = (0, 0);
        }
        if !self.has_room(n) {
            return None;
        }
        let start = self.filled + RECORD_HEADER;
        let output = self.output.get_or_insert_with(|| self.buffers.take());
        output.get_mut(start..start + n)
    }

    /// Seals the `n` bytes that were put where [`Self::room`] said.
    pub(crate) fn seal_record(&mut self, n: usize) -> Result<(), ChannelError> {
        let end = self.filled + RECORD_HEADER + n + RECORD_TRAILER;
        let Some(record) = self.output.as_mut().and_then(|output| output.get_mut(self.filled..end)) else {
            return Err(ChannelError::TooLong(n));
        };
        self.seal.seal(record)?;
        self.filled = end;
        if self.seal.is_worn() {
            self.update_key()?;
        }
        Ok(())
    }

    /// Goes over to the next key for what is sent.
    pub(super) fn update_key(&mut self) -> Result<(), ChannelError> {
        let record = self.seal.key_update()?;
        self.put(&record)?;
        let (sequence, secrets) = self.rekey.next_tx().map_err(ChannelError::Keys)?;
        self.seal = Key::new(sequence, &secrets)?;
        self.seal.set_limit(self.key_records);
        self.key_updates += 1;
        Ok(())
    }

    /// Puts a sealed record to what is sent.
    pub(super) fn put(&mut self, record: &[u8]) -> Result<(), ChannelError> {
        self.compact();
        let output = self.output.get_or_insert_with(|| self.buffers.take());
        let end = self.filled + record.len();
        let room = output.get_mut(self.filled..end).ok_or(ChannelError::TooLong(record.len()))?;
        room.copy_from_slice(record);
        self.filled = end;
        Ok(())
    }

    fn compact(&mut self) {
        if self.sent > 0
            && let Some(output) = &mut self.output
        {
            output.copy_within(self.sent..self.filled, 0);
            (self.sent, self.filled) = (0, self.filled - self.sent);
        }
    }

    /// Puts a frame to what is sent. At the bound the connection is too slow for what it is asked: see [`Self::is_full`].
    ///
    /// # Errors
    /// [`ChannelError::TooLong`] where the frame does not fit (any more).
    pub fn send_payload(&mut self, kind: Kind, offset: u64, payload: &[u8]) -> Result<(), ChannelError> {
        let len = u16::try_from(payload.len()).map_err(|_| ChannelError::TooLong(payload.len()))?;
        let header = Header { kind, len, offset }.encode();
        self.compact();
        let (mut header, mut payload) = (&header[..], payload);
        loop {
            let n = (header.len() + payload.len()).min(MAX_PLAINTEXT);
            let room = self.room(n).ok_or(ChannelError::TooLong(payload.len()))?;
            room[..header.len()].copy_from_slice(header);
            let (now, later) = payload.split_at(n - header.len());
            room[header.len()..].copy_from_slice(now);
            (header, payload) = (&[], later);
            self.seal_record(n)?;
            if payload.is_empty() {
                return Ok(());
            }
        }
    }

    /// Puts a frame of CBOR to what is sent.
    ///
    /// # Errors
    /// As [`Self::send_payload`].
    pub fn send_message<T: Encode<()>>(
        &mut self,
        kind: Kind,
        offset: u64,
        message: &T,
    ) -> Result<(), ChannelError> {
        let frame = frame::encode_frame(kind, offset, message).ok_or(ChannelError::TooLong(MAX_PAYLOAD))?;
        self.send_payload(kind, offset, frame.get(HEADER..).unwrap_or(&[]))
    }

    /// Whether so much waits to be sent that a datagram is better dropped.
    pub fn is_full(&self) -> bool {
        self.filled - self.sent >= FULL / 2
    }

    /// Sends what waits.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ChannelError>> {
        while self.sent < self.filled {
            let Some(output) = &self.output else { break };
            let n = ready!(Pin::new(&mut self.stream).poll_write(cx, &output[self.sent..self.filled]))?;
            if n == 0 {
                return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero).into()));
            }
            self.sent += n;
        }
        (self.sent, self.filled) = (0, 0);
        self.update_waits = false;
        if let Some(output) = self.output.take() {
            self.buffers.give(output);
        }
        Pin::new(&mut self.stream).poll_flush(cx).map_err(Into::into)
    }

    /// Sends what waits.
    ///
    /// # Errors
    /// [`ChannelError`]: the connection is of no use any more.
    pub async fn flush(&mut self) -> Result<(), ChannelError> {
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Says close_notify and ends the sending side.
    ///
    /// # Errors
    /// Where the network does not take it.
    pub async fn close(&mut self) -> Result<(), ChannelError> {
        let record = self.seal.close_notify()?;
        self.put(&record)?;
        self.flush().await?;
        poll_fn(|cx| Pin::new(&mut self.stream).poll_shutdown(cx)).await?;
        Ok(())
    }
}
