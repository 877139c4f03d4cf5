//! Sans-IO framing of every stream, over QUIC, the guest link and the daemon's socket alike: one
//! byte of kind, four of length (little endian), then the body: a prost message or raw bytes.
//!
//! A length over [`FRAME_BODY_MAX`] is an error before anything is allocated. A kind that a reader
//! does not know is its own affair: it is passed on, not refused here.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

use crate::limits::FRAME_BODY_MAX;

/// Bytes in front of each body.
pub const HEADER_LEN: usize = 5;

/// What a frame's body is. Numbers are never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// `StreamOpen`: the first frame of a stream.
    Open = 1,
    /// `StreamError`: the last frame of a stream that was refused or broke.
    Error = 2,
    /// `ExecStarted`.
    Started = 10,
    /// Offset (u64, little endian) and bytes.
    Stdin = 11,
    /// Offset only: there is no input from here on.
    StdinEof = 12,
    /// Offset and bytes. With a terminal, all output.
    Stdout = 13,
    /// Offset and bytes.
    Stderr = 14,
    /// `ExecSignal`.
    Signal = 15,
    /// `ExecResize`.
    Resize = 16,
    /// `ExecAck`.
    Ack = 17,
    /// `ExecExit`: the last frame from the guest.
    Exit = 18,
    /// `ExecList`.
    ExecList = 20,
    /// `GuestConfigure`.
    Configure = 30,
    /// `GuestConfigured`.
    Configured = 31,
    /// `GuestEvent`.
    Event = 32,
    /// `GuestCommand`.
    Command = 33,
    /// A raw FUSE request, as read from /dev/fuse.
    FuseRequest = 40,
    /// A raw FUSE answer, as written to /dev/fuse.
    FuseAnswer = 41,
    /// Raw bytes of the archive; an empty one ends it.
    ImportData = 50,
    /// `ImageImportProgress`.
    ImportProgress = 51,
    /// `ImageImported`.
    Imported = 52,
    /// Raw bytes of the archive; an empty one ends it.
    ExportData = 53,
    /// `ImagePushed`.
    Pushed = 54,
    /// Empty: the answer to a ping stream.
    Pong = 60,
    /// `DaemonRequest`.
    DaemonRequest = 70,
    /// `DaemonAnswer`.
    DaemonAnswer = 71,
    // 80..=99: files, see `towline-filesync`.
    /// `TcpConnected`.
    TcpConnected = 100,
    /// Offset and bytes.
    TcpData = 101,
    /// Offset only: nothing comes from here on.
    TcpEof = 102,
    /// Offset, and an offset (u64, little endian) as the bytes: all before the first has been passed
    /// on and may be forgotten; the sender must stop at the second until the next one.
    TcpAck = 103,
    /// Empty: the connection was reset by its peer.
    TcpReset = 104,
    /// `PortList`.
    PortList = 105,
    /// `ForwardListening`.
    ForwardListening = 106,
    /// `ForwardAccepted`.
    ForwardAccepted = 107,
    /// Raw bytes of the archive; an empty one ends it.
    CopyData = 108,
    /// `CopyDone`.
    CopyDone = 109,
    /// `EgressOpened`.
    EgressOpened = 110,
    /// One datagram.
    EgressDatagram = 111,
    /// `LookupAnswer`.
    LookupAnswer = 112,
    /// `FeedEntry`.
    FeedEntry = 113,
    /// `FeedEnd`.
    FeedEnd = 114,
    /// `DiffPart`.
    DiffPart = 115,
    /// `DiffDone`.
    DiffDone = 116,
    /// `LayerPart`.
    LayerPart = 117,
    /// Raw bytes of a file.
    LayerData = 118,
    /// How many zeros (u64, little endian) come next in a file.
    LayerHole = 119,
    /// `LayerDone`.
    LayerDone = 120,
    /// `Saved`.
    Saved = 121,
    /// `SaveSecrets`.
    SaveSecrets = 122,
    /// `ImagesCollected`.
    ImagesCollected = 130,
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The kind's number; compare with [`Frame::is`].
    pub kind: u8,
    /// The body.
    pub body: Bytes,
}

/// Says what was wrong with the bytes of a stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length field is over the bound.
    #[error("a frame of kind {kind} announces {len} bytes; at most {FRAME_BODY_MAX} are allowed")]
    TooLong {
        /// The frame's kind.
        kind: u8,
        /// The announced length.
        len: usize,
    },
    /// A body that is not the message that its kind says.
    #[error("a frame of kind {kind} does not hold a {message}")]
    Malformed {
        /// The frame's kind.
        kind: u8,
        /// Name of the expected message.
        message: &'static str,
    },
    /// A frame of another kind than the protocol allows here.
    #[error("a frame of kind {got} came where {wanted} was expected")]
    Unexpected {
        /// The frame's kind.
        got: u8,
        /// What should have come.
        wanted: &'static str,
    },
}

impl Frame {
    /// A frame of raw bytes.
    pub fn raw(kind: FrameKind, body: impl Into<Bytes>) -> Self {
        Self { kind: kind as u8, body: body.into() }
    }

    /// A frame that holds a message.
    pub fn message(kind: FrameKind, message: &impl Message) -> Self {
        Self { kind: kind as u8, body: message.encode_to_vec().into() }
    }

    /// A STDIN, STDOUT or STDERR frame.
    pub fn data(kind: FrameKind, offset: u64, bytes: &[u8]) -> Self {
        let mut body = BytesMut::with_capacity(8 + bytes.len());
        body.put_u64_le(offset);
        body.put_slice(bytes);
        Self { kind: kind as u8, body: body.freeze() }
    }

    /// Whether it is of this kind.
    pub fn is(&self, kind: FrameKind) -> bool {
        self.kind == kind as u8
    }

    /// Reads the body as a message.
    pub fn decode<M: Message + Default>(&self) -> Result<M, FrameError> {
        M::decode(self.body.clone()).map_err(|_| FrameError::Malformed {
            kind: self.kind,
            message: std::any::type_name::<M>().rsplit("::").next().unwrap_or("message"),
        })
    }

    /// Splits the body of a STDIN, STDOUT or STDERR frame.
    pub fn split_data(&self) -> Result<(u64, Bytes), FrameError> {
        let mut body = self.body.clone();
        if body.len() < 8 {
            return Err(FrameError::Malformed { kind: self.kind, message: "offset" });
        }
        let offset = body.get_u64_le();
        Ok((offset, body))
    }

    /// Appends the frame to a buffer.
    pub fn encode(&self, out: &mut BytesMut) {
        out.reserve(HEADER_LEN + self.body.len());
        out.put_slice(&header(self.kind, self.body.len()));
        out.put_slice(&self.body);
    }

    /// The frame as bytes of its own.
    pub fn to_bytes(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(HEADER_LEN + self.body.len());
        self.encode(&mut out);
        out.freeze()
    }
}

/// The bytes in front of a body of `len` bytes.
///
/// # Panics
/// If `len` is over [`FRAME_BODY_MAX`]: senders cut their data.
pub fn header(kind: u8, len: usize) -> [u8; HEADER_LEN] {
    assert!(len <= FRAME_BODY_MAX, "senders cut their data to FRAME_BODY_MAX");
    let len = u32::try_from(len).expect("FRAME_BODY_MAX fits u32").to_le_bytes();
    [kind, len[0], len[1], len[2], len[3]]
}

/// Takes the next whole frame off the front of `buffer`; `None` means that more bytes are needed.
pub fn decode(buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
    if buffer.len() < HEADER_LEN {
        return Ok(None);
    }
    let kind = buffer[0];
    let len = u32::from_le_bytes([buffer[1], buffer[2], buffer[3], buffer[4]]) as usize;
    if len > FRAME_BODY_MAX {
        return Err(FrameError::TooLong { kind, len });
    }
    if buffer.len() < HEADER_LEN + len {
        return Ok(None);
    }
    buffer.advance(HEADER_LEN);
    Ok(Some(Frame { kind, body: buffer.split_to(len).freeze() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_length_over_the_bound_is_refused_from_the_header_alone() {
        let mut buffer = BytesMut::from(&[11, 255, 255, 255, 255][..]);
        let error = decode(&mut buffer).unwrap_err();
        assert_eq!(error, FrameError::TooLong { kind: 11, len: u32::MAX as usize });
    }

    proptest! {
        #[test]
        fn frames_round_trip_however_they_are_cut(
            bodies in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..300)), 0..8),
            cut in 1usize..64,
        ) {
            let frames: Vec<Frame> =
                bodies.into_iter().map(|(kind, body)| Frame { kind, body: body.into() }).collect();
            let mut wire = BytesMut::new();
            frames.iter().for_each(|frame| frame.encode(&mut wire));
            let (mut buffer, mut got) = (BytesMut::new(), Vec::new());
            for piece in wire.chunks(cut) {
                buffer.extend_from_slice(piece);
                while let Some(frame) = decode(&mut buffer).unwrap() {
                    got.push(frame);
                }
            }
            prop_assert_eq!(got, frames);
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(frame)) = decode(&mut buffer) {
                let _ = frame.split_data();
                let _ = frame.decode::<crate::v1::StreamOpen>();
            }
        }
    }
}
