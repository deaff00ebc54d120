//! TLS 1.3 connections to other routers, which carry frames.
//!
//! [`connect`] and [`accept`] shake hands by rustls; a [`Channel`] then seals and opens the records itself, in place.
//! rustls's own buffered connection reads 4 KiB at a time and copies each record twice.

use rustls::AlertDescription;

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

/// What an alert of the other side means to whoever reads it here.
fn refused(alert: AlertDescription) -> String {
    let meaning = match alert {
        AlertDescription::CertificateExpired => {
            ": to it, this router's certificate has expired, or is not valid yet: compare the clocks, and renew it"
        }
        AlertDescription::UnknownCA => {
            ": its `trust` has no authority that vouches for this router: add this cluster's bundle there"
        }
        AlertDescription::CertificateRevoked => {
            ": its `revoked` has this router, or a certificate that it shows"
        }
        AlertDescription::UnsupportedCertificate => {
            ": this router's certificate is not made for clientAuth and serverAuth"
        }
        AlertDescription::BadCertificate => {
            ": this router's certificate has no name of a router, or can't be read"
        }
        _ => "",
    };
    format!("the peer rejected us with TLS alert {alert:?}{meaning}; see the peer's log")
}

#[cfg(test)]
pub(crate) mod tests;
