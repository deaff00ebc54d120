//! TCP flows between two routers, one after the other on a channel.

mod carry;
mod room;

pub(crate) use carry::carry;
pub(crate) use room::{Owner, Waiting};
use servicekeel_core::flow::frame::{self, Kind, Open, Refused};
use servicekeel_runtime::net::Stream;

use crate::tls::{Channel, ChannelError};

/// What the other router says to an [`Open`].
#[derive(Debug)]
pub enum Answer {
    /// The flow is connected: [`carry`] it.
    Opened,
    /// It is not; the connection is free for the next.
    Refused(Refused),
}

fn unexpected(kind: Kind, instead: &str) -> ChannelError {
    ChannelError::Protocol(format!("unexpected {kind:?} frame, expected {instead}"))
}

fn malformed(error: frame::PayloadError) -> ChannelError {
    ChannelError::Protocol(error.to_string())
}

/// Asks the other router for a flow and waits for its answer.
///
/// # Errors
/// [`ChannelError`]: the connection is of no use any more.
pub async fn open<S: Stream>(channel: &mut Channel<S>, request: &Open) -> Result<Answer, ChannelError> {
    channel.send_message(Kind::Open, 0, request)?;
    channel.flush().await?;
    answer(channel).await
}

/// Waits for the answer to what [`open`] has asked, where that was given up in the middle.
///
/// Cancel safe.
///
/// # Errors
/// [`ChannelError`]: the connection is of no use any more.
pub async fn answer<S: Stream>(channel: &mut Channel<S>) -> Result<Answer, ChannelError> {
    let (header, payload) = channel.recv().await?.ok_or(ChannelError::Cut)?;
    match header.kind {
        Kind::Opened => {
            channel.mark_used();
            Ok(Answer::Opened)
        }
        Kind::Refused => {
            let refused = frame::decode_payload(payload).map_err(malformed)?;
            channel.mark_used();
            Ok(Answer::Refused(refused))
        }
        kind => Err(unexpected(kind, "Opened or Refused")),
    }
}

/// Waits for the next flow that the other router asks for; `None` when it has closed the connection. What comes of it before
/// it is whole counts against `owner`.
///
/// # Errors
/// [`ChannelError`]: the connection is of no use any more.
pub(crate) async fn next_open<S: Stream>(
    channel: &mut Channel<S>,
    owner: &Owner,
) -> Result<Option<Open>, ChannelError> {
    channel.count_begun(owner.waiting());
    let next = match channel.recv().await? {
        None => Ok(None),
        Some((header, payload)) if header.kind == Kind::Open => {
            frame::decode_payload(payload).map(Some).map_err(malformed)
        }
        Some((header, _)) => Err(unexpected(header.kind, "Open")),
    };
    // What comes of a flow counts by its application.
    channel.count_nothing();
    next
}

/// Says that the flow is connected; [`carry`] it then.
///
/// # Errors
/// [`ChannelError`]: the connection is of no use any more.
pub async fn accept<S: Stream>(channel: &mut Channel<S>) -> Result<(), ChannelError> {
    channel.send_payload(Kind::Opened, 0, &[])?;
    channel.flush().await
}

/// Says that the flow is not connected.
///
/// # Errors
/// [`ChannelError`]: the connection is of no use any more.
pub async fn refuse<S: Stream>(channel: &mut Channel<S>, refused: &Refused) -> Result<(), ChannelError> {
    channel.send_message(Kind::Refused, 0, refused)?;
    channel.flush().await
}

#[cfg(test)]
mod tests;
