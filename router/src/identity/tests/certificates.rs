//! What a peer's certificate must be: its path, its dates, its use, its name, its key.

use super::*;

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
    assert_eq!(error.refusal, Some(wanted));

    let (client, server) = only(&BOTH[..1]);
    handshake(of_a.client(), server).expect("a server with serverAuth");
    let error = handshake(client, of_a.server()).expect_err("a client with serverAuth");
    let wanted = PeerError::Usage { id: id("b.local", "n2"), wanted: "clientAuth" };
    assert_eq!(error.refusal, Some(wanted));

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
fn a_stolen_certificate_without_its_key() {
    let (_, b, of_a, of_b) = pair();
    let shown = b.issue(&name("n2"), &[], 10, SystemTime::now()).unwrap();
    let chain = bundle::certificates(shown.certificate.as_bytes(), &Part::Certificate).unwrap();
    let thief = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    // rustls refuses to build such a config, so the resolver is ours.
    let key = rustls::crypto::ring::sign::any_supported_type(&private(&thief)).unwrap();
    let mut client = (*of_b.client().config).clone();
    client.client_auth_cert_resolver =
        Arc::new(rustls::sign::SingleCertAndKey::from(rustls::sign::CertifiedKey::new(chain, key)));
    let error = handshake(Arc::new(client), of_a.server()).expect_err("the key is another");
    assert_eq!(error.tls, rustls::Error::InvalidCertificate(rustls::CertificateError::BadSignature));
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
    let mut http = (*a.client().config).clone();
    http.alpn_protocols = vec![b"h2".to_vec()];
    assert_eq!(
        handshake(Arc::new(http), b.server()).expect_err("h2 is not spoken").tls,
        rustls::Error::NoApplicationProtocol
    );
}
