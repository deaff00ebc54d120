//! The real network: sockets of the kernel, by tokio.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use servicekeel_core::handoff::DescriptorKind;

use super::Net;
use crate::limit;

mod datagrams;
mod descriptor;
mod dial;
mod handoff;
mod reservation;
mod splice;
mod stream;
mod tcp_info;

pub use datagrams::OsDatagrams;
pub use descriptor::{OsDescriptor, WrongKind};
pub use handoff::{OsHandoff, OsHandoffListener};
pub use reservation::OsReservation;
pub use stream::{OsListener, OsStream};

/// The kernel's network. Clones share one stock of pipes for [`Net::splice`], and what they know of names.
#[derive(Debug, Clone, Default)]
pub struct OsNet {
    pipes: Arc<splice::Pipes>,
    answered: Arc<dial::Answered>,
}

impl OsNet {
    /// The network of the namespace in which the program runs.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Net for OsNet {
    type TcpStream = OsStream;
    type TcpListener = OsListener;
    type UdpSocket = OsDatagrams;
    type Descriptor = OsDescriptor;
    type HandoffListener = OsHandoffListener;
    type Handoff = OsHandoff;
    type Reservation = OsReservation;

    fn reserve(&self, name: &str) -> io::Result<OsReservation> {
        OsReservation::new(name)
    }

    fn most_descriptors(&self) -> Option<u64> {
        limit::open_files()
    }

    fn is_short(&self) -> bool {
        limit::is_short()
    }

    fn make_unbound(&self, kind: DescriptorKind) -> io::Result<OsDescriptor> {
        OsDescriptor::unbound(kind)
    }

    async fn make_bound(&self, kind: DescriptorKind, addr: SocketAddr) -> io::Result<OsDescriptor> {
        OsDescriptor::bound(kind, addr)
    }

    fn adopt_listener(&self, descriptor: OsDescriptor) -> io::Result<OsListener> {
        OsListener::adopt(descriptor)
    }

    fn adopt_udp(&self, descriptor: OsDescriptor) -> io::Result<OsDatagrams> {
        OsDatagrams::adopt(descriptor)
    }

    async fn connect_descriptor(&self, descriptor: OsDescriptor, addr: SocketAddr) -> io::Result<OsStream> {
        OsStream::connect_descriptor(descriptor, addr).await
    }

    async fn listen(&self, addr: SocketAddr) -> io::Result<OsListener> {
        OsListener::listen(addr)
    }

    async fn connect(&self, address: &str) -> io::Result<OsStream> {
        dial::connect(&self.answered, address).await
    }

    async fn handoff_listen(&self, path: &Path) -> io::Result<OsHandoffListener> {
        OsHandoffListener::listen(path).await
    }

    async fn handoff_connect(&self, path: &Path) -> io::Result<OsHandoff> {
        OsHandoff::connect(path).await
    }

    async fn splice(
        &self,
        a: OsStream,
        b: OsStream,
        count: impl Fn(u64, u64) + Send + Sync,
    ) -> io::Result<()> {
        splice::splice(&self.pipes, a, b, count).await
    }
}

/// The error with what was tried before it; its kind stays.
fn while_doing(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> io::Error {
    move |e| io::Error::new(e.kind(), format!("{what}: {e}"))
}

#[cfg(test)]
mod tests {
    crate::net_laws!(super::OsNet::new());
}
