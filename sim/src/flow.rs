//! TCP applications: a service, and the client of one flow. Each says what it sees to the oracle.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use servicekeel_runtime::net::{Listener, Net, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::debug;

use crate::content::Content;
use crate::net::{SimNet, SimStream};
use crate::oracle::{Incoming, Oracle, Service};

/// Bytes that are written or read at once.
const BLOCK: usize = 16 << 10;
const HEADER: usize = 31;
const UP: u64 = 0;
const DOWN: u64 = 1;

/// Who speaks when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Both at once; each ends when it has said all.
    Both,
    /// The service reads to the end, and then answers.
    Answer,
    /// The client says nothing, not even what it wants, before the service has greeted it; the service says all and ends,
    /// and then the client begins.
    ServiceFirst,
    /// The client says all as fast as it goes and reads nothing before; the service takes its time to read.
    ClientReadsLate,
    /// The client resets after half of its bytes.
    ClientResets,
    /// The service resets after half of its bytes.
    ServiceResets,
}

/// Each of them.
pub const SHAPES: [Shape; 6] = [
    Shape::Both,
    Shape::Answer,
    Shape::ServiceFirst,
    Shape::ClientReadsLate,
    Shape::ClientResets,
    Shape::ServiceResets,
];

/// One flow.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Where it goes.
    pub service: Service,
    /// Who speaks when.
    pub shape: Shape,
    /// Bytes to the service.
    pub up: u64,
    /// Bytes from the service.
    pub down: u64,
    /// The pause after each 16 KiB, each way.
    pub pace: Duration,
    /// How long the client reads nothing, after the greeting.
    pub pause: Duration,
}

impl Plan {
    /// A flow of both directions at once, as fast as it goes.
    pub fn new(service: Service, up: u64, down: u64) -> Self {
        Self { service, shape: Shape::Both, up, down, pace: Duration::ZERO, pause: Duration::ZERO }
    }

    /// The same, that speaks in another order.
    pub fn shaped(self, shape: Shape) -> Self {
        Self { shape, ..self }
    }

    /// The same, whose client pauses once for so long.
    pub fn pausing(self, pause: Duration) -> Self {
        Self { pause, ..self }
    }

    /// The same, that pauses.
    pub fn paced(self, pace: Duration) -> Self {
        Self { pace, ..self }
    }
}

/// How a flow went, for its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All bytes came, and all were taken.
    Complete,
    /// It was reset, after so many bytes from the service.
    Reset(u64),
    /// There was no connection.
    NotConnected(io::ErrorKind),
}

/// Begins a flow and carries it to its end.
pub async fn run(net: &SimNet, to: SocketAddr, plan: Plan, oracle: &Oracle) -> Outcome {
    let number = oracle.begin_flow(plan.service);
    debug!(number, %to, ?plan, "a flow begins");
    let stream = match net.connect(&to.to_string()).await {
        Ok(stream) => stream,
        Err(error) => {
            debug!(number, %error, "a flow is not connected");
            return Outcome::NotConnected(error.kind());
        }
    };
    let mut incoming = Incoming::new(oracle, number, DOWN, plan.down);
    let outcome = match client(stream, number, plan, &mut incoming, oracle).await {
        Ok(()) => Outcome::Complete,
        Err(_) => Outcome::Reset(incoming.received()),
    };
    debug!(number, ?outcome, "a flow ends");
    outcome
}

async fn client(
    stream: SimStream,
    number: u64,
    plan: Plan,
    incoming: &mut Incoming<'_>,
    oracle: &Oracle,
) -> io::Result<()> {
    let (mut reader, mut writer) = split(stream);
    let mut header = Vec::with_capacity(HEADER);
    header.extend(number.to_be_bytes());
    header.extend(plan.service.0.to_be_bytes());
    header.push(SHAPES.iter().position(|shape| *shape == plan.shape).unwrap_or(0) as u8);
    header.extend(plan.up.to_be_bytes());
    header.extend(plan.down.to_be_bytes());
    header.extend((plan.pace.as_millis() as u16).to_be_bytes());
    let sending = async {
        writer.write_all(&header).await?;
        match plan.shape {
            Shape::ServiceFirst => {}
            Shape::ClientResets => send(&mut writer, number, UP, plan.up / 2, plan.pace, oracle).await?,
            Shape::ClientReadsLate => say(&mut writer, number, UP, plan.up, Duration::ZERO, oracle).await?,
            _ => say(&mut writer, number, UP, plan.up, plan.pace, oracle).await?,
        }
        Ok(())
    };
    match plan.shape {
        Shape::ClientResets => {
            greeted(&mut reader, plan.service, incoming, oracle).await?;
            sending.await?;
            break_off(reader.unsplit(writer), number, oracle).await;
            return Ok(());
        }
        Shape::ServiceFirst => {
            greeted(&mut reader, plan.service, incoming, oracle).await?;
            sending.await?;
            hear(&mut reader, incoming, Duration::ZERO).await?;
            say(&mut writer, number, UP, plan.up, plan.pace, oracle).await?;
            // The service ended long ago; it closes when it has all.
            return Ok(());
        }
        Shape::ClientReadsLate => {
            sending.await?;
            greeted(&mut reader, plan.service, incoming, oracle).await?;
            return hear(&mut reader, incoming, Duration::ZERO).await;
        }
        Shape::Both | Shape::Answer | Shape::ServiceResets => {}
    }
    if plan.shape == Shape::ServiceResets {
        let receiving = async {
            let greeted = greeting(&mut reader, plan.service, oracle).await?;
            read_out(&mut reader, incoming).await.map(|()| greeted)
        };
        // Who can't write any more reads what is there.
        let (sent, received) = tokio::join!(biased; sending, receiving);
        if sent.is_ok() && matches!(received, Ok(false)) {
            incoming.end_of_silence();
        }
        let received = received.map(drop);
        return end_of_reset(sent, received, incoming, || oracle.reset(number, DOWN, plan.down / 2));
    }
    let receiving = async {
        greeted(&mut reader, plan.service, incoming, oracle).await?;
        if !plan.pause.is_zero() {
            sleep(plan.pause).await;
        }
        hear(&mut reader, incoming, Duration::ZERO).await
    };
    tokio::try_join!(biased; sending, receiving).map(|_: ((), ())| ())
}

/// The service says first which one it is.
async fn greeted(
    reader: &mut ReadHalf<SimStream>,
    service: Service,
    incoming: &Incoming<'_>,
    oracle: &Oracle,
) -> io::Result<()> {
    if greeting(reader, service, oracle).await? {
        return Ok(());
    }
    incoming.end_of_silence();
    Err(io::ErrorKind::UnexpectedEof.into())
}

/// Whether the service says which one it is, before an end.
async fn greeting(reader: &mut ReadHalf<SimStream>, service: Service, oracle: &Oracle) -> io::Result<bool> {
    let mut name = [0; 4];
    let mut filled = 0;
    while filled < name.len() {
        match reader.read(&mut name[filled..]).await? {
            0 => return Ok(false),
            n => filled += n,
        }
    }
    if u32::from_be_bytes(name) != service.0 {
        oracle.violate(format_args!("a flow to {service:?} is answered by {}", u32::from_be_bytes(name)));
    }
    Ok(true)
}

async fn send(
    writer: &mut WriteHalf<SimStream>,
    number: u64,
    direction: u64,
    total: u64,
    pace: Duration,
    oracle: &Oracle,
) -> io::Result<()> {
    let content = Content::new(number, direction);
    let mut sent = 0;
    while sent < total {
        let block = content.at(sent, BLOCK.min((total - sent) as usize));
        writer.write_all(block).await?;
        sent += block.len() as u64;
        oracle.said(number, direction, sent);
        if !pace.is_zero() {
            sleep(pace).await;
        }
    }
    Ok(())
}

async fn say(
    writer: &mut WriteHalf<SimStream>,
    number: u64,
    direction: u64,
    total: u64,
    pace: Duration,
    oracle: &Oracle,
) -> io::Result<()> {
    send(writer, number, direction, total, pace, oracle).await?;
    writer.shutdown().await
}

async fn hear(
    reader: &mut ReadHalf<SimStream>,
    incoming: &mut Incoming<'_>,
    pace: Duration,
) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    loop {
        match reader.read(&mut block).await? {
            0 => {
                incoming.end();
                return Ok(());
            }
            n => incoming.take(&block[..n]),
        }
        if !pace.is_zero() {
            sleep(pace).await;
        }
    }
}

/// Resets a flow once its own system has nothing left of what was said, which would be lost with it.
async fn break_off(stream: SimStream, number: u64, oracle: &Oracle) {
    while !stream.is_taken() {
        sleep(Duration::from_millis(1)).await;
    }
    oracle.break_off(number);
    stream.reset();
}

/// Reads to the end or the reset.
async fn read_out(reader: &mut ReadHalf<SimStream>, incoming: &mut Incoming<'_>) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    loop {
        match reader.read(&mut block).await? {
            0 => return Ok(()),
            n => incoming.take(&block[..n]),
        }
    }
}

/// Judges a flow that the other side resets. A system tells that once: where the writer was told, the reader finds an end.
fn end_of_reset(
    wrote: io::Result<()>,
    read: io::Result<()>,
    incoming: &Incoming<'_>,
    reset: impl FnOnce(),
) -> io::Result<()> {
    match (wrote, read) {
        (Ok(()), Ok(())) => {
            incoming.end();
            Ok(())
        }
        (Err(error), _) | (_, Err(error)) => {
            reset();
            Err(error)
        }
    }
}

/// Serves a Service at an address for ever.
///
/// # Errors
/// Those of bind(2).
pub async fn serve(net: SimNet, at: SocketAddr, service: Service, oracle: Oracle) -> io::Result<()> {
    let listener = net.listen(at).await?;
    let mut flows = JoinSet::new();
    loop {
        while flows.try_join_next().is_some() {}
        let (stream, _) = listener.accept().await?;
        let oracle = oracle.clone();
        flows.spawn(async move {
            if let Err(error) = attend(stream, service, &oracle).await {
                debug!(service = service.0, %error, "a flow ends at its service");
            }
        });
    }
}

async fn attend(stream: SimStream, own: Service, oracle: &Oracle) -> io::Result<()> {
    let (mut reader, mut writer) = split(stream);
    writer.write_all(&own.0.to_be_bytes()).await?;
    let mut header = [0; HEADER];
    reader.read_exact(&mut header).await?;
    let number = |range: std::ops::Range<usize>| {
        header[range].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
    };
    let (id, shape, up, down) = (number(0..8), number(12..13), number(13..21), number(21..29));
    let pace = Duration::from_millis(number(29..31));
    oracle.accept_flow(id, number(8..12) as u32, own);
    let Some(shape) = SHAPES.get(shape as usize).copied() else {
        oracle.violate(format_args!("flow {id}: a header with another shape than was sent"));
        return Ok(());
    };
    let mut incoming = Incoming::new(oracle, id, UP, up);
    match shape {
        Shape::Answer => {
            hear(&mut reader, &mut incoming, Duration::ZERO).await?;
            say(&mut writer, id, DOWN, down, pace, oracle).await?;
        }
        Shape::ServiceFirst => {
            say(&mut writer, id, DOWN, down, pace, oracle).await?;
            hear(&mut reader, &mut incoming, Duration::ZERO).await?;
        }
        Shape::ServiceResets => {
            send(&mut writer, id, DOWN, down / 2, pace, oracle).await?;
            break_off(reader.unsplit(writer), id, oracle).await;
            return Ok(());
        }
        Shape::ClientResets => {
            let saying = say(&mut writer, id, DOWN, down, pace, oracle);
            let (said, heard) = tokio::join!(biased; saying, read_out(&mut reader, &mut incoming));
            return end_of_reset(said, heard, &incoming, || oracle.reset(id, UP, up / 2));
        }
        Shape::Both | Shape::ClientReadsLate => {
            let (saying, hearing) =
                if shape == Shape::ClientReadsLate { (Duration::ZERO, pace) } else { (pace, Duration::ZERO) };
            let hearing = hear(&mut reader, &mut incoming, hearing);
            let saying = say(&mut writer, id, DOWN, down, saying, oracle);
            tokio::try_join!(biased; saying, hearing)?;
        }
    }
    debug!(number = id, "a flow is complete at its service");
    Ok(())
}
