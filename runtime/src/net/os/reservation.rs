//! A name of the network namespace that one program has at a time.

use std::io;

use socket2::{Domain, SockAddr, Socket, Type};

use super::while_doing;
use crate::limit::{self, RESERVE, leaves};

/// An abstract Unix socket of that name (unix(7)): it belongs to the network namespace, needs no file and no privilege,
/// and is gone with the process, however that ends. It does not listen, so nobody can connect to it.
#[derive(Debug)]
pub struct OsReservation {
    _socket: Socket,
}

impl OsReservation {
    pub(super) fn new(name: &str) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM.cloexec(), None)?;
        leaves(&socket, RESERVE, limit::open_files())?;
        socket
            .bind(&SockAddr::unix(format!("\0servicekeel/{name}"))?)
            .map_err(while_doing(format_args!("cannot reserve {name}")))?;
        Ok(Self { _socket: socket })
    }
}
