//! A cluster's authorities, as others trust them.

use std::time::Duration;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use servicekeel_core::name::ClusterName;
use x509_parser::extensions::GeneralName;

use super::error::{IdentityError, Part};
use super::revoked::{Fingerprint, Revoked};
use super::spiffe;

/// The most certificates in one PEM file.
const MAX_CERTIFICATES: usize = 16;

/// The authorities of one cluster. While an authority is replaced there are two.
#[derive(Debug, Clone)]
pub struct TrustBundle {
    cluster: ClusterName,
    anchors: Vec<TrustAnchor<'static>>,
    fingerprints: Vec<Fingerprint>,
    not_after: UnixTime,
}

impl TrustBundle {
    /// Reads the authorities of `cluster` from PEM, 1 to 16 certificates. `part` is for the error.
    ///
    /// # Errors
    /// No certificates, one that is not an authority, or one that names another cluster.
    pub fn from_pem(cluster: &ClusterName, pem: &[u8], part: &Part) -> Result<Self, IdentityError> {
        let (mut anchors, mut fingerprints) = (Vec::new(), Vec::new());
        let mut not_after = UnixTime::since_unix_epoch(std::time::Duration::MAX);
        for certificate in certificates(pem, part)? {
            not_after = not_after.min(check_authority(cluster, &certificate, part)?);
            let anchor = webpki::anchor_from_trusted_cert(&certificate)
                .map_err(|e| IdentityError::Pem { part: part.clone(), reason: e.to_string() })?;
            anchors.push(anchor.to_owned());
            fingerprints.push(Fingerprint::of(&certificate));
        }
        Ok(Self { cluster: cluster.clone(), anchors, fingerprints, not_after })
    }

    /// The cluster that these authorities speak for.
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// When the first of them expires.
    pub fn not_after(&self) -> UnixTime {
        self.not_after
    }

    pub(super) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }

    /// An authority is never shown, so that its fingerprint under `revoked` would cut off nobody.
    pub(super) fn refuse_revoked(&self, revoked: &Revoked, part: &Part) -> Result<(), IdentityError> {
        match self.fingerprints.iter().find(|fingerprint| revoked.contains(fingerprint)) {
            Some(fingerprint) => {
                Err(IdentityError::RevokedAuthority { part: part.clone(), fingerprint: *fingerprint })
            }
            None => Ok(()),
        }
    }

    /// Whether both hold an authority with the same key.
    pub(super) fn shares_with(&self, other: &Self) -> bool {
        let same = |a: &TrustAnchor<'_>, b: &TrustAnchor<'_>| {
            a.subject_public_key_info.as_ref() == b.subject_public_key_info.as_ref()
        };
        self.anchors.iter().any(|a| other.anchors.iter().any(|b| same(a, b)))
    }
}

/// A PEM text with its lines where its readers look for them: editors put a mark of the byte order before the first line
/// (and `cat` then anywhere), and what is cut out of YAML is indented.
pub(super) fn flush_left(pem: &[u8]) -> Vec<u8> {
    const MARK: &[u8] = b"\xef\xbb\xbf";
    let mut text = Vec::with_capacity(pem.len());
    for line in pem.split_inclusive(|byte| *byte == b'\n') {
        let line = line.strip_prefix(MARK).unwrap_or(line);
        // The end of an empty line is no indent.
        let indent = line.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
        text.extend_from_slice(&line[indent..]);
    }
    text
}

/// Whether a PEM text has a private key in it.
pub(crate) fn has_private_key(pem: &[u8]) -> bool {
    flush_left(pem)
        .split(|byte| *byte == b'\n')
        .map(<[u8]>::trim_ascii_end)
        .any(|line| line.strip_prefix(b"-----BEGIN ").is_some_and(|kind| kind.ends_with(b"PRIVATE KEY-----")))
}

/// What a text is that is no PEM, where that can be told by its first bytes.
fn told_by_its_start(text: &[u8]) -> Option<&'static str> {
    match text {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => Some("it is UTF-16 text: save it as UTF-8 or ASCII"),
        // A SEQUENCE of ASN.1 with a length of two bytes, as every certificate is.
        [0x30, 0x82, ..] => Some("it is DER: openssl x509 -inform der -in FILE makes PEM of it"),
        _ => None,
    }
}

/// The certificates of a PEM text, at least one.
pub(super) fn certificates(pem: &[u8], part: &Part) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let refuse = |reason: String| IdentityError::Pem { part: part.clone(), reason };
    if let Some(what) = told_by_its_start(pem) {
        return Err(refuse(format!("this is not PEM: {what}")));
    }
    let certificates = CertificateDer::pem_slice_iter(&flush_left(pem))
        .take(MAX_CERTIFICATES + 1)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| refuse(format!("not PEM: {}", in_words(&e))))?;
    match certificates.len() {
        0 => Err(refuse("no certificate found (-----BEGIN CERTIFICATE-----)".to_owned())),
        n if n > MAX_CERTIFICATES => Err(refuse(format!("more than {MAX_CERTIFICATES} certificates"))),
        _ => Ok(certificates),
    }
}

/// What is wrong with a PEM text. The error itself shows lines of the text as numbers.
pub(super) fn in_words(error: &pem::Error) -> String {
    let shown = |line: &[u8]| String::from_utf8_lossy(line).escape_debug().to_string();
    match error {
        pem::Error::MissingSectionEnd { end_marker } => {
            format!("truncated: no line -----END {}-----", shown(end_marker))
        }
        pem::Error::IllegalSectionStart { line } => {
            format!("a BEGIN line without its five closing dashes: {}", shown(line))
        }
        other => other.to_string(),
    }
}

/// The end of a certificate's validity.
pub(super) fn not_after(certificate: &CertificateDer<'_>) -> Option<UnixTime> {
    let (_, x509) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(unix(x509.validity().not_after.timestamp()))
}

/// How long a certificate is valid in all.
pub(super) fn lifetime(certificate: &CertificateDer<'_>) -> Option<Duration> {
    let (_, x509) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let validity = x509.validity();
    let seconds = validity.not_after.timestamp().checked_sub(validity.not_before.timestamp())?;
    Some(Duration::from_secs(seconds.try_into().ok()?))
}

fn unix(seconds: i64) -> UnixTime {
    UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds.try_into().unwrap_or(0)))
}

/// Takes a certificate for an authority of `cluster`, and says when it expires. A leaf among the trusted would make
/// its holder an authority; one that names another cluster is most likely the wrong file.
fn check_authority(
    cluster: &ClusterName,
    certificate: &CertificateDer<'_>,
    part: &Part,
) -> Result<UnixTime, IdentityError> {
    let refuse = |reason: String| IdentityError::Pem { part: part.clone(), reason };
    let (_, x509) = x509_parser::parse_x509_certificate(certificate)
        .map_err(|e| refuse(format!("cannot parse a certificate: {e}")))?;
    if !x509.is_ca() {
        return Err(IdentityError::NotAnAuthority {
            part: part.clone(),
            subject: x509.subject().to_string(),
        });
    }
    let names = x509.subject_alternative_name().map_err(|e| refuse(e.to_string()))?;
    let named = names.iter().flat_map(|san| &san.value.general_names).find_map(|name| match name {
        GeneralName::URI(uri) if uri.starts_with("spiffe://") => Some(*uri),
        _ => None,
    });
    match named {
        Some(uri) if uri != spiffe::authority_uri(cluster) => Err(IdentityError::OtherAuthority {
            part: part.clone(),
            named: uri.trim_start_matches("spiffe://").escape_default().to_string(),
            wanted: cluster.clone(),
        }),
        _ => Ok(unix(x509.validity().not_after.timestamp())),
    }
}
