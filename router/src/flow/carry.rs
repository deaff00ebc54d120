//! Carries one flow: an application's socket on one side, a channel to another router on the other. One task, no locks;
//! while nothing moves it holds no buffer.

use std::future::poll_fn;
use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use servicekeel_core::flow::frame::{HEADER, Header, Kind, MAX_DATA};
use servicekeel_core::flow::machine::{End, Flow, Received};
use servicekeel_runtime::net::Stream;
use tokio::io::ReadBuf;
use tokio::task::yield_now;
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::room::{Held, Owner, Share};
use crate::tls::{BUFFER, BufferPool, Channel, ChannelError, Place};

/// How long the peer may take to confirm that a flow is broken off, before its connection is given up.
const RESET_TIMEOUT: Duration = Duration::from_secs(10);
/// How long what came before a reset may take to reach the application, or the peer, before the reset is passed on.
/// Less than [`RESET_TIMEOUT`].
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How often it is asked whether the application's system has all, first and at the most: it tells by no event. On one
/// machine an acknowledgement comes at once, or is delayed by 40 ms (RFC 9293 §3.8.6.3).
const ASK: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));
/// How often it is asked whether the path is dead, or the application broken that nothing is read from.
const WATCH: Duration = Duration::from_secs(15);
/// Payloads that go to the application with one system call.
const BATCH: usize = 16;
/// Bytes that are read from the application at once: four records.
pub(super) const READ: usize = 4 * MAX_DATA;
/// Bytes that a flow moves before it lets the others run, so that a new one, a link and the admin endpoint have their
/// turn soon however many move bytes. tokio's own bound counts operations, each of which may move [`READ`] or more.
pub(super) const SHARE: usize = 256 << 10;

/// Carries a flow to its end. A flow may stand still for as long as its ends want. When `lost` resolves, its path is
/// lost for good. What came before a reset, or before the loss, is offered to the application first. What is on its way or
/// held counts against the peer, the `owner`. `count` is told meanwhile how many more
/// bytes came from this side's application, and went to it.
///
/// Ok: the connection is free for the next flow.
///
/// # Errors
/// [`ChannelError`]: it is of no use any more, and the application was reset.
pub(crate) async fn carry<S: Stream, A: Stream>(
    channel: &mut Channel<S>,
    app: A,
    owner: &Owner,
    lost: impl Future<Output = ()>,
    count: impl Fn(u64, u64),
) -> Result<(), ChannelError> {
    let buffers = channel.buffers();
    let mut carry = Carry {
        room: Share::new(owner.on_way.clone()),
        channel,
        buffers,
        app: Some(app),
        flow: Flow::default(),
        places: Vec::new(),
        held: Held::new(owner),
        unsent: None,
        unsent_range: 0..0,
        read_ended: false,
        end_passed: false,
        resetting: None,
        deaf: false,
        last_words: None,
        asking: None,
        share: SHARE,
    };
    let mut lost = pin!(lost);
    let mut watch = pin!(sleep(WATCH));
    let mut counted = (0, 0);
    let end = poll_fn(|cx| {
        if lost.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(ChannelError::Lost));
        }
        while watch.as_mut().poll(cx).is_ready() {
            if carry.channel.is_dead() {
                return Poll::Ready(Err(ChannelError::Lost));
            }
            // While its window is full nothing is read that could tell.
            if carry.app.as_ref().is_some_and(Stream::is_broken) && carry.window_is_full() {
                carry.deafen();
            }
            watch.as_mut().reset(Instant::now() + WATCH);
        }
        let polled = carry.poll(cx);
        let (sent, received) = carry.flow.counts();
        if counted != (sent, received) {
            count(sent - counted.0, received - counted.1);
            counted = (sent, received);
        }
        polled
    })
    .await;
    match &end {
        Ok(()) => carry.app.take().into_iter().for_each(Stream::close),
        Err(error) => {
            // Where it is the path that is gone, what came by it is as good as before.
            let mut reads = matches!(error, ChannelError::Io(_) | ChannelError::Lost);
            let _ = timeout(LAST_WORDS, poll_fn(|cx| carry.poll_rest(&mut reads, cx))).await;
        }
    }
    end
}

/// Dropped before its end, it resets the application, which would else take what it has for all.
struct Carry<'a, S: Stream, A: Stream> {
    channel: &'a mut Channel<S>,
    buffers: Arc<BufferPool>,
    /// Gone once it is broken or was reset.
    app: Option<A>,
    flow: Flow,
    /// Of what the flows with this peer may have on their way.
    room: Share,
    /// Payloads in the channel's buffer that the application has not taken yet.
    places: Vec<Range<usize>>,
    /// Bytes before those that have left the channel's buffer: of frames that span records, or to read on behind them.
    held: Held,
    /// Bytes of the application that are not sealed yet.
    unsent: Option<Box<[u8]>>,
    unsent_range: Range<usize>,
    read_ended: bool,
    end_passed: bool,
    resetting: Option<Pin<Box<Sleep>>>,
    /// The application takes nothing more; what it had sent before is still read.
    deaf: bool,
    /// Until when what came before a reset is offered.
    last_words: Option<Pin<Box<Sleep>>>,
    /// When it is asked again whether the application's system has all, and how long after this time.
    asking: Option<(Pin<Box<Sleep>>, Duration)>,
    /// What is left of [`SHARE`].
    share: usize,
}

impl<S: Stream, A: Stream> Carry<'_, S, A> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ChannelError>> {
        self.share = SHARE;
        loop {
            let mut moved = self.deliver(cx);
            moved |= self.take_frames(cx)?;
            moved |= self.pass_reset_on(cx);
            moved |= self.read_app(cx);
            moved |= self.seal_unsent()?;
            moved |= self.transmit()?;
            moved |= self.flush(cx)?;
            if let Some(end) = self.flow.poll_end() {
                let passed = end == End::Reset || self.end_passed;
                if passed && self.channel.is_flushed() {
                    return Poll::Ready(Ok(()));
                }
            }
            if !moved {
                break;
            }
            if self.share == 0 {
                // Wakes this task behind those that can run, and behind a look at what the sockets have.
                let _ = pin!(yield_now()).poll(cx);
                break;
            }
        }
        self.room.settle(self.flow.on_way());
        if self.unsent_range.is_empty()
            && let Some(buffer) = self.unsent.take()
        {
            self.buffers.give(buffer);
        }
        if self.app.is_none() {
            let resetting = self.resetting.get_or_insert_with(|| Box::pin(sleep(RESET_TIMEOUT)));
            if resetting.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(ChannelError::Protocol("the peer did not confirm a reset".into())));
            }
        }
        Poll::Pending
    }

    /// The application takes nothing more. A service that answers early and closes with the request unread has said its
    /// answer before: it is read, and then the flow is broken off.
    fn deafen(&mut self) {
        self.deaf = true;
        self.places = Vec::new();
        self.held.clear();
        if self.read_ended {
            self.broken();
        }
    }

    /// The application's socket is broken, or to be broken off: the peer is told behind what was read before.
    fn broken(&mut self) {
        self.flow.handle_local_reset();
        if let Some(app) = self.app.take() {
            app.reset();
        }
        self.places = Vec::new();
        self.held.clear();
    }

    /// Passes a reset on behind what came before it, whichever side it is of.
    fn pass_reset_on(&mut self, cx: &mut Context<'_>) -> bool {
        let from_peer = self.flow.peer_broke_off();
        if self.app.is_none() || !(self.deaf || from_peer) {
            return false;
        }
        let last_words = self.last_words.get_or_insert_with(|| Box::pin(sleep(LAST_WORDS)));
        let late = last_words.as_mut().poll(cx).is_ready();
        let done = late || from_peer && (self.deaf || self.poll_has_all(cx).is_ready());
        if done {
            self.broken();
        }
        done
    }

    /// Whether the application's system has all that came for it.
    fn poll_has_all(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(app) = self.app.as_ref().filter(|_| !self.deaf) else { return Poll::Ready(()) };
        if !self.places.is_empty() || !self.held.is_empty() {
            return Poll::Pending;
        }
        while !app.is_taken() {
            let (asking, pause) = self.asking.get_or_insert_with(|| (Box::pin(sleep(ASK.0)), ASK.0));
            ready!(asking.as_mut().poll(cx));
            *pause = (*pause * 2).min(ASK.1);
            asking.as_mut().reset(Instant::now() + *pause);
        }
        Poll::Ready(())
    }

    /// The path is gone: gives the application what came by it. `reads`: while that has not failed.
    fn poll_rest(&mut self, reads: &mut bool, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            self.share = SHARE;
            let mut moved = self.deliver(cx);
            if *reads && !self.flow.peer_broke_off() {
                let taken = self.take_frames(cx);
                *reads = taken.is_ok();
                moved |= taken.unwrap_or(false);
            }
            if !moved {
                return self.poll_has_all(cx);
            }
        }
    }

    /// Gives the application what came for it.
    fn deliver(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        while self.share > 0
            && let Some(app) = &mut self.app
        {
            let taken = if !self.held.is_empty() {
                let held = self.held.first();
                Pin::new(app).poll_write(cx, &held[..held.len().min(self.share)])
            } else if !self.places.is_empty() {
                self.channel.poll_deliver(cx, app, &self.places)
            } else {
                break;
            };
            match taken {
                Poll::Ready(Ok(n)) if n > 0 => {
                    moved = true;
                    self.share = self.share.saturating_sub(n);
                    self.flow.handle_delivered(n as u64);
                    if self.held.is_empty() {
                        consume(&mut self.places, n);
                    } else {
                        self.held.consume(n);
                    }
                }
                Poll::Ready(_) => {
                    self.deafen();
                    return true;
                }
                Poll::Pending => break,
            }
        }
        // The end is passed on behind all bytes, and the other direction goes on.
        if self.flow.peer_ended()
            && !self.end_passed
            && let Some(app) = &mut self.app
        {
            match Pin::new(app).poll_shutdown(cx) {
                Poll::Ready(ended) => {
                    moved = true;
                    self.end_passed = true;
                    // ENOTCONN: the application has closed both sides already, or was reset; reading tells which.
                    if ended.is_err_and(|error| error.kind() != std::io::ErrorKind::NotConnected) {
                        self.deafen();
                    }
                }
                Poll::Pending => {}
            }
        }
        moved
    }

    /// How many bytes of the application may be read now.
    fn may_send(&mut self) -> u64 {
        self.flow.may_send().min(self.room.allows(self.flow.on_way()))
    }

    /// Whether this side's application is stopped until the peer acknowledges.
    fn window_is_full(&mut self) -> bool {
        self.app.is_some() && !self.read_ended && self.may_send() == 0
    }

    /// Takes what waits for the application out of the channel's buffer; false where the peer's part has no room for it.
    fn hold(&mut self) -> bool {
        let n: usize = self.places.iter().map(Range::len).sum();
        if !self.held.has_room(n) {
            return false;
        }
        while let Some(range) = self.places.first().cloned() {
            if !self.held.put(self.channel.payload(&Place::Received(range.clone()))) {
                return false;
            }
            self.share = self.share.saturating_sub(range.len());
            self.places.remove(0);
        }
        true
    }

    /// Takes what the peer sent, once the application took all of before: a slow reader stops its writer.
    fn take_frames(&mut self, cx: &mut Context<'_>) -> Result<bool, ChannelError> {
        if self.flow.peer_broke_off() {
            return Ok(false);
        }
        if !self.places.is_empty() || !self.held.is_empty() {
            if !self.window_is_full() {
                return Ok(false);
            }
            // An application that writes and does not read yet waits for an acknowledgement which stands behind what it
            // does not read. What is held so is at most the peer's window, and the peer's part of what is held for all.
            if !self.hold() {
                return Ok(false);
            }
        }
        let mut moved = false;
        while self.flow.poll_end().is_none() && self.places.len() < BATCH {
            if !(self.held.is_empty() || self.window_is_full() && self.held.has_room(2 * MAX_DATA)) {
                break;
            }
            let Some(frame) = self.channel.next_frame()? else {
                if moved {
                    break;
                }
                // Nothing is held of what was read: the buffer can be filled anew.
                match self.channel.poll_fill(cx)? {
                    Poll::Ready(true) => continue,
                    Poll::Ready(false) => return Err(ChannelError::Cut),
                    Poll::Pending => break,
                }
            };
            moved = true;
            match self.flow.handle_frame(frame.header)? {
                Received::Deliver if self.deaf => {}
                Received::Deliver => match frame.place {
                    Place::Received(range) if self.held.is_empty() => self.places.push(range),
                    place => {
                        self.share = self.share.saturating_sub(usize::from(frame.header.len));
                        if !self.hold() || !self.held.put(self.channel.payload(&place)) {
                            return Err(ChannelError::Crowded);
                        }
                    }
                },
                Received::Reset => {
                    // The peer takes nothing more.
                    self.unsent_range = 0..0;
                    break;
                }
                Received::End | Received::Nothing => {}
            }
        }
        Ok(moved)
    }

    /// Reads from the application, as much as the window allows.
    fn read_app(&mut self, cx: &mut Context<'_>) -> bool {
        if self.read_ended || !self.unsent_range.is_empty() {
            return false;
        }
        let may = usize::try_from(self.may_send()).unwrap_or(usize::MAX).min(READ);
        let Some(app) = &mut self.app else { return false };
        if may == 0 {
            return false;
        }
        let unsent = self.unsent.get_or_insert_with(|| self.buffers.take());
        let mut buf = ReadBuf::new(&mut unsent[..may]);
        match Pin::new(app).poll_read(cx, &mut buf) {
            Poll::Ready(Ok(())) => {
                let n = buf.filled().len();
                self.share = self.share.saturating_sub(n);
                self.unsent_range = 0..n;
                if n == 0 && self.deaf {
                    // It was reset, which another call was told.
                    self.broken();
                } else if n == 0 {
                    self.read_ended = true;
                    self.flow.handle_local_end();
                }
                true
            }
            Poll::Ready(Err(_)) => {
                self.broken();
                true
            }
            Poll::Pending => false,
        }
    }

    /// Seals what was read, a frame a record, as far as there is room.
    fn seal_unsent(&mut self) -> Result<bool, ChannelError> {
        let mut moved = false;
        while !self.unsent_range.is_empty() {
            let n = self.unsent_range.len().min(MAX_DATA);
            let Some(room) = self.channel.room(HEADER + n) else { break };
            let (header, payload) = room.split_at_mut(HEADER);
            let Some(unsent) = &self.unsent else { break };
            payload.copy_from_slice(&unsent[self.unsent_range.start..self.unsent_range.start + n]);
            let offset = self.flow.handle_local_bytes(n as u64);
            header.copy_from_slice(&Header { kind: Kind::Data, len: n as u16, offset }.encode());
            self.channel.seal_record(HEADER + n)?;
            self.unsent_range.start += n;
            moved = true;
        }
        Ok(moved)
    }

    /// Puts the other frames that are due.
    fn transmit(&mut self) -> Result<bool, ChannelError> {
        let mut moved = false;
        // What was read goes before an end.
        while self.unsent_range.is_empty() && self.channel.has_room(HEADER) {
            let Some(header) = self.flow.poll_transmit() else { break };
            if let Some(room) = self.channel.room(HEADER) {
                room.copy_from_slice(&header.encode());
            }
            self.channel.seal_record(HEADER)?;
            moved = true;
        }
        Ok(moved)
    }

    fn flush(&mut self, cx: &mut Context<'_>) -> Result<bool, ChannelError> {
        if self.channel.is_flushed() {
            return Ok(false);
        }
        match self.channel.poll_flush(cx) {
            Poll::Ready(flushed) => flushed.map(|()| true),
            Poll::Pending => Ok(false),
        }
    }
}

impl<S: Stream, A: Stream> Drop for Carry<'_, S, A> {
    fn drop(&mut self) {
        if let Some(app) = self.app.take() {
            app.reset();
        }
        if let Some(buffer) = self.unsent.take() {
            self.buffers.give(buffer);
        }
    }
}

/// Takes the first `n` bytes away.
fn consume(places: &mut Vec<Range<usize>>, mut n: usize) {
    let mut whole = 0;
    for place in places.iter_mut() {
        if n < place.len() {
            place.start += n;
            break;
        }
        n -= place.len();
        whole += 1;
    }
    places.drain(..whole);
}

const _: () = assert!(READ <= BUFFER, "what is read at once fits a buffer");
