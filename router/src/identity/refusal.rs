//! The verifier of one handshake. What it finds is said twice: to the other side by an alert, for which rustls knows a
//! few kinds, and in full to this side.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, PeerIncompatible, ServerConfig, SignatureScheme,
};

use super::error::PeerError;
use super::verifier::{Usage, Verifier};

/// Why a handshake refused the other side's certificate; a clone is the same.
#[derive(Debug, Clone, Default)]
pub struct Refusal(Arc<Mutex<Option<PeerError>>>);

impl Refusal {
    /// The reason, once.
    pub fn take(&self) -> Option<PeerError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn put(&self, error: PeerError) -> rustls::Error {
        let kind = error.kind();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        kind.into()
    }
}

/// For one handshake as the side that dials.
#[derive(Debug, Clone)]
pub struct Client {
    /// For rustls.
    pub config: Arc<ClientConfig>,
    /// Why it fails, where it is for a certificate.
    pub refusal: Refusal,
}

/// For one handshake as the side that is dialled.
#[derive(Debug, Clone)]
pub struct Server {
    /// For rustls.
    pub config: Arc<ServerConfig>,
    /// Why it fails, where it is for a certificate.
    pub refusal: Refusal,
}

/// Asks the identity's verifier.
#[derive(Debug)]
pub(super) struct Witness {
    verifier: Arc<Verifier>,
    refusal: Refusal,
}

impl Witness {
    pub(super) fn new(verifier: &Arc<Verifier>, refusal: &Refusal) -> Arc<Self> {
        Arc::new(Self { verifier: verifier.clone(), refusal: refusal.clone() })
    }

    fn verify(
        &self,
        end: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let chain: Vec<_> = std::iter::once(end).chain(intermediates).cloned().collect();
        self.verifier.verify(&chain, usage, now).map(drop).map_err(|error| self.refusal.put(error))
    }
}

/// TLS 1.2 is not configured; that it is not spoken must not hang on that alone.
fn no_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(PeerIncompatible::Tls12NotOffered.into())
}

impl ServerCertVerifier for Witness {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, Usage::Server, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.handshake_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.schemes()
    }
}

impl ClientCertVerifier for Witness {
    /// None: a router has one certificate, a hint would not change which one it shows.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, Usage::Client, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.handshake_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.schemes()
    }
}
