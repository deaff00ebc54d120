//! A router's own certificate, key and authorities.

use super::*;

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
