//! HTTP/1.1 as far as the admin endpoints need it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Fetches a page: its status code and its body. 5 s at most for each step.
///
/// # Errors
/// Where the server can't be reached or does not speak HTTP.
pub fn get(addr: SocketAddr, path: &str) -> Result<(u16, String)> {
    let limit = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&addr, limit)?;
    stream.set_read_timeout(Some(limit))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no end of headers")?;
    let Some(code) = head.split(' ').nth(1).and_then(|code| code.parse().ok()) else {
        bail!("no status line: {head:?}")
    };
    Ok((code, body.to_owned()))
}
