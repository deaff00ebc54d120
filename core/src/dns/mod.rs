//! DNS: the names that imports give, what is answered for each, and what becomes of all other names.
//!
//! - A [`Zone`] takes a [`Name`] and a type's number and says what the answer is.
//! - [`wire`] reads queries and responses, and writes replies.
//! - [`upstream`] decides which upstream is asked what and when, and remembers what each of them bears.
//! - [`cache`] decides what of other servers' answers is kept.

pub mod cache;
mod name;
pub mod upstream;
pub mod wire;
mod zone;

pub use name::{MAX_NAME, Name, NameError};
pub use zone::{Answer, Record, Zone};

/// How long others may keep our answers, in seconds. A freed address rests longer before another service
/// gets it, so that no cached answer ever leads to the wrong service.
pub const TTL_SECONDS: u32 = 5;

/// The numbers of the record types that are answered with records (RFC 1035 §3.2.2, RFC 2782, RFC 8482).
pub mod record_type {
    /// An IPv4 address.
    pub const A: u16 = 1;
    /// The name of an address.
    pub const PTR: u16 = 12;
    /// Where a named port of a service is.
    pub const SRV: u16 = 33;
    /// Whatever there is; one record set is answer enough (RFC 8482 §4.1).
    pub const ANY: u16 = 255;
}
