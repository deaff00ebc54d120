//! What the programs say when they can't do what they are asked for, and with what exit code.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by a panic")]

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// A program of the project: it lies beside the test's own directory.
fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().unwrap().parent().unwrap().join(name);
    assert!(path.exists(), "{} is not there; cargo build first", path.display());
    path
}

fn fails(command: &mut Command) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    assert_eq!(status.code(), Some(1), "{command:?}");
    String::from_utf8(stderr).unwrap()
}

/// Without a config, with a source that is not there, with a kubeconfig that is not there.
fn failing() -> [Command; 3] {
    let [mut router, mut sidecar, mut controller] =
        ["router", "sidecar", "controller"].map(|name| Command::new(program(&format!("servicekeel-{name}"))));
    router.args(["--config", "/nowhere/router.yaml"]);
    sidecar.args(["--sidecar-source", "api"]);
    controller.arg("--once").env("KUBECONFIG", "/nowhere/kubeconfig");
    [router, sidecar, controller]
}

#[test]
fn why_a_program_ends_is_always_told() {
    let wanted = [
        "/nowhere/router.yaml: not found; pass a config with --config FILE (--help has an example)",
        "SIDECAR_SOURCE=api is not in this version",
        "cannot use KUBECONFIG=/nowhere/kubeconfig: ",
    ];
    for (mut command, wanted) in failing().into_iter().zip(wanted) {
        let name = command.get_program().to_owned();
        let name = name.to_str().unwrap().rsplit('/').next().unwrap();
        let logged = fails(&mut command);
        assert!(logged.contains("ERROR") && logged.contains(wanted), "{logged}");
        let json = fails(command.env("SERVICEKEEL_LOG_FORMAT", "json"));
        assert!(
            json.starts_with('{') && json.contains("\"level\":\"ERROR\"") && json.contains(wanted),
            "{json}"
        );
        let plain = fails(command.env("SERVICEKEEL_LOG", "off"));
        assert!(plain.starts_with(&format!("{name}: {wanted}")), "{plain}");
        let unset = fails(command.env("SERVICEKEEL_LOG", "loud"));
        assert!(unset.starts_with(&format!("{name}: SERVICEKEEL_LOG: ")), "{unset}");
    }
}

/// Nobody answers at port 1.
#[test]
fn the_api_that_does_not_answer_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config");
    let text = "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [ { name: c, context: { cluster: c } } ]\nclusters: [ { name: c, cluster: { server: \"http://127.0.0.1:1\" } } ]\n";
    std::fs::write(&config, text).unwrap();
    let controller = || {
        let mut command = Command::new(program("servicekeel-controller"));
        command.arg("--once").env("KUBECONFIG", &config);
        command
    };
    let told = fails(&mut controller());
    assert!(told.contains("cannot list objects at http://127.0.0.1:1/: "), "{told}");
    assert!(!told.contains("kube_client"), "{told}");
    std::fs::write(&config, text.replace("current-context: c", "current-context: other")).unwrap();
    let told = fails(&mut controller());
    assert!(told.contains("KUBECONFIG=") && told.contains("other"), "{told}");
}

#[test]
fn a_reader_that_has_read_enough_is_no_error() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut check = Command::new(program("servicekeel-router"));
    let done =
        check.args(["check", "/nowhere/x.yaml"]).stdout(writer).stderr(Stdio::piped()).output().unwrap();
    assert_eq!((done.status.code(), String::from_utf8(done.stderr).unwrap()), (Some(141), String::new()));
}

/// A disk that is full takes a file and no byte of it.
#[test]
fn a_certificate_that_cannot_be_written_leaves_no_empty_key() {
    let dir = tempfile::tempdir().unwrap();
    let (pki, out) = (dir.path().join("pki"), dir.path().join("node"));
    let router = program("servicekeel-router");
    let made =
        Command::new(&router).args(["pki", "init", "--cluster", "a.local", "--dir"]).arg(&pki).output();
    assert!(made.unwrap().status.success());
    let mut issue = Command::new("sh");
    issue.args(["-c", "trap '' XFSZ; ulimit -f 0; exec \"$0\" pki issue --node n --dir \"$1\" --out \"$2\""]);
    let told = fails(issue.args([&router, &pki, &out]));
    assert!(told.contains("cannot write") && told.contains("node.key"), "{told}");
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0);
}

#[test]
fn stdin_is_checked_too() {
    let mut check = Command::new("sh");
    check.args(["-c", "printf 'services:\\n- name: a_b\\n  ports: [{port: 1}]\\n' | \"$0\" check -"]);
    let done = check.arg(program("servicekeel-router")).output().unwrap();
    let told = String::from_utf8(done.stdout).unwrap();
    assert_eq!(done.status.code(), Some(1), "{told}");
    assert!(told.starts_with("stdin:2:9: services[0].name: "), "{told}");
}
