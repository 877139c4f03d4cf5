//! The two halves of one stream: what is to be sent under the peer's credit, and what has come and
//! waits for its reader.
//!
//! Invariant: a half that has ended never leaves that state, and holds no bytes unless it ended by
//! FIN and its reader has not yet read them.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};

use super::{HalfError, Priority, Read, SEND_BUFFER_MAX};

/// Part of the window that is read before the sender is told: early enough that it never has to wait
/// for a slow guest's answer, late enough to cost little.
const CREDIT_PART: u32 = 8;

/// Received pieces shorter than this are joined, so that many small ones cost no more than one.
const JOIN_BELOW: usize = 1024;

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) priority: Priority,
    pub(super) sending: Sending,
    pub(super) receiving: Receiving,
    /// OPEN has not been transmitted yet.
    pub(super) open_due: bool,
    pub(super) sender_released: bool,
    pub(super) receiver_released: bool,
    pub(super) in_urgent: bool,
    pub(super) in_ready: bool,
    pub(super) in_changed: bool,
}

impl Stream {
    /// With so much to be received before it is read, to begin with and at most; and so much to be
    /// sent.
    pub(super) fn new(priority: Priority, receive: (u32, u32), send: (u32, u32)) -> Self {
        Self {
            priority,
            sending: Sending::new(send.0, send.1),
            receiving: Receiving::new(receive.0, receive.1),
            open_due: false,
            sender_released: false,
            receiver_released: false,
            in_urgent: false,
            in_ready: false,
            in_changed: false,
        }
    }

    /// Nobody here holds it, and the peer has been told everything.
    pub(super) fn is_done(&self) -> bool {
        self.sender_released
            && self.receiver_released
            && !self.open_due
            && matches!(self.sending.state, SendState::Finished | SendState::Reset)
            && !matches!(self.receiving.state, ReceiveState::Open | ReceiveState::StopDue)
    }
}

/// Open -> Finishing -> Finished
///    \________\------> ResetDue -> Reset
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SendState {
    Open,
    Finishing,
    Finished,
    ResetDue(u32),
    Reset,
}

#[derive(Debug)]
pub(super) struct Sending {
    state: SendState,
    buffer: BytesMut,
    credit: u32,
    /// The reader's window: credit never exceeds it.
    window: u32,
    /// The reader went away, with this code.
    stopped: Option<u32>,
}

impl Sending {
    fn new(credit: u32, window: u32) -> Self {
        Self { state: SendState::Open, buffer: BytesMut::new(), credit, window, stopped: None }
    }

    /// The reader takes so much more than was known; `credit` of it may be sent at once.
    pub(super) fn widen(&mut self, more: u32, credit: u32) {
        self.window = self.window.saturating_add(more);
        self.credit = self.credit.saturating_add(credit);
    }

    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<usize, HalfError> {
        self.check_open()?;
        let taken = bytes.len().min(SEND_BUFFER_MAX - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    pub(super) fn finish(&mut self) -> Result<(), HalfError> {
        match self.state {
            SendState::Finishing | SendState::Finished => Ok(()),
            SendState::Open | SendState::ResetDue(_) | SendState::Reset => {
                self.check_open()?;
                self.state = SendState::Finishing;
                Ok(())
            }
        }
    }

    pub(super) fn is_finished(&self) -> Result<bool, HalfError> {
        match self.state {
            SendState::Finished => Ok(true),
            SendState::Finishing => Ok(false),
            SendState::Open | SendState::ResetDue(_) | SendState::Reset => {
                self.check_open().map(|()| false)
            }
        }
    }

    /// Whether there is now a RESET to be sent.
    pub(super) fn reset(&mut self, code: u32) -> bool {
        match self.state {
            SendState::Open => {
                self.state = SendState::ResetDue(code);
                self.buffer = BytesMut::new();
                true
            }
            // What was promised with FIN is still sent.
            SendState::Finishing
            | SendState::Finished
            | SendState::ResetDue(_)
            | SendState::Reset => false,
        }
    }

    /// The peer does not read any more. Whether there is now a RESET to be sent.
    pub(super) fn stopped(&mut self, code: u32) -> bool {
        if matches!(self.state, SendState::Open | SendState::Finishing) {
            self.stopped = Some(code);
            self.state = SendState::ResetDue(code);
            self.buffer = BytesMut::new();
            return true;
        }
        false
    }

    /// False when it is more than any reader grants.
    pub(super) fn grant(&mut self, credit: u32) -> bool {
        match self.credit.checked_add(credit) {
            Some(sum) if sum <= self.window => {
                self.credit = sum;
                true
            }
            Some(_) | None => false,
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        match self.state {
            SendState::Open => !self.buffer.is_empty() && self.credit > 0,
            SendState::Finishing => self.buffer.is_empty() || self.credit > 0,
            SendState::Finished | SendState::ResetDue(_) | SendState::Reset => false,
        }
    }

    pub(super) fn next_piece(&self, room: usize) -> usize {
        room.min(self.buffer.len()).min(self.credit as usize)
    }

    pub(super) fn take_piece(&mut self, len: usize, out: &mut BytesMut) {
        out.extend_from_slice(&self.buffer[..len]);
        self.buffer.advance(len);
        self.credit -= u32::try_from(len).expect("a piece is at most PIECE_MAX");
    }

    pub(super) fn take_fin(&mut self) -> bool {
        let due = self.state == SendState::Finishing && self.buffer.is_empty();
        if due {
            self.state = SendState::Finished;
        }
        due
    }

    pub(super) fn take_reset(&mut self) -> Option<u32> {
        let SendState::ResetDue(code) = self.state else { return None };
        self.state = SendState::Reset;
        Some(code)
    }

    fn check_open(&self) -> Result<(), HalfError> {
        match (self.stopped, self.state) {
            (Some(code), _) => Err(HalfError::Stopped(code)),
            (None, SendState::Open) => Ok(()),
            (None, _) => Err(HalfError::Closed),
        }
    }
}

/// Open -> Finished | Reset; or by its reader: Open -> StopDue -> Stopped
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReceiveState {
    Open,
    Finished,
    Reset(u32),
    StopDue,
    Stopped,
}

#[derive(Debug)]
pub(super) struct Receiving {
    state: ReceiveState,
    /// Whole pieces, then `tail`.
    pieces: VecDeque<Bytes>,
    tail: BytesMut,
    /// Bytes that may be under way or waiting to be read: at the beginning, now, and at most.
    first: u32,
    window: u32,
    max: u32,
    /// Bytes that the peer may still send.
    allowed: u32,
    /// Bytes read and not yet granted again.
    read: u32,
}

impl Receiving {
    fn new(window: u32, max: u32) -> Self {
        Self {
            state: ReceiveState::Open,
            pieces: VecDeque::new(),
            tail: BytesMut::new(),
            window,
            first: window,
            max,
            allowed: window,
            read: 0,
        }
    }

    /// Accounts for a DATA frame. The error is the excess over the credit, or `None` after the end.
    pub(super) fn expect(&mut self, len: usize) -> Result<(), Option<u32>> {
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        match self.state {
            ReceiveState::Open | ReceiveState::StopDue | ReceiveState::Stopped => {}
            ReceiveState::Finished | ReceiveState::Reset(_) => return Err(None),
        }
        self.allowed = self.allowed.checked_sub(len).ok_or_else(|| Some(len - self.allowed))?;
        Ok(())
    }

    pub(super) fn push(&mut self, piece: Bytes, copy: bool) {
        if self.state != ReceiveState::Open {
            return;
        }
        if copy || piece.len() < JOIN_BELOW {
            self.tail.extend_from_slice(&piece);
            return;
        }
        if !self.tail.is_empty() {
            self.pieces.push_back(self.tail.split().freeze());
        }
        self.pieces.push_back(piece);
    }

    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<Read, HalfError> {
        if let ReceiveState::Reset(code) = self.state {
            return Err(HalfError::Reset(code));
        }
        let mut done = 0;
        while done < into.len() {
            let part = match self.pieces.front_mut() {
                Some(piece) => take_into(piece, &mut into[done..]),
                None => take_into(&mut self.tail, &mut into[done..]),
            };
            if self.pieces.front().is_some_and(Bytes::is_empty) {
                self.pieces.pop_front();
            }
            if part == 0 {
                break;
            }
            done += part;
        }
        self.read += u32::try_from(done).expect("no more than a window has come");
        match (done, self.state) {
            (0, ReceiveState::Finished) => Ok(Read::End),
            (0, ReceiveState::Open) => Ok(Read::Pending),
            (0, _) => Err(HalfError::Closed),
            (done, _) => Ok(Read::Data(done)),
        }
    }

    pub(super) fn finish(&mut self) {
        match self.state {
            ReceiveState::Open => self.state = ReceiveState::Finished,
            ReceiveState::StopDue | ReceiveState::Stopped => self.state = ReceiveState::Finished,
            ReceiveState::Finished | ReceiveState::Reset(_) => {}
        }
    }

    pub(super) fn reset(&mut self, code: u32) {
        if self.state != ReceiveState::Finished {
            self.state = ReceiveState::Reset(code);
            self.pieces.clear();
            self.tail = BytesMut::new();
        }
    }

    /// The reader goes away. Whether there is now a STOP to be sent.
    pub(super) fn stop(&mut self) -> bool {
        self.pieces.clear();
        self.tail = BytesMut::new();
        let due = self.state == ReceiveState::Open;
        if due {
            self.state = ReceiveState::StopDue;
        }
        due
    }

    pub(super) fn take_stop(&mut self) -> Option<u32> {
        (self.state == ReceiveState::StopDue).then(|| {
            self.state = ReceiveState::Stopped;
            super::CODE_CANCELLED
        })
    }

    pub(super) fn credit_due(&self) -> bool {
        self.state == ReceiveState::Open && self.read >= self.window / CREDIT_PART
    }

    /// Doubles the window of a stream that is read, as far as this suffices; returns what it took.
    pub(super) fn widen(&mut self, available: u32) -> u32 {
        if !self.credit_due() {
            return 0;
        }
        let more = self.window.min(self.max - self.window).min(available);
        self.window += more;
        self.read += more;
        more
    }

    /// What the window has grown by.
    pub(super) fn extra(&self) -> u32 {
        self.window - self.first
    }

    pub(super) fn take_credit(&mut self) -> Option<u32> {
        self.credit_due().then(|| {
            self.allowed += self.read;
            std::mem::take(&mut self.read)
        })
    }
}

fn take_into(from: &mut impl Buf, into: &mut [u8]) -> usize {
    let len = from.remaining().min(into.len());
    from.copy_to_slice(&mut into[..len]);
    len
}
