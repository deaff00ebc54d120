//! Authorities and the certificates that they issue (ECDSA P-256, which every TLS
//! library and tool reads).
//!
//! Made for clusters that have no public key infrastructure of their own; where there is one, any certificate will do
//! whose only URI is `spiffe://<cluster>/router/<node>` and whose extended key usages are serverAuth and clientAuth.

use std::fmt;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use servicekeel_core::name::{ClusterName, RouterId};
use x509_parser::extensions::GeneralName;

use crate::identity::{Material, Revoked, spiffe};

/// How long an authority is valid where nobody says: ten years.
pub const AUTHORITY_DAYS: u32 = 3650;
/// How long a node's certificate is valid where nobody says: a year.
pub const NODE_DAYS: u32 = 365;
/// The longest validity, a hundred years.
pub const MAX_DAYS: u32 = 36_500;
const DAY: Duration = Duration::from_secs(86_400);
/// A certificate is valid from this long before it was made: the clocks of edge machines are not exact.
const BACKDATED: Duration = Duration::from_secs(3600);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Not the authority that was expected.
    #[error("not an authority that can issue: {0}")]
    Authority(String),
    /// It is valid for a time that can't be.
    #[error("--days is {0}; it must be from 1 to {MAX_DAYS}")]
    Days(u32),
    /// The authority ends before it starts to be of use.
    #[error("the authority expires in less than a day and cannot issue certificates; create another one")]
    AuthorityExpired,
    /// Of the library that writes certificates.
    #[error("cannot create a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
}

/// A certificate and its key, both PEM.
#[derive(Clone)]
pub struct Issued {
    /// The certificate.
    pub certificate: String,
    /// Its key, PKCS#8. A secret.
    pub key: String,
    /// The end of its validity.
    pub not_after: SystemTime,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// The authority of one cluster, with its key.
pub struct Authority {
    cluster: ClusterName,
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
    not_after: SystemTime,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes a new authority for `cluster`, valid for `days` from `now` on. It can issue certificates of nodes, not
    /// other authorities. (No name constraint: those on URIs are understood by too few verifiers, and refused whole
    /// by webpki; that an authority speaks for its own cluster alone is enforced by the verifying router.)
    ///
    /// # Errors
    /// [`PkiError::Days`].
    pub fn generate(cluster: &ClusterName, days: u32, now: SystemTime) -> Result<Self, PkiError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = params(&format!("ServiceKeel authority of {cluster}"))?;
        let not_after = validity(&mut params, days, now, None)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI(spiffe::authority_uri(cluster).try_into()?)];
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { cluster: cluster.clone(), issuer: Issuer::new(params, key), certificate, not_after })
    }

    /// Reads an authority that [`Authority::generate`] made.
    ///
    /// # Errors
    /// [`PkiError::Authority`] where it is another certificate, or the key is not its own.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, PkiError> {
        let refuse = |reason: &str| PkiError::Authority(reason.to_owned());
        let (cluster, not_after, public) = describe(certificate)?;
        let key = KeyPair::from_pem(key)
            .map_err(|e| PkiError::Authority(format!("its key cannot be read: {e}")))?;
        if rcgen::PublicKeyData::subject_public_key_info(&key) != public {
            return Err(refuse("the key does not match the certificate"));
        }
        let issuer = Issuer::from_ca_cert_pem(certificate, key)?;
        Ok(Self { cluster, issuer, certificate: certificate.to_owned(), not_after })
    }

    /// The cluster that it speaks for.
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// Its certificate, PEM: the trust bundle that other clusters take.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Its key, PEM. A secret: who has it is every router of the cluster.
    pub fn key(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// The end of its validity.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Issues the certificate of the router of `node`, valid for `days` from `now` on, but not longer than the
    /// authority itself. `dns` are further names, for other software that looks at the certificate.
    ///
    /// # Errors
    /// [`PkiError::Days`], [`PkiError::AuthorityExpired`], or a DNS name that is none.
    pub fn issue(
        &self,
        node: &ClusterName,
        dns: &[ClusterName],
        days: u32,
        now: SystemTime,
    ) -> Result<Issued, PkiError> {
        let id = RouterId { cluster: self.cluster.clone(), node: node.clone() };
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = params(&format!("ServiceKeel router of {node}"))?;
        let not_after = validity(&mut params, days, now, Some(self.not_after))?;
        if self.not_after < now + DAY {
            return Err(PkiError::AuthorityExpired);
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.subject_alt_names = vec![SanType::URI(spiffe::uri(&id).try_into()?)];
        for name in dns {
            params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
        }
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Issued { certificate, key: key.serialize_pem(), not_after })
    }

    /// All that the router of `node` needs, in memory: a fresh certificate, and trust in the authorities of `others`.
    ///
    /// # Errors
    /// As [`Authority::issue`].
    pub fn material(
        &self,
        node: &ClusterName,
        others: &[&Self],
        now: SystemTime,
    ) -> Result<Material, PkiError> {
        let issued = self.issue(node, &[], NODE_DAYS, now)?;
        Ok(Material {
            ca: self.certificate.clone().into_bytes(),
            certificate: issued.certificate.into_bytes(),
            key: issued.key.into_bytes(),
            trust: others.iter().map(|o| (o.cluster.clone(), o.certificate.clone().into_bytes())).collect(),
            revoked: Revoked::default(),
        })
    }
}

/// The cluster, end of validity and public key of an authority's certificate.
fn describe(pem: &str) -> Result<(ClusterName, SystemTime, Vec<u8>), PkiError> {
    let refuse = |reason: String| PkiError::Authority(reason);
    let der = CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|e| refuse(format!("its certificate is not PEM: {e}")))?;
    let (_, x509) = x509_parser::parse_x509_certificate(&der)
        .map_err(|e| refuse(format!("its certificate cannot be read: {e}")))?;
    if !x509.is_ca() {
        return Err(refuse(format!("{} is not an authority's certificate", x509.subject())));
    }
    let names = x509.subject_alternative_name().map_err(|e| refuse(e.to_string()))?;
    let cluster = names
        .iter()
        .flat_map(|san| &san.value.general_names)
        .find_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix("spiffe://"),
            _ => None,
        })
        .ok_or_else(|| refuse("its certificate has no name spiffe://<cluster>".to_owned()))?;
    let cluster = cluster.parse().map_err(|e| refuse(format!("its cluster {e}")))?;
    let seconds = u64::try_from(x509.validity().not_after.timestamp()).unwrap_or(0);
    Ok((cluster, SystemTime::UNIX_EPOCH + Duration::from_secs(seconds), x509.public_key().raw.to_vec()))
}

/// The cluster whose authority a certificate is.
///
/// # Errors
/// [`PkiError::Authority`] where it is none.
pub fn cluster_of(certificate: &str) -> Result<ClusterName, PkiError> {
    describe(certificate).map(|(cluster, ..)| cluster)
}

fn params(common_name: &str) -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = DistinguishedName::new();
    // X.520 allows 64 characters; the name that counts is the URI.
    params.distinguished_name.push(DnType::CommonName, common_name.chars().take(64).collect::<String>());
    Ok(params)
}

/// Sets the validity, and says when it ends: at `limit` at the latest.
fn validity(
    params: &mut CertificateParams,
    days: u32,
    now: SystemTime,
    limit: Option<SystemTime>,
) -> Result<SystemTime, PkiError> {
    if !(1..=MAX_DAYS).contains(&days) {
        return Err(PkiError::Days(days));
    }
    let not_after = now + DAY * days;
    let not_after = limit.map_or(not_after, |limit| limit.min(not_after));
    let date = |time: SystemTime| {
        // Certificates have whole seconds (RFC 5280 §4.1.2.5).
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(since.as_secs())
    };
    params.not_before = date(now.checked_sub(BACKDATED).unwrap_or(now));
    params.not_after = date(not_after);
    Ok(not_after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Identity, IdentityError, Revoked};

    fn name(text: &str) -> ClusterName {
        text.parse().unwrap()
    }

    #[test]
    fn what_it_issues_is_an_identity_and_survives_pem() {
        let now = SystemTime::now();
        let made = Authority::generate(&name("cluster-a.local"), AUTHORITY_DAYS, now).unwrap();
        let read = Authority::from_pem(made.certificate(), &made.key()).unwrap();
        assert_eq!((read.cluster(), read.certificate()), (made.cluster(), made.certificate()));
        // By the one that was read, under the one that was made.
        let issued = read.issue(&name("node-1"), &[name("hub.example")], 30, now).unwrap();
        let material = Material {
            ca: made.certificate().into(),
            certificate: issued.certificate.into(),
            key: issued.key.into(),
            trust: vec![],
            revoked: Revoked::default(),
        };
        let id = RouterId { cluster: name("cluster-a.local"), node: name("node-1") };
        let identity = Identity::from_pem(id.clone(), &material).unwrap();
        assert_eq!(identity.id(), &id);
        let left = identity.not_after().duration_since(now).unwrap();
        assert!(left <= DAY * 30 && left > DAY * 30 - Duration::from_secs(2), "{left:?}");
    }

    #[test]
    fn a_node_does_not_outlive_its_authority() {
        let now = SystemTime::now();
        let short = Authority::generate(&name("a.local"), 10, now).unwrap();
        let issued = short.issue(&name("n"), &[], 365, now).unwrap();
        assert_eq!(issued.not_after, short.not_after());
        let at_the_end = now + DAY * 10 - Duration::from_secs(60);
        assert!(matches!(short.issue(&name("n"), &[], 365, at_the_end), Err(PkiError::AuthorityExpired)));
    }

    #[test]
    fn days_have_bounds() {
        let now = SystemTime::now();
        for days in [0, MAX_DAYS + 1, u32::MAX] {
            assert!(matches!(Authority::generate(&name("a.local"), days, now), Err(PkiError::Days(_))));
        }
        Authority::generate(&name("a.local"), MAX_DAYS, now).unwrap();
    }

    #[test]
    fn an_authority_is_read_with_its_own_key_only() {
        let now = SystemTime::now();
        let a = Authority::generate(&name("a.local"), 10, now).unwrap();
        let b = Authority::generate(&name("a.local"), 10, now).unwrap();
        let refused = Authority::from_pem(a.certificate(), &b.key()).unwrap_err().to_string();
        assert!(refused.contains("does not match the certificate"), "{refused}");
        let node = a.issue(&name("n"), &[], 5, now).unwrap();
        let refused = Authority::from_pem(&node.certificate, &node.key).unwrap_err().to_string();
        assert!(refused.contains("not an authority"), "{refused}");
    }

    #[test]
    fn a_bundle_of_another_cluster_is_seen() {
        let now = SystemTime::now();
        let [a, b] = ["a.local", "b.local"].map(|c| Authority::generate(&name(c), 10, now).unwrap());
        let mut material = a.material(&name("n"), &[&b], now).unwrap();
        material.trust[0].0 = name("c.local");
        let id = RouterId { cluster: name("a.local"), node: name("n") };
        assert!(matches!(Identity::from_pem(id, &material), Err(IdentityError::OtherAuthority { .. })));
    }
}
