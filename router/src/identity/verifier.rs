//! Who may be on the other side of a connection: the rule of the mesh, on webpki's path building.
//!
//! The host name that was dialled proves nothing here: a router is whom its certificate names, wherever it is dialled.

use std::collections::BTreeMap;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use servicekeel_core::name::{ClusterName, RouterId};
use webpki::{ExtendedKeyUsageValidator, KeyPurposeIdIter};

use super::bundle::{self, TrustBundle};
use super::error::PeerError;
use super::revoked::Revoked;
use super::spiffe;
use super::{MAX_CHAIN, MAX_CHAIN_BYTES};

/// What a certificate must be made for (extended key usage, RFC 5280 §4.2.1.12).
#[derive(Debug, Clone, Copy)]
pub(super) enum Usage {
    Server,
    Client,
    Either,
}

impl Usage {
    const SERVER_AUTH: &'static [usize] = webpki::KeyUsage::SERVER_AUTH_REPR;
    const CLIENT_AUTH: &'static [usize] = webpki::KeyUsage::CLIENT_AUTH_REPR;

    fn name(self) -> &'static str {
        match self {
            Self::Server => "serverAuth",
            Self::Client => "clientAuth",
            Self::Either => "serverAuth or clientAuth",
        }
    }
}

impl ExtendedKeyUsageValidator for Usage {
    /// For every certificate of the path. An authority without the extension is for all usages; that the end-entity
    /// must have it is asked in [`Verifier::verify`].
    fn validate(&self, purposes: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        let mut absent = true;
        for purpose in purposes {
            absent = false;
            let oid = purpose?.to_decoded_oid();
            let (server, client) = (oid == Self::SERVER_AUTH, oid == Self::CLIENT_AUTH);
            if match self {
                Self::Server => server,
                Self::Client => client,
                Self::Either => server || client,
            } {
                return Ok(());
            }
        }
        if absent { Ok(()) } else { Err(webpki::Error::EmptyEkuExtension) }
    }
}

/// What a chain proves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Proven {
    /// Who shows it.
    pub(crate) id: RouterId,
    /// Until when: the first end among the certificates by which its authority vouches for it.
    pub(crate) until: UnixTime,
}

/// Judges chains, for both sides.
#[derive(Debug)]
pub(super) struct Verifier {
    bundles: BTreeMap<ClusterName, TrustBundle>,
    revoked: Revoked,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    pub(super) fn new(
        bundles: BTreeMap<ClusterName, TrustBundle>,
        revoked: Revoked,
        algorithms: WebPkiSupportedAlgorithms,
    ) -> Self {
        Self { bundles, revoked, algorithms }
    }

    pub(super) fn bundles(&self) -> impl Iterator<Item = &TrustBundle> {
        self.bundles.values()
    }

    /// What the chain (its own certificate first) proves.
    pub(super) fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
    ) -> Result<Proven, PeerError> {
        let (end_entity, intermediates) = chain.split_first().ok_or(PeerError::NoCertificate)?;
        if chain.len() > MAX_CHAIN {
            return Err(PeerError::LongChain(chain.len()));
        }
        let bytes = chain.iter().map(|certificate| certificate.len()).sum();
        if bytes > MAX_CHAIN_BYTES {
            return Err(PeerError::LargeChain(bytes));
        }
        let certificate = webpki::EndEntityCert::try_from(end_entity).map_err(PeerError::Malformed)?;
        let mut uris = certificate.valid_uri_names();
        let id = spiffe::parse(uris.next().ok_or(PeerError::NoSpiffeName)?);
        let more = uris.count();
        if more > 0 {
            return Err(PeerError::SpiffeNames(more + 1));
        }
        let id = id?;
        self.revoked.judge(&id, chain)?;
        let Some(bundle) = self.bundles.get(&id.cluster) else {
            return Err(PeerError::UntrustedCluster { id });
        };
        let verified = certificate.verify_for_usage(
            self.algorithms.all,
            bundle.anchors(),
            intermediates,
            now,
            usage,
            None,
            None,
        );
        match verified {
            Ok(path) if has_usages(end_entity) => {
                // What else it shows proves nothing, and its end ends nothing.
                let used = path.intermediate_certificates().map(|certificate| certificate.der());
                let used = std::iter::once(end_entity.clone()).chain(used);
                let until = used.filter_map(|certificate| bundle::not_after(&certificate)).min();
                Ok(Proven { id, until: until.unwrap_or(now) })
            }
            Ok(_) => Err(PeerError::Usage { id, wanted: usage.name() }),
            Err(error) => Err(explain(error, id, usage)),
        }
    }

    pub(super) fn schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }

    pub(super) fn handshake_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }
}

fn has_usages(certificate: &CertificateDer<'_>) -> bool {
    x509_parser::parse_x509_certificate(certificate)
        .is_ok_and(|(_, x509)| matches!(x509.extended_key_usage(), Ok(Some(_))))
}

fn explain(error: webpki::Error, id: RouterId, usage: Usage) -> PeerError {
    match error {
        webpki::Error::CertExpired { time, not_after } => PeerError::Expired { id, not_after, now: time },
        webpki::Error::CertNotValidYet { time, not_before } => {
            PeerError::NotYetValid { id, not_before, now: time }
        }
        // An authority of the same name and another key shows as a wrong signature.
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
            PeerError::WrongAuthority { id }
        }
        webpki::Error::EmptyEkuExtension => PeerError::Usage { id, wanted: usage.name() },
        reason => PeerError::Invalid { id, reason },
    }
}
