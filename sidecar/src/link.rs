//! The connection to the router: dialled, then read and written at the same time.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use servicekeel_runtime::net::{Handoff, Net};
use tokio::time::timeout;

/// How long a dial may take: a router whose backlog is full is waited for.
const DIAL_TIMEOUT: Duration = Duration::from_secs(2);

type Task<T> = Pin<Box<dyn Future<Output = io::Result<T>> + Send>>;

/// The connection, or the lack of one.
pub(crate) enum Link<N: Net> {
    /// There is none.
    Closed,
    /// It is being dialled.
    Dialling(Task<N::Handoff>),
    /// It is there.
    Open {
        handoff: Arc<N::Handoff>,
        /// The message that is being sent. Reading goes on meanwhile: two sides that both only write stand still.
        sending: Option<Task<()>>,
        /// The router has closed, as sending found: what it said before, such as why, is read first.
        closed: Option<io::Error>,
    },
}

/// What happened at a [`Link`].
pub(crate) enum Event<N: Net> {
    /// The router accepted, or not.
    Dialled(io::Result<N::Handoff>),
    /// The message is sent, or not.
    Sent(io::Result<()>),
    /// A message came; `None` where the router closed. What came beside it is closed: no message has descriptors.
    Received(io::Result<Option<Vec<u8>>>),
}

impl<N: Net> Link<N> {
    /// Dials the router.
    pub(crate) fn dial(net: N, path: PathBuf) -> Self {
        Self::Dialling(Box::pin(async move {
            timeout(DIAL_TIMEOUT, net.handoff_connect(&path)).await.unwrap_or_else(|_| {
                let text = format!("{} did not answer within {} s", path.display(), DIAL_TIMEOUT.as_secs());
                Err(io::Error::new(io::ErrorKind::TimedOut, text))
            })
        }))
    }

    /// Whether a message can be sent now.
    pub(crate) fn is_idle(&self) -> bool {
        matches!(self, Self::Open { sending: None, closed: None, .. })
    }

    /// Begins to send a message. Only where [`Link::is_idle`].
    pub(crate) fn send(&mut self, message: Vec<u8>, descriptors: Vec<N::Descriptor>) {
        if let Self::Open { handoff, sending, .. } = self {
            let handoff = handoff.clone();
            *sending = Some(Box::pin(async move { handoff.send(&message, descriptors).await }));
        }
    }

    /// The next thing that happens; never, where there is no connection.
    ///
    /// Cancel safe.
    pub(crate) async fn event(&mut self) -> Event<N> {
        match self {
            Self::Closed => std::future::pending().await,
            Self::Dialling(dial) => Event::Dialled(dial.as_mut().await),
            Self::Open { handoff, sending, closed } => loop {
                let sent = async {
                    match sending {
                        Some(task) => task.as_mut().await,
                        None => std::future::pending().await,
                    }
                };
                let received = tokio::select! {
                    biased;
                    result = sent => {
                        *sending = None;
                        match result {
                            Err(error) if is_closed(&error) => {
                                *closed = Some(error);
                                continue;
                            }
                            result => return Event::Sent(result),
                        }
                    }
                    result = handoff.recv() => result,
                };
                return match (received, closed.take()) {
                    (Ok(Some((bytes, _))), error) => {
                        *closed = error;
                        Event::Received(Ok(Some(bytes)))
                    }
                    (_, Some(error)) => Event::Sent(Err(error)),
                    (result, None) => Event::Received(result.map(|_| None)),
                };
            },
        }
    }
}

/// Whether the other side has closed: what it said before can be read still.
fn is_closed(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}
