//! Carries out the laptop's changes, in the order sent, each as a compare-and-swap.
//!
//! A change that finds something else than expected changes nothing and says what is there. Only a
//! full disk, or a stream that makes no sense, ends the session.

use std::io;

use rustix::fs::{Gid, Uid};
use rustix::io::Errno;
use towline_filesync::tree::{Outcome, Stage, Staged, StagedFile};
use towline_filesync::wire::{self, Change, FilesKind, Op, PAGE_ENTRIES_MAX, Payload};
use towline_filesync::{BLOCK, Entry, Kind, TreePath, entry};
use towline_proto::frame::{Frame, FrameError};
use towline_proto::v1;

use super::session::{Fault, Session, Wire};
use crate::refusal::Refusal;

/// Changes under way.
#[derive(Debug, Default)]
pub(super) struct Ops {
    stage: Option<Stage>,
    /// A file whose blocks come in frames of their own.
    streaming: Option<(Op, Entry, Result<StagedFile, io::Error>)>,
}

impl Ops {
    /// Whether a frame is one of these.
    pub(super) fn takes(&self, frame: &Frame) -> bool {
        [FilesKind::Ops, FilesKind::Data, FilesKind::OpEnd]
            .iter()
            .any(|kind| wire::is(frame, *kind))
    }

    /// Carries out what a frame asks.
    pub(super) fn take(
        &mut self,
        session: &mut Session,
        wire: &Wire,
        frame: &Frame,
    ) -> Result<(), Fault> {
        if wire::is(frame, FilesKind::Data) {
            return self.block(frame);
        }
        if wire::is(frame, FilesKind::OpEnd) {
            return self.end(session, wire, frame);
        }
        if self.streaming.is_some() {
            return Err(unexpected(frame, "DATA or OP_END"));
        }
        let mut results = v1::FilesResults::default();
        for op in wire::ops(wire::expect(frame, FilesKind::Ops, "OPS")?)? {
            if self.streaming.is_some() {
                return Err(Refusal::invalid("an op follows a streamed one in its frame").into());
            }
            if let Some(result) = self.op(session, op)? {
                results.results.push(result);
            }
        }
        debug_assert!(results.results.len() <= PAGE_ENTRIES_MAX, "a frame of ops is bounded");
        if results.results.is_empty() { Ok(()) } else { wire.send(FilesKind::Results, &results) }
    }

    /// Ends a run of changes.
    pub(super) fn finish(&mut self, _session: &mut Session) -> Result<(), Fault> {
        if self.streaming.is_some() {
            return Err(Refusal::invalid("a BARRIER came in the middle of a file").into());
        }
        match self.stage.take().map(Stage::close) {
            Some(Err(error)) => Err(Refusal::io("changing the sandbox's folder", &error).into()),
            Some(Ok(())) | None => Ok(()),
        }
    }

    fn stage(&mut self, session: &Session) -> Result<&mut Stage, Fault> {
        if self.stage.is_none() {
            let owner = (rustix::process::geteuid().is_root())
                .then(|| (Uid::from_raw(session.uid), Gid::from_raw(session.gid)));
            let stage = Stage::open(&session.root, owner, false);
            self.stage = Some(stage.map_err(|error| {
                Refusal::io("preparing changes in the sandbox's folder", &error)
            })?);
        }
        self.stage.as_mut().ok_or_else(|| Refusal::invalid("no stage").into())
    }

    /// `None`: the answer follows its blocks.
    fn op(&mut self, session: &mut Session, op: Op) -> Result<Option<v1::FilesResult>, Fault> {
        let stage = self.stage(session)?;
        let expected = op.expected.as_ref();
        let outcome = match &op.change {
            Change::Put(new, Payload::Streamed) => {
                let file = stage.file(new.stamp.size);
                let new = new.clone();
                self.streaming = Some((op, new, file));
                return Ok(None);
            }
            Change::Put(new, Payload::Inline(bytes)) => put(stage, &op.path, new, bytes, expected),
            Change::Set(new) => match expected {
                Some(expected) => stage.set(&op.path, new.mode, new.stamp.mtime_ns, expected),
                None => Err(io::Error::from(io::ErrorKind::InvalidInput)),
            },
            Change::Remove => remove(stage, session, &op.path, expected),
        };
        answer(session, &op.path, outcome).map(Some)
    }

    fn block(&mut self, frame: &Frame) -> Result<(), Fault> {
        let Some((_, _, file)) = &mut self.streaming else {
            return Err(unexpected(frame, "OPS"));
        };
        let (offset, bytes) = wire::split_data(frame)?;
        if let Ok(open) = file
            && let Err(error) = open.block(offset, &bytes)
        {
            *file = Err(error);
        }
        Ok(())
    }

    fn end(&mut self, session: &mut Session, wire: &Wire, frame: &Frame) -> Result<(), Fault> {
        let end: v1::FilesEnd = wire::expect(frame, FilesKind::OpEnd, "OP_END")?;
        let Some((op, new, file)) = self.streaming.take() else {
            return Err(unexpected(frame, "OPS"));
        };
        let stage = self.stage(session)?;
        let outcome = match file {
            Ok(file) if !end.whole => {
                stage.discard(file);
                Ok(Outcome::Changed(op.expected.clone()))
            }
            Ok(file) => stage
                .finish(file, new.mode, new.stamp.mtime_ns)
                .and_then(|staged| stage.put(&op.path, staged, op.expected.as_ref())),
            Err(error) => Err(error),
        };
        let result = answer(session, &op.path, outcome)?;
        wire.send(FilesKind::Results, &v1::FilesResults { results: vec![result] })
    }
}

fn put(
    stage: &mut Stage,
    path: &TreePath,
    new: &Entry,
    bytes: &[u8],
    expected: Option<&Entry>,
) -> io::Result<Outcome> {
    let staged = match new.kind {
        Kind::Directory => return stage.directory(path, new.mode, expected),
        Kind::Symlink => stage.symlink(&new.target)?,
        Kind::File => inline(stage, new, bytes)?,
    };
    stage.put(path, staged, expected)
}

fn inline(stage: &mut Stage, new: &Entry, bytes: &[u8]) -> io::Result<Staged> {
    let mut file = stage.file(new.stamp.size)?;
    if !bytes.is_empty() {
        let size_fits = bytes.len() as u64 == new.stamp.size && bytes.len() <= BLOCK;
        let written =
            if size_fits { file.block(0, bytes) } else { Err(io::ErrorKind::InvalidData.into()) };
        if let Err(error) = written {
            stage.discard(file);
            return Err(error);
        }
    }
    stage.finish(file, new.mode, new.stamp.mtime_ns)
}

/// A directory with nothing but ignored paths left in it goes with them: they are the sandbox's own.
fn remove(
    stage: &mut Stage,
    session: &Session,
    path: &TreePath,
    expected: Option<&Entry>,
) -> io::Result<Outcome> {
    let outcome = stage.remove(path, expected)?;
    if outcome != Outcome::NotEmpty {
        return Ok(outcome);
    }
    let listed = session.list()?.entries;
    if listed.keys().any(|other| other.is_below(path)) {
        return Ok(Outcome::NotEmpty);
    }
    stage.remove_all(path)?;
    Ok(Outcome::Done(None))
}

fn answer(
    session: &mut Session,
    path: &TreePath,
    outcome: io::Result<Outcome>,
) -> Result<v1::FilesResult, Fault> {
    use v1::FilesOutcome as Said;
    let (said, now, message) = match outcome {
        Ok(Outcome::Done(now)) => {
            session.index.record(path, now.as_ref());
            (Said::Done, now, String::new())
        }
        Ok(Outcome::Changed(now)) => (Said::Changed, now, String::new()),
        Ok(Outcome::NotEmpty) => (Said::NotEmpty, None, String::new()),
        Err(error) => {
            if matches!(Errno::from_io_error(&error), Some(Errno::NOSPC | Errno::DQUOT)) {
                return Err(Refusal::io(format!("writing `{path}` in the sandbox"), &error).into());
            }
            (Said::Failed, None, error.to_string())
        }
    };
    Ok(v1::FilesResult {
        outcome: said.into(),
        entry: Some(entry::to_wire(path, now.as_ref())),
        message,
    })
}

fn unexpected(frame: &Frame, wanted: &'static str) -> Fault {
    wire::WireError::from(FrameError::Unexpected { got: frame.kind, wanted }).into()
}
