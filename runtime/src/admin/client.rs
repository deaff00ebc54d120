//! The client of an admin endpoint, for the programs' own subcommands.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// For the whole exchange.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of an answer.
const ANSWER_LIMIT: usize = 16 * 1024 * 1024;

/// Asks an admin endpoint, and gives the status code and the text. At most 5 s and 16 MiB.
///
/// # Errors
/// Those of the connection; [`ErrorKind::TimedOut`]; [`ErrorKind::InvalidData`] for an answer that is too long, no
/// UTF-8 or no HTTP; [`ErrorKind::InvalidInput`] for a path that is none.
pub async fn get(addr: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    let late = |_| io::Error::new(ErrorKind::TimedOut, format!("no answer within {} s", TIMEOUT.as_secs()));
    timeout(TIMEOUT, exchange(addr, path)).await.map_err(late)?
}

async fn exchange(addr: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    let request = Request::get(path)
        .header(HOST, addr.to_string())
        .body(Empty::<Bytes>::new())
        .map_err(|error| io::Error::new(ErrorKind::InvalidInput, format!("{path:?}: {error}")))?;
    let stream = TokioIo::new(TcpStream::connect(addr).await?);
    let (mut sender, connection) = http1::handshake(stream).await.map_err(unspoken)?;
    let answer = async move {
        let response = sender.send_request(request).await.map_err(unspoken)?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await.map_err(cut)?;
        let text = String::from_utf8(body.to_bytes().into())
            .map_err(|_| io::Error::new(ErrorKind::InvalidData, "the answer is not UTF-8"))?;
        Ok((status, text))
    };
    // What goes wrong with the connection is told by the answer too.
    let (answer, _) = tokio::join!(answer, connection);
    answer
}

fn unspoken(error: hyper::Error) -> io::Error {
    let kind = if error.is_parse() { ErrorKind::InvalidData } else { ErrorKind::ConnectionAborted };
    io::Error::new(kind, format!("no HTTP answer: {error}"))
}

fn cut(error: Box<dyn std::error::Error + Send + Sync>) -> io::Error {
    if error.is::<LengthLimitError>() {
        return io::Error::new(
            ErrorKind::InvalidData,
            format!("the answer is longer than {ANSWER_LIMIT} bytes"),
        );
    }
    io::Error::new(ErrorKind::UnexpectedEof, format!("the answer was cut: {error}"))
}
