//! The applications of the tests: echo services that end when dropped.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// Sends back what it receives, and ends its side when the client has ended its own.
pub struct Echo {
    listener: TcpListener,
    stop: Arc<AtomicBool>,
    /// Connections that the client reset.
    pub resets: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// Starts it.
    ///
    /// # Errors
    /// Where the address can't be bound.
    pub fn start(addr: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(addr).with_context(|| format!("binding {addr}"))?;
        let accepting = listener.try_clone()?;
        let (stop, resets) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, counted) = (stop.clone(), resets.clone());
        let thread = std::thread::spawn(move || {
            for stream in accepting.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let counted = counted.clone();
                std::thread::spawn(move || {
                    if echo(stream).is_err() {
                        counted.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        Ok(Self { listener, stop, resets, thread: Some(thread) })
    }
}

fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    let mut buf = vec![0; 64 * 1024];
    loop {
        let n = stream.read(&mut buf)?;
        if n == 0 {
            return stream.shutdown(Shutdown::Write);
        }
        stream.write_all(&buf[..n])?;
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the accept, in whatever network it waits.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A new connection to an echo service: what is said comes back. 10 s at most for each step.
///
/// # Errors
/// Where it does not.
pub fn ping(addr: SocketAddr) -> Result<()> {
    let limit = Duration::from_secs(10);
    let mut stream = TcpStream::connect_timeout(&addr, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"ping")?;
    let mut got = [0; 4];
    stream.read_exact(&mut got)?;
    ensure!(&got == b"ping", "{got:?} came back");
    Ok(())
}

/// Sends each datagram back.
pub struct UdpEcho {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl UdpEcho {
    /// Starts it.
    ///
    /// # Errors
    /// Where the address can't be bound.
    pub fn start(addr: SocketAddr) -> Result<Self> {
        let socket = UdpSocket::bind(addr).with_context(|| format!("binding {addr}/UDP"))?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut buf = vec![0; 65_536];
            while !stopped.load(Ordering::SeqCst) {
                if let Ok((n, from)) = socket.recv_from(&mut buf) {
                    let _ = socket.send_to(&buf[..n], from);
                }
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for UdpEcho {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
