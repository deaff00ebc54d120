//! The handshake: rustls over a stream, within a bound of time and bytes.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::UnbufferedClientConnection;
use rustls::kernel::KernelConnection;
use rustls::pki_types::CertificateDer;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, InsufficientSizeError, UnbufferedStatus};
use rustls::{AlertDescription, ExtractedSecrets};
use servicekeel_core::flow::frame::ALPN;
use servicekeel_runtime::net::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::refused;
use super::{BufferPool, Channel, RecordError};
use crate::identity::{Client, PeerError, Refusal, Server, server_name};

/// How long a handshake may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The most bytes of a handshake that wait to be understood: a chain of certificates is a few KiB.
const MAX_WAITING: usize = 64 * 1024;

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// Too slow.
    #[error("no TLS handshake within {} s", TIMEOUT.as_secs())]
    Timeout,
    /// The network.
    #[error("connection broken during the TLS handshake: {0}")]
    Io(#[from] io::Error),
    /// The other side closed.
    #[error("closed during the TLS handshake{}", if *.0 { "" } else { ", before sending anything" })]
    Closed(bool),
    /// It asks by HTTP.
    #[error("speaks HTTP, not TLS: is a web client connecting to this port?")]
    HttpRequest,
    /// It answers by HTTP.
    #[error("answers by HTTP, not TLS: is it a web server rather than a router's listen.peers?")]
    HttpAnswer,
    /// It speaks neither.
    #[error("does not speak TLS (its first bytes are {0:02x?})")]
    NotTls(Vec<u8>),
    /// More bytes than any handshake has.
    #[error("a TLS handshake of more than {MAX_WAITING} bytes")]
    TooLong,
    /// The other side refused.
    #[error("{}", refused(*.0))]
    Alert(AlertDescription),
    /// The other side's certificate is refused here.
    #[error("{0}")]
    Certificate(PeerError),
    /// Refused here for anything else.
    #[error("{0}")]
    Tls(rustls::Error),
    /// A protocol that is not ours.
    #[error("does not speak {}", String::from_utf8_lossy(ALPN))]
    Protocol,
    /// The keys can't be used.
    #[error("{0}")]
    Record(#[from] RecordError),
}

impl From<rustls::Error> for HandshakeError {
    fn from(error: rustls::Error) -> Self {
        match error {
            rustls::Error::AlertReceived(alert) => Self::Alert(alert),
            error => Self::Tls(error),
        }
    }
}

impl HandshakeError {
    /// With the reason for which a certificate was refused: rustls knows its kind only.
    fn explained(self, refusal: &Refusal) -> Self {
        match self {
            Self::Tls(rustls::Error::InvalidCertificate(_)) => {
                refusal.take().map_or(self, HandshakeError::Certificate)
            }
            other => other,
        }
    }
}

/// Gives the next traffic keys.
pub(crate) trait Rekey: Send + Sync {
    fn next_tx(&mut self) -> Result<(u64, rustls::ConnectionTrafficSecrets), rustls::Error>;
    fn next_rx(&mut self) -> Result<(u64, rustls::ConnectionTrafficSecrets), rustls::Error>;
}

impl<D: Send + Sync> Rekey for KernelConnection<D> {
    fn next_tx(&mut self) -> Result<(u64, rustls::ConnectionTrafficSecrets), rustls::Error> {
        self.update_tx_secret()
    }

    fn next_rx(&mut self) -> Result<(u64, rustls::ConnectionTrafficSecrets), rustls::Error> {
        self.update_rx_secret()
    }
}

type Chain = Vec<CertificateDer<'static>>;

/// What a handshake leaves: keys, the peer's certificates, and bytes that came behind it.
type Done = (ExtractedSecrets, Box<dyn Rekey>, Chain, Vec<u8>);

/// Shakes hands as the side that dialled.
///
/// # Errors
/// [`HandshakeError`], within 10 s.
pub async fn connect<S: Stream>(
    mut stream: S,
    side: Client,
    buffers: Arc<BufferPool>,
) -> Result<(Channel<S>, Chain), HandshakeError> {
    let connection = UnbufferedClientConnection::new(side.config, server_name())?;
    let done =
        timeout(TIMEOUT, client(&mut stream, connection)).await.map_err(|_| HandshakeError::Timeout)?;
    finish(stream, done.map_err(|error| error.explained(&side.refusal))?, buffers)
}

/// Shakes hands as the side that was dialled.
///
/// # Errors
/// [`HandshakeError`], within 10 s.
pub async fn accept<S: Stream>(
    mut stream: S,
    side: Server,
    buffers: Arc<BufferPool>,
) -> Result<(Channel<S>, Chain), HandshakeError> {
    let connection = UnbufferedServerConnection::new(side.config)?;
    let done =
        timeout(TIMEOUT, server(&mut stream, connection)).await.map_err(|_| HandshakeError::Timeout)?;
    finish(stream, done.map_err(|error| error.explained(&side.refusal))?, buffers)
}

fn finish<S: Stream>(
    stream: S,
    (secrets, rekey, chain, behind): Done,
    buffers: Arc<BufferPool>,
) -> Result<(Channel<S>, Chain), HandshakeError> {
    Ok((Channel::new(stream, &secrets, rekey, behind, buffers)?, chain))
}

/// What to do next.
enum Step {
    /// Something to send may wait in the output.
    Again,
    Send,
    Read,
    Closed,
    Done,
}

/// Takes one step, the same for both sides: their types differ.
fn step<D>(
    status: UnbufferedStatus<'_, '_, D>,
    output: &mut Vec<u8>,
) -> (usize, Result<Step, HandshakeError>) {
    let discard = status.discard;
    let next = match status.state {
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            let start = output.len();
            match data.encode(&mut []) {
                Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => {
                    output.resize(start + required_size, 0);
                    match data.encode(&mut output[start..]) {
                        Ok(written) => {
                            output.truncate(start + written);
                            Ok(Step::Again)
                        }
                        Err(error) => Err(HandshakeError::Tls(rustls::Error::General(error.to_string()))),
                    }
                }
                Ok(_) => Ok(Step::Again),
                Err(error) => Err(HandshakeError::Tls(rustls::Error::General(error.to_string()))),
            }
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Ok(Step::Send)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Step::Read),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Step::Done),
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Ok(Step::Closed),
        Ok(_) => Err(HandshakeError::Tls(rustls::Error::General("data within the handshake".into()))),
        Err(error) => Err(error.into()),
    };
    (discard, next)
}

macro_rules! drive {
    ($name:ident, $connection:ty) => {
        async fn $name<S: Stream>(
            stream: &mut S,
            mut connection: $connection,
        ) -> Result<Done, HandshakeError> {
            let (mut input, mut output) = (Vec::new(), Vec::new());
            // rustls is given one record more at a time: what comes right behind the handshake is not its business.
            let (mut record, mut given) = (0, 0);
            let mut heard = false;
            loop {
                let (discard, next) = step(connection.process_tls_records(&mut input[..given]), &mut output);
                input.drain(..discard);
                given -= discard;
                record = usize::saturating_sub(record, discard);
                let next = match next {
                    Ok(next) => next,
                    Err(error) => {
                        // What rustls knows of the input is wrong from here on, so it is asked for no more than the
                        // alert, which it then gives before it looks at any input.
                        if connection.wants_write() {
                            let _ = step(connection.process_tls_records(&mut []), &mut output);
                        }
                        if !output.is_empty() && stream.write_all(&output).await.is_ok() {
                            let _ = stream.shutdown().await;
                        }
                        return Err(error);
                    }
                };
                if matches!(next, Step::Send | Step::Read | Step::Done) && !output.is_empty() {
                    stream.write_all(&output).await?;
                    stream.flush().await?;
                    output.clear();
                }
                match next {
                    Step::Again | Step::Send => {}
                    Step::Closed => return Err(HandshakeError::Closed(heard)),
                    Step::Read => {
                        if end_of_record(&input, record) == Some(given) {
                            record = given;
                        }
                        let end = end_of_record(&input, record).unwrap_or(input.len());
                        if end > given {
                            given = end;
                            continue;
                        }
                        if input.len() > MAX_WAITING {
                            return Err(HandshakeError::TooLong);
                        }
                        if stream.read_buf(&mut input).await? == 0 {
                            return Err(HandshakeError::Closed(heard));
                        }
                        if !heard {
                            heard = true;
                            first_bytes(&input)?;
                        }
                    }
                    Step::Done => break,
                }
            }
            if connection.alpn_protocol() != Some(ALPN) {
                return Err(HandshakeError::Protocol);
            }
            let chain = connection.peer_certificates().unwrap_or_default();
            let chain = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
            let (secrets, kernel) = connection.dangerous_into_kernel_connection()?;
            Ok((secrets, Box::new(kernel), chain, input))
        }
    };
}
drive!(client, UnbufferedClientConnection);
drive!(server, UnbufferedServerConnection);

/// Where the record ends that starts at `start`; `None` where the input does not have all of it.
fn end_of_record(input: &[u8], start: usize) -> Option<usize> {
    // RFC 8446 §5.1: a type, a version of two bytes, a length of two bytes.
    let length = input.get(start + 3..start + 5)?;
    let end = start + 5 + usize::from(u16::from_be_bytes([length[0], length[1]]));
    (end <= input.len()).then_some(end)
}

/// Says what speaks there, where it is not TLS. A TLS peer starts with a handshake record or an alert.
fn first_bytes(input: &[u8]) -> Result<(), HandshakeError> {
    const METHODS: [&[u8]; 7] = [b"GET ", b"POST", b"PUT ", b"HEAD", b"OPTI", b"CONN", b"PRI "];
    match input.first() {
        Some(0x16 | 0x15) | None => Ok(()),
        Some(_) if METHODS.iter().any(|method| input.starts_with(method)) => Err(HandshakeError::HttpRequest),
        Some(_) if input.starts_with(b"HTTP") => Err(HandshakeError::HttpAnswer),
        Some(_) => Err(HandshakeError::NotTls(input[..input.len().min(8)].to_vec())),
    }
}
