//! The simulated network: [`SimNet`], the programs' [`Net`] in the simulation.
//!
//! Two networks meet in a node, as in production:
//!
//! - Inside it, pods. Each [`Pod`](SimNet::pod) is a network namespace of a [`Kernel`] of our own: its sockets belong
//!   to it whoever holds them, a listener has a backlog of its own, two Services may have the same port at different
//!   loopback addresses, and a reset is a reset. turmoil has none of these (it keys sockets by their port, and a
//!   connect waits for the accept), so inside a node it is not used. Bytes arrive at once.
//! - Between nodes, turmoil. A [`Wire`](wire) is a turmoil stream, with latency, cuts and healing by
//!   [`Network`](crate::network::Network).
//!
//! What differs from the kernel's network:
//!
//! | here | the kernel |
//! |---|---|
//! | inside a node nothing is late, lost or reordered | as on loopback |
//! | UDP has no ICMP but a refused port | more |
//! | between nodes only TCP, by addresses or names of nodes | and UDP |
//! | a connect between nodes waits for the accept | for the backlog |
//! | a socket of a program that is killed ends (or resets, if bytes were unread) | the same |
//! | what comes through between nodes is acknowledged at once | after a round trip |
//! | a reset between nodes comes behind the bytes that were sent before it | may overtake them |
//! | no port is in TIME_WAIT, no number of descriptors is too large | EADDRINUSE, EMFILE |

mod datagrams;
mod descriptor;
mod handoff;
mod kernel;
mod local;
mod namespace;
mod splice;
mod stream;
mod timers;
pub(crate) mod wire;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

pub use datagrams::SimDatagrams;
pub use descriptor::SimDescriptor;
pub use handoff::{SimHandoff, SimHandoffListener, SimPodThread};
pub use kernel::Kernel;
pub(crate) use kernel::Process;
pub use namespace::SimReservation;
pub use stream::{SimListener, SimStream};

use namespace::Namespace;
use servicekeel_core::handoff::DescriptorKind;
use servicekeel_runtime::net::{Net, PeerCredentials};
use wire::Wires;

/// The network as one program of the simulation sees it.
#[derive(Clone)]
pub struct SimNet {
    kernel: Kernel,
    place: Place,
    process: Process,
}

#[derive(Clone)]
enum Place {
    /// The node's own namespace, which other nodes reach.
    Node(Wires),
    Pod(Arc<Namespace>),
}

impl SimNet {
    /// A program of the node itself, such as its router.
    pub(crate) fn node(kernel: &Kernel, wires: Wires) -> Self {
        Self { kernel: kernel.clone(), place: Place::Node(wires), process: kernel.process(0) }
    }

    /// The first program of a new pod, which has these addresses beside its loopback. [`SimNet::process`] makes the
    /// further ones.
    pub fn pod(kernel: &Kernel, addresses: &[IpAddr]) -> Self {
        let namespace = Namespace::new(kernel, addresses);
        Self { kernel: kernel.clone(), place: Place::Pod(namespace), process: kernel.process(1000) }
    }

    /// Another program of the same pod or node, of user `uid`.
    pub fn process(&self, uid: u32) -> Self {
        Self { process: self.kernel.process(uid), ..self.clone() }
    }

    /// The process that it belongs to.
    pub(crate) fn process_of(&self) -> Process {
        self.process.clone()
    }

    /// A UDP socket of the pod that no other socket shares its address with, as servers and applications have.
    ///
    /// # Errors
    /// As bind(2).
    pub fn bind_udp(&self, addr: SocketAddr) -> io::Result<SimDatagrams> {
        datagrams::Udp::bound(self.namespace()?, addr, None).map(SimDatagrams)
    }

    fn namespace(&self) -> io::Result<&Arc<Namespace>> {
        match &self.place {
            Place::Pod(namespace) => Ok(namespace),
            Place::Node(_) => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the simulation has no such sockets in a node's own namespace",
            )),
        }
    }
}

impl Net for SimNet {
    type TcpStream = SimStream;
    type TcpListener = SimListener;
    type UdpSocket = SimDatagrams;
    type Descriptor = SimDescriptor;
    type HandoffListener = SimHandoffListener;
    type Handoff = SimHandoff;
    type Thread = SimPodThread;
    type Reservation = SimReservation;

    fn own_threads(&self) -> SimPodThread {
        SimPodThread::default()
    }

    fn reserve(&self, name: &str) -> io::Result<SimReservation> {
        self.namespace()?.reserve(name)
    }

    fn make_unbound(&self, kind: DescriptorKind) -> io::Result<SimDescriptor> {
        SimDescriptor::unbound(self.namespace()?, kind)
    }

    async fn make_bound(&self, kind: DescriptorKind, addr: SocketAddr) -> io::Result<SimDescriptor> {
        SimDescriptor::bound(self.namespace()?, kind, addr, Some(self.process.credentials.uid))
    }

    async fn adopt_listener(&self, descriptor: SimDescriptor) -> io::Result<SimListener> {
        descriptor.into_listener(&self.process, true)
    }

    async fn adopt_udp(&self, descriptor: SimDescriptor) -> io::Result<SimDatagrams> {
        descriptor.into_datagrams()
    }

    async fn connect_descriptor(&self, descriptor: SimDescriptor, addr: SocketAddr) -> io::Result<SimStream> {
        descriptor.connect(addr, &self.process, true).await
    }

    async fn listen(&self, addr: SocketAddr) -> io::Result<SimListener> {
        match &self.place {
            Place::Node(wires) => wires.listen(addr).await.map(|wire| SimListener::wire(wire, &self.process)),
            Place::Pod(namespace) => {
                SimDescriptor::bound(namespace, DescriptorKind::TcpListener, addr, None)?
                    .into_listener(&self.process, false)
            }
        }
    }

    async fn connect(&self, address: &str) -> io::Result<SimStream> {
        match &self.place {
            Place::Node(wires) => {
                wires.connect(address).await.map(|wire| SimStream::wire(wire, &self.process))
            }
            Place::Pod(_) => {
                let addr = address.parse().map_err(|_| {
                    io::Error::new(io::ErrorKind::InvalidInput, format!("cannot resolve {address}"))
                })?;
                self.make_unbound(DescriptorKind::TcpUnconnected)?.connect(addr, &self.process, false).await
            }
        }
    }

    async fn handoff_listen(&self, path: &Path) -> io::Result<SimHandoffListener> {
        SimHandoffListener::listen(&self.kernel, path)
    }

    async fn handoff_connect(&self, path: &Path) -> io::Result<SimHandoff> {
        let network = self.namespace().ok().and_then(|namespace| namespace.cookie());
        let credentials = PeerCredentials { network, ..self.process.credentials };
        SimHandoff::connect(&self.kernel, path, credentials).await
    }

    async fn splice(
        &self,
        a: SimStream,
        b: SimStream,
        count: impl Fn(u64, u64) + Send + Sync + 'static,
    ) -> io::Result<()> {
        splice::splice(a, b, count).await
    }
}

#[cfg(test)]
mod tests;
