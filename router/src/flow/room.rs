//! A bound on the bytes that the flows with one peer have on their way unacknowledged, and on those that wait here for
//! applications which take nothing.

use std::collections::VecDeque;
use std::sync::Arc;

use servicekeel_core::flow::frame::{HEADER, MAX_DATA, MAX_PAYLOAD};
use servicekeel_core::flow::machine::ACK_EVERY;

use crate::bounds;
use crate::rooms::{Account, Lease, Rooms};
use crate::tls::BUFFER;

/// What each flow may have on its way at any time: as much as the peer acknowledges at the latest, so that a flow which
/// waits for room always waits for an acknowledgement too, and that comes once its application reads.
pub(super) const OWN: u64 = ACK_EVERY;
/// What a flow takes, and gives back, at once.
const CHUNK: u64 = 256 << 10;
/// A flow takes no more than this part of what is left to its peer, so that there is always some for the next.
const PART: u64 = 8;

/// The most that a connection holds of a frame which has begun: sealed, and opened.
const BEGUN: u64 = (BUFFER + HEADER + MAX_PAYLOAD) as u64;

/// What the flows with one peer hold.
#[derive(Debug, Clone)]
pub(crate) struct Owner {
    pub(super) on_way: Arc<Account>,
    pub(super) held: Arc<Account>,
    /// Of connections that wait for a frame.
    pub(super) begun: Arc<Account>,
}

impl Owner {
    /// Of a router.
    pub(crate) fn of(router: &bounds::Owner, rooms: &Rooms) -> Self {
        Self {
            on_way: rooms.on_way.account_of(router),
            held: rooms.held.account_of(router),
            begun: rooms.begun.account_of(router),
        }
    }

    /// For a connection that waits for a frame.
    pub(crate) fn waiting(&self) -> Waiting {
        Waiting { account: self.begun.clone(), room: None }
    }

    #[cfg(test)]
    pub(crate) fn new(rooms: &Rooms) -> Self {
        Self { on_way: rooms.on_way.account(), held: rooms.held.account(), begun: rooms.begun.account() }
    }
}

/// What a connection holds of a frame that has begun.
pub(crate) struct Waiting {
    account: Arc<Account>,
    room: Option<Lease>,
}

impl Waiting {
    /// Counts it, where one `has_begun`; false where there is no room for it.
    pub(crate) fn count(&mut self, has_begun: bool) -> bool {
        match (has_begun, &self.room) {
            (true, None) => self.room = self.account.lease(BEGUN),
            (false, Some(_)) => self.room = None,
            _ => {}
        }
        !has_begun || self.room.is_some()
    }
}

/// What one flow has on its way of its peer's part. Dropped, it is given back.
pub(super) struct Share {
    account: Arc<Account>,
    taken: u64,
}

impl Share {
    pub(super) fn new(account: Arc<Account>) -> Self {
        Self { account, taken: 0 }
    }

    /// Gives back what is not needed while so many bytes are on their way, but one chunk for the next.
    pub(super) fn settle(&mut self, on_way: u64) {
        let needed = if on_way > OWN { (on_way - OWN).next_multiple_of(CHUNK) + CHUNK } else { 0 };
        if self.taken > needed {
            self.account.give(self.taken - needed);
            self.taken = needed;
        }
    }

    /// How many more bytes may go out while so many are on their way.
    pub(super) fn allows(&mut self, on_way: u64) -> u64 {
        self.settle(on_way);
        if on_way >= OWN + self.taken
            && self.taken + CHUNK <= self.account.left() / PART
            && self.account.take(CHUNK)
        {
            self.taken += CHUNK;
        }
        (OWN + self.taken).saturating_sub(on_way)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.account.give(self.taken);
    }
}

/// Bytes of one block: what the largest frame has.
const BLOCK: usize = MAX_DATA;

/// Bytes that have left the channel's buffer, in blocks that count whole against the peer's part.
pub(super) struct Held {
    account: Arc<Account>,
    blocks: VecDeque<Vec<u8>>,
    /// Bytes of the first block that are gone.
    start: usize,
}

impl Held {
    pub(super) fn new(owner: &Owner) -> Self {
        Self { account: owner.held.clone(), blocks: VecDeque::new(), start: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Whether the peer's part has room for so many bytes more. What is put must have been asked for.
    pub(super) fn has_room(&self, n: usize) -> bool {
        self.account.left() >= (n.div_ceil(BLOCK) * BLOCK) as u64
    }

    /// Puts bytes behind the others; false where the peer's part has no room, and then they are lost.
    pub(super) fn put(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            if self.blocks.back().is_none_or(|block| block.len() == BLOCK) {
                if !self.account.take(BLOCK as u64) {
                    return false;
                }
                self.blocks.push_back(Vec::with_capacity(BLOCK));
            }
            let Some(block) = self.blocks.back_mut() else { return false };
            let n = bytes.len().min(BLOCK - block.len());
            block.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
        }
        true
    }

    /// The first bytes.
    pub(super) fn first(&self) -> &[u8] {
        self.blocks.front().map_or(&[], |block| &block[self.start..])
    }

    /// The first `n` of [`Self::first`] are gone.
    pub(super) fn consume(&mut self, n: usize) {
        self.start += n;
        if self.blocks.front().is_some_and(|block| block.len() == self.start) {
            self.blocks.pop_front();
            self.start = 0;
            self.account.give(BLOCK as u64);
        }
        if self.blocks.is_empty() {
            self.blocks = VecDeque::new();
        }
    }

    pub(super) fn clear(&mut self) {
        self.account.give((self.blocks.len() * BLOCK) as u64);
        (self.blocks, self.start) = (VecDeque::new(), 0);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.clear();
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
    fn one_flow_has_its_window_and_many_share_what_their_peer_has() {
        let rooms = Rooms::default();
        let hostile = Owner::new(&rooms);
        let mut shares = Vec::new();
        let mut sent = Vec::new();
        for _ in 0..5000 {
            let mut share = Share::new(hostile.on_way.clone());
            sent.push(fill(&mut share));
            shares.push(share);
        }
        assert_eq!(sent[0], WINDOW);
        assert!(sent.iter().all(|&n| n >= OWN));
        assert_eq!(sent[4999], OWN);
        // Another peer has its part, however many flows the first one stops.
        let mut other = Share::new(Owner::new(&rooms).on_way);
        assert_eq!(fill(&mut other), WINDOW);
        // What is acknowledged makes room, and so does an end.
        shares[..4000].iter_mut().for_each(|share| share.settle(OWN));
        assert!(fill(&mut shares[0]) > OWN);
        drop(shares);
        assert_eq!(hostile.on_way.held(), 0);
    }

    #[test]
    fn what_is_held_is_counted_and_comes_out_as_it_was_put() {
        let owner = Owner::new(&Rooms::default());
        let mut held = Held::new(&owner);
        let bytes: Vec<u8> = (0..100_000_u32).map(|i| (i * 7 + i / 251) as u8).collect();
        for part in bytes.chunks(777) {
            assert!(held.put(part));
        }
        assert_eq!(owner.held.held(), (bytes.len().div_ceil(BLOCK) * BLOCK) as u64);
        let mut got = Vec::new();
        while !held.is_empty() {
            let n = held.first().len().min(1000);
            got.extend_from_slice(&held.first()[..n]);
            held.consume(n);
        }
        assert!(got == bytes && owner.held.held() == 0);
        while held.put(&bytes) {}
        assert!(!held.has_room(1));
        drop(held);
        assert_eq!(owner.held.held(), 0);
    }
}
