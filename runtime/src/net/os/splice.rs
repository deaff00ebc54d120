//! Bytes between two sockets of this machine by splice(2): they stay in the kernel.
//!
//! A pipe carries them, taken from a common stock while bytes are in flight, so that an idle flow holds none.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustix::pipe::{PipeFlags, SpliceFlags};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::select;
use tokio::time::{sleep, timeout};

use super::lull::Lull;
use super::{OsStream, tcp_info};
use crate::limit;
use crate::net::Stream;
use crate::net::tcp::TcpInfo;

/// Empty pipes that are kept for the next flow.
const STOCK: usize = 32;
/// A pipe's size in bytes: what the kernel allows without privilege (fs.pipe-max-size, pipe(7)), else its default.
const PIPE: usize = 1 << 20;
/// The least that a pipe holds.
const PAGE: usize = 4096;
const FLAGS: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);
/// Bytes that one direction carries before it lets the other one and other flows run ...
const SHARE: usize = 1 << 20;
/// ... where a round counts as this many at least, for its system calls.
const LEAST: usize = 32 << 10;
/// How long a flow waits where the process can't open another pipe.
const NO_PIPE: Duration = Duration::from_millis(20);
/// How long what was said before a reset may take to arrive.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How often it is asked whether it has: at first, and at the least.
const ASK: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(100));

/// The stock of empty pipes.
#[derive(Debug)]
pub(super) struct Pipes {
    stock: Mutex<Vec<Pipe>>,
    /// How many are kept: [`STOCK`], and few where descriptors are few.
    most: usize,
}

impl Default for Pipes {
    fn default() -> Self {
        let most = limit::open_files().map_or(STOCK, |limit| STOCK.min(limit as usize / 32));
        Self { stock: Mutex::default(), most }
    }
}

#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    /// Bytes inside.
    held: usize,
}

impl Pipe {
    fn open() -> io::Result<Self> {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        if limit::is_of_the_last(&write) {
            return Err(io::Error::other("out of file descriptors: raise the open file limit (ulimit -n)"));
        }
        // Above the user's share of pipe memory this fails, and the pipe has its default size, or a page.
        let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE);
        Ok(Self { read, write, held: 0 })
    }

    /// One splice into the pipe; 0 when `from` has ended.
    fn fill(&mut self, from: &TcpStream) -> io::Result<usize> {
        let n = uninterrupted(|| rustix::pipe::splice(from, None, &self.write, None, PIPE, FLAGS))?;
        self.held += n;
        Ok(n)
    }

    /// Carries a few bytes by copying: short messages, for which that is less work than a way through the pipe, and what
    /// a splice leaves where it is, since it stops before an urgent byte and says that there is nothing, or that `from`
    /// has ended. What `to` has no room for goes into the pipe, which is empty and has a page at least. Says how many
    /// came, 0 when `from` has ended, and how many went.
    fn copy(&mut self, from: &TcpStream, to: &TcpStream) -> io::Result<(usize, io::Result<usize>)> {
        let mut bytes = [0; PAGE];
        let (n, _) = uninterrupted(|| rustix::net::recv(from, &mut bytes, RecvFlags::DONTWAIT))?;
        Ok((n, self.pass_on(&bytes[..n], to)))
    }

    fn pass_on(&mut self, bytes: &[u8], to: &TcpStream) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = match uninterrupted(|| rustix::net::send(to, bytes, flags)) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
            sent => sent?,
        };
        let mut rest = &bytes[sent..];
        while !rest.is_empty() {
            let written = uninterrupted(|| rustix::io::write(&self.write, rest))?;
            self.held += written;
            rest = &rest[written..];
        }
        Ok(sent)
    }

    /// One splice out of the pipe.
    fn drain(&mut self, to: &TcpStream) -> io::Result<usize> {
        let n = uninterrupted(|| rustix::pipe::splice(&self.read, None, to, None, self.held, FLAGS))?;
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.held -= n;
        Ok(n)
    }
}

fn uninterrupted<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            outcome => return Ok(outcome?),
        }
    }
}

impl Pipes {
    async fn take(&self) -> Pipe {
        loop {
            if let Some(pipe) = self.stock.lock().unwrap_or_else(PoisonError::into_inner).pop() {
                return pipe;
            }
            match Pipe::open() {
                Ok(pipe) => return pipe,
                Err(e) => {
                    tracing::debug!(error = %e, "cannot create a pipe; the flow waits");
                    sleep(NO_PIPE).await;
                }
            }
        }
    }

    fn put_back(&self, pipe: Pipe) {
        let mut stock = self.stock.lock().unwrap_or_else(PoisonError::into_inner);
        if pipe.held == 0 && stock.len() < self.most {
            stock.push(pipe);
        }
    }
}

/// Both ends of a flow. Dropped before both directions have ended, each peer sees a reset: an end would tell it that
/// it had everything.
struct Ends(Option<(OsStream, OsStream)>);

impl Drop for Ends {
    fn drop(&mut self) {
        if let Some((a, b)) = self.0.take() {
            a.reset();
            b.reset();
        }
    }
}

/// See [`crate::net::Net::splice`].
pub(super) async fn splice(
    pipes: Arc<Pipes>,
    a: OsStream,
    b: OsStream,
    count: impl Fn(u64, u64) + Send + Sync,
) -> io::Result<()> {
    let mut ends = Ends(Some((a, b)));
    let outcome = match &mut ends.0 {
        Some((a, b)) => both_ways(&pipes, a.polled()?, b.polled()?, &count).await,
        None => Ok(()),
    };
    if outcome.is_ok()
        && let Some((a, b)) = ends.0.take()
    {
        a.close();
        b.close();
    }
    outcome
}

/// One end of a flow while bytes are carried.
struct Side<'s> {
    stream: &'s TcpStream,
    /// It was reset. The kernel says so once, and calls what came before it an end then.
    broken: AtomicBool,
}

impl<'s> Side<'s> {
    fn new(stream: &'s TcpStream) -> Self {
        Self { stream, broken: AtomicBool::new(false) }
    }

    fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// Passes an error of it on, and keeps it in mind.
    fn breaks(&self, error: io::Error) -> io::Error {
        self.broken.store(true, Ordering::Relaxed);
        error
    }

    /// Resolves when its system has acknowledged what was written: a reset does not overtake it then.
    async fn has_all(&self) {
        let mut pause = ASK.0;
        let waits = |info: &TcpInfo| !info.is_taken() && !info.is_closed();
        while tcp_info::read(self.stream.as_fd()).is_ok_and(|info| waits(&info)) {
            sleep(pause).await;
            pause = (pause * 2).min(ASK.1);
        }
    }
}

async fn both_ways(
    pipes: &Pipes,
    a: &TcpStream,
    b: &TcpStream,
    count: &(impl Fn(u64, u64) + Sync),
) -> io::Result<()> {
    let (a, b) = (&Side::new(a), &Side::new(b));
    let mut forth = pin!(carry(pipes, a, b, |n| count(n, 0)));
    let mut back = pin!(carry(pipes, b, a, |n| count(0, n)));
    let (first, is_forth) = select! {
        biased;
        outcome = &mut forth => (outcome, true),
        outcome = &mut back => (outcome, false),
    };
    let outcome = match (first, is_forth) {
        // A side that has ended is not read any more, so only its error tells that it is gone.
        (Ok(()), true) => select! {
            biased;
            outcome = back => outcome,
            error = broken(a.stream) => Err(error),
        },
        (Ok(()), false) => select! {
            biased;
            outcome = forth => outcome,
            error = broken(b.stream) => Err(error),
        },
        // What a side said before it broke is carried still, such as the answer of a server that did not read on.
        (Err(error), true) => {
            if !a.is_broken() {
                let _ = timeout(LAST_WORDS, back).await;
            }
            Err(error)
        }
        (Err(error), false) => {
            if !b.is_broken() {
                let _ = timeout(LAST_WORDS, forth).await;
            }
            Err(error)
        }
    };
    if outcome.is_err() {
        // One that takes nothing may have cost it already.
        let _ = timeout(LAST_WORDS / 2, async { tokio::join!(a.has_all(), b.has_all()) }).await;
    }
    outcome
}

/// Carries bytes one way until `from` ends, and then ends `to`.
async fn carry(pipes: &Pipes, from: &Side<'_>, to: &Side<'_>, count: impl Fn(u64)) -> io::Result<()> {
    let (mut short, mut lull) = (true, Lull::default());
    loop {
        from.stream.readable().await?;
        let mut pipe = pipes.take().await;
        let came = burst(&mut pipe, from, to, &mut short, &count).await?;
        pipes.put_back(pipe);
        match came {
            Some(0) => lull.pause().await,
            Some(_) => lull.end(),
            None if from.is_broken() => return Err(io::ErrorKind::ConnectionReset.into()),
            None => {
                return SockRef::from(to.stream).shutdown(Shutdown::Write).map_err(|error| to.breaks(error));
            }
        }
    }
}

/// Carries what `from` has now, and says how much it was; `None` when `from` has ended. Leaves the pipe empty. `short`:
/// what came last was less than a page, and so may this be.
///
/// Bytes are read into an empty pipe only, so EAGAIN has one meaning each time: into the pipe, that `from` has
/// nothing; out of it, that `to` has no room.
async fn burst(
    pipe: &mut Pipe,
    from: &Side<'_>,
    to: &Side<'_>,
    short: &mut bool,
    count: &impl Fn(u64),
) -> io::Result<Option<usize>> {
    let mut share = SHARE;
    let mut all = 0;
    let mut lull = Lull::default();
    loop {
        let moved = from.stream.try_io(Interest::READABLE, || {
            if !*short {
                match pipe.fill(from.stream) {
                    Ok(0) => {}
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    spliced => return spliced.map(|n| (n, Ok(0))),
                }
            }
            pipe.copy(from.stream, to.stream)
        });
        let (came, went) = match moved {
            Ok((0, _)) => return Ok(None),
            Ok((came, went)) => (came, went.map_err(|error| to.breaks(error))?),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                *short = all < PAGE;
                return Ok(Some(all));
            }
            Err(e) => return Err(from.breaks(e)),
        };
        if went > 0 {
            count(went as u64);
        }
        *short &= came < PAGE;
        all += came;
        while pipe.held > 0 {
            match to.stream.try_io(Interest::WRITABLE, || pipe.drain(to.stream)) {
                Ok(n) => {
                    lull.end();
                    count(n as u64);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    has_room(from, to).await?;
                    lull.pause().await;
                }
                Err(e) => return Err(to.breaks(e)),
            }
        }
        share = share.saturating_sub(came.max(LEAST));
        if share == 0 {
            tokio::task::yield_now().await;
            share = SHARE;
        }
    }
}

/// Resolves when `to` has room for more. Where `from` has broken, it has a moment for that.
async fn has_room(from: &Side<'_>, to: &Side<'_>) -> io::Result<()> {
    if !from.is_broken() {
        let error = select! {
            biased;
            error = broken(from.stream) => error,
            ready = to.stream.writable() => return ready,
        };
        from.breaks(error);
    }
    timeout(LAST_WORDS, to.stream.writable()).await.map_err(|_| io::ErrorKind::ConnectionReset)?
}

/// Resolves when the stream has broken.
async fn broken(stream: &TcpStream) -> io::Error {
    match stream.ready(Interest::ERROR).await {
        Ok(_) => stream
            .take_error()
            .ok()
            .flatten()
            // Another call has already been told.
            .unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
        Err(e) => e,
    }
}

#[cfg(test)]
mod tests;
