//! Sockets that are held and handed over.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use servicekeel_core::handoff::DescriptorKind;
use servicekeel_runtime::net::{Descriptor, NamespaceCookie};

use super::datagrams::{SimDatagrams, Udp};
use super::kernel::{Counted, Process};
use super::local::{self, Listening};
use super::namespace::Namespace;
use super::stream::{SimListener, SimStream};

/// A socket of a pod, which stays the pod's whoever holds it.
#[derive(Clone)]
pub struct SimDescriptor(Socket);

#[derive(Clone)]
enum Socket {
    Unconnected(Arc<Unconnected>),
    Listener(Arc<Listening>),
    Udp(Arc<Udp>),
}

/// A TCP socket before its connect.
struct Unconnected {
    namespace: Arc<Namespace>,
    used: AtomicBool,
    _open: Counted,
}

impl SimDescriptor {
    pub(super) fn unbound(namespace: &Arc<Namespace>, kind: DescriptorKind) -> io::Result<Self> {
        match kind {
            DescriptorKind::TcpUnconnected => Ok(Self(Socket::Unconnected(Arc::new(Unconnected {
                namespace: namespace.clone(),
                used: AtomicBool::new(false),
                _open: namespace.kernel.count("unconnected TCP socket"),
            })))),
            DescriptorKind::UdpUnconnected => Ok(Self(Socket::Udp(Udp::unbound(namespace)))),
            DescriptorKind::TcpListener | DescriptorKind::UdpBound => {
                Err(invalid(format!("{kind} needs an address")))
            }
        }
    }

    pub(super) fn bound(
        namespace: &Arc<Namespace>,
        kind: DescriptorKind,
        addr: SocketAddr,
        shared_by: Option<u32>,
    ) -> io::Result<Self> {
        match kind {
            DescriptorKind::TcpListener => {
                Listening::bind(namespace, addr, shared_by).map(Socket::Listener).map(Self)
            }
            DescriptorKind::UdpBound => Udp::bound(namespace, addr, shared_by).map(Socket::Udp).map(Self),
            DescriptorKind::TcpUnconnected | DescriptorKind::UdpUnconnected => {
                Err(invalid(format!("{kind} has no address")))
            }
        }
    }

    /// `resets`: what it accepts is an application's, and reset when dropped.
    pub(super) fn into_listener(self, process: &Process, resets: bool) -> io::Result<SimListener> {
        self.check(DescriptorKind::TcpListener)?;
        match self.0 {
            Socket::Listener(listening) => Ok(SimListener::local(listening, process, resets)),
            _ => Err(invalid("not a listener".into())),
        }
    }

    pub(super) fn into_datagrams(self) -> io::Result<SimDatagrams> {
        if self.check(DescriptorKind::UdpUnconnected).is_err() {
            self.check(DescriptorKind::UdpBound)?;
        }
        match self.0 {
            Socket::Udp(socket) => Ok(SimDatagrams(socket)),
            _ => Err(invalid("not a UDP socket".into())),
        }
    }

    /// `resets`: it is an application's, and reset when dropped.
    pub(super) async fn connect(
        self,
        addr: SocketAddr,
        process: &Process,
        resets: bool,
    ) -> io::Result<SimStream> {
        self.check(DescriptorKind::TcpUnconnected)?;
        let Socket::Unconnected(socket) = self.0 else { return Err(invalid("not a TCP socket".into())) };
        socket.used.store(true, Ordering::Relaxed);
        let stream = local::connect(&socket.namespace, addr).await?;
        Ok(SimStream::local(if resets { stream.reset_when_dropped() } else { stream }, process))
    }

    fn found(&self) -> String {
        match &self.0 {
            Socket::Listener(listening) => format!("a TCP socket that listens on {}", listening.addr()),
            Socket::Unconnected(_) => "a TCP socket that is in use or unconnected".into(),
            Socket::Udp(socket) => {
                format!("a UDP socket bound to {:?}, connected to {:?}", socket.local(), socket.peer())
            }
        }
    }
}

impl Descriptor for SimDescriptor {
    fn share(&self) -> io::Result<Self> {
        Ok(self.clone())
    }

    fn check(&self, kind: DescriptorKind) -> io::Result<()> {
        let fits = match (&self.0, kind) {
            (Socket::Listener(_), DescriptorKind::TcpListener) => true,
            (Socket::Unconnected(socket), DescriptorKind::TcpUnconnected) => {
                !socket.used.load(Ordering::Relaxed)
            }
            (Socket::Udp(socket), DescriptorKind::UdpBound) => {
                socket.local().is_some() && socket.peer().is_none()
            }
            (Socket::Udp(socket), DescriptorKind::UdpUnconnected) => {
                socket.local().is_none() && socket.peer().is_none()
            }
            _ => false,
        };
        match fits {
            true => Ok(()),
            false => Err(invalid(format!("the descriptor should be {kind}, but is {}", self.found()))),
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        let none = (Ipv4Addr::UNSPECIFIED, 0).into();
        Ok(match &self.0 {
            Socket::Listener(listening) => listening.addr(),
            Socket::Unconnected(_) => none,
            Socket::Udp(socket) => socket.local().unwrap_or(none),
        })
    }

    fn namespace(&self) -> io::Result<Option<NamespaceCookie>> {
        let namespace = match &self.0 {
            Socket::Listener(listening) => listening.namespace(),
            Socket::Unconnected(socket) => &socket.namespace,
            Socket::Udp(socket) => socket.namespace(),
        };
        Ok(namespace.cookie())
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}
