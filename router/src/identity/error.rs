//! Why a certificate is not taken, said so that the reader knows what to do.

use std::fmt;

use rustls::pki_types::UnixTime;
use servicekeel_core::name::{ClusterName, RouterId};

/// Why a certificate does not prove that its holder is a router of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The other side showed none.
    #[error("no certificate presented; routers must present one")]
    NoCertificate,
    /// More certificates than any chain of ours has.
    #[error("a chain of {0} certificates; the limit is {max}", max = super::MAX_CHAIN)]
    LongChain(usize),
    /// Longer than any chain of ours.
    #[error("a chain of {0} bytes; the limit is {max}", max = super::MAX_CHAIN_BYTES)]
    LargeChain(usize),
    /// Not a certificate that can be read.
    #[error("cannot parse the certificate: {0}")]
    Malformed(webpki::Error),
    /// No URI among the subject alternative names.
    #[error("the certificate has no SPIFFE name (a URI among its subject alternative names)")]
    NoSpiffeName,
    /// Several URIs: which one would it be?
    #[error("the certificate has {0} URI names; a SPIFFE certificate has exactly one")]
    SpiffeNames(usize),
    /// A URI that names no router.
    #[error("the certificate's name {uri} is not spiffe://<cluster>/router/<node>: {reason}")]
    NotARouter {
        /// The URI, escaped and cut.
        uri: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Of a cluster that has no entry under `trust`.
    #[error(
        "{id} is of a cluster that is not trusted; add an entry for {cluster} under `trust` with the bundle that \
         `servicekeel-router pki bundle` prints there",
        cluster = id.cluster
    )]
    UntrustedCluster {
        /// Whom the certificate names.
        id: RouterId,
    },
    /// Cut off by this router's config.
    #[error("{id} is revoked: `revoked` has {by}")]
    Revoked {
        /// Whom the certificate names.
        id: RouterId,
        /// What of it `revoked` has.
        by: String,
    },
    /// Issued by someone who has no say over that cluster.
    #[error("the certificate of {id} was not issued by an authority of {cluster}", cluster = id.cluster)]
    WrongAuthority {
        /// Whom the certificate names.
        id: RouterId,
    },
    /// Its time is over.
    #[error("the certificate of {id} expired on {}; it is {} now", Date(*not_after), Date(*now))]
    Expired {
        /// Whom the certificate names.
        id: RouterId,
        /// The end of its validity.
        not_after: UnixTime,
        /// The time of the check.
        now: UnixTime,
    },
    /// Its time has not begun.
    #[error(
        "the certificate of {id} is valid from {} on; it is {} now: is this machine's clock right?",
        Date(*not_before), Date(*now)
    )]
    NotYetValid {
        /// Whom the certificate names.
        id: RouterId,
        /// The start of its validity.
        not_before: UnixTime,
        /// The time of the check.
        now: UnixTime,
    },
    /// Not made for this side of a connection.
    #[error("the certificate of {id} lacks the extended key usage {wanted}")]
    Usage {
        /// Whom the certificate names.
        id: RouterId,
        /// `serverAuth`, `clientAuth`, or either.
        wanted: &'static str,
    },
    /// Any other rule of RFC 5280.
    #[error("the certificate of {id} is not valid: {reason}")]
    Invalid {
        /// Whom the certificate names.
        id: RouterId,
        /// The rule.
        reason: webpki::Error,
    },
}

impl PeerError {
    /// What kind of reason it is to rustls, which makes the alert of it that the other side gets (RFC 8446 §6.2): such
    /// as certificate_expired, unknown_ca, certificate_revoked.
    pub(super) fn kind(&self) -> rustls::CertificateError {
        use rustls::CertificateError as Kind;
        match self {
            Self::Expired { .. } => Kind::Expired,
            Self::NotYetValid { .. } => Kind::NotValidYet,
            Self::Revoked { .. } => Kind::Revoked,
            Self::UntrustedCluster { .. } | Self::WrongAuthority { .. } => Kind::UnknownIssuer,
            Self::Usage { .. } => Kind::InvalidPurpose,
            Self::Malformed(_) => Kind::BadEncoding,
            Self::NoSpiffeName | Self::SpiffeNames(_) | Self::NotARouter { .. } => Kind::NotValidForName,
            Self::NoCertificate | Self::LongChain(_) | Self::LargeChain(_) | Self::Invalid { .. } => {
                Kind::Other(rustls::OtherError(std::sync::Arc::new(self.clone())))
            }
        }
    }

    /// Whether it is the same fault of the same certificate, be it at another time.
    pub(crate) fn same_as(&self, other: &Self) -> bool {
        let undated = |error: &Self| {
            let mut error = error.clone();
            if let Self::Expired { now, .. } | Self::NotYetValid { now, .. } = &mut error {
                *now = UnixTime::since_unix_epoch(std::time::Duration::ZERO);
            }
            error
        };
        undated(self) == undated(other)
    }

    /// Whom the certificate names, which is not proven.
    pub fn claims(&self) -> Option<&RouterId> {
        match self {
            Self::UntrustedCluster { id }
            | Self::Revoked { id, .. }
            | Self::WrongAuthority { id }
            | Self::Expired { id, .. }
            | Self::NotYetValid { id, .. }
            | Self::Usage { id, .. }
            | Self::Invalid { id, .. } => Some(id),
            _ => None,
        }
    }
}

/// A part of a router's identity, as the config names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// The own cluster's authority.
    Ca,
    /// The own certificate, with the intermediate ones behind it.
    Certificate,
    /// Its key.
    Key,
    /// Another cluster's authority.
    Trust(ClusterName),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ca => f.write_str("identity.ca"),
            Self::Certificate => f.write_str("identity.cert"),
            Self::Key => f.write_str("identity.key"),
            Self::Trust(cluster) => write!(f, "trust of {cluster}"),
        }
    }
}

/// Why a router can't take an identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// A file that is not the PEM that belongs there.
    #[error("{part}: {reason}")]
    Pem {
        /// Which one.
        part: Part,
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate where an authority's belongs.
    #[error("{part}: {subject} is not an authority (basicConstraints does not say CA)")]
    NotAnAuthority {
        /// Which one.
        part: Part,
        /// The certificate's subject.
        subject: String,
    },
    /// An authority that says itself that it belongs to another cluster.
    #[error("{part}: this is the authority of {named}, not of {wanted}")]
    OtherAuthority {
        /// Which one.
        part: Part,
        /// The cluster that the authority names.
        named: String,
        /// The cluster under which it stands.
        wanted: ClusterName,
    },
    /// `revoked` has an authority, where it has no effect.
    #[error(
        "{part}: the authority {fingerprint} is revoked as if it were a node's certificate; remove it from here instead"
    )]
    RevokedAuthority {
        /// Where it is trusted.
        part: Part,
        /// Its fingerprint.
        fingerprint: super::Fingerprint,
    },
    /// One authority for two clusters: each could then speak for the other.
    #[error("the same authority is configured for {0} and {1}; each cluster needs its own")]
    SharedAuthority(ClusterName, ClusterName),
    /// `trust` names a cluster twice.
    #[error("trust lists {0} twice; put all its certificates into one file")]
    TrustTwice(ClusterName),
    /// `trust` names the own cluster.
    #[error(
        "trust lists {0}, this router's own cluster; its authorities belong in identity.ca (one file may hold several)"
    )]
    TrustOwn(ClusterName),
    /// The own certificate would be refused by every peer.
    #[error("identity.cert: {0}")]
    Certificate(#[from] PeerError),
    /// The own certificate names somebody else.
    #[error(
        "identity.cert: the certificate is that of {certificate}, but the config says {config}; \
         issue one for {config}, or correct `cluster` and `node`"
    )]
    OtherRouter {
        /// Whom the certificate names.
        certificate: RouterId,
        /// Who the router is by its config.
        config: RouterId,
    },
    /// Key and certificate do not belong together.
    #[error("identity.key is not the key of identity.cert")]
    KeyMismatch,
}

impl IdentityError {
    /// Where time alone can heal it, how: a certificate outside of its validity, perhaps by a clock that is not yet set.
    pub fn untimely(&self) -> Option<Untimely> {
        match self {
            Self::Certificate(PeerError::Expired { not_after, .. }) => Some(Untimely::Expired(*not_after)),
            Self::Certificate(PeerError::NotYetValid { not_before, .. }) => {
                Some(Untimely::NotYetValid(*not_before))
            }
            _ => None,
        }
    }
}

/// Why the router's own certificate proves nothing just now: its dates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Untimely {
    /// Since then.
    #[error(
        "this router's certificate expired on {}: renew it with `servicekeel-router pki issue --force`; a new one is \
         used at once",
        Date(*.0)
    )]
    Expired(UnixTime),
    /// Until then.
    #[error(
        "this router's certificate is not valid before {}: is this machine's clock right?",
        Date(*.0)
    )]
    NotYetValid(UnixTime),
}

/// A time as people read it, such as `2027-01-31 12:00:05 UTC`.
pub struct Date(pub UnixTime);

impl From<std::time::SystemTime> for Date {
    fn from(time: std::time::SystemTime) -> Self {
        let since = time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self(UnixTime::since_unix_epoch(since))
    }
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = i64::try_from(self.0.as_secs()).unwrap_or(i64::MAX);
        let Ok(time) = x509_parser::time::ASN1Time::from_timestamp(seconds) else {
            return write!(f, "{seconds} s after 1970");
        };
        let t = time.to_datetime();
        let (year, month, day) = t.to_calendar_date();
        write!(
            f,
            "{year:04}-{:02}-{day:02} {:02}:{:02}:{:02} UTC",
            u8::from(month),
            t.hour(),
            t.minute(),
            t.second()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_fault_at_another_time_is_no_other() {
        let expired = |node: &str, now| PeerError::Expired {
            id: RouterId { cluster: "b.local".parse().unwrap(), node: node.parse().unwrap() },
            not_after: UnixTime::since_unix_epoch(std::time::Duration::from_secs(5)),
            now: UnixTime::since_unix_epoch(std::time::Duration::from_secs(now)),
        };
        assert!(expired("n", 6).same_as(&expired("n", 9)));
        assert!(!expired("n", 6).same_as(&expired("m", 6)));
        assert!(!expired("n", 6).same_as(&PeerError::NoCertificate));
    }
}
