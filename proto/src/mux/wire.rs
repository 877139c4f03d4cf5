//! Frames of the multiplexer: stream (u32), kind (u8), length (u24), little endian, then the body.
//!
//! DATA and PAD bodies are passed on as they come; all other bodies are one u32 or nothing, so a
//! parser never holds more than twelve bytes.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{MuxError, PIECE_MAX, StreamId};

/// Bytes in front of each body.
pub const HEADER_LEN: usize = 8;
/// Longest body of a PAD frame; a preamble is sent in one.
pub(super) const PAD_MAX: usize = 64;

/// What a frame says. Numbers are never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// A new stream; the body is its priority.
    Open = 1,
    /// Bytes of a stream.
    Data = 2,
    /// The body's number of bytes more may be sent.
    Credit = 3,
    /// The sender has finished.
    Fin = 4,
    /// The sender has given up; the body is a code.
    Reset = 5,
    /// The reader has gone; the body is a code.
    Stop = 6,
    /// Means nothing.
    Pad = 7,
}

impl Kind {
    fn from_wire(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Open,
            2 => Self::Data,
            3 => Self::Credit,
            4 => Self::Fin,
            5 => Self::Reset,
            6 => Self::Stop,
            7 => Self::Pad,
            _ => return None,
        })
    }

    fn allows(self, len: usize) -> bool {
        match self {
            Self::Open | Self::Credit | Self::Reset | Self::Stop => len == 4,
            Self::Data => len <= PIECE_MAX,
            Self::Fin => len == 0,
            Self::Pad => len <= PAD_MAX,
        }
    }
}

/// A frame's head; the body of DATA and PAD follows in the input.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parsed {
    pub(super) id: StreamId,
    pub(super) kind: Kind,
    pub(super) len: usize,
    /// The body of the kinds that have a number.
    pub(super) value: u32,
}

/// Collects heads that are cut anywhere.
#[derive(Debug, Default)]
pub(super) struct Parser {
    held: [u8; HEADER_LEN + 4],
    len: usize,
}

impl Parser {
    /// Takes one head off the input, or all of it when it holds less than one.
    pub(super) fn next(&mut self, bytes: &mut Bytes) -> Result<Option<Parsed>, MuxError> {
        if !self.fill(bytes, HEADER_LEN) {
            return Ok(None);
        }
        let [a, b, c, d, kind, x, y, z, ..] = self.held;
        let id = StreamId(u32::from_le_bytes([a, b, c, d]));
        let len = u32::from_le_bytes([x, y, z, 0]) as usize;
        let known = Kind::from_wire(kind).filter(|kind| kind.allows(len));
        let kind = known.ok_or(MuxError::BadFrame { kind, len })?;
        let mut value = 0;
        if !matches!(kind, Kind::Data | Kind::Pad) && len == 4 {
            if !self.fill(bytes, HEADER_LEN + 4) {
                return Ok(None);
            }
            let [.., a, b, c, d] = self.held;
            value = u32::from_le_bytes([a, b, c, d]);
        }
        self.len = 0;
        Ok(Some(Parsed { id, kind, len, value }))
    }

    fn fill(&mut self, bytes: &mut Bytes, wanted: usize) -> bool {
        let take = wanted.saturating_sub(self.len).min(bytes.len());
        self.held[self.len..self.len + take].copy_from_slice(&bytes[..take]);
        bytes.advance(take);
        self.len += take;
        self.len >= wanted
    }
}

pub(super) fn put_header(out: &mut BytesMut, id: StreamId, kind: Kind, len: usize) {
    debug_assert!(kind.allows(len), "{kind:?} with {len} bytes");
    let len = u32::try_from(len).expect("bodies are at most PIECE_MAX");
    out.put_u32_le(id.0);
    out.put_u32_le(len << 8 | u32::from(kind as u8));
}

pub(super) fn put_u32(out: &mut BytesMut, id: StreamId, kind: Kind, value: u32) {
    put_header(out, id, kind, 4);
    out.put_u32_le(value);
}
