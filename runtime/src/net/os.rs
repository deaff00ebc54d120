//! The real network: sockets of the kernel, by tokio.
