//! The network between nodes: latency, cuts, healing, and paths that forget their connections.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use servicekeel_runtime::net::tcp::TcpOptions;
use turmoil::{LinkIter, Protocol, Segment, Sim};

use crate::net::wire::WireTable;

/// The first retransmission of a segment (RTO), and of a SYN; doubled each time, up to [`MAX_RTO`].
const RTO: Duration = Duration::from_millis(200);
const SYN_RTO: Duration = Duration::from_secs(1);
const MAX_RTO: Duration = Duration::from_secs(120);
/// How often what waits on a cut link is looked through, for the time that it takes.
const LOOK: Duration = Duration::from_millis(50);

/// The network of one simulation.
pub struct Network {
    wires: WireTable,
    links: BTreeMap<(IpAddr, IpAddr), Link>,
    /// What the routers ask the kernels for.
    options: TcpOptions,
}

/// A link that is cut, or was cut and has segments that wait to be sent again.
#[derive(Default)]
struct Link {
    cut: Option<Duration>,
    /// When it is looked through next.
    look: Duration,
    /// By sender and receiver of a connection: since when its segments wait.
    waiting: BTreeMap<(SocketAddr, SocketAddr), Waiting>,
}

#[derive(Clone, Copy)]
struct Waiting {
    since: Duration,
    /// When it is sent again and comes through; `None` while the link is cut.
    due: Option<Duration>,
    syn: bool,
}

impl Waiting {
    /// The first retransmission at `now` or later.
    fn retransmission(&self, now: Duration) -> Duration {
        let (mut pause, mut at) = (if self.syn { SYN_RTO } else { RTO }, self.since);
        loop {
            at += pause;
            if at >= now {
                return at;
            }
            pause = (pause * 2).min(MAX_RTO);
        }
    }
}

impl Link {
    /// Sees what is sent on a cut link.
    fn see(&mut self, sent: LinkIter<'_>, now: Duration) {
        for sent in sent {
            let syn = matches!(sent.protocol(), Protocol::Tcp(Segment::Syn(_)));
            self.waiting.entry(sent.pair()).or_insert(Waiting { since: now, due: None, syn });
        }
    }

    /// Lets through what is sent again by now.
    fn send_again(&mut self, sent: LinkIter<'_>, now: Duration) {
        let is_due = |waiting: &Waiting| waiting.due.is_some_and(|due| due <= now);
        for sent in sent {
            if self.waiting.get(&sent.pair()).is_some_and(is_due) {
                sent.deliver();
            }
        }
        self.waiting.retain(|_, waiting| !is_due(waiting));
    }
}

fn pair(a: IpAddr, b: IpAddr) -> (IpAddr, IpAddr) {
    if a < b { (a, b) } else { (b, a) }
}

fn pair_of(sent: &LinkIter<'_>) -> (IpAddr, IpAddr) {
    let (a, b) = sent.pair();
    pair(a, b)
}

impl Network {
    /// A network of connections for which the kernels are asked for `options`.
    pub(crate) fn new(options: TcpOptions) -> Self {
        Self { wires: WireTable::default(), links: BTreeMap::new(), options }
    }

    /// The longest that the window of a connection was closed to bytes that waited.
    pub(crate) fn closed_window(&self) -> Duration {
        self.wires.closed_window()
    }

    /// What the nodes' sockets share with it.
    pub(crate) fn wires(&self) -> &WireTable {
        &self.wires
    }

    /// Cuts the path between two nodes: nothing comes through, and both sides send it again and again.
    pub fn cut(&mut self, sim: &Sim<'_>, a: IpAddr, b: IpAddr) {
        let link = self.links.entry(pair(a, b)).or_default();
        link.cut.get_or_insert(sim.elapsed());
        link.waiting.values_mut().for_each(|waiting| waiting.due = None);
        sim.hold(a, b);
    }

    /// Joins them again. What was lost meanwhile comes when its sender tries it next, which after a long cut is long.
    pub fn heal(&mut self, sim: &Sim<'_>, a: IpAddr, b: IpAddr) {
        let Some(link) = self.links.get_mut(&pair(a, b)) else { return };
        let now = sim.elapsed();
        link.cut = None;
        sim.links(|all| {
            all.filter(|sent| pair_of(sent) == pair(a, b)).for_each(|sent| link.see(sent, now));
        });
        for waiting in link.waiting.values_mut() {
            waiting.due = Some(waiting.retransmission(now));
        }
        sim.repair(a, b);
    }

    /// Whether the path between two nodes is cut.
    pub fn is_cut(&self, a: IpAddr, b: IpAddr) -> bool {
        self.links.get(&pair(a, b)).is_some_and(|link| link.cut.is_some())
    }

    /// A middlebox between two nodes forgets its connections: those of now are dead, and neither side is told.
    pub fn forget(&mut self, a: IpAddr, b: IpAddr) {
        self.wires.lose(a, b);
    }

    /// To be called after each step of the simulation.
    pub fn step(&mut self, sim: &Sim<'_>) {
        let now = sim.elapsed();
        let Self { wires, links, options } = self;
        if !links.is_empty() {
            sim.links(|all| {
                for sent in all {
                    let link = links.get_mut(&pair_of(&sent)).filter(|link| link.look <= now);
                    let Some(link) = link else { continue };
                    link.look = now + LOOK;
                    match link.cut {
                        Some(_) => link.see(sent, now),
                        None => link.send_again(sent, now),
                    }
                }
            });
        }
        links.retain(|_, link| link.cut.is_some() || !link.waiting.is_empty());
        let link = |a, b| links.get(&pair(a, b));
        let is_cut = |a, b| link(a, b).is_some_and(|link| link.cut.is_some());
        let waits = |from: SocketAddr, to: SocketAddr| {
            link(from.ip(), to.ip()).is_some_and(|link| link.waiting.contains_key(&(from, to)))
        };
        wires.tick(now, options, is_cut, waits);
    }
}
