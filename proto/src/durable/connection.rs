//! Both directions of one forwarded connection: frames in, frames out, and what the local socket is
//! to be given. The same at both ends; only who opens and who answers differs, and that is theirs.

use std::collections::VecDeque;

use bytes::{Buf as _, Bytes};

use super::{DurableError, Inbound, Outbound};
use crate::frame::{Frame, FrameKind};
use crate::limits::{DATA_CHUNK_MAX, TCP_FIRST_WINDOW, TCP_PRESSED_WINDOW, TCP_WINDOW};

/// What is to be sent next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outgoing {
    /// TCP_DATA; not copied.
    Data(u64, Bytes),
    /// TCP_EOF.
    End(u64),
    /// TCP_ACK: all before `offset` was passed on; bytes before `limit` may be sent.
    Ack {
        /// The place after what was passed on; one more when the end was.
        offset: u64,
        /// Where the sender must stop.
        limit: u64,
    },
    /// TCP_RESET.
    Reset,
}

impl Outgoing {
    /// As a frame. `Data` is better sent without a copy.
    pub fn to_frame(&self) -> Frame {
        match self {
            Self::Data(offset, bytes) => Frame::data(FrameKind::TcpData, *offset, bytes),
            Self::End(offset) => Frame::data(FrameKind::TcpEof, *offset, &[]),
            Self::Ack { offset, limit } => {
                Frame::data(FrameKind::TcpAck, *offset, &limit.to_le_bytes())
            }
            Self::Reset => Frame::raw(FrameKind::TcpReset, Bytes::new()),
        }
    }
}

/// What the local socket is to be given next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// These bytes; they stay until [`Durable::written`].
    Bytes(Bytes),
    /// Its end; then [`Durable::end_written`].
    End,
    /// The connection was reset by its other end: so is ours.
    Reset,
}

/// One end of a durable connection.
#[derive(Debug)]
pub struct Durable {
    live: bool,
    pressed: bool,
    out: Outbound,
    /// What the peer granted.
    limit: u64,
    out_end_acked: bool,
    inbound: Inbound,
    queue: VecDeque<Bytes>,
    in_end: Option<u64>,
    in_end_written: bool,
    /// What we granted.
    granted: u64,
    /// The place that was acknowledged last, the end's own included; and an ACK that must go out
    /// because the one before may have been lost with its link.
    told: u64,
    ack_now: bool,
    local_reset: bool,
    reset_sent: bool,
    peer_reset: bool,
}

impl Default for Durable {
    fn default() -> Self {
        Self {
            live: false,
            pressed: false,
            out: Outbound::default(),
            limit: TCP_FIRST_WINDOW as u64,
            out_end_acked: false,
            inbound: Inbound::default(),
            queue: VecDeque::new(),
            in_end: None,
            in_end_written: false,
            granted: TCP_FIRST_WINDOW as u64,
            told: 0,
            ack_now: false,
            local_reset: false,
            reset_sent: false,
            peer_reset: false,
        }
    }
}

impl Durable {
    /// A link is there, and its other end has received this much.
    pub fn attach(&mut self, peer_received: u64) -> Result<(), DurableError> {
        if self.out.is_finished() && peer_received == self.out.end() + 1 {
            self.out.resume_at(self.out.end())?;
            self.out.next_end();
            self.out_end_acked = true;
        } else {
            self.out.resume_at(peer_received)?;
        }
        self.live = true;
        self.ack_now = self.place() > 0 || self.granted > TCP_FIRST_WINDOW as u64;
        Ok(())
    }

    /// The link is gone: nothing is sent until the next one.
    pub fn detach(&mut self) {
        self.live = false;
    }

    /// What we have received: said when a link is taken up.
    pub fn received_offset(&self) -> u64 {
        self.inbound.received() + u64::from(self.in_end.is_some())
    }

    /// Memory is short: less is read and granted from here on.
    pub fn set_pressed(&mut self, pressed: bool) {
        self.pressed = pressed;
    }

    /// Bytes in memory.
    pub fn held(&self) -> usize {
        self.out.held() + self.queued()
    }

    /// Takes a frame of the peer. Kinds that a later peer may know are ignored.
    pub fn on_frame(&mut self, frame: &Frame) -> Result<(), DurableError> {
        let malformed = || DurableError::Malformed(frame.kind);
        if frame.is(FrameKind::TcpReset) {
            self.peer_reset = true;
            return Ok(());
        }
        let kinds = [FrameKind::TcpData, FrameKind::TcpEof, FrameKind::TcpAck];
        if !kinds.into_iter().any(|kind| frame.is(kind)) {
            return Ok(());
        }
        let (offset, mut rest) = frame.split_data().map_err(|_| malformed())?;
        if frame.is(FrameKind::TcpData) {
            self.on_data(offset, rest)
        } else if frame.is(FrameKind::TcpEof) {
            self.on_end(offset)
        } else {
            let limit = if rest.len() >= 8 { rest.get_u64_le() } else { return Err(malformed()) };
            self.on_ack(offset, limit);
            Ok(())
        }
    }

    /// Takes the first bytes that came with the open.
    pub fn on_data(&mut self, offset: u64, bytes: Bytes) -> Result<(), DurableError> {
        let end = offset.saturating_add(bytes.len() as u64);
        if self.in_end.is_some_and(|in_end| end > in_end) {
            return Err(DurableError::AfterEnd);
        }
        let window = self.granted - self.inbound.consumed();
        if let Some(fresh) = self.inbound.take(offset, bytes, window)? {
            if self.local_reset || self.peer_reset {
                self.inbound.consume(fresh.len());
            } else {
                self.queue.push_back(fresh);
            }
        }
        Ok(())
    }

    fn on_end(&mut self, offset: u64) -> Result<(), DurableError> {
        let received = self.inbound.received();
        if offset > received {
            return Err(DurableError::Gap { expected: received, got: offset });
        }
        if offset < received || self.in_end.is_some_and(|end| end != offset) {
            return Err(DurableError::AfterEnd);
        }
        self.in_end = Some(offset);
        Ok(())
    }

    fn on_ack(&mut self, offset: u64, limit: u64) {
        self.out.acknowledge(offset);
        // Only what we have sent can be acknowledged, the end too.
        if self.out.is_finished() && offset > self.out.end() && self.out.held() == 0 {
            self.out_end_acked = true;
        }
        self.limit = self.limit.max(limit);
    }

    /// How many bytes may be read from the local socket now.
    pub fn room(&self) -> usize {
        let bound = if self.pressed { TCP_PRESSED_WINDOW } else { TCP_WINDOW };
        match self.out.is_finished() || self.local_reset || self.peer_reset {
            true => 0,
            false => bound.saturating_sub(self.out.held()),
        }
    }

    /// Bytes were read from the local socket.
    pub fn on_read(&mut self, bytes: Bytes) {
        self.out.push(bytes);
    }

    /// The local socket said its end.
    pub fn on_read_end(&mut self) {
        self.out.finish();
    }

    /// The local socket broke: the peer's will be reset after what was read before.
    pub fn on_local_reset(&mut self) {
        self.local_reset = true;
        self.drop_queue();
    }

    /// What the local socket is to be given now.
    pub fn next_write(&self) -> Option<Write> {
        match self.queue.front() {
            _ if self.local_reset => None,
            Some(bytes) => Some(Write::Bytes(bytes.clone())),
            None if self.peer_reset => Some(Write::Reset),
            None if self.in_end.is_some() && !self.in_end_written => Some(Write::End),
            None => None,
        }
    }

    /// The local socket took this many of the bytes.
    pub fn written(&mut self, bytes: usize) {
        let mut left = bytes;
        while left > 0
            && let Some(front) = self.queue.front_mut()
        {
            let taken = left.min(front.len());
            front.advance(taken);
            left -= taken;
            if front.is_empty() {
                self.queue.pop_front();
            }
        }
        self.inbound.consume(bytes - left);
    }

    /// The local socket was told its end.
    pub fn end_written(&mut self) {
        self.in_end_written = true;
    }

    /// The first bytes, to travel with the open; they are sent again if nobody acknowledges them.
    pub fn first(&mut self, max: usize) -> Bytes {
        // Each attempt to open begins anew: nothing was acknowledged before a TCP_CONNECTED.
        if self.out.resume_at(0).is_err() {
            return Bytes::new();
        }
        self.out.next(self.limit, max).map_or_else(Bytes::new, |(_, bytes)| bytes)
    }

    /// Bytes that wait to be sent or acknowledged.
    pub fn out_held(&self) -> usize {
        self.out.held()
    }

    /// Whether [`Self::next_outgoing`] has something.
    pub fn wants_to_send(&self) -> bool {
        self.live
            && !self.reset_sent
            && (self.ack_due() || self.local_reset || self.out.wants_to_send(self.limit))
    }

    /// What to send next: acknowledgements first, a reset after what may still be sent.
    pub fn next_outgoing(&mut self) -> Option<Outgoing> {
        if !self.live || self.reset_sent {
            return None;
        }
        if self.ack_due() {
            return Some(self.ack());
        }
        if let Some((offset, bytes)) = self.out.next(self.limit, DATA_CHUNK_MAX) {
            return Some(Outgoing::Data(offset, bytes));
        }
        if self.local_reset {
            self.reset_sent = true;
            return Some(Outgoing::Reset);
        }
        self.out.next_end().map(Outgoing::End)
    }

    /// Whether both directions ended and each end has been told so.
    pub fn is_complete(&self) -> bool {
        self.out_end_acked && self.in_end_written && self.told == self.place()
    }

    /// Whether all that the peer had to say was passed on, its end too.
    pub fn is_in_ended(&self) -> bool {
        self.in_end_written
    }

    /// Whether it was reset by either end and nothing is left to tell.
    pub fn is_reset(&self) -> bool {
        self.peer_reset || self.reset_sent
    }

    /// Whether the local socket broke.
    pub fn is_locally_reset(&self) -> bool {
        self.local_reset
    }

    /// Gives up: the local socket is to be reset.
    pub fn abandon(&mut self) {
        self.peer_reset = true;
        self.drop_queue();
    }

    fn drop_queue(&mut self) {
        self.inbound.consume(self.queued());
        self.queue.clear();
    }

    fn queued(&self) -> usize {
        usize::try_from(self.inbound.received() - self.inbound.consumed()).unwrap_or(usize::MAX)
    }

    /// The place after what was passed on.
    fn place(&self) -> u64 {
        self.inbound.consumed() + u64::from(self.in_end_written)
    }

    fn window(&self) -> u64 {
        let window = if self.pressed { TCP_PRESSED_WINDOW } else { TCP_WINDOW };
        window as u64
    }

    fn ack_due(&self) -> bool {
        let step = self.window() / 4;
        // A sender whose memory is short keeps little and waits for this.
        let small = TCP_PRESSED_WINDOW as u64 / 4;
        let more = (self.inbound.consumed() + self.window()).saturating_sub(self.granted);
        self.ack_now
            || (self.in_end_written && self.told != self.place())
            || self.inbound.unacknowledged() >= step
            || (self.inbound.is_drained() && self.inbound.unacknowledged() >= small)
            // A first window is not what a long stream should go on with.
            || (more >= step && self.inbound.unacknowledged() > 0)
    }

    fn ack(&mut self) -> Outgoing {
        self.ack_now = false;
        self.inbound.acknowledge();
        self.granted = self.granted.max(self.inbound.consumed() + self.window());
        self.told = self.place();
        Outgoing::Ack { offset: self.told, limit: self.granted }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
