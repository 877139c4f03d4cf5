//! What both ends of a durable stream keep, without IO: bytes that the other end has not
//! acknowledged, how far each direction came, and what may be sent next.
//!
//! [`Outbound`] and [`Inbound`] are one direction each. [`Durable`] is both directions of a forwarded connection, the same at the laptop and in the guest:
//!
//! ```text
//! attach --> live --TCP_DATA, TCP_EOF, TCP_ACK--> complete     (both ends are acknowledged)
//!   ^          |---- TCP_RESET ------------------> reset
//!   +- detach -+                                               (the link broke; offsets say where to go on)
//! ```
//! Invariant: `acked <= sent <= end` of what is sent, and offsets only grow. The end of a direction
//! has a place of its own after its last byte, so that it is acknowledged like one. A sender never
//! goes beyond what its receiver granted: that bounds what a hostile peer can make us hold.

mod connection;

use std::collections::VecDeque;

use bytes::Bytes;

pub use connection::{Durable, Outgoing, Write};

/// Says how the other end broke the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DurableError {
    /// Bytes that begin after what came before them.
    #[error("the stream went from byte {expected} to byte {got}: {} bytes are missing", got - expected)]
    Gap {
        /// Where it should have gone on.
        expected: u64,
        /// Where it went on.
        got: u64,
    },
    /// More than was granted.
    #[error("more was sent than was granted")]
    Window,
    /// An offset that was never reached, or was forgotten.
    #[error("byte {wanted} is asked for, but {from} to {to} is what there is")]
    Gone {
        /// What was asked for.
        wanted: u64,
        /// The first byte still held.
        from: u64,
        /// The end of what there is.
        to: u64,
    },
    /// Bytes after the end, or another end than before.
    #[error("the stream goes on after its end")]
    AfterEnd,
    /// A frame that is not what its kind says.
    #[error("a frame of kind {0} is malformed")]
    Malformed(u8),
}

/// What is sent, from the first byte not yet acknowledged.
#[derive(Debug, Default)]
pub struct Outbound {
    chunks: VecDeque<Bytes>,
    /// Offset of the first held byte.
    acked: u64,
    sent: u64,
    end: u64,
    finished: bool,
    end_sent: bool,
}

impl Outbound {
    /// Nothing before `offset` is ours: somebody else has sent it.
    pub fn begin_at(&mut self, offset: u64) {
        self.acked = offset;
        self.sent = offset;
        self.end += offset;
    }

    /// Adds bytes at the end.
    pub fn push(&mut self, bytes: Bytes) {
        self.end += bytes.len() as u64;
        if !bytes.is_empty() {
            self.chunks.push_back(bytes);
        }
    }

    /// Nothing comes from here on.
    pub fn finish(&mut self) {
        self.finished = true;
    }

    /// Whether nothing comes from here on.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Offset after the last byte there is.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Bytes in memory.
    pub fn held(&self) -> usize {
        usize::try_from(self.end - self.acked).unwrap_or(usize::MAX)
    }

    /// Forgets what the other end has; an offset beyond what was sent means all that was.
    pub fn acknowledge(&mut self, offset: u64) {
        self.forget_until(offset.clamp(self.acked, self.sent));
    }

    /// Goes on sending from `offset`, on a new link.
    pub fn resume_at(&mut self, offset: u64) -> Result<(), DurableError> {
        if !(self.acked..=self.end).contains(&offset) {
            return Err(DurableError::Gone { wanted: offset, from: self.acked, to: self.end });
        }
        self.forget_until(offset);
        self.sent = offset;
        self.end_sent = false;
        Ok(())
    }

    /// Whether there are bytes to send below `limit`, or the end is to be told.
    pub fn wants_to_send(&self, limit: u64) -> bool {
        self.sent < self.end.min(limit)
            || (self.finished && !self.end_sent && self.sent == self.end)
    }

    /// The next bytes to send, at most `max` and none at or beyond `limit`, with their offset.
    pub fn next(&mut self, limit: u64, max: usize) -> Option<(u64, Bytes)> {
        let allowed = usize::try_from(limit.saturating_sub(self.sent)).unwrap_or(usize::MAX);
        let max = max.min(allowed);
        if max == 0 {
            return None;
        }
        let mut skip = self.sent - self.acked;
        for chunk in &self.chunks {
            let len = chunk.len() as u64;
            if skip < len {
                let rest = chunk.slice(usize::try_from(skip).ok()?..);
                let piece = rest.slice(..rest.len().min(max));
                let offset = self.sent;
                self.sent += piece.len() as u64;
                return Some((offset, piece));
            }
            skip -= len;
        }
        None
    }

    /// The offset of the end, once all is sent and this is not.
    pub fn next_end(&mut self) -> Option<u64> {
        let due = self.finished && !self.end_sent && self.sent == self.end;
        if due {
            self.end_sent = true;
        }
        due.then_some(self.end)
    }

    fn forget_until(&mut self, offset: u64) {
        let mut drop = offset.saturating_sub(self.acked);
        while let Some(front) = self.chunks.front_mut() {
            let len = front.len() as u64;
            if drop < len {
                *front = front.slice(usize::try_from(drop).unwrap_or(0)..);
                break;
            }
            drop -= len;
            self.chunks.pop_front();
        }
        self.acked = self.acked.max(offset);
    }
}

/// How far a direction came that we receive.
#[derive(Debug, Clone, Copy, Default)]
pub struct Inbound {
    received: u64,
    consumed: u64,
    acked: u64,
}

impl Inbound {
    /// Bytes received, each once.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Bytes passed on.
    pub fn consumed(&self) -> u64 {
        self.consumed
    }

    /// Bytes that were passed on and not yet acknowledged.
    pub fn unacknowledged(&self) -> u64 {
        self.consumed - self.acked
    }

    /// Whether all that was received is passed on.
    pub fn is_drained(&self) -> bool {
        self.consumed == self.received
    }

    /// Takes bytes at `offset`, cutting off what was received before. What is received and not yet
    /// passed on must stay within `window`.
    pub fn take(
        &mut self,
        offset: u64,
        bytes: Bytes,
        window: u64,
    ) -> Result<Option<Bytes>, DurableError> {
        if offset > self.received {
            return Err(DurableError::Gap { expected: self.received, got: offset });
        }
        let known = usize::try_from(self.received - offset).unwrap_or(usize::MAX);
        if known >= bytes.len() {
            return Ok(None);
        }
        let fresh = bytes.slice(known..);
        let received = self.received + fresh.len() as u64;
        if received - self.consumed > window {
            return Err(DurableError::Window);
        }
        self.received = received;
        Ok(Some(fresh))
    }

    /// Skips what the sender no longer has.
    pub fn begin_at(&mut self, offset: u64) {
        if offset > self.received {
            let skipped = offset - self.received;
            self.received += skipped;
            self.consumed += skipped;
        }
    }

    /// Bytes were passed on.
    pub fn consume(&mut self, bytes: usize) {
        self.consumed = (self.consumed + bytes as u64).min(self.received);
    }

    /// Returns the offset to acknowledge, and takes it as told.
    pub fn acknowledge(&mut self) -> u64 {
        self.acked = self.consumed;
        self.acked
    }
}
