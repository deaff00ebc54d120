//! One TCP flow on one connection: what may be sent, what is due, and how it ends. Both sides run the same machine.
//!
//! The driver moves bytes; the machine counts them. Drive it so:
//! - [`Flow::may_send`] says how many bytes of the application the connection may take; what was taken goes to
//!   [`Flow::handle_local_bytes`], the application's end to [`Flow::handle_local_end`], its reset to
//!   [`Flow::handle_local_reset`].
//! - Each frame of the peer goes to [`Flow::handle_frame`], which says what to do with it; bytes that the application's
//!   socket took go to [`Flow::handle_delivered`].
//! - After [`Received::Reset`] the application has what came before it first, as far as it takes it, and then its reset,
//!   which [`Flow::handle_local_reset`] confirms. A reset of this side goes behind all that was taken of its application.
//! - [`Flow::poll_transmit`] gives the frames that are due beside Data.
//! - [`Flow::poll_end`] says when the flow is over.

use super::frame::{Header, Kind};

/// The most bytes that may be on their way unacknowledged, where the driver says no other: 4 MiB.
pub const WINDOW: u64 = 4 << 20;
/// Delivered bytes are acknowledged at the latest when there are so many: a sixteenth of the window.
pub const ACK_EVERY: u64 = WINDOW / 16;

/// What to do with a frame that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// Deliver the payload to the application.
    Deliver,
    /// The peer's application has ended its side: pass the end on when all before is delivered.
    End,
    /// The flow is broken off: reset the application behind all that came before, and confirm it by
    /// [`Flow::handle_local_reset`].
    Reset,
    /// Nothing.
    Nothing,
}

/// How a flow ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Both sides have ended, and all was delivered.
    Finished,
    /// It was broken off; both sides know.
    Reset,
}

/// What a peer may not send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Bytes that are not the next ones.
    #[error("data at offset {got}, expected {want}")]
    Gap {
        /// The offset that came.
        got: u64,
        /// The offset that was due.
        want: u64,
    },
    /// Bytes behind the end.
    #[error("data after the end")]
    AfterEnd,
    /// More bytes on their way than the window allows.
    #[error("more than {0} bytes unacknowledged")]
    Window(u64),
    /// An acknowledgement of bytes that were never sent, or of fewer than before.
    #[error("acknowledges {got} of {sent} bytes")]
    Ack {
        /// What it acknowledges.
        got: u64,
        /// What was sent.
        sent: u64,
    },
    /// A frame that has no place in a flow.
    #[error("a {0:?} frame within a flow")]
    Unexpected(Kind),
}

/// The machine.
#[derive(Debug)]
pub struct Flow {
    window: u64,
    ack_every: u64,
    sent: u64,
    acked: u64,
    received: u64,
    delivered: u64,
    ack_sent: u64,
    /// This side's application has ended; whether the Fin is sent.
    fin: Option<bool>,
    /// The peer's application has ended.
    peer_fin: bool,
    /// Our Reset is due or sent.
    reset: Option<bool>,
    peer_reset: bool,
}

impl Default for Flow {
    fn default() -> Self {
        Self::new(WINDOW)
    }
}

impl Flow {
    /// A flow that was just opened, with at most `window` bytes (at least 16) unacknowledged each way; both sides
    /// must have the same.
    pub fn new(window: u64) -> Self {
        Self {
            window,
            ack_every: (window / 16).max(1),
            sent: 0,
            acked: 0,
            received: 0,
            delivered: 0,
            ack_sent: 0,
            fin: None,
            peer_fin: false,
            reset: None,
            peer_reset: false,
        }
    }

    /// How many bytes of the application may be sent now.
    pub fn may_send(&self) -> u64 {
        if self.fin.is_some() || self.reset.is_some() || self.peer_reset {
            return 0;
        }
        self.window - (self.sent - self.acked)
    }

    /// How many bytes of the application are on their way unacknowledged.
    pub fn on_way(&self) -> u64 {
        self.sent - self.acked
    }

    /// `n` bytes of the application go out, at most [`Self::may_send`]: the offset of the first, for their frames.
    pub fn handle_local_bytes(&mut self, n: u64) -> u64 {
        debug_assert!(n <= self.may_send());
        let offset = self.sent;
        self.sent += n;
        offset
    }

    /// The application has ended its side.
    pub fn handle_local_end(&mut self) {
        if self.reset.is_none() {
            self.fin.get_or_insert(false);
        }
    }

    /// The application's socket is broken, and all that it had sent is taken; or it was reset since the peer broke off.
    pub fn handle_local_reset(&mut self) {
        self.reset.get_or_insert(false);
    }

    /// A frame of the peer.
    ///
    /// # Errors
    /// [`Violation`]: the connection is of no use any more.
    pub fn handle_frame(&mut self, header: Header) -> Result<Received, Violation> {
        match header.kind {
            Kind::Reset => {
                if std::mem::replace(&mut self.peer_reset, true) {
                    return Err(Violation::Unexpected(header.kind));
                }
                Ok(if self.reset.is_none() { Received::Reset } else { Received::Nothing })
            }
            // A peer that has reset sends nothing behind it.
            Kind::Data | Kind::Fin | Kind::Ack if self.peer_reset => Err(Violation::Unexpected(header.kind)),
            Kind::Data | Kind::Fin if self.peer_fin => Err(Violation::AfterEnd),
            Kind::Data => {
                self.expect(header.offset)?;
                self.received += u64::from(header.len);
                if self.reset.is_some() {
                    // On its way when we broke off: skipped, and counted as delivered, so that the window stays open
                    // until the peer's own Reset.
                    self.delivered += u64::from(header.len);
                    return Ok(Received::Nothing);
                }
                if self.received - self.ack_sent > self.window {
                    return Err(Violation::Window(self.window));
                }
                Ok(Received::Deliver)
            }
            Kind::Fin => {
                self.expect(header.offset)?;
                self.peer_fin = true;
                Ok(if self.reset.is_some() { Received::Nothing } else { Received::End })
            }
            Kind::Ack => {
                if header.offset > self.sent || header.offset < self.acked {
                    return Err(Violation::Ack { got: header.offset, sent: self.sent });
                }
                self.acked = header.offset;
                Ok(Received::Nothing)
            }
            kind => Err(Violation::Unexpected(kind)),
        }
    }

    fn expect(&self, offset: u64) -> Result<(), Violation> {
        if offset == self.received {
            Ok(())
        } else {
            Err(Violation::Gap { got: offset, want: self.received })
        }
    }

    /// The application's socket took `n` bytes.
    pub fn handle_delivered(&mut self, n: u64) {
        self.delivered += n;
    }

    /// Whether all that came was delivered.
    pub fn is_delivered(&self) -> bool {
        self.delivered == self.received
    }

    /// Whether the peer has broken off, and its reset is not passed on yet.
    pub fn peer_broke_off(&self) -> bool {
        self.peer_reset && self.reset.is_none()
    }

    /// Whether the peer's application has ended its side and all before is delivered: the end can be passed on.
    pub fn peer_ended(&self) -> bool {
        self.peer_fin && self.is_delivered()
    }

    /// A frame that is due. It has no payload. Frames of Data that were taken before must go out before it.
    pub fn poll_transmit(&mut self) -> Option<Header> {
        let frame = |kind, offset| Some(Header { kind, len: 0, offset });
        if self.reset == Some(false) {
            self.reset = Some(true);
            return frame(Kind::Reset, 0);
        }
        if self.reset.is_some() || self.peer_reset {
            return None;
        }
        let due = self.delivered - self.ack_sent;
        // The last one waits for our own end, which goes out with it: until then the peer needs it for nothing.
        if due >= self.ack_every || (due > 0 && self.peer_ended() && self.fin.is_some()) {
            self.ack_sent = self.delivered;
            return frame(Kind::Ack, self.delivered);
        }
        if self.fin == Some(false) {
            self.fin = Some(true);
            return frame(Kind::Fin, self.sent);
        }
        None
    }

    /// How the flow ended, once it has: the connection is free then.
    pub fn poll_end(&self) -> Option<End> {
        if self.reset == Some(true) && self.peer_reset {
            return Some(End::Reset);
        }
        let finished = self.reset.is_none()
            && self.fin == Some(true)
            && self.peer_ended()
            && self.acked == self.sent
            && self.ack_sent == self.delivered;
        finished.then_some(End::Finished)
    }

    /// Bytes of the application that went out, and that came in.
    pub fn counts(&self) -> (u64, u64) {
        (self.sent, self.delivered)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn data(len: u16, offset: u64) -> Header {
        Header { kind: Kind::Data, len, offset }
    }

    fn bare(kind: Kind, offset: u64) -> Header {
        Header { kind, len: 0, offset }
    }

    #[test]
    fn violations() {
        let mut flow = Flow::new(100);
        assert_eq!(flow.handle_frame(data(10, 5)), Err(Violation::Gap { got: 5, want: 0 }));
        assert_eq!(flow.handle_frame(bare(Kind::Ack, 1)), Err(Violation::Ack { got: 1, sent: 0 }));
        assert_eq!(flow.handle_frame(data(60, 0)), Ok(Received::Deliver));
        assert_eq!(flow.handle_frame(data(60, 60)), Err(Violation::Window(100)));
        let mut flow = Flow::new(100);
        assert_eq!(flow.handle_frame(bare(Kind::Fin, 0)), Ok(Received::End));
        assert_eq!(flow.handle_frame(data(1, 0)), Err(Violation::AfterEnd));
        assert_eq!(flow.handle_frame(bare(Kind::Open, 0)), Err(Violation::Unexpected(Kind::Open)));
    }

    /// What one side's application does with its socket.
    #[derive(Debug, Clone, Copy)]
    enum Step {
        /// Sends so many bytes, as far as the window lets it.
        Send(bool, u16),
        /// Takes so many bytes.
        Take(bool, u16),
        /// The wire carries one frame to this side.
        Carry(bool),
        End(bool),
        Reset(bool),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (any::<bool>(), 1..400_u16).prop_map(|(s, n)| Step::Send(s, n)),
            4 => (any::<bool>(), 1..400_u16).prop_map(|(s, n)| Step::Take(s, n)),
            8 => any::<bool>().prop_map(Step::Carry),
            1 => any::<bool>().prop_map(Step::End),
            1 => any::<bool>().prop_map(Step::Reset),
        ]
    }

    struct Side {
        flow: Flow,
        /// Frames on the wire to this side.
        wire: VecDeque<Header>,
        /// Bytes that came and wait for the application.
        waiting: u64,
        sent: u64,
        took: u64,
        ended: bool,
        saw_end: bool,
        saw_reset: bool,
        /// It broke off at any time.
        broke: bool,
    }

    impl Side {
        fn new() -> Self {
            let flow = Flow::new(1000);
            let wire = VecDeque::new();
            Self {
                flow,
                wire,
                waiting: 0,
                sent: 0,
                took: 0,
                ended: false,
                saw_end: false,
                saw_reset: false,
                broke: false,
            }
        }

        /// The reset of the peer goes behind the bytes.
        fn pass_reset_on(&mut self) {
            if self.flow.peer_broke_off() && self.flow.is_delivered() {
                self.flow.handle_local_reset();
            }
        }

        fn pump(&mut self, to: &mut VecDeque<Header>) {
            while let Some(header) = self.flow.poll_transmit() {
                to.push_back(header);
            }
        }
    }

    fn apply(sides: &mut [Side; 2], step: Step) {
        let [a, b] = sides;
        let pick = |right: bool| right;
        match step {
            Step::Send(right, n) => {
                let (me, other) = if pick(right) { (b, a) } else { (a, b) };
                let n = u64::from(n).min(me.flow.may_send());
                if n > 0 && !me.ended {
                    let offset = me.flow.handle_local_bytes(n);
                    assert_eq!(offset, me.sent);
                    me.sent += n;
                    other.wire.push_back(data(n as u16, offset));
                }
            }
            Step::Take(right, n) => {
                let (me, other) = if right { (b, a) } else { (a, b) };
                let n = u64::from(n).min(me.waiting);
                me.waiting -= n;
                me.took += n;
                me.flow.handle_delivered(n);
                me.pass_reset_on();
                me.pump(&mut other.wire);
            }
            Step::Carry(right) => {
                let (me, other) = if right { (b, a) } else { (a, b) };
                if let Some(header) = me.wire.pop_front() {
                    match me.flow.handle_frame(header).expect("a peer that keeps the rules") {
                        Received::Deliver => me.waiting += u64::from(header.len),
                        Received::End => me.saw_end = true,
                        Received::Reset => me.saw_reset = true,
                        Received::Nothing => {}
                    }
                    me.pass_reset_on();
                    me.pump(&mut other.wire);
                }
            }
            Step::End(right) => {
                let (me, other) = if right { (b, a) } else { (a, b) };
                me.ended = true;
                me.flow.handle_local_end();
                me.pump(&mut other.wire);
            }
            Step::Reset(right) => {
                let (me, other) = if right { (b, a) } else { (a, b) };
                // An application that breaks takes no more.
                me.flow.handle_local_reset();
                me.waiting = 0;
                me.saw_reset = true;
                me.broke = true;
                me.pump(&mut other.wire);
            }
        }
    }

    proptest! {
        /// Whatever the applications do in whatever order: bytes arrive once and in order, both sides come to the same
        /// end, an end without a reset means that all arrived, and a reset overtakes nothing.
        #[test]
        fn both_sides_come_to_the_same_end(steps in prop::collection::vec(step(), 0..200)) {
            let mut sides = [Side::new(), Side::new()];
            for step in steps {
                apply(&mut sides, step);
            }
            for right in [false, true] {
                apply(&mut sides, Step::End(right));
            }
            for _ in 0..10_000 {
                if sides.iter().all(|side| side.flow.poll_end().is_some()) {
                    break;
                }
                for right in [false, true] {
                    apply(&mut sides, Step::Carry(right));
                    apply(&mut sides, Step::Take(right, u16::MAX));
                }
            }
            let [a, b] = &sides;
            let end = a.flow.poll_end();
            prop_assert!(end.is_some(), "no end: {a:?} {b:?}", a = a.flow, b = b.flow);
            prop_assert_eq!(end, b.flow.poll_end());
            prop_assert!(a.wire.is_empty() && b.wire.is_empty());
            if end == Some(End::Finished) {
                prop_assert_eq!((a.sent, b.sent), (b.took, a.took));
                prop_assert!(a.saw_end && b.saw_end && !a.saw_reset && !b.saw_reset);
            } else {
                prop_assert!(a.saw_reset && b.saw_reset);
                // What was sent before a reset is delivered before it, but to one that broke off itself.
                prop_assert!(a.broke || a.took == b.sent, "{} of {} bytes", a.took, b.sent);
                prop_assert!(b.broke || b.took == a.sent, "{} of {} bytes", b.took, a.sent);
                prop_assert!(a.took <= b.sent && b.took <= a.sent);
            }
        }
    }
}
