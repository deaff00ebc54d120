//! What flows and datagrams carry: bytes that both ends can tell from the number of the flow.

use std::sync::OnceLock;

use crate::random::Random;

/// A prime, so that no power of two in a buffer or a frame hides a shift.
const PERIOD: usize = 65_521;

fn period() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let mut random = Random::new(1);
        let period: Vec<u8> = (0..PERIOD).map(|_| random.draw() as u8).collect();
        period.repeat(2)
    })
}

/// The bytes of one direction of a flow.
#[derive(Debug, Clone, Copy)]
pub struct Content {
    start: usize,
}

impl Content {
    /// Those of a flow's direction, or of a datagram.
    pub fn new(number: u64, direction: u64) -> Self {
        let start = Random::new(number ^ (direction << 63)).draw() as usize % PERIOD;
        Self { start }
    }

    /// The bytes from `offset` on, as many as lie in one piece; `len` at most.
    pub fn at(&self, offset: u64, len: usize) -> &'static [u8] {
        let from = (self.start + (offset % PERIOD as u64) as usize) % PERIOD;
        &period()[from..from + len.min(PERIOD)]
    }

    /// Where `bytes`, which came at `offset`, are not what they should be.
    pub fn differs(&self, offset: u64, bytes: &[u8]) -> Option<u64> {
        let mut at = offset;
        for part in bytes.chunks(PERIOD) {
            let wanted = self.at(at, part.len());
            if wanted != part {
                let wrong = wanted.iter().zip(part).position(|(a, b)| a != b).unwrap_or(0);
                return Some(at + wrong as u64);
            }
            at += part.len() as u64;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_or_a_change_is_seen_wherever_it_is() {
        let content = Content::new(7, 0);
        let mut bytes: Vec<u8> = (0..3).flat_map(|i| content.at(i * 60_000, 60_000)).copied().collect();
        assert_eq!(content.differs(0, &bytes), None);
        assert!(content.differs(1, &bytes).is_some());
        assert!(content.differs(65_536, &bytes).is_some());
        assert!(Content::new(7, 1).differs(0, &bytes).is_some());
        bytes[170_000] ^= 1;
        assert_eq!(content.differs(0, &bytes), Some(170_000));
    }
}
