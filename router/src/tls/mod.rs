//! TLS 1.3 connections to other routers, which carry frames.
//!
//! [`connect`] and [`accept`] shake hands by rustls; a [`Channel`] then seals and opens the records itself, in place.
//! rustls's own buffered connection reads 4 KiB at a time and copies each record twice.

mod channel;
mod handshake;
mod pool;
mod record;

pub use channel::{Channel, ChannelError};
pub(crate) use channel::{Next, Place};
pub use handshake::{HandshakeError, accept, connect};
pub(crate) use pool::BUFFER;
pub use pool::BufferPool;
pub use record::RecordError;

#[cfg(test)]
pub(crate) mod tests;
