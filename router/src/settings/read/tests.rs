use std::time::{Duration, SystemTime};

use super::*;
use crate::pki::Authority;

/// A directory with the files of a router of a.local/n that trusts b.local.
struct Files {
    dir: tempfile::TempDir,
    a: Authority,
}

const CONFIG: &str = "\
cluster: a.local
node: n
identity:
  ca: ca.crt
  cert: node.crt
  key: node.key
trust:
  - { cluster: b.local, ca: b.crt }
";

impl Files {
    fn new() -> Self {
        let now = SystemTime::now();
        let [a, b] =
            ["a.local", "b.local"].map(|c| Authority::generate(&c.parse().unwrap(), 10, now).unwrap());
        let files = Self { dir: tempfile::tempdir().unwrap(), a };
        files.put("router.yaml", CONFIG);
        files.put("ca.crt", files.a.certificate());
        files.put("b.crt", b.certificate());
        files.issue("n", now);
        files
    }

    fn put(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn issue(&self, node: &str, now: SystemTime) {
        let issued = self.a.issue(&node.parse().unwrap(), &[], 5, now).unwrap();
        self.put("node.crt", &issued.certificate);
        self.put("node.key", &issued.key);
    }

    fn read(&self) -> Reading {
        read(&self.dir.path().join("router.yaml"), "host")
    }

    fn bad(&self) -> (Vec<String>, bool) {
        let bad = self.read().outcome.unwrap_err();
        let prefix = format!("{}/", self.dir.path().display());
        let told = bad.problems.0.iter().map(|p| p.to_string().replace(&prefix, "")).collect();
        (told, bad.without_identity.is_some())
    }
}

#[test]
fn good_files_make_settings() {
    let reading = Files::new().read();
    assert_eq!(reading.files.len(), 5, "{reading:?}");
    let good = reading.outcome.unwrap();
    let identity = good.settings.identity.unwrap();
    assert_eq!(identity.id().to_string(), "a.local/n");
    assert_eq!(identity.trust().count(), 2);
}

#[test]
fn each_file_that_is_wrong_is_named_where_the_config_names_it() {
    let now = SystemTime::now();
    let foreign = Authority::generate(&"b.local".parse().unwrap(), 10, now).unwrap();
    type Break = Box<dyn Fn(&Files)>;
    let cases: Vec<(Break, &str, &[&str])> = vec![
        (
            Box::new(|f| std::fs::remove_file(f.dir.path().join("node.crt")).unwrap()),
            "router.yaml:5:9: identity.cert: cannot be read",
            &["node.crt"],
        ),
        (
            Box::new(|f| f.put("node.key", "no key")),
            "router.yaml:6:8: identity.key: ",
            &["PRIVATE KEY", "node.key"],
        ),
        (
            Box::new(|f| {
                f.put("node.key", &f.a.issue(&"n".parse().unwrap(), &[], 5, SystemTime::now()).unwrap().key)
            }),
            "router.yaml:6:8: identity.key is not the key of identity.cert",
            &["node.key"],
        ),
        (
            Box::new(|f| f.issue("other", SystemTime::now())),
            "router.yaml:5:9: identity.cert: ",
            &["a.local/other", "a.local/n", "node.crt"],
        ),
        (
            Box::new(move |f| f.put("ca.crt", foreign.certificate())),
            "router.yaml:4:7: identity.ca: ",
            &["b.local", "a.local", "ca.crt"],
        ),
        (
            Box::new(|f| f.put("b.crt", f.a.certificate())),
            "router.yaml:8:29: trust of b.local: ",
            &["a.local", "b.crt"],
        ),
        (
            Box::new(|f| f.put("b.crt", &"x".repeat(300_000))),
            "router.yaml:8:29: trust of b.local: cannot be read",
            &["limit"],
        ),
    ];
    for (make_bad, start, words) in cases {
        let files = Files::new();
        make_bad(&files);
        let (told, heals) = files.bad();
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].starts_with(start), "{start}: {told:?}");
        assert!(words.iter().all(|word| told[0].contains(word)), "{words:?}: {told:?}");
        assert!(!heals);
    }
}

#[test]
fn a_certificate_out_of_its_time_may_heal() {
    let files = Files::new();
    let old = SystemTime::now() - Duration::from_secs(8 * 86_400);
    let early = Authority::generate(&"a.local".parse().unwrap(), 20, old).unwrap();
    let issued = early.issue(&"n".parse().unwrap(), &[], 5, old).unwrap();
    files.put("ca.crt", early.certificate());
    files.put("node.crt", &issued.certificate);
    files.put("node.key", &issued.key);
    let (told, heals) = files.bad();
    assert!(
        told[0].starts_with("router.yaml:5:9: identity.cert: ") && told[0].contains("expired"),
        "{told:?}"
    );
    assert!(heals);
}

#[test]
fn several_bad_files_are_told_at_once() {
    let files = Files::new();
    for name in ["ca.crt", "node.key", "b.crt"] {
        std::fs::remove_file(files.dir.path().join(name)).unwrap();
    }
    assert_eq!(files.bad().0.len(), 3);
    files.put("router.yaml", "cluster: \u{7f}\n");
    assert_eq!(files.bad().0.len(), 1);
    std::fs::write(files.dir.path().join("router.yaml"), [0xff, 0xfe]).unwrap();
    assert!(files.bad().0[0].contains("UTF-8"));
}

#[test]
fn a_file_that_was_cut_is_told_in_words() {
    for (name, kind) in [("ca.crt", "CERTIFICATE"), ("node.key", "PRIVATE KEY")] {
        let files = Files::new();
        let path = files.dir.path().join(name);
        let text = std::fs::read_to_string(&path).unwrap();
        files.put(name, &text[..text.len() / 2]);
        let (told, _) = files.bad();
        assert!(
            told[0].contains(&format!("truncated: no line -----END {kind}-----")) && told[0].contains(name),
            "{told:?}"
        );
    }
}

#[test]
fn a_text_with_a_mark_or_an_indent_is_the_same_text_and_another_form_is_named() {
    let files = Files::new();
    let [ca, b, crt, key] = ["ca.crt", "b.crt", "node.crt", "node.key"]
        .map(|name| (name, std::fs::read_to_string(files.dir.path().join(name)).unwrap()));
    let indented =
        |text: &str| text.lines().map(|line| format!("  \t{line}\r\n")).collect::<String>() + "\n  \n";
    let marked = |text: &str| format!("\u{feff}{text}\u{feff}");
    for (name, text) in [&ca, &b, &crt, &key] {
        for changed in [indented(text), marked(text), marked(&indented(text)), text.replace('\n', "\r\n")] {
            files.put(name, &changed);
            let reading = files.read();
            assert!(
                reading.outcome.is_ok() && reading.warnings.is_empty(),
                "{changed}\n{:?}",
                reading.outcome
            );
        }
        files.put(name, text);
    }
    // Two files in one, each with its mark.
    files.put("b.crt", &format!("{}{}", marked(&b.1).trim_end_matches('\u{feff}'), marked(&b.1)));
    assert!(files.read().outcome.is_ok());
    let wide: Vec<u8> =
        std::iter::once(0xfeff).chain(b.1.encode_utf16()).flat_map(u16::to_le_bytes).collect();
    for (bytes, says) in [(wide, "it is UTF-16 text"), (vec![0x30, 0x82, 1, 2, 3], "it is DER")] {
        std::fs::write(files.dir.path().join("b.crt"), bytes).unwrap();
        let (told, _) = files.bad();
        let start = format!("router.yaml:8:29: trust of b.local: this is not PEM: {says}");
        assert!(told[0].starts_with(&start), "{told:?}");
    }
}

#[test]
fn a_private_key_among_authorities_is_warned_of_and_never_shown() {
    let files = Files::new();
    let key = files.a.key();
    for (name, place, part) in [("ca.crt", "4:7", "identity.ca"), ("b.crt", "8:29", "trust of b.local")] {
        let text = std::fs::read_to_string(files.dir.path().join(name)).unwrap();
        for key in [key.to_string(), key.replace("-----BEGIN", "  -----BEGIN")] {
            files.put(name, &format!("{text}{key}"));
            let reading = files.read();
            assert!(reading.outcome.is_ok());
            let told: Vec<_> = reading.warnings.iter().map(ToString::to_string).collect();
            let start = format!("router.yaml:{place}: {part}: there is a private key");
            assert!(told.len() == 1 && told[0].contains(&start), "{told:?}");
            let secret = key.lines().nth(1).unwrap();
            assert!(!told[0].contains(secret), "the key is shown");
        }
        files.put(name, &text);
    }
    // A certificate and its key may be one file.
    let both = ["node.crt", "node.key"]
        .map(|name| std::fs::read_to_string(files.dir.path().join(name)).unwrap())
        .concat();
    files.put("node.crt", &both);
    assert!(files.read().warnings.is_empty());
}
