//! A bound on the bytes that all flows of a router have on their way unacknowledged: the other router holds them where
//! its application does not read.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use servicekeel_core::flow::machine::ACK_EVERY;

use crate::tls::BufferPool;

/// What all flows of a router may have on their way together, beside [`OWN`] of each: 256 MiB.
pub(crate) const ROOM: u64 = 256 << 20;
/// What each flow may have on its way at any time: as much as the peer acknowledges at the latest, so that a flow which
/// waits for room always waits for an acknowledgement too, and that comes once its application reads.
pub(super) const OWN: u64 = ACK_EVERY;
/// What a flow takes, and gives back, at once.
const CHUNK: u64 = 256 << 10;
/// A flow takes no more than this part of what is left, so that there is always some for the next.
const PART: u64 = 8;

/// What is taken of [`ROOM`].
#[derive(Debug, Default)]
pub(crate) struct Room(AtomicU64);

impl Room {
    /// Takes a chunk for a flow that has so much already.
    fn take(&self, has: u64) -> bool {
        let taken = self.0.fetch_add(CHUNK, Ordering::Relaxed) + CHUNK;
        let fits = has + CHUNK <= ROOM.saturating_sub(taken) / PART;
        if !fits {
            self.give(CHUNK);
        }
        fits
    }

    #[cfg(test)]
    pub(super) fn exhaust(&self) {
        self.0.store(ROOM, Ordering::Relaxed);
    }

    fn give(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }
}

/// What one flow has of it. Dropped, it is given back.
pub(super) struct Share {
    buffers: Arc<BufferPool>,
    taken: u64,
}

impl Share {
    pub(super) fn new(buffers: Arc<BufferPool>) -> Self {
        Self { buffers, taken: 0 }
    }

    /// Gives back what is not needed while so many bytes are on their way, but one chunk for the next.
    pub(super) fn settle(&mut self, on_way: u64) {
        let needed = if on_way > OWN { (on_way - OWN).next_multiple_of(CHUNK) + CHUNK } else { 0 };
        if self.taken > needed {
            self.buffers.room().give(self.taken - needed);
            self.taken = needed;
        }
    }

    /// How many more bytes may go out while so many are on their way.
    pub(super) fn allows(&mut self, on_way: u64) -> u64 {
        self.settle(on_way);
        if on_way >= OWN + self.taken && self.buffers.room().take(self.taken) {
            self.taken += CHUNK;
        }
        (OWN + self.taken).saturating_sub(on_way)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.buffers.room().give(self.taken);
    }
}

#[cfg(test)]
mod tests {
    use servicekeel_core::flow::machine::WINDOW;

    use super::*;

    /// Sends as much as is allowed, and never is acknowledged.
    fn fill(share: &mut Share) -> u64 {
        let mut on_way = 0;
        while on_way < WINDOW {
            match share.allows(on_way) {
                0 => break,
                more => on_way += more.min(WINDOW - on_way),
            }
        }
        on_way
    }

    #[test]
    fn one_flow_has_its_window_and_many_share_the_room() {
        let buffers = BufferPool::new();
        let mut shares = Vec::new();
        let mut sent = Vec::new();
        for _ in 0..5000 {
            let mut share = Share::new(buffers.clone());
            sent.push(fill(&mut share));
            shares.push(share);
        }
        assert_eq!(sent[0], WINDOW);
        assert!(sent.iter().all(|&n| n >= OWN));
        let beyond: u64 = sent.iter().map(|n| n - OWN).sum();
        assert!(beyond <= ROOM, "{beyond} bytes of {ROOM}");
        assert_eq!(sent[4999], OWN);
        // What is acknowledged makes room, and so does an end.
        shares[..4000].iter_mut().for_each(|share| share.settle(OWN));
        assert!(fill(&mut shares[0]) > OWN);
        drop(shares);
        assert_eq!(buffers.room().0.load(Ordering::Relaxed), 0);
    }
}
