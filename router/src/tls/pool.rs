//! Buffers of the data path, shared by all connections of a router: a connection holds one only while bytes are in it.

use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of one buffer: several full records each way.
pub(crate) const BUFFER: usize = 128 * 1024;
/// The most unused buffers kept: 8 MiB.
const MAX_KEPT: usize = 64;

/// The pool.
#[derive(Debug, Default)]
pub struct BufferPool {
    kept: Mutex<Vec<Box<[u8]>>>,
}

impl BufferPool {
    /// An empty pool.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// A buffer of [`BUFFER`] bytes, with anything in it.
    pub(crate) fn take(&self) -> Box<[u8]> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.unwrap_or_else(|| vec![0; BUFFER].into_boxed_slice())
    }

    /// Gives a buffer back.
    pub(crate) fn give(&self, buffer: Box<[u8]>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < MAX_KEPT {
            kept.push(buffer);
        }
    }
}
