//! A pod without a sidecar of ours, which speaks to the router itself.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::Path;
use std::time::Duration;

use servicekeel_core::handoff::{DescriptorKind, Pod, ToRouter, ToSidecar, VERSION};
use servicekeel_core::name::{Protocol, ServiceName, ServicePort};
use servicekeel_runtime::net::{Datagrams, Handoff, Net};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::{LONGEST, STAY, STEP};
use crate::flow::{self, Plan};
use crate::net::{SimDescriptor, SimHandoff, SimNet};
use crate::oracle::Oracle;
use crate::random::Random;
use crate::stage::{Port, service_port};
use crate::world::{SOCKET, World};

/// Where its imports listen.
const AT: [u8; 4] = [127, 9, 9, 9];

/// What it does in one conversation.
#[derive(Debug, Clone, Copy)]
enum Deed {
    /// Bytes that are no message.
    Rubbish,
    /// As many exports as it can, each of another name.
    Exports,
    /// One export that comes and goes, opened and closed to all.
    Flip,
    /// One import after the other, in each other's place.
    Imports,
    /// Imports and stock that come without the sockets that they speak of, or with those of another kind.
    Unbacked,
    /// Sockets that nobody asked for.
    Stock,
    /// It introduces itself again and again.
    Hellos,
    /// It says that it is another pod, and hands over sockets as that one's.
    Claim,
    /// Many datagrams by an import, whose answers nobody reads.
    Datagrams,
    /// Many flows by an import, that say nothing or read nothing.
    Flows,
    /// An export whose port is that of its own import of the same Service: what comes there comes back to the router.
    Loop,
}

const DEEDS: [Deed; 11] = [
    Deed::Rubbish,
    Deed::Exports,
    Deed::Flip,
    Deed::Imports,
    Deed::Unbacked,
    Deed::Stock,
    Deed::Hellos,
    Deed::Claim,
    Deed::Datagrams,
    Deed::Flows,
    Deed::Loop,
];

struct Mallory {
    net: SimNet,
    oracle: Oracle,
    random: Random,
    router: SimHandoff,
    /// The most messages.
    most: u64,
    /// Services of others.
    ports: Vec<Port>,
}

impl World {
    /// Lets a pod do one thing that a sidecar never does, with up to `most` messages. It may claim to be one of `others`,
    /// and use their `ports`.
    pub async fn harm_by_pod(&self, pod: &str, others: &[&str], ports: &[Port], most: u64) {
        let mut random = Random::new(self.draw());
        let deed = *random.pick(&DEEDS);
        let victim = matches!(deed, Deed::Claim).then(|| (*random.pick(others)).to_owned());
        let (net, oracle, ports) = (self.net(pod).process(1337), self.oracle.clone(), ports.to_vec());
        let name = pod.to_owned();
        let job = async move {
            tracing::info!(pod = name, ?deed, victim, "a pod means harm");
            let Ok(router) = net.handoff_connect(Path::new(SOCKET)).await else { return };
            let mut mallory = Mallory { net, oracle, random, router, most, ports };
            if mallory.random.chance(90) && mallory.say(&hello(victim.as_deref())).await.is_none() {
                return;
            }
            let _ = mallory.act(deed).await;
            // It stays, and reads nothing.
            sleep(mallory.random.millis(0..STAY)).await;
        };
        self.within(pod, async move { timeout(LONGEST, job).await }).await.unwrap_or_default();
    }
}

impl World {
    /// Lets one process of a pod begin as many conversations as it can, up to `most`, and stay for so long.
    pub async fn crowd_by_pod(&self, pod: &str, most: usize, stay: Duration) -> usize {
        let net = self.net(pod).process(1337);
        let job = async move {
            let mut crowd = Vec::new();
            while crowd.len() < most {
                let Ok(router) = net.handoff_connect(Path::new(SOCKET)).await else { break };
                if router.send(&hello(None).encode(), Vec::new()).await.is_ok() {
                    crowd.push(router);
                }
                // Each is met before it is too many that wait to be.
                if crowd.len() % 256 == 0 {
                    sleep(Duration::from_millis(5)).await;
                }
            }
            sleep(stay).await;
            crowd.len()
        };
        self.within(pod, job).await
    }
}

/// How often a flood sends, and what: as much as a socket's queue holds, the small ones for what the large ones leave.
const TICK: Duration = Duration::from_millis(10);
const BURST: [(usize, usize); 2] = [(2, 60_000), (120, 20)];

impl World {
    /// Lets a pod import a UDP port and flood it for so long, by clients that read nothing.
    pub async fn flood_by_pod(&self, pod: &str, port: Port, time: Duration) {
        let (net, oracle) = (self.net(pod).process(1337), self.oracle.clone());
        let job = async move {
            let router = net.handoff_connect(Path::new(SOCKET)).await.expect("a router");
            let (random, ports) = (Random::new(0), vec![port]);
            let mut mallory = Mallory { net, oracle, random, router, most: 1, ports };
            mallory.say(&hello(None)).await.expect("a router that hears it");
            let (_, to) = mallory.own(true).await.expect("an import");
            let service = mallory.oracle.service(&port.to_string());
            let socket = mallory.net.bind_udp(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a socket");
            let client = mallory.oracle.begin_client();
            let end = Instant::now() + time;
            while Instant::now() < end {
                for len in BURST.into_iter().flat_map(|(n, len)| std::iter::repeat_n(len, n)) {
                    let (_, bytes) = mallory.oracle.send_datagram(client, service, len);
                    let _ = socket.send_to(&bytes, to).await;
                }
                sleep(TICK).await;
            }
        };
        self.within(pod, job).await;
    }
}

fn hello(victim: Option<&str>) -> ToRouter {
    let pod = Pod {
        name: victim.unwrap_or("mallory").into(),
        namespace: "default".parse().expect("a namespace"),
        uid: victim.map_or_else(String::new, |victim| format!("uid-of-{victim}")),
    };
    ToRouter::Hello { version: VERSION, pod, addresses: vec![AT.into(); 20] }
}

impl Mallory {
    async fn act(&mut self, deed: Deed) -> Option<()> {
        let messages = self.random.within(1..self.most.max(2));
        match deed {
            Deed::Datagrams => return self.datagrams().await,
            Deed::Flows => return self.flows().await,
            Deed::Loop => return self.turn_in_a_circle().await,
            _ => {}
        }
        for number in 0..messages {
            match deed {
                Deed::Rubbish => {
                    let len = self.random.within(1..200);
                    let bytes: Vec<_> = (0..len).map(|_| self.random.draw() as u8).collect();
                    self.send(&bytes, Vec::new()).await?;
                }
                Deed::Exports => self.say(&export(number, number)).await?,
                Deed::Flip => match number % 2 {
                    0 => self.say(&export(1, 1)).await?,
                    _ => self.say(&ToRouter::Unexport { id: 1 }).await?,
                },
                Deed::Imports | Deed::Claim => self.import(number % 4, number).await?,
                Deed::Unbacked => self.unbacked(number).await?,
                // One message has more than a flow needs, and they are the pod's own descriptors.
                Deed::Stock if number >= 16 => break,
                Deed::Stock => {
                    let sockets = self.stock(32, 32);
                    self.send(&ToRouter::Stock { tcp: 32, udp: 32 }.encode(), sockets).await?;
                }
                Deed::Hellos => self.say(&hello(None)).await?,
                Deed::Datagrams | Deed::Flows | Deed::Loop => {}
            }
        }
        Some(())
    }

    async fn say(&self, message: &ToRouter) -> Option<()> {
        self.send(&message.encode(), Vec::new()).await
    }

    /// `None`: the router takes no more.
    async fn send(&self, message: &[u8], sockets: Vec<SimDescriptor>) -> Option<()> {
        timeout(STEP, self.router.send(message, sockets)).await.ok()?.ok()
    }

    fn stock(&self, tcp: usize, udp: usize) -> Vec<SimDescriptor> {
        let tcps = std::iter::repeat_n(DescriptorKind::TcpUnconnected, tcp);
        let udps = std::iter::repeat_n(DescriptorKind::UdpUnconnected, udp);
        tcps.chain(udps).filter_map(|kind| self.net.make_unbound(kind).ok()).collect()
    }

    /// An import of a Service of others, at an address of its own.
    async fn import(&mut self, id: u64, number: u64) -> Option<()> {
        let port = *self.random.pick(&self.ports);
        let kind = if port.udp { DescriptorKind::UdpBound } else { DescriptorKind::TcpListener };
        let at = SocketAddr::from((AT, 1000 + (number % 1000) as u16));
        let socket = self.net.make_bound(kind, at).await.ok()?;
        self.send(&ToRouter::Import { id, wanted: service_port(&port) }.encode(), vec![socket]).await?;
        if self.random.chance(30) {
            self.say(&ToRouter::Unimport { id }).await?;
        }
        Some(())
    }

    async fn unbacked(&mut self, number: u64) -> Option<()> {
        let wanted = service_port(self.random.pick(&self.ports));
        let other = match wanted.protocol {
            Protocol::Tcp => self.stock(0, 1),
            Protocol::Udp => self.stock(1, 0),
        };
        let sockets = if self.random.chance(50) { other } else { Vec::new() };
        let import = ToRouter::Import { id: number, wanted };
        let stock = ToRouter::Stock { tcp: 1, udp: 0 };
        let message = if self.random.chance(50) { import } else { stock };
        self.send(&message.encode(), sockets).await
    }

    /// An import of one of its ports that are UDP or not, which stays: where it is.
    async fn own(&mut self, udp: bool) -> Option<(Port, SocketAddr)> {
        let ports: Vec<_> = self.ports.iter().filter(|port| port.udp == udp).copied().collect();
        let port = *(!ports.is_empty()).then(|| self.random.pick(&ports))?;
        let kind = if udp { DescriptorKind::UdpBound } else { DescriptorKind::TcpListener };
        let at = SocketAddr::from((AT, 2000 + self.random.within(0..1000) as u16));
        let socket = self.net.make_bound(kind, at).await.ok()?;
        self.send(&ToRouter::Import { id: 9, wanted: service_port(&port) }.encode(), vec![socket]).await?;
        Some((port, at))
    }

    async fn datagrams(&mut self) -> Option<()> {
        let (port, to) = self.own(true).await?;
        let service = self.oracle.service(&port.to_string());
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        for _ in 0..self.random.within(1..6) {
            for _ in 0..self.random.within(1..20) {
                let Ok(socket) = self.net.bind_udp(any) else { continue };
                let client = self.oracle.begin_client();
                for _ in 0..self.random.within(1..10) {
                    let len = self.random.within(20..9000) as usize;
                    let (_, bytes) = self.oracle.send_datagram(client, service, len);
                    let _ = socket.send_to(&bytes, to).await;
                }
            }
            sleep(self.random.millis(0..100)).await;
        }
        Some(())
    }

    async fn flows(&mut self) -> Option<()> {
        let (port, to) = self.own(false).await?;
        let mut flows = JoinSet::new();
        for _ in 0..self.random.within(1..20) {
            let (net, oracle) = (self.net.clone(), self.oracle.clone());
            if self.random.chance(50) {
                let stay = self.random.millis(0..STAY);
                flows.spawn(async move {
                    // A service that was spoken to by nobody sees it go.
                    let silent = net.connect(&to.to_string()).await;
                    sleep(stay).await;
                    drop(silent);
                });
            } else {
                let service = self.oracle.service(&port.to_string());
                let down = self.random.within(0..300_000);
                let plan = Plan::new(service, 10, down).pausing(self.random.millis(0..STAY));
                flows.spawn(async move {
                    let _ =
                        timeout(Duration::from_millis(2 * STAY), flow::run(&net, to, plan, &oracle)).await;
                });
            }
        }
        while flows.join_next().await.is_some() {}
        Some(())
    }
}

impl Mallory {
    async fn turn_in_a_circle(&mut self) -> Option<()> {
        let port = own_port(1);
        let at = SocketAddr::from((AT, 3000 + self.random.within(0..1000) as u16));
        let socket = self.net.make_bound(DescriptorKind::TcpListener, at).await.ok()?;
        let target = at.port().try_into().ok()?;
        self.say(&ToRouter::Export { id: 1, offered: port.clone(), target, allow: None }).await?;
        self.send(&ToRouter::Stock { tcp: 32, udp: 0 }.encode(), self.stock(32, 0)).await?;
        self.send(&ToRouter::Import { id: 1, wanted: port }.encode(), vec![socket]).await?;
        let mut flows = Vec::new();
        for _ in 0..self.random.within(1..10) {
            flows.push(self.net.connect(&at.to_string()).await.ok()?);
            // As a sidecar, it gives what is asked for.
            while let Ok(Ok(Some((bytes, _)))) = timeout(STEP, self.router.recv()).await {
                if let Ok(ToSidecar::More { tcp, udp }) = ToSidecar::decode(&bytes) {
                    let sockets = self.stock(tcp.into(), udp.into());
                    self.send(&ToRouter::Stock { tcp, udp }.encode(), sockets).await?;
                }
            }
        }
        Some(())
    }
}

/// A name that nobody else wants.
fn own_port(number: u64) -> ServicePort {
    let port = service_port(&Port::tcp("flood", crate::stage::CLUSTER_A, 80));
    let name = format!("flood-{number}").parse().expect("a name");
    ServicePort { service: ServiceName { name, ..port.service }, ..port }
}

fn export(id: u64, number: u64) -> ToRouter {
    ToRouter::Export { id, offered: own_port(number), target: NonZeroU16::MIN, allow: None }
}
