//! The real network: sockets of the kernel, by tokio.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use servicekeel_core::handoff::DescriptorKind;

use super::{Net, PodThread};
use crate::limit;

mod closer;
mod datagrams;
mod descriptor;
mod dial;
mod getsockopt;
mod handoff;
mod lull;
mod own_files;
mod reservation;
mod splice;
mod stream;
mod tcp_info;
mod thread;

pub use datagrams::OsDatagrams;
pub use descriptor::{OsDescriptor, WrongKind};
pub use handoff::{OsHandoff, OsHandoffListener};
pub use reservation::OsReservation;
pub use stream::{OsListener, OsStream};
pub use thread::OsPodThread;

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
    type Thread = OsPodThread;
    type Reservation = OsReservation;

    fn reserve(&self, name: &str) -> io::Result<OsReservation> {
        OsReservation::new(name)
    }

    fn most_descriptors(&self) -> Option<u64> {
        limit::open_files()
    }

    fn most_threads(&self) -> Option<u64> {
        limit::threads::left()
    }

    fn is_short(&self) -> bool {
        limit::is_short()
    }

    fn own_threads(&self) -> OsPodThread {
        // Where there is none, they run with everything else.
        OsPodThread::own().unwrap_or_default()
    }

    fn make_unbound(&self, kind: DescriptorKind) -> io::Result<OsDescriptor> {
        OsDescriptor::unbound(kind)
    }

    async fn make_bound(&self, kind: DescriptorKind, addr: SocketAddr) -> io::Result<OsDescriptor> {
        OsDescriptor::bound(kind, addr)
    }

    async fn adopt_listener(&self, descriptor: OsDescriptor) -> io::Result<OsListener> {
        on(&descriptor.thread(), async { OsListener::adopt(descriptor) }).await
    }

    async fn adopt_udp(&self, descriptor: OsDescriptor) -> io::Result<OsDatagrams> {
        on(&descriptor.thread(), async { OsDatagrams::adopt(descriptor) }).await
    }

    async fn connect_descriptor(&self, descriptor: OsDescriptor, addr: SocketAddr) -> io::Result<OsStream> {
        on(&descriptor.thread(), OsStream::connect_descriptor(descriptor, addr)).await
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
        count: impl Fn(u64, u64) + Send + Sync + 'static,
    ) -> io::Result<()> {
        let thread = b.thread().or(a.thread());
        let spliced = thread.run_flow(splice::splice(self.pipes.clone(), a, b, count)).await;
        spliced.unwrap_or_else(panicked)
    }
}

/// Does it on a pod's thread.
async fn on<T: Send + 'static>(
    thread: &OsPodThread,
    task: impl Future<Output = io::Result<T>> + Send + 'static,
) -> io::Result<T> {
    thread.run(task).await.unwrap_or_else(panicked)
}

fn panicked<T>() -> io::Result<T> {
    Err(io::Error::other("a task on the pod's thread panicked"))
}

/// The error with what was tried before it; its kind stays.
fn while_doing(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> io::Error {
    move |e| io::Error::new(e.kind(), format!("{what}: {e}"))
}

#[cfg(test)]
mod tests {
    crate::net_laws!(super::OsNet::new());
}
