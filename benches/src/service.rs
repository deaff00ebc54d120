//! The service that is measured. A client says with 8 bytes (big endian) how many bytes it wants, and gets them; again
//! and again until it closes.

use std::net::SocketAddr;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const CHUNK: usize = 256 * 1024;

pub(crate) fn serve(addr: SocketAddr) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(addr).await?;
        let mut clients = tokio::task::JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await?;
            while clients.try_join_next().is_some() {}
            clients.spawn(client(stream));
        }
    })
}

async fn client(mut stream: TcpStream) -> std::io::Result<()> {
    static BYTES: [u8; CHUNK] = [0x5a; CHUNK];
    stream.set_nodelay(true)?;
    // Ends with the error of the client's close.
    loop {
        let mut left = stream.read_u64().await?;
        while left > 0 {
            let n = left.min(CHUNK as u64) as usize;
            stream.write_all(&BYTES[..n]).await?;
            left -= n as u64;
        }
    }
}
