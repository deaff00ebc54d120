//! Who this router is, and whom it believes.
//!
//! - A router is named by the one URI of its certificate, `spiffe://<cluster>/router/<node>`.
//! - Each cluster has its own authorities, and they speak for that cluster alone: a chain is followed to the
//!   authorities of the cluster that the certificate names, never to another's.
//! - TLS 1.3 with certificates on both sides; there is no other way in.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::ResolvesClientCert;
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_CHACHA20_POLY1305_SHA256};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ResolvesServerCert;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use rustls::{ClientConfig, ServerConfig};
use servicekeel_core::flow::frame::ALPN;
use servicekeel_core::name::{ClusterName, RouterId};

mod bundle;
mod error;
mod refusal;
mod revoked;
pub mod spiffe;
mod verifier;

pub use bundle::TrustBundle;
pub(crate) use bundle::has_private_key;
pub use error::{Date, IdentityError, Part, PeerError, Untimely};
use refusal::Witness;
pub use refusal::{Client, Refusal, Server};
pub use revoked::{Fingerprint, Revocation, Revoked};
pub(crate) use verifier::Proven;
use verifier::{Usage, Verifier};

/// The most certificates that a router shows: its own and the intermediate ones.
pub const MAX_CHAIN: usize = 8;
/// The most bytes of them together: what connections were proven by is kept for as long as they last.
pub const MAX_CHAIN_BYTES: usize = 32 * 1024;

/// The PEM texts that make an [`Identity`].
#[derive(Clone, PartialEq, Eq)]
pub struct Material {
    /// The authorities of the own cluster.
    pub ca: Vec<u8>,
    /// The own certificate, then the intermediate ones.
    pub certificate: Vec<u8>,
    /// The certificate's key, PKCS#8.
    pub key: Vec<u8>,
    /// The authorities of other clusters.
    pub trust: Vec<(ClusterName, Vec<u8>)>,
    /// Who is refused whoever vouches for it.
    pub revoked: Revoked,
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let trust: Vec<_> = self.trust.iter().map(|(cluster, _)| cluster).collect();
        f.debug_struct("Material").field("trust", &trust).finish_non_exhaustive()
    }
}

/// A router's identity: it proves who it is and checks who others are.
pub struct Identity {
    id: RouterId,
    provider: Arc<CryptoProvider>,
    /// The certificate and its key.
    own: Arc<SingleCertAndKey>,
    verifier: Arc<Verifier>,
    clock: Arc<dyn TimeProvider>,
    not_after: UnixTime,
    /// How long before its end the own certificate is to be renewed.
    renewal: Duration,
}

/// The longest time before the end of a certificate from which on it is told.
const RENEWAL: Duration = Duration::from_secs(14 * 86_400);

impl Identity {
    /// Makes the identity of `id` of PEM texts, by the machine's clock.
    ///
    /// # Errors
    /// [`IdentityError`]: whatever a peer would refuse is refused here first.
    pub fn from_pem(id: RouterId, material: &Material) -> Result<Self, IdentityError> {
        Self::with_clock(id, material, Arc::new(DefaultTimeProvider))
    }

    /// As [`Identity::from_pem`], by another clock.
    ///
    /// # Errors
    /// As [`Identity::from_pem`].
    pub fn with_clock(
        id: RouterId,
        material: &Material,
        clock: Arc<dyn TimeProvider>,
    ) -> Result<Self, IdentityError> {
        let provider = Arc::new(provider());
        let verifier = Verifier::new(
            bundles(&id.cluster, material)?,
            material.revoked.clone(),
            provider.signature_verification_algorithms,
        );

        let chain = bundle::certificates(&material.certificate, &Part::Certificate)?;
        let now = now(&*clock);
        let Proven { id: named, until: not_after } = verifier.verify(&chain, Usage::Server, now)?;
        verifier.verify(&chain, Usage::Client, now)?;
        if named != id {
            return Err(IdentityError::OtherRouter { certificate: named, config: id });
        }
        let key = key(&material.key)?;

        // The last third, as cert-manager has it (`spec.renewBefore` of a Certificate): one that lives for a day is told
        // for hours, not for all of its life.
        let lifetime = chain.first().and_then(bundle::lifetime);
        let renewal = lifetime.map_or(RENEWAL, |lifetime| RENEWAL.min(lifetime / 3));
        let own = certified(&provider, chain, key)?;
        Ok(Self { id, provider, own, verifier: Arc::new(verifier), clock, not_after, renewal })
    }

    /// The same router by the same certificate, which believes from now on what `material` believes for a router of
    /// `cluster`: a config whose name takes effect at the next start says whom to trust at once. Where it says nothing of
    /// this router's own cluster, that is trusted as before. The own certificate is not judged: without it, nobody could
    /// be refused.
    ///
    /// # Errors
    /// As [`Identity::from_pem`], of the authorities.
    pub(crate) fn with_trust_of(
        &self,
        cluster: &ClusterName,
        material: &Material,
    ) -> Result<Self, IdentityError> {
        let mut bundles = bundles(cluster, material)?;
        let own = &self.id.cluster;
        if let Some(before) = self.trust().find(|bundle| bundle.cluster() == own)
            && !bundles.contains_key(own)
        {
            // An authority speaks for one cluster.
            bundles.retain(|_, bundle| !bundle.shares_with(before));
            bundles.insert(own.clone(), before.clone());
        }
        let algorithms = self.provider.signature_verification_algorithms;
        let verifier = Arc::new(Verifier::new(bundles, material.revoked.clone(), algorithms));
        Ok(Self {
            id: self.id.clone(),
            provider: self.provider.clone(),
            own: self.own.clone(),
            verifier,
            clock: self.clock.clone(),
            not_after: self.not_after,
            renewal: self.renewal,
        })
    }

    /// Who this router is.
    pub fn id(&self) -> &RouterId {
        &self.id
    }

    /// For one connection that this router dials.
    pub fn client(&self) -> Client {
        let refusal = Refusal::default();
        let config = client(&self.provider, &self.clock, &self.verifier, &refusal, self.own.clone());
        Client { config: Arc::new(config), refusal }
    }

    /// For one connection that it accepts.
    pub fn server(&self) -> Server {
        let refusal = Refusal::default();
        let config = server(&self.provider, &self.clock, &self.verifier, &refusal, self.own.clone());
        Server { config: Arc::new(config), refusal }
    }

    /// The router that a peer's certificates (`rustls::…::peer_certificates`) prove, now and by this identity's trust:
    /// asked again after a change, it says whether a live connection is still one to keep.
    ///
    /// # Errors
    /// [`PeerError`] where they prove nothing (any more).
    pub fn peer(&self, certificates: &[CertificateDer<'_>]) -> Result<RouterId, PeerError> {
        self.peer_at(certificates, self.now())
    }

    /// As [`Identity::peer`], by the dates of another time: whether what was valid then is trusted still.
    pub(crate) fn peer_at(
        &self,
        certificates: &[CertificateDer<'_>],
        at: UnixTime,
    ) -> Result<RouterId, PeerError> {
        self.prove(certificates, at).map(|proven| proven.id)
    }

    /// As [`Identity::peer_at`], with the end of what they prove.
    pub(crate) fn prove(
        &self,
        certificates: &[CertificateDer<'_>],
        at: UnixTime,
    ) -> Result<Proven, PeerError> {
        self.verifier.verify(certificates, Usage::Either, at)
    }

    /// The time by this identity's clock.
    pub(crate) fn now(&self) -> UnixTime {
        now(&*self.clock)
    }

    /// Why it proves nothing any more, where that is so.
    pub fn untimely(&self) -> Option<Untimely> {
        (self.not_after < self.now()).then_some(Untimely::Expired(self.not_after))
    }

    /// Whether the own certificate is valid and should be renewed by now.
    pub(crate) fn is_due(&self, now: SystemTime) -> bool {
        self.not_after().duration_since(now).is_ok_and(|left| left < self.renewal)
    }

    /// As [`Identity::not_after`].
    pub(crate) fn expires(&self) -> UnixTime {
        self.not_after
    }

    /// When the own certificate expires, or the first of those that vouch for it.
    pub fn not_after(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(self.not_after.as_secs())
    }

    /// The authorities that are believed, the own cluster's among them.
    pub fn trust(&self) -> impl Iterator<Item = &TrustBundle> {
        self.verifier.bundles()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("id", &self.id).finish_non_exhaustive()
    }
}

/// The name to give to rustls when dialling. It is neither sent (no SNI) nor compared: the certificate names the peer.
pub fn server_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into())
}

/// ring, with the two suites that are measured and tested; the fastest first where the machine has AES instructions.
fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![TLS13_AES_128_GCM_SHA256, TLS13_CHACHA20_POLY1305_SHA256],
        ..rustls::crypto::ring::default_provider()
    }
}

fn now(clock: &dyn TimeProvider) -> UnixTime {
    // Without a clock nothing is valid: the start of 1970 is before every certificate.
    clock.current_time().unwrap_or(UnixTime::since_unix_epoch(std::time::Duration::ZERO))
}

fn bundles(
    own: &ClusterName,
    material: &Material,
) -> Result<BTreeMap<ClusterName, TrustBundle>, IdentityError> {
    let own_bundle = TrustBundle::from_pem(own, &material.ca, &Part::Ca)?;
    own_bundle.refuse_revoked(&material.revoked, &Part::Ca)?;
    let mut bundles = BTreeMap::from([(own.clone(), own_bundle)]);
    for (cluster, pem) in &material.trust {
        if cluster == own {
            return Err(IdentityError::TrustOwn(own.clone()));
        }
        let part = Part::Trust(cluster.clone());
        let bundle = TrustBundle::from_pem(cluster, pem, &part)?;
        bundle.refuse_revoked(&material.revoked, &part)?;
        if let Some(other) = bundles.values().find(|other| other.shares_with(&bundle)) {
            if other.cluster() == cluster {
                return Err(IdentityError::TrustTwice(cluster.clone()));
            }
            return Err(IdentityError::SharedAuthority(other.cluster().clone(), cluster.clone()));
        }
        if bundles.insert(cluster.clone(), bundle).is_some() {
            return Err(IdentityError::TrustTwice(cluster.clone()));
        }
    }
    Ok(bundles)
}

fn key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, IdentityError> {
    PrivateKeyDer::from_pem_slice(&bundle::flush_left(pem)).map_err(|e| IdentityError::Pem {
        part: Part::Key,
        reason: match e {
            rustls::pki_types::pem::Error::NoItemsFound => {
                "no private key found (-----BEGIN PRIVATE KEY-----)".to_owned()
            }
            e => format!("not a PEM key: {}", bundle::in_words(&e)),
        },
    })
}

fn key_error(error: rustls::Error) -> IdentityError {
    match error {
        rustls::Error::InconsistentKeys(_) => IdentityError::KeyMismatch,
        e => IdentityError::Pem {
            part: Part::Key,
            reason: format!("unsupported key ({e}); use Ed25519, ECDSA P-256 or P-384, or RSA, as PKCS#8"),
        },
    }
}

/// A certificate and its key, as it is shown.
fn certified(
    provider: &CryptoProvider,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<SingleCertAndKey>, IdentityError> {
    Ok(Arc::new(CertifiedKey::from_der(chain, key, provider).map_err(key_error)?.into()))
}

fn client(
    provider: &Arc<CryptoProvider>,
    clock: &Arc<dyn TimeProvider>,
    verifier: &Arc<Verifier>,
    refusal: &Refusal,
    own: Arc<dyn ResolvesClientCert>,
) -> ClientConfig {
    let mut config = ClientConfig::builder_with_details(provider.clone(), clock.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has suites of TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Witness::new(verifier, refusal))
        .with_client_cert_resolver(own);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_secret_extraction = true;
    config
}

fn server(
    provider: &Arc<CryptoProvider>,
    clock: &Arc<dyn TimeProvider>,
    verifier: &Arc<Verifier>,
    refusal: &Refusal,
    own: Arc<dyn ResolvesServerCert>,
) -> ServerConfig {
    let mut config = ServerConfig::builder_with_details(provider.clone(), clock.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has suites of TLS 1.3")
        .with_client_cert_verifier(Witness::new(verifier, refusal))
        .with_cert_resolver(own);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.enable_secret_extraction = true;
    config
}

#[cfg(test)]
mod tests;
