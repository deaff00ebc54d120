//! The usual stand: two clusters, a router and two pods, over this machine's loopback.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context, Result};
use hickory_proto::rr::RecordType;

use crate::{Place, Router, RouterOptions, Sidecar, SidecarOptions, Stand, annotation, ask};

/// Where the tests' programs are: beside the test's own directory.
///
/// # Errors
/// Where the system does not say where the test is.
pub fn programs() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let deps = test.parent().context("a program without a directory")?;
    Ok(deps.parent().context("deps without a parent")?.to_owned())
}

/// Cluster `a.local` with the pod `server`, cluster `b.local` with the pod `client` that imports its Service `web`: TCP and
/// UDP of [`Pair::PORT`]. The router of `b.local` dials.
pub struct Pair {
    /// The client's sidecar; before its router, so that it ends first.
    pub client: Sidecar,
    /// The server's sidecar.
    pub server: Sidecar,
    /// The router of `b.local`, the client's.
    pub b: Router,
    /// The router of `a.local`, the server's.
    pub a: Router,
    /// Where the server's application is to listen.
    pub service: SocketAddr,
    /// Where peers dial the router of `a.local`.
    pub peers: SocketAddr,
    /// Tells the tests of one run apart: the third byte of their loopback addresses.
    pub number: u8,
    /// The rest of the stand.
    pub stand: Stand,
}

impl Pair {
    /// The Service's port.
    pub const PORT: u16 = 8080;

    /// Starts it.
    ///
    /// # Errors
    /// Where something does not start; with its log.
    pub fn start() -> Result<Self> {
        Self::with("")
    }

    /// Starts it with more text in the server's export, such as a line of `allow`, indented by four.
    ///
    /// # Errors
    /// Where something does not start; with its log.
    pub fn with(more: &str) -> Result<Self> {
        static NEXT: AtomicU8 = AtomicU8::new(0);
        // Test programs run at the same time: each takes addresses by its process number.
        let number = (std::process::id() % 12) as u8 * 20 + NEXT.fetch_add(1, Ordering::SeqCst) % 20;
        let stand = Stand::new(&programs()?)?;
        let here = Place::default();
        let peers = stand.free_port()?;
        let (a_node, b_node) = ("a.local", "b.local");
        let a = stand.router(&RouterOptions {
            place: here.clone(),
            cluster: a_node,
            node: "a-1",
            peers: Some(peers),
            dials: Vec::new(),
            trusts: vec![b_node],
        })?;
        let b = stand.router(&RouterOptions {
            place: here.clone(),
            cluster: b_node,
            node: "b-1",
            peers: None,
            dials: vec![peers.to_string()],
            trusts: vec![a_node],
        })?;
        let pod = IpAddr::V4(Ipv4Addr::new(127, 110, number, 2));
        let entries = [
            ("web", "default", "a.local", Self::PORT, "TCP", Self::PORT),
            ("dgram", "default", "a.local", Self::PORT, "UDP", Self::PORT),
        ];
        let mut exports = annotation(&entries);
        exports.push_str(more);
        let server = stand.sidecar(
            &a,
            &SidecarOptions {
                place: here.clone(),
                pod: "server",
                namespace: "default",
                range: &format!("127.111.{number}.0/24"),
                dns: SocketAddr::from(([127, 110, number, 3], 10_053)),
                addresses: vec![pod],
                exports,
                imports: String::new(),
            },
        )?;
        let client = stand.sidecar(
            &b,
            &SidecarOptions {
                place: here,
                pod: "client",
                namespace: "default",
                range: &format!("127.112.{number}.0/24"),
                dns: SocketAddr::from(([127, 110, number, 4], 10_053)),
                addresses: Vec::new(),
                exports: String::new(),
                imports: annotation(&entries),
            },
        )?;
        let service = SocketAddr::new(pod, Self::PORT);
        let pair = Self { client, server, b, a, service, peers, number, stand };
        if more.is_empty() {
            pair.b.wait_for_offer(&format!("web.default.a.local:{}/TCP", Self::PORT))?;
            pair.b.wait_for_offer(&format!("dgram.default.a.local:{}/UDP", Self::PORT))?;
        }
        Ok(pair)
    }

    /// Where the client's DNS says that a Service is.
    ///
    /// # Errors
    /// Where it gives no address.
    pub fn resolve(&self, name: &str) -> Result<SocketAddr> {
        let answer = ask(self.client.dns, name, RecordType::A)?;
        let address = answer.addresses.first().with_context(|| format!("{name}: {answer:?}"))?;
        Ok(SocketAddr::from((*address, Self::PORT)))
    }

    /// The stand's directory.
    pub fn dir(&self) -> &Path {
        self.stand.dir()
    }
}
