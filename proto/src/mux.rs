//! Sans-IO multiplexer of the guest link: many credit-limited streams over one byte pipe.
//!
//! One [`Mux`] is one session; [`preamble`] finds where a session starts in the pipe. Leaves sockets
//! and wakers to `towline-streams`. Invariant: whatever the peer sends, memory is bounded by the
//! window of each stream and the number of streams, and nothing panics.

pub mod preamble;
mod stream;
pub mod terms;
mod wire;

use std::collections::{BTreeMap, VecDeque};

use bytes::{Bytes, BytesMut};

use crate::limits::GUEST_STREAMS_MAX;
use stream::Stream;
use terms::{Terms, WINDOW_MIN};
use wire::{Kind, Parsed, Parser};

pub use wire::HEADER_LEN;

/// Name of the virtio-serial port that carries the guest link.
pub const PORT_NAME: &str = "dev.towline.link";
/// Port that the guest agent listens at where the guest link goes over vsock.
pub const VSOCK_PORT: u32 = 1024;
/// Bytes that this build takes on one stream before its reader has read. The other end may have
/// another number: each says its own ([`terms`]).
pub const WINDOW: u32 = 512 << 10;
/// Longest payload of one DATA frame, in version 1: with its header it fills one write of a guest's
/// port.
pub const PIECE_MAX: usize = (32 << 10) - HEADER_LEN;
/// Bytes that one stream keeps to be sent before its writer waits.
pub const SEND_BUFFER_MAX: usize = 128 << 10;
/// A node's window on a stream that the guest opened, to begin with: it grants more to those that it
/// reads, up to its whole window and out of [`EXTRA_MAX`].
pub const FIRST_WINDOW: u32 = WINDOW_MIN;
/// What a node grants beyond the first windows, to all streams of its guest together.
pub const EXTRA_MAX: u32 = 32 << 20;
/// Streams that a guest may have open towards the node at once: control, file system, and one for
/// each connection of the workload. Their first windows and the extra together bound what a hostile
/// guest makes a node hold, 48 MiB.
pub const GUEST_OPENED_MAX: usize = 1024;
/// Refusals waiting to be sent; a peer that causes more without reading is cut off.
const REFUSALS_MAX: usize = 1024;
/// A DATA frame that would carry less than this waits for the next batch.
const PIECE_MIN: usize = 512;

/// One piece in so many goes to the lowest priority that has something to send.
const LOWEST_EVERY: u32 = 8;

/// Reset code: the other end dropped its half before it was finished.
pub const CODE_CANCELLED: u32 = 1;
/// Reset code: too many streams.
pub const CODE_REFUSED: u32 = 2;

/// Which end of the link this is. A host opens even ids, a guest odd ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The node.
    Host,
    /// The guest agent.
    Guest,
}

/// Which stream goes first when several have something to send: lower ones wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Priority {
    /// Control of the guest.
    Control = 0,
    /// Terminals and commands.
    Interactive = 1,
    /// File system requests that a program waits for.
    Demand = 2,
    /// Everything long.
    Bulk = 3,
}

const PRIORITIES: usize = 4;

impl Priority {
    fn from_wire(value: u8) -> Option<Self> {
        Some(match value {
            0 => Self::Control,
            1 => Self::Interactive,
            2 => Self::Demand,
            3 => Self::Bulk,
            _ => return None,
        })
    }
}

/// One stream of a session; never reused within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(u32);

/// Says why a session cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MuxError {
    /// The frame is of no known kind, or too long for its kind.
    #[error("the guest link carried a frame of kind {kind} with {len} bytes, which no peer sends")]
    BadFrame {
        /// The frame's kind.
        kind: u8,
        /// The announced length.
        len: usize,
    },
    /// A frame for a stream that was never opened, or an OPEN that the rules do not allow.
    #[error("the guest link carried a frame of kind {kind} for stream {id}, which is not open")]
    BadStream {
        /// The frame's kind.
        kind: u8,
        /// The stream named.
        id: u32,
    },
    /// More bytes than there was credit for.
    #[error("the peer sent {over} bytes more on stream {id} than it had credit for")]
    CreditExceeded {
        /// The stream.
        id: u32,
        /// How many bytes too much.
        over: u32,
    },
    /// More credit than a window can hold.
    #[error("the peer gave stream {id} more credit than a window")]
    CreditOverflow {
        /// The stream.
        id: u32,
    },
    /// The peer opens streams faster than refusals can be sent.
    #[error("the peer keeps opening streams over the limit")]
    TooManyRefusals,
    /// This end has too many streams open, or has used all ids.
    #[error(
        "no more streams can be opened on this guest link (at most {GUEST_STREAMS_MAX} at once)"
    )]
    NoMoreStreams,
}

/// Says why one half of a stream ended before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HalfError {
    /// The sender gave up.
    #[error("the other end reset the stream (code {0})")]
    Reset(u32),
    /// The reader went away.
    #[error("the other end stopped reading the stream (code {0})")]
    Stopped(u32),
    /// The stream is not there any more.
    #[error("the stream is closed")]
    Closed,
}

/// What a read found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// So many bytes, at least one.
    Data(usize),
    /// Nothing yet.
    Pending,
    /// The sender finished.
    End,
}

/// One session of the guest link.
#[derive(Debug)]
pub struct Mux {
    end: End,
    /// What this end takes on each stream.
    window: u32,
    /// What the other end takes on each.
    peer_window: u32,
    parser: Parser,
    /// Stream and rest of the DATA frame under way; no stream means that its bytes are dropped.
    data: Option<(Option<StreamId>, usize)>,
    streams: BTreeMap<StreamId, Stream>,
    next_id: u32,
    peer_next_id: u32,
    opened_by_peer: usize,
    /// Credit beyond the first windows that is left to grant.
    extra: u32,
    /// Streams with something other than data to say.
    urgent: VecDeque<StreamId>,
    /// Streams with data to send, by priority.
    ready: [VecDeque<StreamId>; PRIORITIES],
    turn: u32,
    refusals: VecDeque<StreamId>,
    accepted: VecDeque<StreamId>,
    changed: VecDeque<StreamId>,
}

impl Mux {
    /// An empty session in which this end takes what its terms say, and the other as little as any
    /// build takes, until [`Mux::agree`] says more.
    pub fn new(end: End, ours: Terms) -> Self {
        let (next_id, peer_next_id) = match end {
            End::Host => (0, 1),
            End::Guest => (1, 0),
        };
        Self {
            end,
            window: ours.window,
            peer_window: WINDOW_MIN,
            parser: Parser::default(),
            data: None,
            streams: BTreeMap::new(),
            next_id,
            peer_next_id,
            opened_by_peer: 0,
            extra: EXTRA_MAX,
            urgent: VecDeque::new(),
            ready: Default::default(),
            turn: 0,
            refusals: VecDeque::new(),
            accepted: VecDeque::new(),
            changed: VecDeque::new(),
        }
    }

    /// The other end has said its terms; writers may go on up to its window. Only the first counts.
    pub fn agree(&mut self, peer: Terms) {
        let more = peer.window.saturating_sub(self.peer_window);
        if self.peer_window != WINDOW_MIN || more == 0 {
            return;
        }
        self.peer_window = peer.window;
        let ids: Vec<StreamId> = self.streams.keys().copied().collect();
        for id in ids {
            if let Some(stream) = self.streams.get_mut(&id) {
                // One that this guest opened is widened by its reader.
                let by_reader = self.end == End::Guest && id.0 & 1 == 1;
                stream.sending.widen(more, if by_reader { 0 } else { more });
            }
            self.note_ready(id);
        }
    }

    /// Opens a stream; it exists for the peer as soon as something is transmitted.
    pub fn open(&mut self, priority: Priority) -> Result<StreamId, MuxError> {
        if self.streams.len() >= GUEST_STREAMS_MAX {
            return Err(MuxError::NoMoreStreams);
        }
        let id = StreamId(self.next_id);
        self.next_id = self.next_id.checked_add(2).ok_or(MuxError::NoMoreStreams)?;
        let mut stream = self.stream(id, priority);
        stream.open_due = true;
        self.streams.insert(id, stream);
        self.note_urgent(id);
        Ok(id)
    }

    /// The next stream that the peer opened.
    pub fn accept(&mut self) -> Option<(StreamId, Priority)> {
        let id = self.accepted.pop_front()?;
        let priority = self.streams.get(&id).map_or(Priority::Bulk, |stream| stream.priority);
        Some((id, priority))
    }

    /// Whether [`Mux::accept`] would yield a stream.
    pub fn has_accepted(&self) -> bool {
        !self.accepted.is_empty()
    }

    /// The next stream on which reading, writing or finishing may have become possible.
    pub fn next_changed(&mut self) -> Option<StreamId> {
        let id = self.changed.pop_front()?;
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.in_changed = false;
        }
        Some(id)
    }

    /// Takes as many of the bytes as there is room for; zero means that the writer must wait.
    pub fn write(&mut self, id: StreamId, bytes: &[u8]) -> Result<usize, HalfError> {
        let stream = self.streams.get_mut(&id).ok_or(HalfError::Closed)?;
        let taken = stream.sending.push(bytes)?;
        self.note_ready(id);
        Ok(taken)
    }

    /// Says that nothing follows what was written.
    pub fn finish(&mut self, id: StreamId) -> Result<(), HalfError> {
        let stream = self.streams.get_mut(&id).ok_or(HalfError::Closed)?;
        stream.sending.finish()?;
        self.note_ready(id);
        Ok(())
    }

    /// Whether everything written, and the end, has been transmitted.
    pub fn is_finished(&self, id: StreamId) -> Result<bool, HalfError> {
        self.streams.get(&id).ok_or(HalfError::Closed)?.sending.is_finished()
    }

    /// Gives up sending: what was not transmitted is dropped and the peer's reader gets an error.
    pub fn reset(&mut self, id: StreamId, code: u32) {
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.sending.reset(code)
        {
            self.note_urgent(id);
        }
    }

    /// Says that nobody will write any more; an unfinished half is reset.
    pub fn release_sender(&mut self, id: StreamId) {
        self.reset(id, CODE_CANCELLED);
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.sender_released = true;
        }
        self.remove_if_done(id);
    }

    /// Reads what has come.
    pub fn read(&mut self, id: StreamId, into: &mut [u8]) -> Result<Read, HalfError> {
        let stream = self.streams.get_mut(&id).ok_or(HalfError::Closed)?;
        let read = stream.receiving.read(into)?;
        if self.end == End::Host {
            self.extra -= stream.receiving.widen(self.extra);
        }
        if stream.receiving.credit_due() {
            self.note_urgent(id);
        }
        Ok(read)
    }

    /// Says that nobody will read any more; the peer's writer gets an error unless it has finished.
    pub fn release_receiver(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.receiver_released = true;
        if stream.receiving.stop() {
            self.note_urgent(id);
        }
        self.remove_if_done(id);
    }

    /// How many streams there are.
    pub fn streams(&self) -> usize {
        self.streams.len()
    }

    /// Whether [`Mux::transmit`] would produce something.
    pub fn has_output(&self) -> bool {
        !self.refusals.is_empty()
            || !self.urgent.is_empty()
            || self.ready.iter().any(|queue| !queue.is_empty())
    }

    /// Appends frames until `out` holds about `limit` bytes or nothing is left to send.
    pub fn transmit(&mut self, out: &mut BytesMut, limit: usize) {
        while out.len() < limit {
            let Some(id) = self.refusals.pop_front() else { break };
            wire::put_u32(out, id, Kind::Reset, CODE_REFUSED);
            wire::put_u32(out, id, Kind::Stop, CODE_REFUSED);
        }
        while out.len() < limit {
            let Some(id) = self.urgent.pop_front() else { break };
            self.transmit_urgent(id, out);
        }
        while out.is_empty() || limit.saturating_sub(out.len()) >= HEADER_LEN + PIECE_MIN {
            let Some(id) = self.next_ready() else { break };
            self.transmit_ready(id, out, limit);
        }
    }

    /// The next stream that may send data: the highest priority first, but every
    /// [`LOWEST_EVERY`]th time the lowest, so that nothing starves.
    fn next_ready(&mut self) -> Option<StreamId> {
        self.turn = self.turn.wrapping_add(1);
        if self.turn.is_multiple_of(LOWEST_EVERY) {
            self.ready.iter_mut().rev().find_map(VecDeque::pop_front)
        } else {
            self.ready.iter_mut().find_map(VecDeque::pop_front)
        }
    }

    /// Takes bytes of the session, cut anywhere.
    pub fn receive(&mut self, mut bytes: Bytes) -> Result<(), MuxError> {
        while !bytes.is_empty() {
            if let Some((target, left)) = self.data.take() {
                let piece = bytes.split_to(left.min(bytes.len()));
                let left = left - piece.len();
                if left > 0 {
                    self.data = Some((target, left));
                }
                if let Some(id) = target {
                    self.receive_data(id, piece);
                }
                continue;
            }
            match self.parser.next(&mut bytes)? {
                Some(parsed) => self.receive_frame(&parsed)?,
                None => break,
            }
        }
        Ok(())
    }

    fn receive_frame(&mut self, frame: &Parsed) -> Result<(), MuxError> {
        let Parsed { id, kind, len, value } = *frame;
        match kind {
            Kind::Pad => {
                self.data = (len > 0).then_some((None, len));
                Ok(())
            }
            Kind::Open => self.receive_open(id, value),
            Kind::Data | Kind::Credit | Kind::Fin | Kind::Reset | Kind::Stop => {
                if self.streams.contains_key(&id) {
                    self.receive_for(id, kind, len, value)
                } else if self.was_open(id) {
                    // A frame that crossed our end of the stream.
                    if kind == Kind::Data && len > 0 {
                        self.data = Some((None, len));
                    }
                    Ok(())
                } else {
                    Err(MuxError::BadStream { kind: kind as u8, id: id.0 })
                }
            }
        }
    }

    fn receive_open(&mut self, id: StreamId, value: u32) -> Result<(), MuxError> {
        let priority = u8::try_from(value).ok().and_then(Priority::from_wire);
        let Some(priority) = priority.filter(|_| id.0 == self.peer_next_id) else {
            return Err(MuxError::BadStream { kind: Kind::Open as u8, id: id.0 });
        };
        self.peer_next_id = self.peer_next_id.checked_add(2).ok_or(MuxError::NoMoreStreams)?;
        let max = match self.end {
            End::Host => GUEST_OPENED_MAX,
            End::Guest => GUEST_STREAMS_MAX,
        };
        if self.opened_by_peer >= max {
            if self.refusals.len() >= REFUSALS_MAX {
                return Err(MuxError::TooManyRefusals);
            }
            self.refusals.push_back(id);
            return Ok(());
        }
        self.opened_by_peer += 1;
        self.streams.insert(id, self.stream(id, priority));
        self.accepted.push_back(id);
        Ok(())
    }

    fn receive_for(
        &mut self,
        id: StreamId,
        kind: Kind,
        len: usize,
        value: u32,
    ) -> Result<(), MuxError> {
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        match kind {
            Kind::Data => {
                stream.receiving.expect(len).map_err(|over| match over {
                    Some(over) => MuxError::CreditExceeded { id: id.0, over },
                    None => MuxError::BadStream { kind: kind as u8, id: id.0 },
                })?;
                if len > 0 {
                    self.data = Some((Some(id), len));
                }
                return Ok(());
            }
            Kind::Credit => {
                if !stream.sending.grant(value) {
                    return Err(MuxError::CreditOverflow { id: id.0 });
                }
                self.note_ready(id);
                return Ok(());
            }
            Kind::Fin => stream.receiving.finish(),
            Kind::Reset => stream.receiving.reset(value),
            Kind::Stop => {
                if stream.sending.stopped(value) {
                    self.note_urgent(id);
                }
            }
            Kind::Open | Kind::Pad => return Ok(()),
        }
        self.note_changed(id);
        self.remove_if_done(id);
        Ok(())
    }

    fn receive_data(&mut self, id: StreamId, piece: Bytes) {
        // A node copies, so that a small piece never keeps a large buffer alive; a guest trusts it.
        let copy = self.end == End::Host;
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.receiving.push(piece, copy);
            self.note_changed(id);
        }
    }

    fn transmit_urgent(&mut self, id: StreamId, out: &mut BytesMut) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.in_urgent = false;
        if std::mem::take(&mut stream.open_due) {
            wire::put_u32(out, id, Kind::Open, u32::from(stream.priority as u8));
        }
        if let Some(code) = stream.sending.take_reset() {
            wire::put_u32(out, id, Kind::Reset, code);
        }
        if let Some(code) = stream.receiving.take_stop() {
            wire::put_u32(out, id, Kind::Stop, code);
        }
        if let Some(credit) = stream.receiving.take_credit() {
            wire::put_u32(out, id, Kind::Credit, credit);
        }
        self.remove_if_done(id);
    }

    fn transmit_ready(&mut self, id: StreamId, out: &mut BytesMut, limit: usize) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.in_ready = false;
        let room = limit.saturating_sub(out.len() + HEADER_LEN).clamp(PIECE_MIN, PIECE_MAX);
        let piece = stream.sending.next_piece(room);
        if piece > 0 {
            wire::put_header(out, id, Kind::Data, piece);
            stream.sending.take_piece(piece, out);
        }
        if stream.sending.take_fin() {
            wire::put_header(out, id, Kind::Fin, 0);
        }
        self.note_ready(id);
        self.note_changed(id);
        self.remove_if_done(id);
    }

    /// A new stream. Towards the node, one that the guest opened begins with a small window.
    fn stream(&self, id: StreamId, priority: Priority) -> Stream {
        let by_guest = id.0 & 1 == 1;
        let first = |window: u32, towards_node: bool| match by_guest && towards_node {
            true => (window.min(FIRST_WINDOW), window),
            false => (window, window),
        };
        let receive = first(self.window, self.end == End::Host);
        Stream::new(priority, receive, first(self.peer_window, self.end == End::Guest))
    }

    /// Whether the id was opened once in this session, by either end.
    fn was_open(&self, id: StreamId) -> bool {
        let ours = (id.0 & 1) == (self.next_id & 1);
        id.0 < if ours { self.next_id } else { self.peer_next_id }
    }

    fn note_urgent(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id)
            && !std::mem::replace(&mut stream.in_urgent, true)
        {
            self.urgent.push_back(id);
        }
    }

    fn note_ready(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.sending.is_ready()
            && !std::mem::replace(&mut stream.in_ready, true)
        {
            self.ready[stream.priority as usize].push_back(id);
        }
    }

    fn note_changed(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id)
            && !std::mem::replace(&mut stream.in_changed, true)
        {
            self.changed.push_back(id);
        }
    }

    fn remove_if_done(&mut self, id: StreamId) {
        if self.streams.get(&id).is_some_and(Stream::is_done) {
            let gone = self.streams.remove(&id);
            self.extra += gone.map_or(0, |stream| stream.receiving.extra());
            if (id.0 & 1) != (self.next_id & 1) {
                self.opened_by_peer -= 1;
            }
        }
    }
}
