//! One direction of a flow, as it comes: its bytes, its end.

use super::Oracle;
use crate::content::Content;

/// One direction of a flow, as it comes.
pub(crate) struct Incoming<'a> {
    oracle: &'a Oracle,
    number: u64,
    direction: u64,
    content: Content,
    total: u64,
    received: u64,
}

impl<'a> Incoming<'a> {
    pub(crate) fn new(oracle: &'a Oracle, number: u64, direction: u64, total: u64) -> Self {
        Self { oracle, number, direction, content: Content::new(number, direction), total, received: 0 }
    }

    /// Bytes came.
    pub(crate) fn take(&mut self, bytes: &[u8]) {
        self.oracle.hear(self.number, self.direction, bytes.len() as u64);
        if let Some(at) = self.content.differs(self.received, bytes) {
            self.oracle.violate(format_args!("flow {}: byte {at} is another than was sent", self.number));
        }
        self.received += bytes.len() as u64;
        if self.received > self.total {
            self.oracle.violate(format_args!(
                "flow {}: {} bytes came where {} were sent",
                self.number, self.received, self.total
            ));
        }
    }

    /// The end came.
    pub(crate) fn end(&self) {
        if self.received < self.total && self.oracle.is_end_honest(self.number) {
            self.oracle.violate(format_args!(
                "flow {}: ends as if complete after {} of {} bytes",
                self.number, self.received, self.total
            ));
        }
    }

    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    /// The end came before the service spoke.
    pub(crate) fn end_of_silence(&self) {
        if self.oracle.is_end_honest(self.number) {
            self.oracle.violate(format_args!("flow {} ends before its service spoke", self.number));
        }
    }
}
