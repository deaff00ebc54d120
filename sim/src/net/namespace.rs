//! A network namespace: its addresses, and which sockets are bound where.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use servicekeel_runtime::net::NamespaceCookie;

use super::datagrams::Udp;
use super::kernel::{Counted, Kernel};
use super::local::Listening;
use crate::random::Random;

/// Ports that the kernel gives out (ip_local_port_range).
const EPHEMERAL: std::ops::RangeInclusive<u16> = 32_768..=60_999;

/// The sockets of one pod.
pub(super) struct Namespace {
    pub(super) kernel: Kernel,
    cookie: NamespaceCookie,
    addresses: Vec<IpAddr>,
    tcp: Mutex<Table<Listening>>,
    udp: Mutex<Table<Udp>>,
    next_port: Mutex<u16>,
    reserved: Mutex<BTreeMap<String, Weak<Counted>>>,
}

/// A name of the pod that one program has at a time.
pub struct SimReservation {
    _held: Arc<Counted>,
}

impl Namespace {
    pub(super) fn new(kernel: &Kernel, addresses: &[IpAddr]) -> Arc<Self> {
        Arc::new(Self {
            kernel: kernel.clone(),
            cookie: kernel.namespace(),
            addresses: addresses.into(),
            tcp: Mutex::default(),
            udp: Mutex::default(),
            next_port: Mutex::new(*EPHEMERAL.start()),
            reserved: Mutex::default(),
        })
    }

    /// Its number, where the kernel says it.
    pub(super) fn cookie(&self) -> Option<NamespaceCookie> {
        self.kernel.says_namespaces().then_some(self.cookie)
    }

    pub(super) fn reserve(&self, name: &str) -> io::Result<SimReservation> {
        let mut reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        if reserved.get(name).is_some_and(|held| held.strong_count() > 0) {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, format!("{name} is reserved")));
        }
        let held = Arc::new(self.kernel.count("reservation"));
        reserved.insert(name.to_owned(), Arc::downgrade(&held));
        Ok(SimReservation { _held: held })
    }

    pub(super) fn tcp(&self) -> MutexGuard<'_, Table<Listening>> {
        self.tcp.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn udp(&self) -> MutexGuard<'_, Table<Udp>> {
        self.udp.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The source address of what goes to `to`, as the local routing table has it.
    ///
    /// # Errors
    /// [`io::ErrorKind::NetworkUnreachable`]: the address is of another namespace, and none is joined to this one.
    pub(super) fn source(&self, to: IpAddr) -> io::Result<IpAddr> {
        if to.is_loopback() && to.is_ipv4() {
            Ok(Ipv4Addr::LOCALHOST.into())
        } else if self.addresses.contains(&to) {
            Ok(to)
        } else {
            Err(io::Error::new(io::ErrorKind::NetworkUnreachable, format!("no route to {to}")))
        }
    }

    /// The address to bind: its port chosen where it has none.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrNotAvailable`]: the address is of another namespace.
    pub(super) fn complete(&self, addr: SocketAddr) -> io::Result<SocketAddr> {
        if !addr.ip().is_unspecified() && self.source(addr.ip()).is_err() {
            return Err(error_at(io::ErrorKind::AddrNotAvailable, addr, "not an address of this namespace"));
        }
        match addr.port() {
            0 => Ok(SocketAddr::new(addr.ip(), self.port())),
            _ => Ok(addr),
        }
    }

    /// A port that nothing is bound to.
    pub(super) fn port(&self) -> u16 {
        let mut next = self.next_port.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let port = *next;
            *next = if port == *EPHEMERAL.end() { *EPHEMERAL.start() } else { port + 1 };
            if !self.tcp().has_port(port) && !self.udp().has_port(port) {
                return port;
            }
        }
    }
}

/// The sockets of one protocol that are bound.
pub(super) struct Table<T>(BTreeMap<SocketAddr, Vec<Bound<T>>>);

struct Bound<T> {
    socket: Weak<T>,
    /// The user whose other sockets may have the address too (SO_REUSEPORT, socket(7)).
    shared_by: Option<u32>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> Table<T> {
    fn has_port(&self, port: u16) -> bool {
        self.0.keys().any(|addr| addr.port() == port)
    }

    /// Binds a socket.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] where another overlaps, unless both are shared by the same user.
    pub(super) fn bind(
        &mut self,
        addr: SocketAddr,
        socket: &Arc<T>,
        shared_by: Option<u32>,
    ) -> io::Result<()> {
        let overlaps = |other: &SocketAddr| {
            let any = other.ip().is_unspecified() || addr.ip().is_unspecified();
            other.port() == addr.port() && (any || other.ip() == addr.ip())
        };
        let taken = self.0.iter().filter(|(other, _)| overlaps(other)).flat_map(|(_, bound)| bound);
        if taken.into_iter().any(|other| shared_by.is_none() || other.shared_by != shared_by) {
            return Err(error_at(io::ErrorKind::AddrInUse, addr, "address in use"));
        }
        self.0.entry(addr).or_default().push(Bound { socket: Arc::downgrade(socket), shared_by });
        Ok(())
    }

    /// Takes a socket that is being dropped out of the table.
    pub(super) fn unbind(&mut self, addr: SocketAddr, socket: &T) {
        if let Some(bound) = self.0.get_mut(&addr) {
            bound.retain(|other| !std::ptr::eq(other.socket.as_ptr(), socket));
            if bound.is_empty() {
                self.0.remove(&addr);
            }
        }
    }

    /// The sockets that take what goes to `to`: those at the address, else those at every address.
    pub(super) fn at(&self, to: SocketAddr) -> Vec<Arc<T>> {
        let everywhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), to.port());
        [to, everywhere]
            .iter()
            .filter_map(|addr| self.0.get(addr))
            .map(|bound| bound.iter().filter_map(|bound| bound.socket.upgrade()).collect::<Vec<_>>())
            .find(|sockets| !sockets.is_empty())
            .unwrap_or_default()
    }
}

/// Which of several sockets at one address takes what comes from `from`: the kernel hashes too.
pub(super) fn choose<T>(mut sockets: Vec<T>, from: SocketAddr) -> Option<T> {
    if sockets.is_empty() {
        return None;
    }
    // Mixed well: by a multiplication alone, clients that alternate would each meet the same socket again and again.
    let chosen = Random::new(from.port().into()).draw() as usize % sockets.len();
    Some(sockets.swap_remove(chosen))
}

pub(super) fn error_at(kind: io::ErrorKind, addr: SocketAddr, text: &str) -> io::Error {
    io::Error::new(kind, format!("{addr}: {text}"))
}
