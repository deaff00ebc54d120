//! The client pod's application: downloads that check every byte and note the longest pause.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::content::{BLOCK, Content};

/// How long a download may stand still.
const PATIENCE: Duration = Duration::from_secs(30);

/// A download that has ended well.
#[derive(Debug, Clone, Copy)]
pub struct Downloaded {
    /// Its bytes, each of them the right one.
    pub bytes: u64,
    /// How long it took.
    pub time: Duration,
    /// The longest time in which nothing came.
    pub longest_pause: Duration,
}

/// A download that runs on a thread of its own.
pub struct Download {
    received: Arc<AtomicU64>,
    thread: JoinHandle<Result<Downloaded>>,
}

impl Download {
    /// Begins to fetch `blocks` blocks, at `rate` MB a second where it is given.
    pub fn start(addr: SocketAddr, blocks: u64, rate: Option<u32>) -> Self {
        let received = Arc::new(AtomicU64::new(0));
        let count = received.clone();
        let path = rate.map_or_else(|| format!("/bytes/{blocks}"), |rate| format!("/bytes/{blocks}/{rate}"));
        let thread = std::thread::spawn(move || fetch(addr, &path, blocks, &count));
        Self { received, thread }
    }

    /// The bytes so far.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Whether it has ended, well or not.
    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Where it broke, or a byte was not the right one.
    pub fn finish(self) -> Result<Downloaded> {
        self.thread.join().map_err(|_| anyhow::anyhow!("the download's thread panicked"))?
    }
}

fn fetch(addr: SocketAddr, path: &str, blocks: u64, received: &AtomicU64) -> Result<Downloaded> {
    let mut stream = TcpStream::connect_timeout(&addr, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let head = read_head(&mut stream)?;
    ensure!(head.starts_with("HTTP/1.1 200 "), "expected 200; got {head:?}");

    let (started, mut last, mut longest_pause) = (Instant::now(), Instant::now(), Duration::ZERO);
    let (mut content, mut buf) = (Content::default(), vec![0; BLOCK]);
    for n in 0..blocks {
        let mut filled = 0;
        while filled < BLOCK {
            let got = stream.read(&mut buf[filled..]).with_context(|| at(received))?;
            ensure!(got > 0, "expected {} bytes; the end came {}", blocks * BLOCK as u64, at(received));
            filled += got;
            received.fetch_add(got as u64, Ordering::Relaxed);
            longest_pause = longest_pause.max(last.elapsed());
            last = Instant::now();
        }
        ensure!(
            content.matches(n, &buf),
            "expected the bytes that were sent; block {n} of {blocks} has wrong ones"
        );
    }
    ensure!(stream.read(&mut buf)? == 0, "more bytes than were asked for");
    Ok(Downloaded { bytes: blocks * BLOCK as u64, time: started.elapsed(), longest_pause })
}

fn at(received: &AtomicU64) -> String {
    format!("after {} bytes", received.load(Ordering::Relaxed))
}

/// The head of an answer, byte by byte so that nothing of the body is taken.
fn read_head(stream: &mut TcpStream) -> Result<String> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        ensure!(head.len() < 4096, "no end of the answer's head");
        stream.read_exact(&mut byte).context("the answer's head")?;
        head.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// What a download says of a server that answers with these bytes.
    fn fetched(answer: Vec<u8>) -> Result<Downloaded> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            read_head(&mut client).unwrap();
            client.write_all(&answer).unwrap();
        });
        let fetched = Download::start(addr, 2, None).finish();
        server.join().unwrap();
        fetched
    }

    #[test]
    fn only_the_right_bytes_are_a_download() {
        let (mut content, mut answer) = (Content::default(), b"HTTP/1.1 200 OK\r\n\r\n".to_vec());
        answer.extend_from_slice(content.block(0));
        answer.extend_from_slice(content.block(1));
        assert_eq!(fetched(answer.clone()).unwrap().bytes, 2 * BLOCK as u64);

        let short = answer[..answer.len() - 1].to_vec();
        assert!(fetched(short).unwrap_err().to_string().contains("the end came"));
        let mut wrong = answer.clone();
        let last = wrong.len() - 1;
        wrong[last] ^= 1;
        assert!(fetched(wrong).unwrap_err().to_string().contains("block 1 of 2 has wrong ones"));
        let mut long = answer;
        long.push(0);
        assert!(fetched(long).unwrap_err().to_string().contains("more bytes"));
        assert!(fetched(b"HTTP/1.1 404 No\r\n\r\n".to_vec()).unwrap_err().to_string().contains("404"));
    }
}
