//! The laptop's end of a durable exec as a state machine: frames in, frames out, no IO.
//!
//! ```text
//! Opening --STARTED--> Live --EXIT--> Ended
//!    ^                   |
//!    +----- broken ------+      (opened again with ExecResume; offsets say where to go on)
//! ```
//! Invariant: `acked <= sent <= end` of the input, and output offsets only grow. At most
//! [`UNACKED_MAX`] bytes are held in each direction.

use std::collections::VecDeque;

use bytes::Bytes;
use towline_proto::frame::{Frame, FrameError, FrameKind};
use towline_proto::limits::{DATA_CHUNK_MAX, OUTPUT_ACK_STEP, UNACKED_MAX};
use towline_proto::v1;

/// Consumed output is acknowledged in steps of this size.
const ACK_STEP: u64 = OUTPUT_ACK_STEP as u64;
/// What a guest may have in flight beyond its window before it is called hostile.
const WINDOW_SLACK: u64 = DATA_CHUNK_MAX as u64;
/// Signals waiting to be sent; further ones are dropped, as a kernel merges pending ones.
const SIGNALS_MAX: usize = 64;

/// How the exec is entered.
#[derive(Debug, Clone)]
pub enum How {
    /// Start it. Repeating this is harmless: the id makes it idempotent.
    Start(v1::ExecStart),
    /// Take up one that runs, or the newest main one.
    Attach(v1::ExecResume),
}

/// Which output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output; with a terminal, everything.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What a frame meant.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// It runs, or we are back.
    Started(v1::ExecStarted),
    /// New output, each byte once.
    Output(Stream, Bytes),
    /// The command ended; all output came before.
    Exited(v1::ExecExit),
    /// The guest, the node or somebody between refused or gave up.
    Refused(v1::StreamError),
    /// Nothing that anybody needs to know.
    Nothing,
}

/// What is to be sent next.
#[derive(Debug, Clone, PartialEq)]
pub enum Outgoing {
    /// A small message.
    Frame(Frame),
    /// Input; not copied.
    Stdin(u64, Bytes),
}

/// Says how the other end broke the protocol.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Not even a frame of ours.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Output that begins after what came before it.
    #[error("output went from byte {expected} to byte {got}: {} bytes are missing", got - expected)]
    Gap {
        /// Where it should have gone on.
        expected: u64,
        /// Where it went on.
        got: u64,
    },
    /// More than was allowed without an acknowledgement.
    #[error("the guest sent more output than its window allows")]
    Window,
    /// An offset of the input that we never reached, or have forgotten.
    #[error("the guest wants input from byte {wanted}, but {from} to {to} is what there is")]
    Stdin {
        /// What it asked for.
        wanted: u64,
        /// The first byte still held.
        from: u64,
        /// The end of what was read.
        to: u64,
    },
    /// The end came before all output did.
    #[error("the command ended after {announced} bytes of output, but {received} arrived")]
    Truncated {
        /// What the guest says it sent.
        announced: u64,
        /// What came.
        received: u64,
    },
}

/// One output as we receive it.
#[derive(Debug, Default)]
struct Incoming {
    received: u64,
    consumed: u64,
    acked: u64,
}

impl Incoming {
    /// Takes bytes at `offset`, cutting off what was received before.
    fn take(&mut self, offset: u64, bytes: Bytes) -> Result<Option<Bytes>, ProtocolError> {
        if offset > self.received {
            return Err(ProtocolError::Gap { expected: self.received, got: offset });
        }
        let known = usize::try_from(self.received - offset).unwrap_or(usize::MAX);
        if known >= bytes.len() {
            return Ok(None);
        }
        let fresh = bytes.slice(known..);
        self.received += fresh.len() as u64;
        if self.received - self.consumed > UNACKED_MAX as u64 + WINDOW_SLACK {
            return Err(ProtocolError::Window);
        }
        Ok(Some(fresh))
    }

    /// Skips output that the guest no longer has.
    fn begin_at(&mut self, offset: u64) {
        if offset > self.received {
            let skipped = offset - self.received;
            self.received += skipped;
            self.consumed += skipped;
        }
    }
}

/// Our input, from the first byte not yet acknowledged.
#[derive(Debug, Default)]
struct Input {
    chunks: VecDeque<Bytes>,
    /// Offset of the first held byte.
    acked: u64,
    sent: u64,
    end: u64,
    eof: bool,
    eof_sent: bool,
}

impl Input {
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

    fn check(&self, wanted: u64) -> Result<(), ProtocolError> {
        match (self.acked..=self.end).contains(&wanted) {
            true => Ok(()),
            false => Err(ProtocolError::Stdin { wanted, from: self.acked, to: self.end }),
        }
    }

    fn next(&mut self) -> Option<(u64, Bytes)> {
        let mut skip = self.sent - self.acked;
        for chunk in &self.chunks {
            let len = chunk.len() as u64;
            if skip < len {
                let rest = chunk.slice(usize::try_from(skip).ok()?..);
                let piece = rest.slice(..rest.len().min(DATA_CHUNK_MAX));
                let offset = self.sent;
                self.sent += piece.len() as u64;
                return Some((offset, piece));
            }
            skip -= len;
        }
        None
    }
}

/// The state machine.
#[derive(Debug)]
pub struct ExecClient {
    exec_id: Vec<u8>,
    how: How,
    started: bool,
    live: bool,
    input: Input,
    stdout: Incoming,
    stderr: Incoming,
    signals: VecDeque<i32>,
    size: Option<(u32, u32)>,
    exit: Option<v1::ExecExit>,
    final_ack_due: bool,
    /// The acknowledgement before may have been lost with its stream.
    ack_now: bool,
}

impl ExecClient {
    /// A new exec; `exec_id` may be empty when the newest main one is meant.
    pub fn new(exec_id: Vec<u8>, how: How) -> Self {
        let mut new = Self {
            exec_id,
            started: false,
            live: false,
            input: Input::default(),
            stdout: Incoming::default(),
            stderr: Incoming::default(),
            signals: VecDeque::new(),
            size: None,
            exit: None,
            final_ack_due: false,
            ack_now: false,
            how,
        };
        if let How::Attach(resume) = &new.how {
            new.stdout.begin_at(resume.stdout_offset);
            new.stderr.begin_at(resume.stderr_offset);
        }
        new
    }

    /// Returns the message that opens (or opens again) the stream.
    pub fn open(&self) -> v1::ExecOpen {
        use v1::exec_open::How as Wire;
        let how = match (&self.how, self.started) {
            (How::Start(start), false) => Wire::Start(start.clone()),
            (How::Attach(resume), false) => Wire::Resume(*resume),
            (how, true) => {
                let before = match how {
                    How::Attach(resume) => *resume,
                    How::Start(_) => v1::ExecResume { take_stdin: true, ..Default::default() },
                };
                Wire::Resume(v1::ExecResume {
                    stdout_offset: self.stdout.received,
                    stderr_offset: self.stderr.received,
                    newest_main: false,
                    ..before
                })
            }
        };
        v1::ExecOpen { exec_id: self.exec_id.clone(), how: Some(how) }
    }

    /// Whether the guest has said STARTED at least once.
    pub fn started(&self) -> bool {
        self.started
    }

    /// Returns how it ended, once it has.
    pub fn exit(&self) -> Option<&v1::ExecExit> {
        self.exit.as_ref()
    }

    /// Whether the end of the stream, without EXIT, is an answer (`logs` without follow).
    pub fn ends_without_exit(&self) -> bool {
        self.live && matches!(&self.how, How::Attach(resume) if resume.no_follow)
    }

    /// The stream broke: nothing is sent until the next STARTED.
    pub fn broken(&mut self) {
        self.live = false;
    }

    /// Takes a frame of the guest.
    pub fn on_frame(&mut self, frame: &Frame) -> Result<Event, ProtocolError> {
        const OUTPUTS: [(FrameKind, Stream); 2] =
            [(FrameKind::Stdout, Stream::Stdout), (FrameKind::Stderr, Stream::Stderr)];
        for (kind, stream) in OUTPUTS {
            if frame.is(kind) {
                let (offset, bytes) = frame.split_data()?;
                let fresh = self.incoming(stream).take(offset, bytes)?;
                return Ok(fresh.map_or(Event::Nothing, |bytes| Event::Output(stream, bytes)));
            }
        }
        if frame.is(FrameKind::Started) {
            return self.on_started(frame.decode()?);
        }
        if frame.is(FrameKind::Ack) {
            let ack: v1::ExecAck = frame.decode()?;
            let acked = ack.stdin_offset.clamp(self.input.acked, self.input.sent);
            self.input.forget_until(acked);
            return Ok(Event::Nothing);
        }
        if frame.is(FrameKind::Exit) {
            return self.on_exit(frame.decode()?);
        }
        if frame.is(FrameKind::Error) {
            return Ok(Event::Refused(frame.decode()?));
        }
        // A newer guest may say more than we understand.
        Ok(Event::Nothing)
    }

    fn on_started(&mut self, started: v1::ExecStarted) -> Result<Event, ProtocolError> {
        if !self.started && matches!(self.how, How::Attach(_)) {
            // What was typed before us is somebody else's.
            self.input.acked = started.stdin_offset;
            self.input.sent = started.stdin_offset;
            self.input.end += started.stdin_offset;
        }
        self.input.check(started.stdin_offset)?;
        self.input.forget_until(started.stdin_offset);
        self.input.sent = started.stdin_offset;
        self.input.eof_sent = false;
        if self.exec_id.is_empty() {
            self.exec_id.clone_from(&started.exec_id);
        }
        self.stdout.begin_at(started.stdout_offset);
        self.stderr.begin_at(started.stderr_offset);
        // That we have received something says where to go on, and not that it may be forgotten.
        self.ack_now = self.started;
        self.started = true;
        self.live = true;
        Ok(Event::Started(started))
    }

    fn on_exit(&mut self, exit: v1::ExecExit) -> Result<Event, ProtocolError> {
        let pairs =
            [(exit.stdout_bytes, self.stdout.received), (exit.stderr_bytes, self.stderr.received)];
        for (announced, received) in pairs {
            if announced > received {
                return Err(ProtocolError::Truncated { announced, received });
            }
        }
        self.exit = Some(exit.clone());
        self.final_ack_due = true;
        Ok(Event::Exited(exit))
    }

    /// Output was written where it belongs.
    pub fn consumed(&mut self, stream: Stream, bytes: usize) {
        self.incoming(stream).consumed += bytes as u64;
    }

    /// Whether output was received that is not written yet.
    pub fn output_pending(&self) -> bool {
        let pending = |incoming: &Incoming| incoming.consumed < incoming.received;
        pending(&self.stdout) || pending(&self.stderr)
    }

    /// How many bytes of input may be read now.
    pub fn input_room(&self) -> usize {
        let held = usize::try_from(self.input.end - self.input.acked).unwrap_or(usize::MAX);
        if self.input.eof { 0 } else { UNACKED_MAX.saturating_sub(held) }
    }

    /// Input was read.
    pub fn on_input(&mut self, bytes: Bytes) {
        self.input.end += bytes.len() as u64;
        if !bytes.is_empty() {
            self.input.chunks.push_back(bytes);
        }
    }

    /// There is no input from here on.
    pub fn on_input_end(&mut self) {
        self.input.eof = true;
    }

    /// A signal for the command.
    pub fn signal(&mut self, signal: i32) {
        if self.signals.len() < SIGNALS_MAX {
            self.signals.push_back(signal);
        }
    }

    /// The terminal has this size now.
    pub fn resize(&mut self, rows: u32, columns: u32) {
        self.size = Some((rows, columns));
    }

    /// Whether [`Self::next_outgoing`] has something.
    pub fn wants_to_send(&self) -> bool {
        self.live
            && (!self.signals.is_empty()
                || self.size.is_some()
                || self.ack_due()
                || self.input.sent < self.input.end
                || (self.input.eof && !self.input.eof_sent))
    }

    /// Returns what to send next: small things first, so that a signal never waits behind input.
    pub fn next_outgoing(&mut self) -> Option<Outgoing> {
        if !self.live {
            return None;
        }
        if let Some(signal) = self.signals.pop_front() {
            let message = v1::ExecSignal { signal };
            return Some(Outgoing::Frame(Frame::message(FrameKind::Signal, &message)));
        }
        if let Some((rows, columns)) = self.size.take() {
            let message = v1::ExecResize { rows, columns };
            return Some(Outgoing::Frame(Frame::message(FrameKind::Resize, &message)));
        }
        if self.ack_due() {
            return Some(Outgoing::Frame(self.ack()));
        }
        if let Some((offset, bytes)) = self.input.next() {
            return Some(Outgoing::Stdin(offset, bytes));
        }
        if self.input.eof && !self.input.eof_sent {
            self.input.eof_sent = true;
            return Some(Outgoing::Frame(Frame::data(FrameKind::StdinEof, self.input.end, &[])));
        }
        None
    }

    fn ack_due(&self) -> bool {
        let far = |incoming: &Incoming| incoming.consumed - incoming.acked >= ACK_STEP;
        let all = |incoming: &Incoming| incoming.consumed == incoming.received;
        self.ack_now
            || far(&self.stdout)
            || far(&self.stderr)
            || (self.final_ack_due && all(&self.stdout) && all(&self.stderr))
    }

    fn ack(&mut self) -> Frame {
        self.ack_now = false;
        self.stdout.acked = self.stdout.consumed;
        self.stderr.acked = self.stderr.consumed;
        if self.stdout.acked == self.stdout.received && self.stderr.acked == self.stderr.received {
            self.final_ack_due = false;
        }
        let message = v1::ExecAck {
            stdin_offset: 0,
            stdout_offset: self.stdout.acked,
            stderr_offset: self.stderr.acked,
        };
        Frame::message(FrameKind::Ack, &message)
    }

    fn incoming(&mut self, stream: Stream) -> &mut Incoming {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
