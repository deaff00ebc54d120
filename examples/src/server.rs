//! The server pod's application: HTTP and UDP, with the answers of the image in the manifest as far as it is used.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::content::{BLOCK, Content};

/// How long a client may take to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// The most bytes of a request's head.
const MAX_HEAD: u64 = 8 * 1024;

/// Serves for as long as the program lives: `/hostname` gives `name`, `/bytes/N` gives N blocks of [`Content`], and
/// `/bytes/N/R` gives them at R MB a second.
///
/// # Errors
/// Where the address can't be bound.
pub fn http(addr: SocketAddr, name: &str) -> Result<()> {
    let listener = TcpListener::bind(addr).with_context(|| taken(addr, "TCP"))?;
    let name = name.to_owned();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let name = name.clone();
            // A client that goes away is no news.
            std::thread::spawn(move || drop(serve(client, &name)));
        }
    });
    Ok(())
}

/// Serves for as long as the program lives: `hostname` is answered by `name`, all else comes back as it was sent.
///
/// # Errors
/// Where the address can't be bound.
pub fn udp(addr: SocketAddr, name: &str) -> Result<()> {
    let socket = UdpSocket::bind(addr).with_context(|| taken(addr, "UDP"))?;
    let name = name.to_owned();
    std::thread::spawn(move || {
        let mut buf = vec![0; 65_536];
        loop {
            if let Ok((n, client)) = socket.recv_from(&mut buf) {
                let answer = if &buf[..n] == b"hostname" { name.as_bytes() } else { &buf[..n] };
                // A datagram may be lost.
                let _ = socket.send_to(answer, client);
            }
        }
    });
    Ok(())
}

fn taken(addr: SocketAddr, protocol: &str) -> String {
    format!(
        "{addr}/{protocol} is taken: end what listens on port {}, or another demo, and try again",
        addr.port()
    )
}

fn serve(client: TcpStream, name: &str) -> std::io::Result<()> {
    client.set_nodelay(true)?;
    client.set_read_timeout(Some(REQUEST_TIMEOUT))?;
    let mut head = BufReader::new(client.try_clone()?.take(MAX_HEAD));
    let mut request = String::new();
    head.read_line(&mut request)?;
    let mut line = String::new();
    while head.read_line(&mut line)? > 2 {
        line.clear();
    }
    let mut client = client;
    let mut words = request.split(' ');
    let path = match (words.next(), words.next()) {
        (Some("GET"), Some(path)) => path,
        _ => {
            return write!(
                client,
                "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        }
    };
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    match parts[..] {
        ["hostname" | ""] => {
            ok(&mut client, name.len() as u64).and_then(|()| client.write_all(name.as_bytes()))
        }
        ["bytes", n] => stream(&mut client, n.parse().unwrap_or(0), None),
        ["bytes", n, rate] => stream(&mut client, n.parse().unwrap_or(0), rate.parse().ok()),
        _ => write!(client, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"),
    }?;
    client.shutdown(Shutdown::Write)
}

fn ok(client: &mut TcpStream, length: u64) -> std::io::Result<()> {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    client.write_all(head.as_bytes())
}

fn stream(client: &mut TcpStream, blocks: u64, rate: Option<u32>) -> std::io::Result<()> {
    ok(client, blocks * BLOCK as u64)?;
    let (started, mut content) = (Instant::now(), Content::default());
    for n in 0..blocks {
        client.write_all(content.block(n))?;
        if let Some(rate) = rate {
            let due = Duration::from_secs_f64(((n + 1) * BLOCK as u64) as f64 / 1e6 / f64::from(rate.max(1)));
            std::thread::sleep(due.saturating_sub(started.elapsed()));
        }
    }
    Ok(())
}
