use std::time::{Duration, SystemTime};

use rustls::time_provider::TimeProvider;
use servicekeel_core::name::RouterId;
use servicekeel_runtime::net::os::OsNet;
use tokio::time::timeout;

use super::*;
use crate::identity::{Fingerprint, Material, Revocation};
use crate::pki::Authority;

fn authority(cluster: &str) -> Authority {
    Authority::generate(&cluster.parse().unwrap(), 2, SystemTime::now()).unwrap()
}

fn chain(authority: &Authority) -> Vec<CertificateDer<'static>> {
    use rustls::pki_types::pem::PemObject;
    let issued = authority.issue(&"n".parse().unwrap(), &[], 1, SystemTime::now()).unwrap();
    vec![CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap()]
}

fn shown(chain: Vec<CertificateDer<'static>>, at: UnixTime) -> Shown {
    let day = UnixTime::since_unix_epoch(Duration::from_secs(at.as_secs() + 86_400));
    Shown { chain, at, expires: day, until: day }
}

struct Trusting {
    own: Authority,
    material: Material,
}

impl Trusting {
    /// A router of a.local that trusts these authorities of b.local.
    fn new(trusted: &[&Authority]) -> Self {
        let own = authority("a.local");
        let mut material = own.material(&"n".parse().unwrap(), &[], SystemTime::now()).unwrap();
        if let Some(first) = trusted.first() {
            let pem: String = trusted.iter().map(|authority| authority.certificate()).collect();
            material.trust = vec![(first.cluster().clone(), pem.into())];
        }
        Self { own, material }
    }

    fn identity(&self) -> Identity {
        let id = RouterId { cluster: self.own.cluster().clone(), node: "n".parse().unwrap() };
        Identity::from_pem(id, &self.material).unwrap()
    }

    fn without_trust(mut self) -> Identity {
        self.material.trust.clear();
        self.identity()
    }

    fn revoking(mut self, entry: Revocation) -> Identity {
        self.material.revoked = [entry].into_iter().collect();
        self.identity()
    }
}

fn peer() -> Arc<Peer<OsNet>> {
    let id = RouterId { cluster: "b.local".parse().unwrap(), node: "n".parse().unwrap() };
    Arc::new(Peer::new(id.clone(), crate::bounds::Owner::Peer(id, None), &crate::rooms::Rooms::default()))
}

async fn is_cut(standing: &Standing<OsNet>) -> bool {
    let resolved = timeout(Duration::from_millis(10), standing.lost()).await.is_ok();
    assert_eq!(resolved, standing.is_lost());
    resolved
}

#[tokio::test(start_paused = true)]
async fn each_connection_is_judged_by_what_it_showed_itself() {
    let (stolen, renewed) = (authority("b.local"), authority("b.local"));
    let both = Trusting::new(&[&stolen, &renewed]).identity();
    let peer = peer();
    let thief = peer.stand(shown(chain(&stolen), both.now())).unwrap();
    // The name shows another chain after that.
    let honest = peer.stand(shown(chain(&renewed), both.now())).unwrap();
    assert!(peer.judge(Some(&both)).is_ok());
    assert!(!is_cut(&thief).await && !is_cut(&honest).await);
    let reason = peer.judge(Some(&Trusting::new(&[&renewed]).identity())).unwrap_err().to_string();
    assert!(reason.contains("not issued by an authority of b.local"), "{reason}");
    assert!(is_cut(&thief).await && !is_cut(&honest).await);
    // Trusted again, what was cut off stays so, and a new connection is one.
    assert!(peer.judge(Some(&both)).is_ok() && is_cut(&thief).await);
    assert!(!is_cut(&peer.stand(shown(chain(&stolen), both.now())).unwrap()).await);
    assert!(peer.judge(None).is_err() && is_cut(&honest).await);
}

#[tokio::test(start_paused = true)]
async fn one_that_comes_while_the_settings_change_is_not_missed() {
    let of_b = authority("b.local");
    let before = Trusting::new(&[&of_b]).identity();
    let after = Trusting::new(&[&of_b]).without_trust();
    let peer = peer();
    // It stands first and is judged then: either the change finds it, or it finds the change.
    let found = peer.stand(shown(chain(&of_b), before.now())).unwrap();
    assert!(peer.judge(Some(&after)).is_err() && is_cut(&found).await);
    assert!(found.judge(Some(&before)).is_ok() && is_cut(&found).await, "what is cut off came back");
    let finds = peer.stand(shown(chain(&of_b), before.now())).unwrap();
    assert!(finds.judge(Some(&after)).is_err() && is_cut(&finds).await);
}

#[tokio::test(start_paused = true)]
async fn a_revoked_node_and_a_revoked_certificate() {
    let of_b = authority("b.local");
    let peer = peer();
    let (one, other) = (chain(&of_b), chain(&of_b));
    let now = Trusting::new(&[&of_b]).identity().now();
    let stand =
        || (peer.stand(shown(one.clone(), now)).unwrap(), peer.stand(shown(other.clone(), now)).unwrap());
    let (first, second) = stand();
    let by_certificate = Trusting::new(&[&of_b]).revoking(Revocation::Certificate(Fingerprint::of(&one[0])));
    let reason = peer.judge(Some(&by_certificate)).unwrap_err().to_string();
    assert!(reason.contains("b.local/n is revoked") && reason.contains(':'), "{reason}");
    assert!(is_cut(&first).await && !is_cut(&second).await);
    let (_first, second) = stand();
    let by_name = Trusting::new(&[&of_b]).revoking(Revocation::Node(peer.id.clone()));
    assert!(peer.judge(Some(&by_name)).is_err() && is_cut(&second).await);
    // A handshake finds the same.
    assert!(by_name.peer(&other).is_err() && by_certificate.peer(&one).is_err());
    assert!(by_certificate.peer(&other).is_ok());
}

#[derive(Debug)]
struct Later(Duration);

impl TimeProvider for Later {
    fn current_time(&self) -> Option<UnixTime> {
        let now = rustls::time_provider::DefaultTimeProvider.current_time()?;
        Some(UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs()) + self.0))
    }
}

/// The dates come before the authority where a chain is checked: what has expired must not hide whom it was issued by.
#[tokio::test(start_paused = true)]
async fn what_has_expired_goes_on_and_still_leaves_with_its_authority() {
    let of_b = authority("b.local");
    let days = Duration::from_secs(36 * 3600);
    let expired = chain(&of_b);
    let mut trusting = Trusting::new(&[&of_b]);
    // Its own certificate must outlive theirs.
    let own = Authority::generate(&"a.local".parse().unwrap(), 9, SystemTime::now()).unwrap();
    let issued = own.issue(&"n".parse().unwrap(), &[], 8, SystemTime::now()).unwrap();
    trusting.material.ca = own.certificate().into();
    trusting.material.certificate = issued.certificate.into();
    trusting.material.key = issued.key.into();
    let id = RouterId { cluster: "a.local".parse().unwrap(), node: "n".parse().unwrap() };
    let valid = Identity::from_pem(id.clone(), &trusting.material).unwrap();
    let later = Identity::with_clock(id.clone(), &trusting.material, Arc::new(Later(days))).unwrap();
    let peer = peer();
    let standing = peer.stand(shown(expired.clone(), valid.now())).unwrap();
    assert!(later.peer(&expired).is_err(), "it has expired");
    assert!(peer.judge(Some(&later)).is_ok() && !is_cut(&standing).await);
    trusting.material.trust = Trusting::new(&[&authority("b.local")]).material.trust;
    let gone = Identity::with_clock(id, &trusting.material, Arc::new(Later(days))).unwrap();
    assert!(peer.judge(Some(&gone)).is_err() && is_cut(&standing).await);
}

#[tokio::test(start_paused = true)]
async fn the_chains_of_one_peer_are_bounded_and_the_same_one_counts_once() {
    let of_b = authority("b.local");
    let now = Trusting::new(&[&of_b]).identity().now();
    let peer = peer();
    let same = chain(&of_b);
    let mut held: Vec<_> = (0..100).map(|_| peer.stand(shown(same.clone(), now)).unwrap()).collect();
    held.extend((1..MAX_PROOFS).map(|_| peer.stand(shown(chain(&of_b), now)).unwrap()));
    assert!(peer.stand(shown(chain(&of_b), now)).is_none());
    assert!(peer.stand(shown(same, now)).is_some());
    held.pop();
    assert!(peer.stand(shown(chain(&of_b), now)).is_some());
}

#[tokio::test(start_paused = true)]
async fn nothing_begins_past_the_end_of_either_certificate_and_what_is_open_goes_on() {
    let of_b = authority("b.local");
    let own = Trusting::new(&[&of_b]).identity();
    let second = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(own.expires().as_secs() + seconds));
    let peer = peer();
    let proven = |until| Proven { id: peer.id.clone(), until };
    // By the end of this router's own, and by that of the peer's.
    let by_own = peer.stand(Shown::new(chain(&of_b), own.now(), &proven(second(9)), &own)).unwrap();
    assert!(!by_own.is_over(second(0)) && by_own.is_over(second(1)));
    assert_eq!(peer.lock().expires, Some(second(9)));
    let earlier = UnixTime::since_unix_epoch(Duration::from_secs(own.expires().as_secs() - 100));
    let by_theirs = peer.stand(Shown::new(chain(&of_b), own.now(), &proven(earlier), &own)).unwrap();
    assert!(by_theirs.is_over(second(0)) && by_theirs.left(second(0)).is_zero());
    assert_eq!(by_own.left(second(0)), Duration::from_secs(1));
    assert!(!is_cut(&by_own).await && !is_cut(&by_theirs).await);
}
