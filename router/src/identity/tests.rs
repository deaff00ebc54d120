//! Handshakes of real connections in memory: who gets in, and what the refused are told.

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::{AlertDescription, ClientConnection, Connection, ServerConnection};

use super::*;
use crate::pki::Authority;

mod certificates;
mod own;

const BOTH: [ExtendedKeyUsagePurpose; 2] =
    [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];

fn name(text: &str) -> ClusterName {
    text.parse().unwrap()
}

fn id(cluster: &str, node: &str) -> RouterId {
    RouterId { cluster: name(cluster), node: name(node) }
}

fn authority(cluster: &str) -> Authority {
    Authority::generate(&name(cluster), 100, SystemTime::now()).unwrap()
}

/// Two clusters that trust each other, and a router of each.
fn pair() -> (Authority, Authority, Identity, Identity) {
    let (a, b) = (authority("a.local"), authority("b.local"));
    let now = SystemTime::now();
    let of_a =
        Identity::from_pem(id("a.local", "n1"), &a.material(&name("n1"), &[&b], now).unwrap()).unwrap();
    let of_b =
        Identity::from_pem(id("b.local", "n2"), &b.material(&name("n2"), &[&a], now).unwrap()).unwrap();
    (a, b, of_a, of_b)
}

/// A certificate as a stranger or a careless authority would make it.
struct Forged {
    params: CertificateParams,
    key: KeyPair,
}

impl Forged {
    fn new(uris: &[&str]) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = uris.iter().map(|u| SanType::URI((*u).try_into().unwrap())).collect();
        params.extended_key_usages = BOTH.to_vec();
        Self { params, key: KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap() }
    }

    fn with(mut self, change: impl FnOnce(&mut CertificateParams)) -> Self {
        change(&mut self.params);
        self
    }

    /// Issued by `authority`, with its key.
    fn by(self, authority: &Authority) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::from_pem(&authority.key()).unwrap();
        let issuer = Issuer::from_ca_cert_pem(authority.certificate(), key).unwrap();
        let certificate = self.params.signed_by(&self.key, &issuer).unwrap();
        (vec![certificate.der().clone()], private(&self.key))
    }

    fn by_itself(self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let certificate = self.params.self_signed(&self.key).unwrap();
        (vec![certificate.der().clone()], private(&self.key))
    }
}

fn private(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::try_from(key.serialize_der()).unwrap()
}

/// A stranger's configs: any certificate, trust in everything that `like` trusts.
fn stranger(
    like: &Identity,
    (chain, key): (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>),
) -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let (provider, clock) = (Arc::new(provider()), like.clock.clone());
    let own = certified(&provider, chain, key).unwrap();
    let nobody = Refusal::default();
    let client = client(&provider, &clock, &like.verifier, &nobody, own.clone());
    let server = server(&provider, &clock, &like.verifier, &nobody, own);
    (Arc::new(client), Arc::new(server))
}

impl From<Arc<ClientConfig>> for Client {
    fn from(config: Arc<ClientConfig>) -> Self {
        Self { config, refusal: Refusal::default() }
    }
}

impl From<Arc<ServerConfig>> for Server {
    fn from(config: Arc<ServerConfig>) -> Self {
        Self { config, refusal: Refusal::default() }
    }
}

/// How a handshake was broken off.
#[derive(Debug)]
struct Broken {
    /// What rustls says on the side that did.
    tls: rustls::Error,
    /// Why, where it was for a certificate.
    refusal: Option<PeerError>,
    /// What the other side was told.
    alert: Option<AlertDescription>,
}

/// Both sides of a finished handshake.
fn handshake(client: impl Into<Client>, server: impl Into<Server>) -> Result<[Connection; 2], Box<Broken>> {
    let (as_client, as_server) = (client.into(), server.into());
    let mut client = Connection::from(ClientConnection::new(as_client.config, server_name()).unwrap());
    let mut server = Connection::from(ServerConnection::new(as_server.config).unwrap());
    let told = |from: &mut Connection, to: &mut Connection| match carry(from, to) {
        Err(rustls::Error::AlertReceived(alert)) => Some(alert),
        _ => None,
    };
    for _ in 0..10 {
        if let Err(tls) = carry(&mut client, &mut server) {
            let alert = told(&mut server, &mut client);
            return Err(Box::new(Broken { tls, refusal: as_server.refusal.take(), alert }));
        }
        if let Err(tls) = carry(&mut server, &mut client) {
            let alert = told(&mut client, &mut server);
            return Err(Box::new(Broken { tls, refusal: as_client.refusal.take(), alert }));
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    Ok([client, server])
}

fn carry(from: &mut Connection, to: &mut Connection) -> Result<(), rustls::Error> {
    let mut bytes = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut bytes).unwrap();
    }
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        to.read_tls(&mut rest).unwrap();
        to.process_new_packets()?;
    }
    Ok(())
}

/// What RFC 8446 §6.2 has for it.
fn alert_of(refusal: &PeerError) -> AlertDescription {
    match refusal {
        PeerError::Expired { .. } | PeerError::NotYetValid { .. } => AlertDescription::CertificateExpired,
        PeerError::Revoked { .. } => AlertDescription::CertificateRevoked,
        PeerError::UntrustedCluster { .. } | PeerError::WrongAuthority { .. } => AlertDescription::UnknownCA,
        PeerError::Usage { .. } => AlertDescription::UnsupportedCertificate,
        PeerError::NoSpiffeName
        | PeerError::SpiffeNames(_)
        | PeerError::NotARouter { .. }
        | PeerError::Malformed(_) => AlertDescription::BadCertificate,
        _ => AlertDescription::CertificateUnknown,
    }
}

/// What `to` says of the certificate when it is shown by the dialler and by the dialled.
fn refusals(to: &Identity, shown: (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)) -> [PeerError; 2] {
    let (client, server) = stranger(to, shown);
    let dialled = handshake(client, to.server()).expect_err("the server lets it in");
    let dialler = handshake(to.client(), server).expect_err("the client believes it");
    [dialled, dialler].map(|broken| {
        let Some(refusal) = broken.refusal else { panic!("not of the certificate: {}", broken.tls) };
        assert_eq!(broken.alert, Some(alert_of(&refusal)), "{refusal}");
        refusal
    })
}

#[test]
fn two_clusters_that_trust_each_other() {
    let (_, _, a, b) = pair();
    let [client, server] = handshake(a.client(), b.server()).unwrap();
    assert_eq!(a.peer(client.peer_certificates().unwrap()), Ok(b.id().clone()));
    assert_eq!(b.peer(server.peer_certificates().unwrap()), Ok(a.id().clone()));
    for side in [client, server] {
        assert_eq!(side.alpn_protocol(), Some(ALPN));
        assert_eq!(side.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
        let suite = side.negotiated_cipher_suite().unwrap().suite();
        assert_eq!(suite, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
        // For a record layer of our own.
        side.dangerous_extract_secrets().unwrap();
    }
}

#[test]
fn a_second_handshake_is_as_full_as_the_first() {
    let (_, _, a, b) = pair();
    let (client, server) = (a.client(), b.server());
    for _ in 0..2 {
        let sides = handshake(client.clone(), server.clone()).unwrap();
        for side in sides {
            assert_eq!(side.handshake_kind(), Some(rustls::HandshakeKind::Full));
        }
    }
}

#[test]
fn two_nodes_of_one_cluster() {
    let a = authority("a.local");
    let now = SystemTime::now();
    let [n1, n2] = ["n1", "n2.example"]
        .map(|n| Identity::from_pem(id("a.local", n), &a.material(&name(n), &[], now).unwrap()).unwrap());
    let [client, _] = handshake(n1.client(), n2.server()).unwrap();
    assert_eq!(n1.peer(client.peer_certificates().unwrap()), Ok(id("a.local", "n2.example")));
}

#[test]
fn a_cluster_that_is_not_trusted() {
    let (_, _, a, _) = pair();
    let c = authority("c.local");
    let refused = refusals(&a, Forged::new(&["spiffe://c.local/router/n"]).by(&c));
    assert_eq!(refused, [(); 2].map(|()| PeerError::UntrustedCluster { id: id("c.local", "n") }));
    assert!(refused[0].to_string().contains("add an entry for c.local under `trust`"));
}

#[test]
fn another_authority_of_the_same_name() {
    let (_, _, a, _) = pair();
    let impostor = authority("b.local");
    let refused = refusals(&a, Forged::new(&["spiffe://b.local/router/n2"]).by(&impostor));
    assert_eq!(refused, [(); 2].map(|()| PeerError::WrongAuthority { id: id("b.local", "n2") }));
}

#[test]
fn a_trusted_authority_speaks_for_its_own_cluster_alone() {
    let (a, b, of_a, of_b) = pair();
    // b's authority for a router of a: to a itself, and to b, which trusts both.
    for to in [&of_a, &of_b] {
        let refused = refusals(to, Forged::new(&["spiffe://a.local/router/n9"]).by(&b));
        assert_eq!(refused, [(); 2].map(|()| PeerError::WrongAuthority { id: id("a.local", "n9") }));
    }
    // The same name by the right one gets in: the test is about the authority.
    let (client, _) = stranger(&of_b, Forged::new(&["spiffe://a.local/router/n9"]).by(&a));
    handshake(client, of_b.server()).unwrap();
}

#[test]
fn a_client_without_a_certificate() {
    let (_, _, a, b) = pair();
    let mut bare = (*a.client().config).clone();
    bare.client_auth_cert_resolver = Arc::new(NoCertificate);
    let error = handshake(Arc::new(bare), b.server()).expect_err("nobody gets in");
    assert_eq!(error.tls, rustls::Error::NoCertificatesPresented);
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// A clock that stands.
#[derive(Debug)]
struct At(SystemTime);

impl TimeProvider for At {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(self.0.duration_since(SystemTime::UNIX_EPOCH).unwrap()))
    }
}

#[test]
fn a_live_peer_is_asked_again_after_its_time() {
    let (a, b) = (authority("a.local"), authority("b.local"));
    let now = SystemTime::now();
    let later = Arc::new(At(now + Duration::from_secs(50 * 86_400)));
    let old = Identity::from_pem(id("b.local", "n2"), &b.material(&name("n2"), &[&a], now).unwrap()).unwrap();
    let material = a.material(&name("n1"), &[&b], now).unwrap();
    let of_a = Identity::with_clock(id("a.local", "n1"), &material, later).unwrap();
    let short = Forged::new(&["spiffe://b.local/router/n2"]);
    let chain = [
        bundle::certificates(
            b.issue(&name("n2"), &[], 49, now).unwrap().certificate.as_bytes(),
            &Part::Certificate,
        )
        .unwrap(),
        short.by(&b).0,
    ];
    assert!(matches!(of_a.peer(&chain[0]), Err(PeerError::Expired { .. })));
    assert_eq!(of_a.peer(&chain[1]).as_ref(), Ok(old.id()));
}
