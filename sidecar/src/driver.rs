//! Does what the machine of [`servicekeel_core::sidecar`] decides: makes sockets, sets the zone, speaks with the router.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddrV4;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use servicekeel_core::handoff::{DescriptorKind, SocketId, ToRouter, ToSidecar};
use servicekeel_core::name::ServiceName;
use servicekeel_core::sidecar::{Annotation, Command, Outgoing, RouterStatus};
use servicekeel_runtime::net::{Descriptor, Net};
use servicekeel_runtime::throttle::Throttle;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::alone::{Claim, Claims};
use crate::disk::Disk;
use crate::link::{Event, Link};
use crate::metrics::Metrics;
use crate::notices;
use crate::source::Annotations;
use crate::status::Shared;

/// Between two warnings about what is tried again and again.
const SELDOM: Duration = Duration::from_secs(60);

/// The socket of an import.
struct Held<N: Net> {
    descriptor: N::Descriptor,
    _claim: Arc<Claim<N>>,
}

/// The hands of one sidecar.
pub(crate) struct Driver<N: Net> {
    net: N,
    shared: Arc<Shared>,
    metrics: Metrics,
    pub(crate) disk: Disk,
    /// The sockets of imports. The router has others of the same sockets; the kernel's backlog is one.
    held: BTreeMap<SocketId, Held<N>>,
    claims: Claims<N>,
    pub(crate) link: Link<N>,
    /// Whether the log has that this router says what can't be read.
    unread: bool,
    /// For the log: a socket can't be handed over.
    unshared: Throttle,
    /// For the log: sockets for the router can't be made.
    short: Throttle,
    /// For the log: ports that can't be served, of which there may be thousands at once.
    unserved: Throttle,
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

impl<N: Net> Driver<N> {
    pub(crate) fn new(net: N, shared: Arc<Shared>, metrics: Metrics, disk: Disk) -> Self {
        Self {
            net,
            shared,
            metrics,
            disk,
            held: BTreeMap::new(),
            claims: Claims::default(),
            link: Link::Closed,
            unread: false,
            unshared: Throttle::new(1, SELDOM),
            short: Throttle::new(1, SELDOM),
            unserved: Throttle::new(20, Duration::from_secs(10)),
        }
    }

    /// Takes in what the annotations say now.
    pub(crate) fn handle_annotations(&self, annotations: &Annotations) {
        let mut sidecar = self.shared.sidecar();
        if annotations.is_absent() {
            return sidecar.handle_absent(now());
        }
        for annotation in [Annotation::Exports, Annotation::Imports] {
            sidecar.handle_text(annotation, annotations.text(annotation), now());
        }
    }

    /// Takes in what happened at the connection to the router.
    pub(crate) fn handle_event(&mut self, event: Event<N>) {
        match event {
            Event::Dialled(Ok(handoff)) => {
                self.link = Link::Open { handoff: Arc::new(handoff), sending: None, closed: None };
                self.unread = false;
                self.metrics.router_conversations.inc();
                self.shared.sidecar().handle_connected(now());
            }
            Event::Sent(Ok(())) => {}
            Event::Received(Ok(Some(bytes))) => match ToSidecar::decode(&bytes) {
                Ok(message) => self.shared.sidecar().handle_message(message, now()),
                // It may be of a version to come, and what matters comes in messages that this version has.
                Err(error) if self.unread => tracing::debug!(%error, "skipped a message from the router"),
                Err(error) => {
                    self.unread = true;
                    warn!(%error, "ignoring unknown messages from the router");
                }
            },
            Event::Received(Ok(None)) => self.disconnected("the router closed the connection".to_owned()),
            Event::Dialled(Err(error)) | Event::Sent(Err(error)) | Event::Received(Err(error)) => {
                self.disconnected(error.to_string());
            }
        }
    }

    fn disconnected(&mut self, reason: String) {
        self.link = Link::Closed;
        self.shared.sidecar().handle_disconnected(reason, now());
    }

    /// Takes in that the state is written, or is not. What is tried again and again is told once.
    pub(crate) fn handle_written(&self, result: Result<(), String>) {
        let mut disk = self.shared.disk.lock().unwrap_or_else(PoisonError::into_inner);
        match (&result, &*disk) {
            (Err(message), failing) => {
                self.metrics.state_failures.inc();
                if failing.is_none() {
                    warn!("{message}");
                }
            }
            (Ok(()), Some(_)) => info!("state written again"),
            (Ok(()), None) => {}
        }
        *disk = result.err();
    }

    /// Does everything that is to be done now.
    pub(crate) async fn drive(&mut self) {
        loop {
            let command = self.shared.sidecar().poll_command();
            match command {
                Some(command) => self.execute(command).await,
                None => break,
            }
        }
        self.send();
        let mut sidecar = self.shared.sidecar();
        while let Some(notice) = sidecar.poll_notice() {
            notices::log(notice, &sidecar, &self.unserved);
        }
        self.metrics.observe(&sidecar);
    }

    async fn execute(&mut self, command: Command) {
        match command {
            Command::Make { id, kind, addr, port } => {
                let result = match make(&self.net, &mut self.claims, kind, addr, &port.service).await {
                    Ok(held) => {
                        self.metrics.sockets_made.inc();
                        self.held.insert(id, held);
                        Ok(())
                    }
                    Err(reason) => {
                        self.metrics.socket_failures.inc();
                        Err(reason)
                    }
                };
                self.shared.sidecar().handle_made(id, result, now());
            }
            Command::Close { id } => {
                self.held.remove(&id);
            }
            Command::SetZone(zone) => self.shared.dns.set_zone(zone),
            Command::Save(saved) => self.disk.save(saved),
            Command::Connect => self.link = Link::dial(self.net.clone(), self.shared.router.clone()),
            Command::Disconnect => self.link = Link::Closed,
        }
    }

    /// Begins to send the next message, where the last one is sent.
    fn send(&mut self) {
        while self.link.is_idle() {
            let outgoing = self.shared.sidecar().poll_message();
            match outgoing {
                None => return,
                Some(Outgoing::Plain(message)) => self.link.send(message.encode(), Vec::new()),
                Some(Outgoing::WithSocket(message, id)) => {
                    match self.held.get(&id).map(|held| held.descriptor.share()) {
                        Some(Ok(shared)) => self.link.send(message.encode(), vec![shared]),
                        failed => {
                            if let (Some(Err(error)), ToRouter::Import { wanted, .. }) = (failed, &message)
                                && let Some(suppressed) = self.unshared.permit()
                            {
                                warn!(port = %wanted, %error, suppressed, "cannot hand over a socket; retrying");
                            }
                            self.shared.sidecar().handle_unsent(id, now());
                        }
                    }
                }
                Some(Outgoing::Stock { tcp, udp }) => self.stock(tcp, udp),
            }
        }
    }

    /// Makes unconnected sockets and begins to send them.
    fn stock(&mut self, tcp: u16, udp: u16) {
        let mut sockets = Vec::with_capacity(usize::from(tcp + udp));
        let mut make = |kind, count: u16| {
            for made in 0..count {
                match self.net.make_unbound(kind) {
                    Ok(socket) => sockets.push(socket),
                    Err(error) => {
                        self.metrics.socket_failures.inc();
                        return Err((made, error));
                    }
                }
            }
            Ok(())
        };
        let made = |result: &Result<(), (u16, io::Error)>, count| match result {
            Ok(()) => count,
            Err((made, _)) => *made,
        };
        let first = make(DescriptorKind::TcpUnconnected, tcp);
        let second = make(DescriptorKind::UdpUnconnected, udp);
        let (made_tcp, made_udp) = (made(&first, tcp), made(&second, udp));
        if let Err((_, error)) = first.and(second) {
            let (tcp, udp) = (tcp - made_tcp, udp - made_udp);
            if let Some(suppressed) = self.short.permit() {
                warn!(tcp, udp, %error, suppressed, "cannot create sockets for the router; retrying");
            }
            self.shared.sidecar().handle_short(tcp, udp, now());
        }
        if !sockets.is_empty() {
            self.metrics.sockets_stocked.inc_by(sockets.len() as u64);
            self.link.send(ToRouter::Stock { tcp: made_tcp, udp: made_udp }.encode(), sockets);
        }
    }

    /// Whether the machine serves a first state.
    pub(crate) fn is_applied(&self) -> bool {
        self.shared.sidecar().is_applied()
    }

    /// When the machine wants to be called.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.shared.sidecar().poll_timeout().map(Instant::from_std)
    }

    /// The machine wanted to be called.
    pub(crate) fn handle_timeout(&self) {
        self.shared.sidecar().handle_timeout(now());
    }

    /// Says Bye, where the router is there, and writes what is to be written.
    pub(crate) async fn finish(&mut self) {
        self.shared.sidecar().handle_shutdown();
        let connected = !matches!(self.shared.sidecar().router(now()), RouterStatus::Down { .. });
        self.send();
        while connected && matches!(self.link, Link::Open { sending: Some(_), .. }) {
            match self.link.event().await {
                Event::Sent(Ok(())) => self.send(),
                // What the router says no longer matters.
                Event::Received(Ok(Some(_))) => {}
                _ => break,
            }
        }
        self.disk.finish().await;
    }
}

async fn make<N: Net>(
    net: &N,
    claims: &mut Claims<N>,
    kind: DescriptorKind,
    addr: SocketAddrV4,
    service: &ServiceName,
) -> Result<Held<N>, String> {
    let claim = claims.claim(net, *addr.ip(), service).map_err(|taken| taken.to_string())?;
    let made = net.make_bound(kind, addr.into()).await;
    let descriptor = made.map_err(|error| explain(addr, &error))?;
    Ok(Held { descriptor, _claim: claim })
}

/// Why a socket can't be made, and what to do.
fn explain(addr: SocketAddrV4, error: &io::Error) -> String {
    let advice = match error.kind() {
        io::ErrorKind::PermissionDenied if addr.port() < 1024 => format!(
            "; set the pod's sysctl net.ipv4.ip_unprivileged_port_start to {} or below (a safe sysctl)",
            addr.port()
        ),
        io::ErrorKind::AddrInUse => format!(
            "; port {} is in use by another program of the pod, at this address or at all addresses; let it listen on the pod's address",
            addr.port()
        ),
        _ => String::new(),
    };
    format!("{error}{advice}")
}
