//! The bytes of a download: each block says which one it is, so that a lost, doubled or moved block is found.

/// The size of a block in bytes.
pub const BLOCK: usize = 64 * 1024;

/// Writes blocks, and checks those that come.
pub struct Content {
    block: Vec<u8>,
}

impl Default for Content {
    fn default() -> Self {
        // A linear congruential generator (Numerical Recipes, 3rd ed., §7.1.1): any bytes that do not repeat will do.
        let mut state = 0x5ee1_u32;
        let next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        Self { block: std::iter::repeat_with(next).take(BLOCK).collect() }
    }
}

impl Content {
    /// Block number `n`, from 0.
    pub fn block(&mut self, n: u64) -> &[u8] {
        self.block[..8].copy_from_slice(&n.to_be_bytes());
        &self.block
    }

    /// Whether `bytes`, at most [`BLOCK`], are the beginning of block `n`.
    pub fn matches(&mut self, n: u64, bytes: &[u8]) -> bool {
        bytes == &self.block(n)[..bytes.len()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_itself_and_no_other() {
        let (mut sent, mut expected) = (Content::default(), Content::default());
        let block = sent.block(7).to_vec();
        assert!(expected.matches(7, &block));
        assert!(!expected.matches(8, &block));
        let mut broken = block;
        broken[BLOCK - 1] ^= 1;
        assert!(!expected.matches(7, &broken));
    }
}
