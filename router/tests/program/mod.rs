//! A router as a program: killed with the test, which a panic in any of its threads fails; and the files that it reads.

use std::fs::File;
use std::io::{Read, Seek};
use std::net::{SocketAddr, TcpListener};
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::SystemTime;

use servicekeel_router::pki::Authority;

/// What a router is started with.
#[allow(dead_code, reason = "not every test starts one so")]
pub(crate) struct Files {
    pub(crate) config: PathBuf,
    pub(crate) socket: PathBuf,
    pub(crate) peers: SocketAddr,
    pub(crate) admin: SocketAddr,
}

#[allow(dead_code, reason = "not every test starts one so")]
impl Files {
    /// For a router of `own`'s cluster, which trusts the other's and dials `peer`.
    pub(crate) fn write(dir: &Path, own: &Authority, other: &Authority, peer: Option<SocketAddr>) -> Self {
        let dir = dir.join(own.cluster().as_str());
        std::fs::create_dir(&dir).unwrap();
        let issued = own.issue(&"n".parse().unwrap(), &[], 1, SystemTime::now()).unwrap();
        let put = |file: &str, text: &str| std::fs::write(dir.join(file), text).unwrap();
        put("ca.crt", own.certificate());
        put("other.crt", other.certificate());
        put("node.crt", &issued.certificate);
        put("node.key", &issued.key);
        let socket = dir.join("router.sock");
        let free = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [peers, admin] = free.map(|listener| listener.local_addr().unwrap());
        let dials = peer.map(|at| format!("peers: [ {{ address: \"{at}\" }} ]\n")).unwrap_or_default();
        put(
            "router.yaml",
            &format!(
                "cluster: {}\nnode: n\nlisten: {{ sidecars: {}, peers: \"{peers}\", admin: \"{admin}\" }}\n\
                 identity: {{ ca: ca.crt, cert: node.crt, key: node.key }}\n\
                 trust: [ {{ cluster: {}, ca: other.crt }} ]\n{dials}",
                own.cluster(),
                socket.display(),
                other.cluster()
            ),
        );
        Self { config: dir.join("router.yaml"), socket, peers, admin }
    }
}

pub(crate) struct Program {
    child: Child,
    said: File,
}

impl Program {
    pub(crate) fn start(command: &mut Command) -> Self {
        let said = tempfile::tempfile().unwrap();
        let child = command.stderr(said.try_clone().unwrap()).spawn().unwrap();
        Self { child, said }
    }

    /// What it has said so far.
    #[allow(dead_code, reason = "not every test asks")]
    pub(crate) fn log(&self) -> String {
        // Its own description, so that where the program writes stays as it is.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.said));
        std::fs::read_to_string(path).unwrap()
    }
}

impl Deref for Program {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.child
    }
}

impl DerefMut for Program {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.child
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mut said = String::new();
        self.said.rewind().unwrap();
        self.said.read_to_string(&mut said).unwrap();
        if let Some(at) = said.find("panicked at ")
            && !std::thread::panicking()
        {
            panic!("the router panicked: {}", &said[at..said.len().min(at + 2000)]);
        }
    }
}
