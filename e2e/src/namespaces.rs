//! Nodes and pods as network namespaces of this machine, a switch between the nodes, and what cuts them apart.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};

use crate::Place;

/// The uplink of a node, and of a pod that has one.
const UPLINK: &str = "eth0";

/// Namespaces that are gone, with all their interfaces, when it is dropped. Nothing of this machine's own network is
/// touched: the switch has a namespace too.
pub struct Namespaces {
    /// Tells those of this process and test apart from all others.
    prefix: String,
    /// What `ip netns exec` shows to a program as its files under `/etc`.
    etc: Vec<PathBuf>,
    made: Vec<String>,
    switch: Place,
}

/// What a firewall does with what it does not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Nothing: whoever dials waits.
    Drop,
    /// It says so: whoever dials learns it at once.
    Reject,
}

impl Namespaces {
    /// A switch with nothing plugged in. `tools` are the programs that the test runs beside `ip` and `iptables`.
    ///
    /// # Errors
    /// Without root, or a tool: the text says what to do.
    pub fn new(tools: &[&str]) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        for tool in ["ip", "iptables"].iter().chain(tools) {
            let found = std::env::var_os("PATH")
                .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(tool).is_file()));
            ensure!(
                found,
                "{tool} is not on the PATH, and this test needs it (Debian: apt-get install iproute2 iptables dnsutils curl)"
            );
        }
        ensure!(
            rustix::process::geteuid().is_root(),
            "this test makes network namespaces: run it as root, such as by `sudo make test-net`"
        );
        let prefix = format!("sk{}n{}", std::process::id(), NEXT.fetch_add(1, Ordering::SeqCst));
        let mut namespaces = Self { prefix, etc: Vec::new(), made: Vec::new(), switch: Place::default() };
        namespaces.switch = namespaces.add("switch").context(
            "no network namespace can be made: root is not enough where a container lacks CAP_SYS_ADMIN and CAP_NET_ADMIN",
        )?;
        let switch = namespaces.switch.clone();
        ip(&switch, "link add br0 type bridge")?;
        ip(&switch, "link set br0 up")?;
        Ok(namespaces)
    }

    fn add(&mut self, name: &str) -> Result<Place> {
        let name = format!("{}-{name}", self.prefix);
        run(Command::new("ip").args(["netns", "add", &name]))?;
        self.made.push(name.clone());
        let place = Place { netns: Some(name), user: None, open_files: None };
        ip(&place, "link set lo up")?;
        Ok(place)
    }

    /// A node, plugged into the switch. Nodes see each other as neighbours of one /24.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn node(&mut self, name: &str, address: Ipv4Addr) -> Result<Place> {
        let node = self.add(name)?;
        let port = self.port(&node)?;
        let switch = self.switch.netns.clone().context("the switch has no namespace")?;
        ip(&node, &format!("link add {UPLINK} type veth peer name {port} netns {switch}"))?;
        ip(&node, &format!("addr add {address}/24 dev {UPLINK}"))?;
        ip(&node, &format!("link set {UPLINK} up"))?;
        ip(&self.switch, &format!("link set {port} master br0 up"))?;
        Ok(node)
    }

    /// A pod without any network but its own loopback. Its programs ask the DNS server `dns` for names.
    ///
    /// # Errors
    /// What `ip` says, or where `/etc/netns` can't be written.
    pub fn pod(&mut self, name: &str, dns: Ipv4Addr) -> Result<Place> {
        let pod = self.add(name)?;
        let etc = Path::new("/etc/netns").join(pod.netns.as_deref().unwrap_or_default());
        std::fs::create_dir_all(&etc).with_context(|| format!("making {}", etc.display()))?;
        self.etc.push(etc.clone());
        std::fs::write(etc.join("resolv.conf"), format!("nameserver {dns}\noptions timeout:2 attempts:1\n"))?;
        Ok(pod)
    }

    /// Gives a pod an address of its own, at the end of a cable to its node.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn attach(&self, pod: &Place, node: &Place, address: Ipv4Addr) -> Result<()> {
        let node = node.netns.as_deref().context("the node has no namespace")?;
        ip(pod, &format!("link add {UPLINK} type veth peer name pod netns {node}"))?;
        ip(pod, &format!("addr add {address}/24 dev {UPLINK}"))?;
        ip(pod, &format!("link set {UPLINK} up"))?;
        run(Command::new("ip").args(["-n", node, "link", "set", "pod", "up"]))
    }

    /// The switch's name for a node's cable.
    fn port(&self, node: &Place) -> Result<String> {
        let name = node.netns.as_deref().and_then(|name| name.strip_prefix(&self.prefix));
        Ok(format!("port{}", name.context("not a namespace of this test")?))
    }

    /// Takes a node's own link down, or up again.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn set_link(&self, node: &Place, up: bool) -> Result<()> {
        ip(node, &format!("link set {UPLINK} {}", if up { "up" } else { "down" }))
    }

    /// Makes the switch swallow what a node sends and what is sent to it, or no longer. To both sides all looks well,
    /// and nothing arrives.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn set_plugged(&self, node: &Place, plugged: bool) -> Result<()> {
        let port = self.port(node)?;
        let master = if plugged { "master br0" } else { "nomaster" };
        ip(&self.switch, &format!("link set {port} {master}"))
    }

    /// Puts a firewall on a node's uplink: nobody may dial in, by TCP or UDP. What it dials itself works.
    ///
    /// # Errors
    /// What `iptables` says.
    pub fn refuse_inbound(&self, node: &Place, refusal: Refusal) -> Result<()> {
        let (tcp, udp) = match refusal {
            Refusal::Drop => ("DROP", "DROP"),
            Refusal::Reject => ("REJECT --reject-with tcp-reset", "REJECT"),
        };
        for rule in [format!("-p tcp --syn -j {tcp}"), format!("-p udp -j {udp}")] {
            let mut iptables = node.command(Path::new("iptables"));
            iptables.args(["-w", "-A", "INPUT", "-i", UPLINK]).args(rule.split(' '));
            run(&mut iptables)?;
        }
        Ok(())
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.made {
            if let Err(error) = run(Command::new("ip").args(["netns", "del", name])) {
                eprintln!("{error:#}");
            }
        }
        for etc in &self.etc {
            let _ = std::fs::remove_dir_all(etc);
        }
        // Only where it is empty: others may have theirs there.
        let _ = std::fs::remove_dir("/etc/netns");
    }
}

/// Runs `ip` in a place.
fn ip(place: &Place, arguments: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(name) = &place.netns {
        command.args(["-n", name]);
    }
    run(command.args(arguments.split(' ')))
}

fn run(command: &mut Command) -> Result<()> {
    let done = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    if !done.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&done.stderr).trim_end());
    }
    Ok(())
}
