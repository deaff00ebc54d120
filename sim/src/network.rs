//! The network between nodes: latency, cuts, healing, and paths that forget their connections.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use turmoil::{Protocol, Segment, Sim};

use crate::net::wire::WireTable;

/// How long bytes may stay unacknowledged before a connection breaks: what the routers ask for (TCP_USER_TIMEOUT). It
/// replaces the count of keepalive probes too, so an idle connection over a cut path breaks at the same time (tcp(7)).
const USER_TIMEOUT: Duration = Duration::from_secs(60);
/// The first retransmission of a segment (RTO), and of a SYN; doubled each time, up to [`MAX_RTO`].
const RTO: Duration = Duration::from_millis(200);
const SYN_RTO: Duration = Duration::from_secs(1);
const MAX_RTO: Duration = Duration::from_secs(120);
/// How often what waits on a cut link is looked through, for the time that it takes.
const LOOK: Duration = Duration::from_millis(50);

/// The network of one simulation.
#[derive(Default)]
pub struct Network {
    wires: WireTable,
    links: BTreeMap<(IpAddr, IpAddr), Link>,
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
    syn: bool,
}

impl Waiting {
    /// The first retransmission at `now` or later.
    fn due(&self, now: Duration) -> Duration {
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

fn pair(a: IpAddr, b: IpAddr) -> (IpAddr, IpAddr) {
    if a < b { (a, b) } else { (b, a) }
}

impl Network {
    /// What the nodes' sockets share with it.
    pub(crate) fn wires(&self) -> &WireTable {
        &self.wires
    }

    /// Cuts the path between two nodes: nothing comes through, and both sides send it again and again.
    pub fn cut(&mut self, sim: &Sim<'_>, a: IpAddr, b: IpAddr) {
        let link = self.links.entry(pair(a, b)).or_default();
        link.cut.get_or_insert(sim.elapsed());
        sim.hold(a, b);
    }

    /// Joins them again. What was lost meanwhile comes when its sender tries it next, which after a long cut is long.
    pub fn heal(&mut self, sim: &Sim<'_>, a: IpAddr, b: IpAddr) {
        if let Some(link) = self.links.get_mut(&pair(a, b)) {
            link.cut = None;
            let now = sim.elapsed();
            for waiting in link.waiting.values_mut() {
                *waiting = Waiting { since: waiting.due(now), syn: waiting.syn };
            }
            sim.repair(a, b);
        }
    }

    /// Whether the path between two nodes is cut.
    pub fn is_cut(&self, a: IpAddr, b: IpAddr) -> bool {
        self.links.get(&pair(a, b)).is_some_and(|link| link.cut.is_some())
    }

    /// A middlebox between two nodes forgets its connections: those of now are dead, and neither side is told.
    pub fn forget(&mut self, sim: &Sim<'_>, a: IpAddr, b: IpAddr) {
        self.wires.lose(a, b, sim.elapsed());
    }

    /// To be called after each step of the simulation.
    pub fn step(&mut self, sim: &Sim<'_>) {
        let now = sim.elapsed();
        let Self { wires, links } = self;
        if !links.is_empty() {
            sim.links(|all| {
                for mut turmoil_link in all {
                    let (a, b) = turmoil_link.pair();
                    let Some(link) = links.get_mut(&pair(a, b)).filter(|link| link.look <= now) else {
                        continue;
                    };
                    link.look = now + LOOK;
                    match link.cut {
                        Some(_) => {
                            for sent in turmoil_link.by_ref() {
                                let syn = matches!(sent.protocol(), Protocol::Tcp(Segment::Syn(_)));
                                link.waiting.entry(sent.pair()).or_insert(Waiting { since: now, syn });
                            }
                        }
                        None => {
                            for sent in turmoil_link.by_ref() {
                                if link.waiting.get(&sent.pair()).is_some_and(|waiting| waiting.since <= now)
                                {
                                    sent.deliver();
                                }
                            }
                            link.waiting.retain(|_, waiting| waiting.since > now);
                        }
                    }
                }
            });
        }
        for (&(a, b), link) in links.iter() {
            let Some(cut) = link.cut else { continue };
            if cut + USER_TIMEOUT <= now {
                wires.time_out_all(a, b);
            }
            for (&(from, to), waiting) in &link.waiting {
                if !waiting.syn && waiting.since + USER_TIMEOUT <= now {
                    wires.time_out(from, to);
                }
            }
        }
        links.retain(|_, link| link.cut.is_some() || !link.waiting.is_empty());
        wires.tick(now, USER_TIMEOUT, |a, b| links.get(&pair(a, b)).is_some_and(|link| link.cut.is_some()));
    }
}
