//! One sync session: requests in, answers out, in order, on a thread that may block.
//!
//! The laptop decides; what it sends is checked by `towline_filesync::wire` all the same. A failure
//! of the stream ends the session at once; everything done so far stands by itself.

use std::io;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use prost::Message as _;
use tokio::sync::{OwnedMutexGuard, mpsc};
use towline_filesync::tree::{LISTED_MAX, Root, Scan, ScanOptions, content_of, read_blocks, scan};
use towline_filesync::wire::{self, FilesKind, PAGE_BYTES, PAGE_ENTRIES_MAX};
use towline_filesync::{BLOCK, Entry, Kind, TreePath, entry};
use towline_proto::frame::Frame;
use towline_proto::limits::GUEST_PROTOCOL;
use towline_proto::v1;

use super::index::Index;
use super::ops::Ops;
use crate::refusal::Refusal;

/// How often a long scan says that it goes on.
const STILL_AT_IT: Duration = Duration::from_secs(2);

/// Files of one request that are flushed one by one before they are read; more are flushed together.
const FLUSHED_ALONE: usize = 32;

/// The two queues of frames.
#[derive(Debug)]
pub(super) struct Wire {
    pub(super) incoming: mpsc::Receiver<Frame>,
    pub(super) outgoing: mpsc::Sender<Frame>,
}

impl Wire {
    pub(super) fn send(&self, kind: FilesKind, message: &impl prost::Message) -> Result<(), Fault> {
        self.send_frame(wire::frame(kind, message))
    }

    fn send_frame(&self, frame: Frame) -> Result<(), Fault> {
        self.outgoing.blocking_send(frame).map_err(|_| Fault::Cut)
    }
}

/// Why a session ends early.
#[derive(Debug)]
pub(super) enum Fault {
    /// Nobody is left to tell.
    Cut,
    /// The laptop is told.
    Refused(Refusal),
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<wire::WireError> for Fault {
    fn from(error: wire::WireError) -> Self {
        Self::Refused(Refusal::invalid(error.to_string()))
    }
}

/// A session on one tree.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) root: Root,
    pub(super) index: OwnedMutexGuard<Index>,
    pub(super) uid: u32,
    pub(super) gid: u32,
    git: bool,
    excludes: Vec<u8>,
    flushed: bool,
}

impl Session {
    pub(super) fn new(
        root: &Path,
        uid: u32,
        gid: u32,
        index: OwnedMutexGuard<Index>,
    ) -> io::Result<Self> {
        let root = Root::open(root)?;
        Ok(Self { root, index, uid, gid, git: false, excludes: Vec::new(), flushed: false })
    }

    /// Answers until the laptop ends the stream.
    pub(super) fn run(mut self, mut wire: Wire) -> Result<(), Refusal> {
        match self.answer_all(&mut wire) {
            Ok(()) | Err(Fault::Cut) => Ok(()),
            Err(Fault::Refused(refusal)) => Err(refusal),
        }
    }

    fn answer_all(&mut self, wire: &mut Wire) -> Result<(), Fault> {
        let mut ops = Ops::default();
        while let Some(frame) = wire.incoming.blocking_recv() {
            if ops.takes(&frame) {
                ops.take(self, wire, &frame)?;
                continue;
            }
            if wire::is(&frame, FilesKind::Barrier) {
                let barrier: v1::FilesBarrier =
                    wire::expect(&frame, FilesKind::Barrier, "BARRIER")?;
                ops.finish(self)?;
                self.barrier(wire, barrier.id)?;
                continue;
            }
            self.answer(wire, &frame)?;
        }
        Ok(())
    }

    fn answer(&mut self, wire: &Wire, frame: &Frame) -> Result<(), Fault> {
        match frame.kind {
            kind if kind == FilesKind::Hello as u8 => self.hello(wire, frame),
            kind if kind == FilesKind::Scan as u8 => self.scan(wire, frame),
            kind if kind == FilesKind::Lookup as u8 => self.lookup(wire, frame),
            kind if kind == FilesKind::Get as u8 => self.get(wire, frame),
            kind => Err(Refusal::invalid(format!("a frame of kind {kind} is no request")).into()),
        }
    }

    fn hello(&mut self, wire: &Wire, frame: &Frame) -> Result<(), Fault> {
        let hello: v1::FilesHello = wire::expect(frame, FilesKind::Hello, "HELLO")?;
        self.git = hello.git;
        self.excludes = hello.excludes;
        let birth =
            self.root.birth().map_err(|error| Refusal::io("looking at the folder", &error))?;
        let ready = v1::FilesReady {
            protocol: GUEST_PROTOCOL,
            incarnation: birth.to_vec(),
            index: Some(self.index.state()),
        };
        wire.send(FilesKind::Ready, &ready)
    }

    fn scan(&mut self, wire: &Wire, frame: &Frame) -> Result<(), Fault> {
        let request: v1::FilesScan = wire::expect(frame, FilesKind::Scan, "SCAN")?;
        let mut found = self.scan_aloud(wire)?;
        let known = self.index.is_known(request.known.as_ref());
        let entries = std::mem::take(&mut found.entries);
        let difference = self.index.update(entries, known);
        let mut page = Page::default();
        for path in difference.changed {
            let Some(entry) = self.index.entry(&path) else { continue };
            page.changed(wire, entry.to_wire(&path))?;
        }
        for path in difference.unlisted {
            page.unlisted(wire, wire::path(&path))?;
        }
        page.send(wire)?;
        wire.send(FilesKind::Scanned, &self.scanned(found, !known))
    }

    fn scanned(&self, found: Scan, complete: bool) -> v1::FilesScanned {
        let skipped =
            |(path, reason): (TreePath, String)| v1::FilesSkipped { path: path.to_wire(), reason };
        v1::FilesScanned {
            index: Some(self.index.state()),
            complete,
            ignored: found.ignored_count,
            ignored_paths: found.ignored.iter().take(100).map(wire::path).collect(),
            skipped: found.skipped.into_iter().take(LISTED_MAX.min(100)).map(skipped).collect(),
            git_locked: found.git_locked,
        }
    }

    /// Lists the tree; the laptop hears every now and then that it goes on.
    fn scan_aloud(&self, wire: &Wire) -> Result<Scan, Fault> {
        let (done, listing) = channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                while listing.recv_timeout(STILL_AT_IT) == Err(RecvTimeoutError::Timeout) {
                    if wire.send(FilesKind::Entries, &v1::FilesEntries::default()).is_err() {
                        break;
                    }
                }
            });
            let scanned = self.list();
            drop(done);
            scanned.map_err(|error| Refusal::io("listing the sandbox's folder", &error).into())
        })
    }

    pub(super) fn list(&self) -> io::Result<Scan> {
        let options = ScanOptions { git: self.git, secrets_stay: false, excludes: &self.excludes };
        scan(&self.root, options, &|_| true)
    }

    fn lookup(&mut self, wire: &Wire, frame: &Frame) -> Result<(), Fault> {
        let request: v1::FilesLookup = wire::expect(frame, FilesKind::Lookup, "LOOKUP")?;
        let mut found = v1::FilesFound::default();
        for path in wire::paths(request.paths)? {
            let looked = self.root.look(&path);
            let mut entry =
                looked.map_err(|error| Refusal::io(format!("looking at `{path}`"), &error))?;
            if let Some(entry) =
                entry.as_mut().filter(|entry| request.contents && entry.kind == Kind::File)
            {
                entry.content = content_of(&self.root, &path).ok().flatten();
            }
            found.entries.push(entry::to_wire(&path, entry.as_ref()));
        }
        wire.send(FilesKind::Found, &found)
    }

    fn get(&mut self, wire: &Wire, frame: &Frame) -> Result<(), Fault> {
        let request: v1::FilesGet = wire::expect(frame, FilesKind::Get, "GET")?;
        let paths = wire::paths(request.paths)?;
        let alone = paths.len() <= FLUSHED_ALONE;
        if !alone && !self.flushed {
            // What the laptop takes over must not be lost here by a crash: it would look like an edit.
            self.root.sync().map_err(|error| Refusal::io("flushing the sandbox's disk", &error))?;
            self.flushed = true;
        }
        let mut page = v1::FilesContents::default();
        let mut bytes = 0;
        for path in paths {
            let content = self.content(wire, &path, alone, &mut page)?;
            bytes +=
                content.inline.len() + content.entry.as_ref().map_or(0, v1::Entry::encoded_len);
            page.contents.push(content);
            if bytes >= PAGE_BYTES || page.contents.len() >= PAGE_ENTRIES_MAX {
                wire.send(FilesKind::Contents, &std::mem::take(&mut page))?;
                bytes = 0;
            }
        }
        if page.contents.is_empty() { Ok(()) } else { wire.send(FilesKind::Contents, &page) }
    }

    /// Reads one file. A long one is streamed, after the page of those before it.
    fn content(
        &self,
        wire: &Wire,
        path: &TreePath,
        flush: bool,
        page: &mut v1::FilesContents,
    ) -> Result<v1::FilesContent, Fault> {
        let mut streamed = false;
        let mut inline = Vec::new();
        let mut cut = false;
        if flush {
            // Best effort: a file that cannot be flushed cannot be read either, and that is said.
            let _ = self.root.flush(path);
        }
        let read = read_blocks(&self.root, path, |entry, offset, block| {
            if entry.stamp.size <= BLOCK as u64 {
                inline = block.to_vec();
                return Ok(());
            }
            let sent = announce(wire, path, entry, page, &mut streamed)
                .and_then(|()| wire.send_frame(wire::data(offset, block)));
            sent.map_err(|_| {
                cut = true;
                io::Error::from(io::ErrorKind::BrokenPipe)
            })
        });
        if cut {
            return Err(Fault::Cut);
        }
        let outcome = |outcome: v1::FilesOutcome| v1::FilesContent {
            outcome: outcome.into(),
            entry: Some(entry::nothing(path)),
            ..v1::FilesContent::default()
        };
        let content = match read {
            Ok(read) if read.changed => outcome(v1::FilesOutcome::Changed),
            Ok(read) => v1::FilesContent {
                entry: Some(read.entry.to_wire(path)),
                inline,
                ..outcome(v1::FilesOutcome::Done)
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                outcome(v1::FilesOutcome::Changed)
            }
            Err(error) => {
                v1::FilesContent { message: error.to_string(), ..outcome(v1::FilesOutcome::Failed) }
            }
        };
        if streamed {
            let whole = content.outcome() == v1::FilesOutcome::Done;
            wire.send(FilesKind::ContentEnd, &v1::FilesEnd { whole, entry: None })?;
        }
        Ok(content)
    }

    fn barrier(&mut self, wire: &Wire, id: u64) -> Result<(), Fault> {
        self.root.sync().map_err(|error| Refusal::io("flushing the sandbox's disk", &error))?;
        wire.send(
            FilesKind::BarrierDone,
            &v1::FilesBarrierDone { id, index: Some(self.index.state()) },
        )
    }
}

/// Says that blocks follow, once.
fn announce(
    wire: &Wire,
    path: &TreePath,
    entry: &Entry,
    page: &mut v1::FilesContents,
    streamed: &mut bool,
) -> Result<(), Fault> {
    if std::mem::replace(streamed, true) {
        return Ok(());
    }
    if !page.contents.is_empty() {
        wire.send(FilesKind::Contents, &std::mem::take(page))?;
    }
    let head = v1::FilesContent {
        entry: Some(entry.to_wire(path)),
        streamed: true,
        ..v1::FilesContent::default()
    };
    wire.send(FilesKind::Contents, &v1::FilesContents { contents: vec![head] })
}

/// Entries on their way, sent when there are enough.
#[derive(Default)]
struct Page {
    entries: v1::FilesEntries,
    bytes: usize,
}

impl Page {
    fn changed(&mut self, wire: &Wire, entry: v1::Entry) -> Result<(), Fault> {
        self.bytes += entry.encoded_len();
        self.entries.changed.push(entry);
        self.send_full(wire)
    }

    fn unlisted(&mut self, wire: &Wire, path: v1::FilesPath) -> Result<(), Fault> {
        self.bytes += path.encoded_len();
        self.entries.unlisted.push(path);
        self.send_full(wire)
    }

    fn send_full(&mut self, wire: &Wire) -> Result<(), Fault> {
        let items = self.entries.changed.len() + self.entries.unlisted.len();
        if self.bytes < PAGE_BYTES && items < PAGE_ENTRIES_MAX { Ok(()) } else { self.send(wire) }
    }

    fn send(&mut self, wire: &Wire) -> Result<(), Fault> {
        self.bytes = 0;
        if self.entries.changed.is_empty() && self.entries.unlisted.is_empty() {
            return Ok(());
        }
        wire.send(FilesKind::Entries, &std::mem::take(&mut self.entries))
    }
}
