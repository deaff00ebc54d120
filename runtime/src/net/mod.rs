//! The network as the programs see it: [`Net`]. [`os::OsNet`] is the real one; the simulation has its own.
//!
//! A socket goes through three hands. A sidecar makes it as a [`Net::Descriptor`], which nothing polls; hands it over
//! a [`Handoff`] connection; and the router turns it into a live listener, connector or socket.

use std::any::Any;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use servicekeel_core::handoff::{DescriptorKind, MAX_DESCRIPTORS};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Handle;
use tokio::task::{AbortHandle, JoinSet};

#[cfg(any(test, feature = "laws"))]
pub mod laws;
#[cfg(any(test, feature = "laws"))]
mod memory;
pub mod os;
pub mod tcp;

/// A network: where sockets are made, names of peers resolved, and descriptors handed over.
pub trait Net: Clone + Send + Sync + 'static {
    /// A connected TCP stream.
    type TcpStream: Stream;
    /// A listening TCP socket.
    type TcpListener: Listener<Stream = Self::TcpStream>;
    /// A UDP socket.
    type UdpSocket: Datagrams;
    /// A socket that is held or handed over, and not polled.
    type Descriptor: Descriptor;
    /// The router's end of [`Net::handoff_connect`].
    type HandoffListener: HandoffListener<Handoff = Self::Handoff>;
    /// A conversation between sidecar and router.
    type Handoff: Handoff<Descriptor = Self::Descriptor, Thread = Self::Thread>;
    /// Where calls are made that a pod can hold up.
    type Thread: PodThread;
    /// What [`Net::reserve`] gives.
    type Reservation: Send + 'static;

    /// Takes a name in the program's network namespace, until what is returned is dropped or the process is gone.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`]: another has it.
    fn reserve(&self, name: &str) -> io::Result<Self::Reservation>;

    /// How many descriptors this process may have; `None`: there is no limit.
    fn most_descriptors(&self) -> Option<u64> {
        None
    }
    /// How many threads this process may have beside those that it has; `None`: as many as it likes.
    fn most_threads(&self) -> Option<u64> {
        None
    }
    /// Whether so few descriptors are left that what is held for long should take none.
    fn is_short(&self) -> bool {
        false
    }

    /// Threads of the program's own, for tasks that wait for those of pods again and again: what wakes them wakes one
    /// thread. Nothing that blocks is called there.
    fn own_threads(&self) -> Self::Thread;

    /// Makes a socket that is not bound: [`DescriptorKind::TcpUnconnected`] or [`DescriptorKind::UdpUnconnected`].
    fn make_unbound(&self, kind: DescriptorKind) -> io::Result<Self::Descriptor>;
    /// Makes a bound socket: [`DescriptorKind::TcpListener`] or [`DescriptorKind::UdpBound`]. A socket of the same
    /// user that another process still holds at the address does not hinder it.
    fn make_bound(
        &self,
        kind: DescriptorKind,
        addr: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::Descriptor>> + Send;

    /// Starts to poll a listener that was handed over, after asking whether it is one. What it accepts is an
    /// application's stream: see [`Stream::close`]. It is polled on the pod's thread ([`Handoff::thread`]) alone; what it
    /// accepts is the router's own, and may be polled anywhere.
    fn adopt_listener(
        &self,
        descriptor: Self::Descriptor,
    ) -> impl Future<Output = io::Result<Self::TcpListener>> + Send;
    /// Starts to poll a UDP socket that was handed over, bound or not. It may be polled anywhere.
    fn adopt_udp(
        &self,
        descriptor: Self::Descriptor,
    ) -> impl Future<Output = io::Result<Self::UdpSocket>> + Send;
    /// Connects an unconnected TCP socket that was handed over and [checked](Descriptor::check), in the network namespace where it was made. It is an
    /// application's stream then: see [`Stream::close`]. It is polled on the pod's thread alone.
    fn connect_descriptor(
        &self,
        descriptor: Self::Descriptor,
        addr: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send;

    /// Listens in the program's own network namespace.
    fn listen(&self, addr: SocketAddr) -> impl Future<Output = io::Result<Self::TcpListener>> + Send;
    /// Resolves `host:port` and connects to the first address that answers.
    fn connect(&self, address: &str) -> impl Future<Output = io::Result<Self::TcpStream>> + Send;

    /// Listens for sidecars at a path. A dead socket that lies there is replaced; a live one is an error.
    fn handoff_listen(&self, path: &Path) -> impl Future<Output = io::Result<Self::HandoffListener>> + Send;
    /// Connects to a router at a path.
    fn handoff_connect(&self, path: &Path) -> impl Future<Output = io::Result<Self::Handoff>> + Send;

    /// Carries bytes both ways between two streams of this machine until both have ended. `count` is told meanwhile
    /// how many more went from `a` to `b`, and from `b` to `a`. An end of one side is passed on as an end, and the
    /// other direction goes on; a reset is passed on as a reset. It runs on the thread of the pod whose socket one of
    /// them is.
    fn splice(
        &self,
        a: Self::TcpStream,
        b: Self::TcpStream,
        count: impl Fn(u64, u64) + Send + Sync + 'static,
    ) -> impl Future<Output = io::Result<()>> + Send;
}

/// The thread of one sidecar's pod. A socket that was handed over is still the pod's, which may have it block, also
/// where it is closed: on this thread that holds up nobody else. Clones are the same.
pub trait PodThread: Clone + Send + Sync + 'static {
    /// Runs a task there, and ends it when dropped; `None` where it panicked.
    fn run<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> impl Future<Output = Option<T>> + Send;
    /// As [`PodThread::run`], for a flow: a pod that carries many has more threads than one, and each flow runs on one of
    /// them.
    fn run_flow<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> impl Future<Output = Option<T>> + Send {
        self.run(task)
    }
    /// Starts a flow of `set` on one of them: the one that calls, unless it carries many and the flow is `carried` there. One
    /// that is not waits for a thread of another pod to carry it. Where there is no thread of a pod it runs at `home`. The
    /// threads last as long as the flow.
    fn spawn_flow(
        &self,
        set: &mut JoinSet<()>,
        home: &Handle,
        _carried: bool,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> AbortHandle {
        set.spawn_on(task, home)
    }
    /// Keeps something until nothing of the thread is left: no clone, no socket, no call that has not returned.
    fn hold(&self, guest: impl Send + 'static);
}

/// A TCP stream.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Drops the stream so that the peer sees a reset, not an end.
    fn reset(self);
    /// Closes the stream in good order: what was written goes out, and then an end.
    ///
    /// An application's stream that is dropped without it is reset, also where the kernel drops it since the process
    /// was killed: an end would tell the application that it had everything.
    fn close(self);
    /// Whether the other side is gone: it reset. What came, be it an end, is left to be read, and hides a reset from what
    /// wakes the caller: it asks again by itself. Never, where this can't be told.
    fn poll_gone(&mut self, _cx: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }
    /// Whether the other side has ended: it says no more. It may still want an answer, or have closed the other direction
    /// too, which looks the same. False where this can't be told.
    fn has_ended(&self) -> bool {
        false
    }
    /// Whoever polls it from now on is on this thread: what wakes it is to be here, too.
    ///
    /// # Errors
    /// The stream is of no use any more.
    fn come_here(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// Whether nothing has come that is not read, no end and no reset either. True where only a read can tell.
    fn is_idle(&self) -> bool {
        true
    }
    /// Whether the other side's system has acknowledged all that was written: a reset does not overtake it then. True
    /// where this can't be told.
    fn is_taken(&self) -> bool {
        true
    }
    /// After how long the system sends again what the other side's has not acknowledged (RFC 6298), by what the path takes.
    /// `None` where this can't be told.
    fn retransmits_after(&self) -> Option<Duration> {
        None
    }
    /// Whether the connection is over by a reset, also where bytes that came before it are unread. False where this can't
    /// be told.
    fn is_broken(&self) -> bool {
        false
    }
    /// Whether what was written has found no answer for so long that the path is dead, though nothing says so. One that
    /// only takes nothing does answer.
    fn is_dead(&self) -> bool {
        false
    }
    /// The address of the other side.
    fn peer_addr(&self) -> io::Result<SocketAddr>;
}

/// A listening TCP socket.
pub trait Listener: Send + Sync + 'static {
    /// What it accepts.
    type Stream: Stream;
    /// The next connection. Errors of one connection (ECONNABORTED) are skipped; others are for the caller.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, SocketAddr)>> + Send;
    /// Where it listens.
    fn local_addr(&self) -> io::Result<SocketAddr>;
}

/// A UDP socket.
pub trait Datagrams: Send + Sync + 'static {
    /// Receives a datagram that is here, and says who sent it. After [`Datagrams::connect`] an ICMP refusal comes as
    /// [`io::ErrorKind::ConnectionRefused`], once.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] where none is here.
    fn try_recv_from(&self, buf: &mut ReadBuf<'_>) -> io::Result<SocketAddr>;
    /// Resolves when [`Datagrams::try_recv_from`] may have something, be it a refusal that no further datagram provokes.
    ///
    /// # Errors
    /// Where nothing can come any more.
    fn readable(&self) -> impl Future<Output = io::Result<()>> + Send;
    /// Receives one datagram: the length and the sender.
    ///
    /// # Errors
    /// Those of [`Datagrams::try_recv_from`] and [`Datagrams::readable`].
    fn recv_from(&self, buf: &mut [u8]) -> impl Future<Output = io::Result<(usize, SocketAddr)>> + Send {
        async {
            let mut buf = ReadBuf::new(buf);
            loop {
                match self.try_recv_from(&mut buf) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable().await?,
                    received => return received.map(|from| (buf.filled().len(), from)),
                }
            }
        }
    }
    /// Sends one datagram.
    fn send_to(&self, buf: &[u8], to: SocketAddr) -> impl Future<Output = io::Result<()>> + Send;
    /// Sends one datagram where the socket has room for it now.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] where it has none, and those of [`Datagrams::send_to`].
    fn try_send_to(&self, buf: &[u8], to: SocketAddr) -> io::Result<()> {
        let mut cx = Context::from_waker(Waker::noop());
        match pin!(self.send_to(buf, to)).poll(&mut cx) {
            Poll::Ready(sent) => sent,
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
    /// Takes datagrams from `to` alone from now on. A refusal of where it was connected before is forgotten.
    fn connect(&self, to: SocketAddr) -> impl Future<Output = io::Result<()>> + Send;
    /// Where it is bound.
    fn local_addr(&self) -> io::Result<SocketAddr>;
}

/// A socket that is held, not polled. What came from a pod is asked on the pod's thread alone, and closed there wherever
/// it is dropped.
pub trait Descriptor: Send + Sync + Sized + 'static {
    /// Another handle of the same socket, to hand over.
    fn share(&self) -> io::Result<Self>;
    /// Asks the kernel whether the socket is of this kind.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`], with a text that says what it is instead.
    fn check(&self, kind: DescriptorKind) -> io::Result<()>;
    /// The address where it is bound.
    fn local_addr(&self) -> io::Result<SocketAddr>;
    /// The network namespace where it was made, whoever holds it; `None` where the kernel does not say.
    ///
    /// # Errors
    /// Those of getsockopt(2), such as for what is no socket.
    fn namespace(&self) -> io::Result<Option<NamespaceCookie>>;
}

/// The kernel's number of a network namespace: another has another, and none has it again until the machine restarts
/// (SO_NETNS_COOKIE, Linux 5.14).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceCookie(pub u64);

/// Accepts conversations.
pub trait HandoffListener: Send + Sync + 'static {
    /// What it accepts.
    type Handoff: Handoff;
    /// The next sidecar, with what the kernel says of it. It waits while too many are refused and not told so yet.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Handoff, PeerCredentials)>> + Send;
}

/// What the kernel attests of the process at the other end of a Unix socket (SO_PEERCRED, unix(7)). The socket that accept
/// returns is of the network namespace of the socket that connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Its process, as the router's process namespace numbers it; 0 where it has no number there.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// The network namespace where it made its end of the connection; `None` where the kernel does not say.
    pub network: Option<NamespaceCookie>,
}

/// A message and the descriptors that came beside it; `None`: the other side has closed.
pub type Received<D> = Option<(Vec<u8>, Vec<D>)>;

/// What a pod takes a place for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// One more thread. Where there is no place, there is none.
    Thread,
    /// A socket that waits to be closed on the pod's thread, which may be blocked. It is closed in any case.
    Closing,
}

/// Takes a place, if there is one, until what is returned is dropped.
pub type Places = Arc<dyn Fn(Place) -> Option<Box<dyn Any + Send>> + Send + Sync>;

/// A conversation: whole messages with descriptors.
pub trait Handoff: Send + Sync + 'static {
    /// What travels beside a message.
    type Descriptor: Descriptor;
    /// See [`Handoff::thread`].
    type Thread: PodThread;
    /// Gives a conversation that was accepted a thread of its own. One that is dropped without, since it is refused, is
    /// told so on a thread that all such share, and closed by one that waits for nothing. Another thread of it, for flows, takes a place, which it keeps while it
    /// lasts: where it gets none, the flows share those that are there.
    ///
    /// # Errors
    /// There is no thread for it: the conversation as it was, and why.
    fn with_own_thread(self, places: Places) -> Result<Self, (Self, io::Error)>
    where
        Self: Sized;
    /// As [`Handoff::with_own_thread`], on a thread that all such share: any of their pods may hold up the others.
    #[must_use]
    fn with_shared_thread(self, places: Places) -> Self;
    /// The thread of the sidecar that was accepted: the conversation is received and dropped there, since what is under
    /// way in it is closed by whoever does that.
    fn thread(&self) -> Self::Thread;
    /// Sends one message, waiting where the other side is slow.
    fn send(
        &self,
        message: &[u8],
        descriptors: Vec<Self::Descriptor>,
    ) -> impl Future<Output = io::Result<()>> + Send;
    /// The bytes of the next message, which stays where it is, and its descriptors with it; `None` when the other side has
    /// closed. One that is too long is [`io::ErrorKind::InvalidData`].
    fn peek(&self) -> impl Future<Output = io::Result<Option<Vec<u8>>>> + Send;
    /// Takes the message that was peeked at, with the first of its descriptors, `most` at most, and says whether there were
    /// more: those are closed and never open here. What descriptors this process has no room for is
    /// [`io::ErrorKind::QuotaExceeded`], and the message is lost.
    fn take(&self, most: usize) -> io::Result<(Vec<Self::Descriptor>, bool)>;
    /// Receives one message; `None` when the other side has closed. Every descriptor that came is owned by what is
    /// returned, or closed. One that is too long, or has more than [`MAX_DESCRIPTORS`], is
    /// [`io::ErrorKind::InvalidData`], and lost. The errors of [`Handoff::take`] beside.
    ///
    /// Cancel safe: a message is taken whole or not at all.
    fn recv(&self) -> impl Future<Output = io::Result<Received<Self::Descriptor>>> + Send {
        async {
            let Some(bytes) = self.peek().await? else { return Ok(None) };
            match self.take(MAX_DESCRIPTORS)? {
                (descriptors, false) => Ok(Some((bytes, descriptors))),
                (_, true) => Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("a message with more than {MAX_DESCRIPTORS} descriptors"),
                )),
            }
        }
    }
}
