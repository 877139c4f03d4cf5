//! Frames of a files stream, and the checks of what they carry.
//!
//! Pure. Numbers continue those of `towline_proto::frame`. Whoever receives decodes through here,
//! so that bounds hold before anything is acted on.

use bytes::{BufMut as _, Bytes, BytesMut};
use prost::Message;
use towline_proto::frame::{Frame, FrameError};
use towline_proto::v1;

use crate::content::BLOCK;
use crate::entry::{Entry, EntryError};
use crate::path::{PathError, TreePath};

/// Kinds of frames; what each carries and in which order is said in files.proto.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FilesKind {
    /// `FilesHello`.
    Hello = 80,
    /// `FilesReady`.
    Ready = 81,
    /// `FilesScan`.
    Scan = 82,
    /// `FilesEntries`; an empty one says that the guest is still at it.
    Entries = 83,
    /// `FilesScanned`.
    Scanned = 84,
    /// `FilesLookup`.
    Lookup = 85,
    /// `FilesFound`.
    Found = 86,
    /// `FilesGet`.
    Get = 87,
    /// `FilesContents`.
    Contents = 88,
    /// Offset (u64, little endian) and one block.
    Data = 89,
    /// `FilesEnd`.
    ContentEnd = 90,
    /// `FilesOps`.
    Ops = 91,
    /// `FilesEnd`.
    OpEnd = 92,
    /// `FilesResults`.
    Results = 93,
    /// `FilesBarrier`.
    Barrier = 94,
    /// `FilesBarrierDone`.
    BarrierDone = 95,
}

/// Entries of one page, paths of one request, ops of one frame.
pub const PAGE_ENTRIES_MAX: usize = 4096;

/// Encoded bytes at which a sender ends a page: well below the bound of a frame, since one more
/// entry may follow.
pub const PAGE_BYTES: usize = 256 << 10;

/// Says what was wrong with a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not the message that it says.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// An entry.
    #[error(transparent)]
    Entry(#[from] EntryError),
    /// A path.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Too many of something.
    #[error("a frame holds {0} items; at most {PAGE_ENTRIES_MAX} are allowed")]
    Items(usize),
    /// Something that must be there is not.
    #[error("a frame lacks {0}")]
    Missing(&'static str),
    /// A block.
    #[error("a block of {0} bytes; at most {BLOCK} are allowed")]
    Block(usize),
}

/// One change that the laptop asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Op {
    /// Where.
    pub path: TreePath,
    /// What is expected there.
    pub expected: Option<Entry>,
    /// What to do.
    pub change: Change,
}

/// What an op does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Puts this in place, with this content.
    Put(Entry, Payload),
    /// Sets mode and modification time.
    Set(Entry),
    /// Removes it.
    Remove,
}

/// How content comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// In the frame itself.
    Inline(Bytes),
    /// In DATA frames that follow.
    Streamed,
}

/// A frame that holds a message.
pub fn frame(kind: FilesKind, message: &impl Message) -> Frame {
    Frame { kind: kind as u8, body: message.encode_to_vec().into() }
}

/// A DATA frame.
pub fn data(offset: u64, block: &[u8]) -> Frame {
    let mut body = BytesMut::with_capacity(8 + block.len());
    body.put_u64_le(offset);
    body.put_slice(block);
    Frame { kind: FilesKind::Data as u8, body: body.freeze() }
}

/// Whether a frame is of this kind.
pub fn is(frame: &Frame, kind: FilesKind) -> bool {
    frame.kind == kind as u8
}

/// Reads a message, of the kind that must come now.
pub fn expect<M: Message + Default>(
    frame: &Frame,
    kind: FilesKind,
    wanted: &'static str,
) -> Result<M, WireError> {
    if !is(frame, kind) {
        return Err(FrameError::Unexpected { got: frame.kind, wanted }.into());
    }
    Ok(frame.decode()?)
}

/// Reads a DATA frame.
pub fn split_data(frame: &Frame) -> Result<(u64, Bytes), WireError> {
    let (offset, block) = frame.split_data()?;
    if block.len() > BLOCK {
        return Err(WireError::Block(block.len()));
    }
    Ok((offset, block))
}

/// Checks entries.
pub fn entries(messages: Vec<v1::Entry>) -> Result<Vec<(TreePath, Option<Entry>)>, WireError> {
    bounded(messages.len())?;
    messages.into_iter().map(|message| Ok(Entry::from_wire(message)?)).collect()
}

/// Checks paths.
pub fn paths(messages: Vec<v1::FilesPath>) -> Result<Vec<TreePath>, WireError> {
    bounded(messages.len())?;
    messages.into_iter().map(|message| Ok(TreePath::from_components(&message.path)?)).collect()
}

/// A path as a message.
pub fn path(path: &TreePath) -> v1::FilesPath {
    v1::FilesPath { path: path.to_wire() }
}

/// Checks ops.
pub fn ops(message: v1::FilesOps) -> Result<Vec<Op>, WireError> {
    bounded(message.ops.len())?;
    message.ops.into_iter().map(op).collect()
}

fn op(message: v1::FilesOp) -> Result<Op, WireError> {
    let (path, expected) =
        Entry::from_wire(message.expected.ok_or(WireError::Missing("what is expected"))?)?;
    let there = |entry: v1::Entry| -> Result<Entry, WireError> {
        Entry::from_wire(entry)?.1.ok_or(WireError::Missing("a kind"))
    };
    let change = match message.what.ok_or(WireError::Missing("what to do"))? {
        v1::files_op::What::Put(entry) if message.streamed => {
            Change::Put(there(entry)?, Payload::Streamed)
        }
        v1::files_op::What::Put(entry) => {
            Change::Put(there(entry)?, Payload::Inline(message.inline.into()))
        }
        v1::files_op::What::Set(entry) => Change::Set(there(entry)?),
        v1::files_op::What::Remove(_) => Change::Remove,
    };
    Ok(Op { path, expected, change })
}

fn bounded(items: usize) -> Result<(), WireError> {
    if items > PAGE_ENTRIES_MAX { Err(WireError::Items(items)) } else { Ok(()) }
}

/// Feeds a stranger's bytes to every decoder; for fuzzing. What decodes must encode to the same.
pub fn fuzz(bytes: &[u8]) {
    let mut buffer = BytesMut::from(bytes);
    while let Ok(Some(frame)) = towline_proto::frame::decode(&mut buffer) {
        let _ = split_data(&frame);
        if let Ok(message) = frame.decode::<v1::FilesEntries>() {
            let _ = paths(message.unlisted);
            for (path, entry) in entries(message.changed).unwrap_or_default() {
                let again = Entry::from_wire(crate::entry::to_wire(&path, entry.as_ref()));
                assert_eq!(again, Ok((path.clone(), entry.clone())));
                fuzz_rules(&path, entry.as_ref());
            }
        }
        if let Ok(message) = frame.decode::<v1::FilesOps>() {
            let _ = ops(message);
        }
        let _ = frame.decode::<v1::FilesScanned>();
        let _ = frame.decode::<v1::FilesContents>();
        let _ = frame.decode::<v1::FilesResults>();
    }
    let _ = crate::git_index::Tracked::parse(bytes);
}

fn fuzz_rules(path: &TreePath, entry: Option<&Entry>) {
    assert!(path.components().all(|name| !name.is_empty() && name != b".." && name != b"."));
    let _ = (path.to_string(), crate::guard::guarded(path, |_| false));
    if let Some(entry) = entry {
        let _ = crate::guard::leaves(path, &entry.target);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn strange_entries_are_refused() {
        let entry = |path: &[&[u8]], mode, kind: i32, target: &[u8]| v1::Entry {
            path: path.iter().map(|name| name.to_vec()).collect(),
            mode,
            kind,
            target: target.to_vec(),
            ..v1::Entry::default()
        };
        let bad = [
            entry(&[b".."], 0, 1, b""),
            entry(&[b"a", b"..", b"b"], 0, 1, b""),
            entry(&[b"a/b"], 0, 1, b""),
            entry(&[], 0, 1, b""),
            entry(&[b"a"], 0o4755, 1, b""),
            entry(&[b"a"], 0, 9, b""),
            entry(&[b"a"], 0, 3, b""),
            entry(&[b"a"], 0, 3, b"x\0y"),
            entry(&[b"a"], 0, 1, b"target"),
        ];
        for message in bad {
            assert!(entries(vec![message.clone()]).is_err(), "{message:?}");
        }
        assert!(entries(vec![entry(&[b"a"], 0o755, 1, b"")]).is_ok());
        assert!(entries(vec![entry(&[b"a"], 0, 1, b""); PAGE_ENTRIES_MAX + 1]).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(body in prop::collection::vec(any::<u8>(), 0..200), kind in 80u8..96) {
            fuzz(&Frame { kind, body: body.into() }.to_bytes());
        }
    }
}
