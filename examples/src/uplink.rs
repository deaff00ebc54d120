//! The path between the two routers: a TCP forwarder that can be cut.
//!
//! Cut, it forwards nothing, and nothing is closed or lost: as with an uplink that is gone, the ends hear nothing at
//! all, and must find out by themselves. Joined again, what was on its way arrives, as TCP sends it again.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use anyhow::Result;

#[derive(Default)]
struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn set(&self, closed: bool) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = closed;
        self.opened.notify_all();
    }

    fn pass(&self) {
        let closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.opened.wait_while(closed, |closed| *closed).unwrap_or_else(PoisonError::into_inner));
    }
}

/// The forwarder. It lives as long as the program; dropped, it is joined, so that nobody waits at it.
pub struct Uplink {
    addr: SocketAddr,
    gate: Arc<Gate>,
}

impl Uplink {
    /// A forwarder to an address, which listens on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// Where there is none.
    pub fn start(to: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let uplink = Self { addr: listener.local_addr()?, gate: Arc::default() };
        let gate = uplink.gate.clone();
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let gate = gate.clone();
                std::thread::spawn(move || {
                    gate.pass();
                    // Where the far end does not listen, the near end is closed.
                    if let Ok(far) = TcpStream::connect(to) {
                        let _ = join(near, far, &gate);
                    }
                });
            }
        });
        Ok(uplink)
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Lets nothing pass from now on.
    pub fn cut(&self) {
        self.gate.set(true);
    }

    /// Lets everything pass again.
    pub fn join(&self) {
        self.gate.set(false);
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        self.join();
    }
}

fn join(near: TcpStream, far: TcpStream, gate: &Arc<Gate>) -> std::io::Result<()> {
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let (near_reader, far_writer, there) = (near.try_clone()?, far.try_clone()?, gate.clone());
    let back = gate.clone();
    std::thread::spawn(move || pump(near_reader, far_writer, &there));
    pump(far, near, &back);
    Ok(())
}

fn pump(mut from: TcpStream, mut to: TcpStream, gate: &Gate) {
    let mut buf = vec![0; 256 * 1024];
    loop {
        gate.pass();
        let read = from.read(&mut buf);
        gate.pass();
        let written = match read {
            Ok(0) => {
                // Either end may be gone already.
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
            Ok(n) => to.write_all(&buf[..n]),
            Err(error) => Err(error),
        };
        if written.is_err() {
            let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn nothing_passes_while_it_is_cut_and_nothing_is_lost() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uplink = Uplink::start(listener.local_addr().unwrap()).unwrap();
        let mut near = TcpStream::connect(uplink.addr()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        far.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let mut buf = [0; 2];
        near.write_all(b"ab").unwrap();
        far.read_exact(&mut buf).unwrap();

        uplink.cut();
        near.write_all(b"cd").unwrap();
        assert!(far.read(&mut buf).is_err(), "bytes passed a path that is cut");
        let late = TcpStream::connect(uplink.addr()).unwrap();
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "a connection passed a path that is cut");
        listener.set_nonblocking(false).unwrap();

        uplink.join();
        far.read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"cd");
        listener.accept().unwrap();
        drop((near, late));
        assert_eq!(far.read(&mut buf).unwrap(), 0);
    }
}
