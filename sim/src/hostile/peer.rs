//! A router of a cluster that the others trust, and a stranger without any name.

use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::flow::frame::{Kind, MAX_DATA, Open, Preface, Purpose, VERSION, decode_payload};
use servicekeel_core::mesh::{LinkMessage, Offer};
use servicekeel_core::name::{RouterId, ServiceName, ServicePort};
use servicekeel_router::identity::Identity;
use servicekeel_router::tls::{self, BufferPool, Channel};
use servicekeel_runtime::net::Net;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::{LONGEST, STAY, STEP};
use crate::net::{SimNet, SimStream};
use crate::oracle::Oracle;
use crate::random::Random;
use crate::stage::{Port, service_port};
use crate::world::World;

/// What it does to one router.
#[derive(Debug, Clone, Copy)]
enum Deed {
    /// Connections that say nothing.
    Silence,
    /// Bytes that are no handshake.
    Rubbish,
    /// A name that is another's.
    Liar,
    /// A link on which it offers what is its own again and again, and more than it may.
    Offers,
    /// A link on which it offers what is another's, and takes what comes for it.
    Theft,
    /// A link on which it asks for more connections than there are, and for an answer to each word.
    Asks,
    /// Frames that belong nowhere.
    Frames,
    /// Flows that it opens and does not carry, or carries as no router does.
    Flows,
    /// Many UDP sessions.
    Sessions,
}

const DEEDS: [Deed; 9] = [
    Deed::Silence,
    Deed::Rubbish,
    Deed::Liar,
    Deed::Offers,
    Deed::Theft,
    Deed::Asks,
    Deed::Frames,
    Deed::Flows,
    Deed::Sessions,
];
const KINDS: [Kind; 11] = [
    Kind::Preface,
    Kind::Message,
    Kind::Open,
    Kind::Opened,
    Kind::Refused,
    Kind::Data,
    Kind::Ack,
    Kind::Fin,
    Kind::Reset,
    Kind::Datagram,
    Kind::Close,
];

struct Mallory {
    net: SimNet,
    identity: Arc<Identity>,
    oracle: Oracle,
    random: Random,
    /// The router.
    to: String,
    /// The most messages.
    most: u64,
    /// Services of others.
    ports: Vec<Port>,
}

impl World {
    /// Lets a node that runs no router ([`Stage::hostile`](crate::stage::Stage::hostile)) do one thing to that of another
    /// node that no router does, with up to `most` messages, and use `ports` of others.
    pub async fn harm_by_peer(&self, node: &str, to: &str, ports: &[Port], most: u64) {
        let mut random = Random::new(self.draw());
        let deed = *random.pick(&DEEDS);
        let (net, identity) = self.stranger(node);
        let (node, oracle, ports) = (node.to_owned(), self.oracle.clone(), ports.to_vec());
        let to = format!("{to}:{}", crate::world::PEERS.port());
        let name = node.clone();
        let job = async move {
            tracing::info!(node = name, to, ?deed, "a peer means harm");
            let mut mallory = Mallory { net, identity, oracle, random, to, most, ports };
            let _ = Box::pin(mallory.act(deed)).await;
        };
        self.within_node(&node, async move { timeout(LONGEST, job).await }).await.unwrap_or_default();
    }
}

impl World {
    /// Lets a node that runs no router offer another's port to the router of a node, for so long.
    pub async fn steal_by_peer(&self, node: &str, to: &str, port: Port, stay: Duration) {
        let random = Random::new(self.draw());
        let (net, identity) = self.stranger(node);
        let to = format!("{to}:{}", crate::world::PEERS.port());
        let ports = vec![port];
        let mut mallory = Mallory { net, identity, oracle: self.oracle.clone(), random, to, most: 1, ports };
        let job = Box::pin(async move { mallory.steal(&port, stay).await });
        let done = self.within_node(node, job).await;
        assert!(done.is_some(), "it can't even say what it offers");
    }
}

impl Mallory {
    async fn act(&mut self, deed: Deed) -> Option<()> {
        let messages = self.random.within(1..self.most.max(2));
        match deed {
            Deed::Silence => {
                let mut silent = Vec::new();
                for _ in 0..messages.min(40) {
                    silent.push(self.dial().await?);
                }
                self.stay().await;
            }
            Deed::Rubbish => {
                let mut stream = self.dial().await?;
                let mut bytes: Vec<u8> = (0..messages).map(|_| self.random.draw() as u8).collect();
                if self.random.chance(50) {
                    // What begins as a handshake's record does (RFC 8446 §5.1).
                    bytes.splice(0..0, [22, 3, 1, 2, 0]);
                }
                timeout(STEP, stream.write_all(&bytes)).await.ok()?.ok()?;
                self.stay().await;
            }
            Deed::Liar => {
                let other = RouterId {
                    cluster: self.ports.first()?.cluster.parse().ok()?,
                    node: self.identity.id().node.clone(),
                };
                let mut channel = self.shake_hands().await?;
                self.introduce(&mut channel, Purpose::Link, other).await?;
                self.stay().await;
            }
            Deed::Offers => self.offers(messages).await?,
            Deed::Theft => {
                let (port, stay) = (*self.random.pick(&self.ports), self.random.millis(0..STAY));
                self.steal(&port, stay).await?;
            }
            Deed::Asks => self.asks(messages).await?,
            Deed::Frames => self.frames(messages).await?,
            Deed::Flows => self.flows().await?,
            Deed::Sessions => self.sessions(messages).await?,
        }
        Some(())
    }

    /// It stays for a while, and neither reads nor says anything.
    async fn stay(&mut self) {
        sleep(self.random.millis(0..STAY)).await;
    }

    async fn dial(&self) -> Option<SimStream> {
        timeout(4 * STEP, self.net.connect(&self.to)).await.ok()?.ok()
    }

    async fn shake_hands(&self) -> Option<Channel<SimStream>> {
        let stream = self.dial().await?;
        Some(tls::connect(stream, self.identity.client(), BufferPool::new()).await.ok()?.0)
    }

    async fn introduce(
        &mut self,
        channel: &mut Channel<SimStream>,
        purpose: Purpose,
        sender: RouterId,
    ) -> Option<()> {
        let preface = Preface { version: VERSION, purpose, sender, boot: u64::from(self.random.chance(90)) };
        channel.send_message(Kind::Preface, 0, &preface).ok()?;
        flush(channel).await
    }

    /// A connection that is good so far.
    async fn open(&mut self, purpose: Purpose) -> Option<Channel<SimStream>> {
        let mut channel = self.shake_hands().await?;
        let own = self.identity.id().clone();
        self.introduce(&mut channel, purpose, own).await?;
        timeout(4 * STEP, channel.recv()).await.ok()?.ok()??;
        Some(channel)
    }

    /// A port of its own cluster.
    fn own_port(&self, number: u64) -> ServicePort {
        let port = service_port(&Port::tcp("flood", crate::stage::CLUSTER_A, 80));
        let name = format!("flood-{number}").parse().expect("a name");
        let cluster = self.identity.id().cluster.clone();
        ServicePort { service: ServiceName { name, cluster, ..port.service }, ..port }
    }

    async fn offers(&mut self, messages: u64) -> Option<()> {
        let mut channel = self.open(Purpose::Link).await?;
        let flips = self.random.chance(50);
        for number in 0..messages {
            let port = self.own_port(if flips { 1 } else { number });
            let message = match flips && number % 2 == 1 {
                true => LinkMessage::Withdraw(port),
                false => LinkMessage::Offer(Offer { port, allow: None }),
            };
            put(&mut channel, &message).await?;
        }
        flush(&mut channel).await?;
        self.stay().await;
        Some(())
    }

    /// What it offers is judged one by one: its own goes with it, and it is a good neighbour else.
    async fn steal(&mut self, port: &Port, stay: Duration) -> Option<()> {
        let mut back = Vec::new();
        for _ in 0..4 {
            back.push(self.open(Purpose::FlowsBack).await?);
        }
        let mut swallowing: JoinSet<_> = back.into_iter().map(swallow).collect();
        let mut link = self.open(Purpose::Link).await?;
        for port in [self.own_port(1), service_port(port), self.own_port(2)] {
            link.send_message(Kind::Message, 0, &LinkMessage::Offer(Offer { port, allow: None })).ok()?;
        }
        link.send_message(Kind::Message, 0, &LinkMessage::Synced).ok()?;
        flush(&mut link).await?;
        let answering = async {
            while let Ok(Some((header, payload))) = link.recv().await {
                let ping =
                    header.kind == Kind::Message && matches!(decode_payload(payload), Ok(LinkMessage::Ping));
                if ping && link.send_message(Kind::Message, 0, &LinkMessage::Pong).is_ok() {
                    flush(&mut link).await;
                }
            }
        };
        let _ = timeout(stay, answering).await;
        swallowing.shutdown().await;
        Some(())
    }

    async fn asks(&mut self, messages: u64) -> Option<()> {
        let mut channel = self.open(Purpose::Link).await?;
        for _ in 0..messages {
            let message = match self.random.within(0..6) {
                0 => LinkMessage::DialBack { flows: u16::MAX, datagrams: u16::MAX },
                1 => LinkMessage::Goodbye,
                2 => LinkMessage::Synced,
                _ => LinkMessage::Ping,
            };
            put(&mut channel, &message).await?;
        }
        flush(&mut channel).await?;
        self.stay().await;
        Some(())
    }

    async fn frames(&mut self, messages: u64) -> Option<()> {
        let purposes = [Purpose::Link, Purpose::Flows, Purpose::FlowsBack, Purpose::Datagrams];
        let purpose = *self.random.pick(&[&purposes[..], &[Purpose::DatagramsBack]].concat());
        let mut channel = self.open(purpose).await?;
        for _ in 0..messages {
            let kind = *self.random.pick(&KINDS);
            let payload: Vec<u8> = (0..self.random.within(0..40)).map(|_| self.random.draw() as u8).collect();
            let offset = if self.random.chance(50) { 0 } else { self.random.draw() };
            channel.send_payload(kind, offset, &payload).ok()?;
            flush(&mut channel).await?;
        }
        self.stay().await;
        Some(())
    }

    fn open_frame(&mut self, udp: bool) -> Option<(Port, Open)> {
        let ports: Vec<_> = self.ports.iter().filter(|port| port.udp == udp).copied().collect();
        let port = *(!ports.is_empty()).then(|| self.random.pick(&ports))?;
        Some((
            port,
            Open { flow: self.random.draw(), wanted: service_port(&port), namespace: None, consumer: None },
        ))
    }

    /// The services behind them are told nothing that they would take for a flow: less than its header.
    async fn flows(&mut self) -> Option<()> {
        let mut open = Vec::new();
        for _ in 0..self.random.within(1..20) {
            let Some(mut channel) = self.open(Purpose::Flows).await else { continue };
            let (_, wanted) = self.open_frame(false)?;
            channel.send_message(Kind::Open, 0, &wanted).ok()?;
            if self.random.chance(70) {
                channel.send_payload(Kind::Data, 0, b"hello").ok()?;
            }
            let (kind, offset) = *self.random.pick(&[
                (Kind::Ack, 1 << 40),
                (Kind::Ack, 0),
                (Kind::Fin, 5),
                (Kind::Fin, 1 << 40),
                (Kind::Reset, 0),
                (Kind::Open, 0),
                (Kind::Opened, 0),
            ]);
            if channel.send_payload(kind, offset, &[]).is_ok() && self.random.chance(30) {
                let beyond = vec![0; MAX_DATA];
                channel.send_payload(Kind::Data, 1 << 30, &beyond).ok()?;
            }
            let _ = flush(&mut channel).await;
            open.push(channel);
        }
        self.stay().await;
        Some(())
    }

    async fn sessions(&mut self, messages: u64) -> Option<()> {
        let mut channel = self.open(Purpose::Datagrams).await?;
        for session in 0..messages {
            let (port, wanted) = self.open_frame(true)?;
            let service = self.oracle.service(&port.to_string());
            let client = self.oracle.begin_client();
            channel.send_message(Kind::Open, session, &wanted).ok()?;
            for _ in 0..self.random.within(0..3) {
                let len = self.random.within(20..3000) as usize;
                let (_, bytes) = self.oracle.send_datagram(client, service, len);
                channel.send_payload(Kind::Datagram, session, &bytes).ok()?;
            }
            if channel.is_full() {
                flush(&mut channel).await?;
            }
        }
        flush(&mut channel).await?;
        self.stay().await;
        Some(())
    }
}

/// Takes each flow of a connection, and answers none.
async fn swallow(mut channel: Channel<SimStream>) {
    while let Ok(Some((header, _))) = channel.recv().await {
        if header.kind == Kind::Open
            && (channel.send_payload(Kind::Opened, 0, &[]).is_err() || flush(&mut channel).await.is_none())
        {
            return;
        }
    }
}

/// One message of a link, which is sent with those behind it. `None`: the router takes no more.
async fn put(channel: &mut Channel<SimStream>, message: &LinkMessage) -> Option<()> {
    channel.send_message(Kind::Message, 0, message).ok()?;
    if channel.is_full() {
        flush(channel).await?;
    }
    Some(())
}

/// `None`: the router takes no more.
async fn flush(channel: &mut Channel<SimStream>) -> Option<()> {
    timeout(STEP, channel.flush()).await.ok()?.ok()
}
