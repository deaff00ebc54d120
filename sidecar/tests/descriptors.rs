//! The program with few descriptors.
#![allow(clippy::unwrap_used, reason = "whatever fails here is a test that fails")]

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use servicekeel_runtime::admin;
use servicekeel_sidecar::source::IMPORTS_FILE;
use tempfile::NamedTempFile;

const LIMIT: Duration = Duration::from_secs(20);

/// Killed when dropped; a panic in its log fails the test then.
struct Running(Child, NamedTempFile);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
        let log = std::fs::read_to_string(self.1.path()).unwrap();
        assert!(std::thread::panicking() || !log.contains("panicked at "), "{log}");
    }
}

fn imports(count: u16) -> String {
    let mut text = "services:\n".to_owned();
    for i in 0..count {
        if i % 50 == 0 {
            write!(text, "  - name: web-{i}\n    ports:\n").unwrap();
        }
        writeln!(text, "      - {{ name: p{i}, port: {} }}", 20_000 + i).unwrap();
    }
    text
}

/// Waits until so many ports have a socket and so many have none for want of a descriptor.
async fn wait(admin: SocketAddr, wanted: impl Fn(usize, usize) -> bool) {
    let end = Instant::now() + LIMIT;
    let mut found = (0, 0);
    loop {
        if let Ok((200, text)) = admin::get(admin, "/status").await {
            let status: serde_json::Value = serde_json::from_str(&text).unwrap();
            let imports = status["imports"].as_array().unwrap();
            let ports = || imports.iter().flat_map(|import| import["ports"].as_array().unwrap());
            let short = |port: &&serde_json::Value| port.to_string().contains("the limit of 64 open files");
            found = (ports().filter(|port| port["state"] == "held").count(), ports().filter(short).count());
            if wanted(found.0, found.1) {
                return;
            }
        }
        assert!(Instant::now() < end, "held and short: {found:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn more_imports_than_descriptors_leave_enough_to_read_fewer() {
    let directory = tempfile::tempdir().unwrap();
    let put = |count| std::fs::write(directory.path().join(IMPORTS_FILE), imports(count)).unwrap();
    let free = |ip: Ipv4Addr| TcpListener::bind((ip, 0)).unwrap().local_addr().unwrap();
    let (admin, dns) = (free(Ipv4Addr::LOCALHOST), free(Ipv4Addr::new(127, 116, 0, 1)));
    put(13);
    // Not beside the annotations, whose directory is watched.
    let log = NamedTempFile::new().unwrap();
    let child = Command::new("sh")
        .args(["-c", "ulimit -n 64; exec \"$0\""])
        .arg(env!("CARGO_BIN_EXE_servicekeel-sidecar"))
        .env("SIDECAR_CONFIG_DIR", directory.path())
        .env("SIDECAR_STATE_DIR", directory.path().join("state"))
        .env("SIDECAR_SERVER_LISTEN", directory.path().join("router.sock"))
        .env("SIDECAR_IP_RANGE", "127.115.0.0/24")
        .env("SIDECAR_ADMIN_ADDR", admin.to_string())
        .env("SIDECAR_DNS_ADDR", dns.to_string())
        .env("SIDECAR_CLUSTER", "a.local")
        .stderr(log.reopen().unwrap())
        .spawn()
        .unwrap();
    let _running = Running(child, log);
    wait(admin, |held, short| (held, short) == (13, 0)).await;
    put(150);
    wait(admin, |held, short| held >= 13 && short > 100 && held + short == 150).await;
    std::net::TcpStream::connect(dns).unwrap();
    put(13);
    wait(admin, |held, short| (held, short) == (13, 0)).await;
}
