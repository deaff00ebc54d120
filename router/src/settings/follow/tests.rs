use std::path::Path;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use servicekeel_core::name::ClusterName;
use tokio::time::timeout;

use super::*;
use crate::pki::Authority;

struct Stand {
    dir: tempfile::TempDir,
    authority: Authority,
    others: Vec<Authority>,
}

fn name(text: &str) -> ClusterName {
    text.parse().unwrap()
}

impl Stand {
    fn new() -> Self {
        let now = SystemTime::now();
        let make = |cluster| Authority::generate(&name(cluster), 30, now).unwrap();
        let stand = Self {
            dir: tempfile::tempdir().unwrap(),
            authority: make("a.local"),
            others: vec![make("b.local"), make("c.local")],
        };
        stand.put("ca.crt", stand.authority.certificate());
        for other in &stand.others {
            stand.put(&format!("{}.crt", other.cluster()), other.certificate());
        }
        stand.issue();
        stand.config("");
        stand
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("router.yaml")
    }

    fn put(&self, file: &str, text: &str) {
        servicekeel_runtime::file::replace(&self.dir.path().join(file), text.as_bytes()).unwrap();
    }

    fn issue(&self) {
        let issued = self.authority.issue(&name("n"), &[], 20, SystemTime::now()).unwrap();
        self.put("node.crt", &issued.certificate);
        self.put("node.key", &issued.key);
    }

    fn config(&self, more: &str) {
        let own = "cluster: a.local\nnode: n\nidentity: { ca: ca.crt, cert: node.crt, key: node.key }\n";
        self.put("router.yaml", &format!("{own}{more}"));
    }

    fn start(&self) -> (Follow, watch::Receiver<Arc<Settings>>) {
        Follow::start(self.path(), "host".into()).unwrap()
    }
}

fn peers(receiver: &watch::Receiver<Arc<Settings>>) -> Vec<String> {
    receiver.borrow().config.peers.iter().map(|peer| peer.address.clone()).collect()
}

fn shows_the_same(one: &Identity, other: &Identity) -> bool {
    let shown = |identity: &Identity| identity.client().config.client_auth_cert_resolver.clone();
    Arc::ptr_eq(&shown(one), &shown(other))
}

#[tokio::test]
async fn good_changes_go_through_and_bad_ones_change_nothing() {
    let stand = Stand::new();
    let (mut follow, mut receiver) = stand.start();
    assert!(peers(&receiver).is_empty());
    let identity = |receiver: &watch::Receiver<Arc<Settings>>| receiver.borrow().identity.clone().unwrap();
    let first = identity(&receiver);

    stand.config("peers: [ { address: \"h:1\" } ]\ntrust: [ { cluster: b.local, ca: b.local.crt } ]\n");
    follow.read();
    assert!(receiver.has_changed().unwrap());
    receiver.mark_unchanged();
    assert_eq!(peers(&receiver), ["h:1"]);
    assert_eq!(identity(&receiver).trust().count(), 2);

    // The same again is no news, nor is another spelling of it.
    follow.read();
    stand.config("peers: [ { address: h:1 } ] # the hub\ntrust: [ { cluster: b.local, ca: b.local.crt } ]\n");
    follow.read();
    assert!(!receiver.has_changed().unwrap());

    let used = receiver.borrow().clone();
    let same = |receiver: &watch::Receiver<Arc<Settings>>| {
        let now = receiver.borrow();
        let identities = (now.identity.as_ref().unwrap(), used.identity.as_ref().unwrap());
        Arc::ptr_eq(&now.config, &used.config) && Arc::ptr_eq(identities.0, identities.1)
    };
    let refused = |receiver: &watch::Receiver<Arc<Settings>>| receiver.borrow().pending.refused.clone();
    assert_eq!(refused(&receiver), None);
    for bad in [
        "peers: [",
        "peer: []\n",
        "trust: [ { cluster: b.local, ca: absent.crt } ]\n",
        "revoked: [ nonsense ]\n",
    ] {
        stand.config(bad);
        follow.read();
        assert!(same(&receiver), "{bad}");
        let refused = refused(&receiver).unwrap();
        assert_eq!(refused.in_use, follow.in_use);
        assert!(refused.reason.contains(&follow.told[0].to_string()), "{refused}");
        assert!(follow.told[0].to_string().contains("router.yaml:4:"), "{:?}", follow.told);
    }
    // A key that is not the certificate's: the valid pair stays.
    stand.config("peers: [ { address: \"h:1\" } ]\ntrust: [ { cluster: b.local, ca: b.local.crt } ]\n");
    let other = stand.authority.issue(&name("n"), &[], 20, SystemTime::now()).unwrap();
    stand.put("node.key", &other.key);
    follow.read();
    assert!(same(&receiver) && !follow.told.is_empty() && refused(&receiver).is_some());
    // And its certificate: rotated.
    stand.put("node.crt", &other.certificate);
    follow.read();
    assert!(!same(&receiver) && follow.told.is_empty() && refused(&receiver).is_none());
    // What is as it was before it was refused is no longer refused either.
    let good = std::fs::read_to_string(stand.path()).unwrap();
    stand.config("peers: [");
    follow.read();
    assert!(refused(&receiver).is_some());
    stand.put("router.yaml", &good);
    follow.read();
    assert_eq!(refused(&receiver), None);
    assert!(!shows_the_same(&first, &identity(&receiver)));
}

#[tokio::test]
async fn what_needs_a_new_start_waits_and_the_rest_is_applied() {
    let stand = Stand::new();
    let (mut follow, receiver) = stand.start();
    stand.config("listen: { peers: \"127.0.0.1:1\", admin: off }\npeers: [ { address: \"h:1\" } ]\n");
    follow.read();
    assert_eq!(peers(&receiver), ["h:1"]);
    assert_eq!(receiver.borrow().config.listen, follow.started.listen);
    assert_eq!(waits(&follow.started, &follow.good.0), ["listen.peers", "listen.admin"]);
    assert_eq!(receiver.borrow().pending.at_next_start, ["listen.peers", "listen.admin"]);
    // Another node: the certificate of the new name is not for the router that runs.
    let issued = stand.authority.issue(&name("m"), &[], 20, SystemTime::now()).unwrap();
    stand.put("node.crt", &issued.certificate);
    stand.put("node.key", &issued.key);
    let config = std::fs::read_to_string(stand.path()).unwrap();
    stand.put("router.yaml", &config.replace("node: n", "node: m").replace("h:1", "h:2"));
    follow.read();
    assert_eq!(peers(&receiver), ["h:2"]);
    assert_eq!(receiver.borrow().config.node, name("n"));
    assert_eq!(receiver.borrow().identity.as_ref().unwrap().id().node, name("n"));
}

#[tokio::test]
async fn whom_to_trust_and_whom_not_does_not_wait_for_another_name() {
    let stand = Stand::new();
    let trust = "trust: [ { cluster: b.local, ca: b.local.crt }, { cluster: c.local, ca: c.local.crt } ]\n";
    stand.config(trust);
    let (mut follow, receiver) = stand.start();
    let identity = || receiver.borrow().identity.clone().unwrap();
    let certificates = |authority: &Authority, node| {
        let issued = authority.issue(&name(node), &[], 20, SystemTime::now()).unwrap();
        (CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap(), issued)
    };
    let (of_b, _) = certificates(&stand.others[0], "n");
    let (of_c, _) = certificates(&stand.others[1], "n");
    let (stolen, _) = certificates(&stand.others[1], "stolen");
    let believes =
        |certificate: &CertificateDer<'_>| identity().peer(std::slice::from_ref(certificate)).is_ok();
    assert!(believes(&of_b) && believes(&of_c) && believes(&stolen));
    let before = identity();

    // Another node's name, its certificate, one cluster less and a node cut off, in one edit.
    let (_, issued) = certificates(&stand.authority, "m");
    stand.put("node.crt", &issued.certificate);
    stand.put("node.key", &issued.key);
    let own = "cluster: a.local\nnode: m\nidentity: { ca: ca.crt, cert: node.crt, key: node.key }\n";
    let more = "trust: [ { cluster: c.local, ca: c.local.crt } ]\nrevoked: [ c.local/stolen ]\n";
    stand.put("router.yaml", &format!("{own}{more}"));
    follow.read();
    assert!(!believes(&of_b), "it is not trusted any more");
    assert!(!believes(&stolen), "it is revoked");
    assert!(believes(&of_c));
    assert_eq!(identity().id().node, name("n"));
    assert!(shows_the_same(&before, &identity()));
    assert_eq!(identity().not_after(), before.not_after());

    // Its own old name is revoked: its key was stolen.
    let (own_name, _) = certificates(&stand.authority, "n");
    assert!(believes(&own_name));
    stand.put("router.yaml", &format!("{own}{}", more.replace("c.local/stolen", "a.local/n")));
    follow.read();
    assert!(!believes(&own_name) && believes(&stolen));

    // Another cluster, of other authorities: its own is trusted until the next start.
    let (of_a, _) = certificates(&stand.authority, "other");
    let renamed = Authority::generate(&name("d.local"), 30, SystemTime::now()).unwrap();
    let (of_d, issued) = certificates(&renamed, "m");
    stand.put("ca.crt", renamed.certificate());
    stand.put("node.crt", &issued.certificate);
    stand.put("node.key", &issued.key);
    stand.put("router.yaml", &own.replace("a.local", "d.local"));
    follow.read();
    assert!(believes(&of_a) && believes(&of_d) && !believes(&of_c));
    assert_eq!(identity().id().cluster, name("a.local"));

    // And no identity at all is none at once.
    stand.put("router.yaml", "cluster: d.local\nnode: m\n");
    follow.read();
    assert!(receiver.borrow().identity.is_none());
}

#[tokio::test]
async fn an_untimely_certificate_starts_without_an_identity_and_heals() {
    let stand = Stand::new();
    // Made a year ahead: as for a machine whose clock is not set yet.
    let later = SystemTime::now() + Duration::from_secs(365 * 86_400);
    let issued = stand.authority.issue(&name("n"), &[], 20, SystemTime::now()).unwrap();
    let future = Authority::generate(&name("a.local"), 800, later).unwrap();
    let early = future.issue(&name("n"), &[], 400, later).unwrap();
    stand.put("ca.crt", future.certificate());
    stand.put("node.crt", &early.certificate);
    stand.put("node.key", &early.key);
    let (mut follow, receiver) = stand.start();
    assert!(receiver.borrow().identity.is_none() && follow.untimely);
    assert!(follow.told[0].text.contains("valid from"), "{:?}", follow.told);
    stand.put("ca.crt", stand.authority.certificate());
    stand.put("node.crt", &issued.certificate);
    stand.put("node.key", &issued.key);
    follow.read();
    assert!(receiver.borrow().identity.is_some() && !follow.untimely && follow.told.is_empty());
    // A renewal that is out of its time keeps the valid one.
    stand.put("ca.crt", future.certificate());
    stand.put("node.crt", &early.certificate);
    stand.put("node.key", &early.key);
    follow.read();
    assert!(receiver.borrow().identity.is_some() && follow.untimely);
}

#[tokio::test]
async fn the_end_of_the_certificate_is_told_as_it_nears() {
    let stand = Stand::new();
    let (mut follow, _receiver) = stand.start();
    let mut at = |days: u64| {
        follow.look(SystemTime::now() + Duration::from_secs(days * 86_400));
        follow.validity
    };
    // It is valid for 20 days.
    assert_eq!([0, 13, 14, 21, 1].map(&mut at), {
        use Validity::{Ended, Fine, Soon};
        [Fine, Fine, Soon, Ended, Fine]
    });
}

#[tokio::test]
async fn the_files_are_watched() {
    let stand = Stand::new();
    let (follow, mut receiver) = stand.start();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(follow.run());
    let limit = Duration::from_secs(5);
    stand.config("trust: [ { cluster: c.local, ca: c.local.crt } ]\n");
    timeout(limit, receiver.changed()).await.unwrap().unwrap();
    // A file that the first config did not name.
    stand.put("c.local.crt", &(stand.others[1].certificate().to_owned() + "\n"));
    timeout(limit, receiver.changed()).await.unwrap().unwrap();
    // A config that is gone for a moment, as with a mount.
    std::fs::rename(stand.path(), Path::new(&format!("{}.away", stand.path().display()))).unwrap();
    let trust = |receiver: &watch::Receiver<Arc<Settings>>| {
        receiver.borrow().identity.as_ref().map(|identity| identity.trust().count())
    };
    timeout(limit, receiver.changed()).await.unwrap().unwrap();
    assert!(receiver.borrow_and_update().pending.refused.as_ref().unwrap().reason.contains("cannot be read"));
    assert_eq!(trust(&receiver), Some(2));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!receiver.has_changed().unwrap());
    stand.config("peers: [ { address: \"h:1\" } ]\n");
    timeout(limit, receiver.wait_for(|settings| settings.pending.refused.is_none())).await.unwrap().unwrap();
    assert_eq!(peers(&receiver), ["h:1"]);
}
