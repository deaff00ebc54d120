//! Handshakes of real connections in memory: who gets in, and what the refused are told.

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::{ClientConnection, Connection, ServerConnection};

use super::*;
use crate::pki::Authority;

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
    let client = client(&provider, &clock, &like.verifier, own.clone());
    let server = server(&provider, &clock, &like.verifier, own);
    (Arc::new(client), Arc::new(server))
}

/// Both sides of a finished handshake, or the error of the side that broke it off.
fn handshake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Result<[Connection; 2], rustls::Error> {
    let mut client = Connection::from(ClientConnection::new(client, server_name()).unwrap());
    let mut server = Connection::from(ServerConnection::new(server).unwrap());
    for _ in 0..10 {
        carry(&mut client, &mut server)?;
        carry(&mut server, &mut client)?;
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

/// What `to` says of the certificate when it is shown by the dialler and by the dialled.
fn refusals(to: &Identity, shown: (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)) -> [PeerError; 2] {
    let (client, server) = stranger(to, shown);
    let dialled = handshake(client, to.server()).expect_err("the server lets it in");
    let dialler = handshake(to.client(), server).expect_err("the client believes it");
    [dialled, dialler]
        .map(|e| PeerError::of(&e).unwrap_or_else(|| panic!("not of the certificate: {e}")).clone())
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
fn self_signed() {
    let (_, _, a, _) = pair();
    let refused = refusals(&a, Forged::new(&["spiffe://b.local/router/n2"]).by_itself());
    assert_eq!(refused, [(); 2].map(|()| PeerError::WrongAuthority { id: id("b.local", "n2") }));
}

#[test]
fn a_node_is_not_an_authority() {
    let (_, b, of_a, _) = pair();
    // A node of b signs a certificate of another node with its own key, and shows its own as the intermediate.
    let node_key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let node = Forged { params: Forged::new(&["spiffe://b.local/router/n2"]).params, key: node_key };
    let (params, node_private) = (node.params.clone(), node.key.serialize_pem());
    let (node_chain, _) = node.by(&b);
    let issuer = Issuer::new(params, KeyPair::from_pem(&node_private).unwrap());
    let victim = Forged::new(&["spiffe://b.local/router/n3"]);
    let leaf = victim.params.signed_by(&victim.key, &issuer).unwrap().der().clone();
    let refused = refusals(&of_a, (vec![leaf, node_chain[0].clone()], private(&victim.key)));
    for error in refused {
        assert!(
            matches!(error, PeerError::Invalid { reason: webpki::Error::EndEntityUsedAsCa, .. }),
            "{error}"
        );
    }
}

#[test]
fn an_intermediate_authority_is_followed_within_its_path_length() {
    // Ours issue none, but other software does: root, one or two intermediate ones of path length 0, leaf.
    let authority = |cn: &str, constraint| {
        Forged::new(&[]).with(|p| {
            p.distinguished_name.push(rcgen::DnType::CommonName, cn);
            p.is_ca = IsCa::Ca(constraint);
            p.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            p.extended_key_usages.clear();
        })
    };
    for (middles, gets_in) in [(&["one"][..], true), (&["one", "two"], false)] {
        let root = authority("root", BasicConstraints::Unconstrained);
        let root_pem = root.params.self_signed(&root.key).unwrap().pem();
        let mut issuer = Issuer::new(root.params, root.key);
        let mut chain = String::new();
        for cn in middles {
            let middle = authority(cn, BasicConstraints::Constrained(0));
            chain = middle.params.signed_by(&middle.key, &issuer).unwrap().pem() + &chain;
            issuer = Issuer::new(middle.params, middle.key);
        }
        let leaf = Forged::new(&["spiffe://a.local/router/n1"]);
        let certificate = leaf.params.signed_by(&leaf.key, &issuer).unwrap().pem() + &chain;
        let material = Material {
            ca: root_pem.into(),
            certificate: certificate.into(),
            key: leaf.key.serialize_pem().into(),
            trust: vec![],
            revoked: Revoked::default(),
        };
        let made = Identity::from_pem(id("a.local", "n1"), &material);
        assert_eq!(made.is_ok(), gets_in, "{made:?}");
    }
}

#[test]
fn expired_and_not_yet_valid() {
    let (_, b, of_a, _) = pair();
    let (past, future) = (rcgen::date_time_ymd(2020, 2, 29), rcgen::date_time_ymd(2990, 1, 1));
    let expired = Forged::new(&["spiffe://b.local/router/n2"]).with(|p| p.not_after = past).by(&b);
    for error in refusals(&of_a, expired) {
        assert!(matches!(error, PeerError::Expired { .. }));
        assert!(
            error.to_string().contains("b.local/n2 expired on 2020-02-29 00:00:00 UTC; it is 2"),
            "{error}"
        );
    }
    let early = Forged::new(&["spiffe://b.local/router/n2"]).with(|p| p.not_before = future).by(&b);
    for error in refusals(&of_a, early) {
        assert!(matches!(error, PeerError::NotYetValid { .. }));
        assert!(error.to_string().contains("valid from 2990-01-01 00:00:00 UTC on"), "{error}");
    }
}

#[test]
fn a_usage_for_one_side_only() {
    let (_, b, of_a, _) = pair();
    let only = |usages: &[ExtendedKeyUsagePurpose]| {
        let usages = usages.to_vec();
        stranger(
            &of_a,
            Forged::new(&["spiffe://b.local/router/n2"]).with(|p| p.extended_key_usages = usages).by(&b),
        )
    };
    let (client, server) = only(&BOTH[1..]);
    handshake(client, of_a.server()).expect("a client with clientAuth");
    let error = handshake(of_a.client(), server).expect_err("a server with clientAuth");
    let wanted = PeerError::Usage { id: id("b.local", "n2"), wanted: "serverAuth" };
    assert_eq!(PeerError::of(&error), Some(&wanted));

    let (client, server) = only(&BOTH[..1]);
    handshake(of_a.client(), server).expect("a server with serverAuth");
    let error = handshake(client, of_a.server()).expect_err("a client with serverAuth");
    let wanted = PeerError::Usage { id: id("b.local", "n2"), wanted: "clientAuth" };
    assert_eq!(PeerError::of(&error), Some(&wanted));

    for usages in [&[][..], &[ExtendedKeyUsagePurpose::CodeSigning]] {
        let (client, server) = only(usages);
        assert!(handshake(client, of_a.server()).is_err() && handshake(of_a.client(), server).is_err());
    }
}

#[test]
fn names_that_are_not_one_router() {
    let (_, b, of_a, _) = pair();
    assert_eq!(refusals(&of_a, Forged::new(&[]).by(&b)), [PeerError::NoSpiffeName, PeerError::NoSpiffeName]);
    let two = Forged::new(&["spiffe://b.local/router/n2", "spiffe://b.local/router/n3"]).by(&b);
    assert_eq!(refusals(&of_a, two), [PeerError::SpiffeNames(2), PeerError::SpiffeNames(2)]);
    let workload = Forged::new(&["spiffe://b.local/ns/default/sa/web"]).by(&b);
    for error in refusals(&of_a, workload) {
        assert!(matches!(error, PeerError::NotARouter { .. }), "{error}");
    }
    // A DNS name is nobody's name here.
    let dns =
        Forged::new(&[]).with(|p| p.subject_alt_names = vec![SanType::DnsName("n2".try_into().unwrap())]);
    assert_eq!(refusals(&of_a, dns.by(&b))[0], PeerError::NoSpiffeName);
}

#[test]
fn an_authority_is_not_a_router() {
    let (_, b, of_a, _) = pair();
    let ca = Forged::new(&["spiffe://b.local/router/n2"])
        .with(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    for error in refusals(&of_a, ca.by(&b)) {
        assert!(
            matches!(error, PeerError::Invalid { reason: webpki::Error::CaUsedAsEndEntity, .. }),
            "{error}"
        );
    }
}

#[test]
fn a_client_without_a_certificate() {
    let (_, _, a, b) = pair();
    let mut bare = (*a.client()).clone();
    bare.client_auth_cert_resolver = Arc::new(NoCertificate);
    let error = handshake(Arc::new(bare), b.server()).expect_err("nobody gets in");
    assert_eq!(error, rustls::Error::NoCertificatesPresented);
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

#[test]
fn a_stolen_certificate_without_its_key() {
    let (_, b, of_a, of_b) = pair();
    let shown = b.issue(&name("n2"), &[], 10, SystemTime::now()).unwrap();
    let chain = bundle::certificates(shown.certificate.as_bytes(), &Part::Certificate).unwrap();
    let thief = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    // rustls refuses to build such a config, so the resolver is ours.
    let key = rustls::crypto::ring::sign::any_supported_type(&private(&thief)).unwrap();
    let mut client = (*of_b.client()).clone();
    client.client_auth_cert_resolver =
        Arc::new(rustls::sign::SingleCertAndKey::from(rustls::sign::CertifiedKey::new(chain, key)));
    let error = handshake(Arc::new(client), of_a.server()).expect_err("the key is another");
    assert_eq!(error, rustls::Error::InvalidCertificate(rustls::CertificateError::BadSignature));
}

#[test]
fn key_algorithms_of_other_software() {
    let (_, b, of_a, _) = pair();
    for algorithm in [&rcgen::PKCS_ED25519, &rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384] {
        let mut forged = Forged::new(&["spiffe://b.local/router/n2"]);
        forged.key = KeyPair::generate_for(algorithm).unwrap();
        let (client, server) = stranger(&of_a, forged.by(&b));
        handshake(client, of_a.server()).unwrap();
        handshake(of_a.client(), server).unwrap();
    }
}

#[test]
fn another_protocol() {
    let (_, _, a, b) = pair();
    let mut http = (*a.client()).clone();
    http.alpn_protocols = vec![b"h2".to_vec()];
    assert_eq!(
        handshake(Arc::new(http), b.server()).expect_err("h2 is not spoken"),
        rustls::Error::NoApplicationProtocol
    );
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

#[test]
fn own_material_that_does_not_fit() {
    let (a, b, ..) = pair();
    let now = SystemTime::now();
    let good = a.material(&name("n1"), &[&b], now).unwrap();
    let make = |m: &Material| Identity::from_pem(id("a.local", "n1"), m);
    make(&good).unwrap();
    let refused = |change: &dyn Fn(&mut Material)| {
        let mut material = good.clone();
        change(&mut material);
        make(&material).expect_err("refused")
    };

    let other = a.issue(&name("n1"), &[], 10, now).unwrap();
    assert_eq!(refused(&|m| m.key = other.key.clone().into()), IdentityError::KeyMismatch);
    assert!(matches!(refused(&|m| m.key = m.ca.clone()), IdentityError::Pem { part: Part::Key, .. }));
    assert!(matches!(
        refused(&|m| m.key = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n".to_vec()),
        IdentityError::Pem { part: Part::Key, .. }
    ));
    for rubbish in
        [&b""[..], b"hello", b"\xff\xfe\0", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"]
    {
        assert!(matches!(refused(&|m| m.ca = rubbish.to_vec()), IdentityError::Pem { part: Part::Ca, .. }));
        let error = refused(&|m| m.certificate = rubbish.to_vec());
        assert!(error.to_string().starts_with("identity.cert: "), "{error}");
        let error = refused(&|m| m.trust[0].1 = rubbish.to_vec());
        assert!(error.to_string().starts_with("trust of b.local: "), "{error}");
    }
    // A node's certificate where an authority's belongs.
    assert!(matches!(
        refused(&|m| m.trust[0].1 = b.issue(&name("x"), &[], 9, now).unwrap().certificate.into()),
        IdentityError::NotAnAuthority { part: Part::Trust(_), .. }
    ));
    // One authority for two clusters, one cluster twice, the own cluster.
    let shared = Forged::new(&[]).with(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    let shared = shared.params.self_signed(&shared.key).unwrap().pem();
    assert_eq!(
        refused(&|m| m.trust = ["c.local", "d.local"].map(|c| (name(c), shared.clone().into())).into()),
        IdentityError::SharedAuthority(name("c.local"), name("d.local"))
    );
    assert_eq!(refused(&|m| m.trust.extend(m.trust.clone())), IdentityError::TrustTwice(name("b.local")));
    assert_eq!(refused(&|m| m.trust[0].0 = name("a.local")), IdentityError::TrustOwn(name("a.local")));
    // The certificate of somebody else.
    let error = Identity::from_pem(id("a.local", "n7"), &good).expect_err("another node");
    assert!(error.to_string().contains("is that of a.local/n1, but the config says a.local/n7"), "{error}");
    let error = refused(&|m| m.certificate = b.issue(&name("n1"), &[], 9, now).unwrap().certificate.into());
    assert_eq!(
        error,
        IdentityError::OtherRouter { certificate: id("b.local", "n1"), config: id("a.local", "n1") }
    );
    assert!(!format!("{good:?}").contains("PRIVATE"));
}

#[test]
fn an_authority_is_replaced_by_having_two_for_a_while() {
    let (old, new, b) = (authority("a.local"), authority("a.local"), authority("b.local"));
    let now = SystemTime::now();
    let both = format!("{}{}", old.certificate(), new.certificate()).into_bytes();
    let mut material = b.material(&name("n2"), &[&old], now).unwrap();
    material.trust[0].1 = both;
    let of_b = Identity::from_pem(id("b.local", "n2"), &material).unwrap();
    for authority in [&old, &new] {
        let material = authority.material(&name("n1"), &[&b], now).unwrap();
        let of_a = Identity::from_pem(id("a.local", "n1"), &material).unwrap();
        handshake(of_a.client(), of_b.server()).unwrap();
    }
}
