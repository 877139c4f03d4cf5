//! `tow diff` in the guest: walks what changed against the image and tells the client of it, piece
//! by piece.
//!
//! The walk is plain blocking code on a thread of its own; a client that leaves ends it.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{
    self, DiffDone, DiffPart, FileChange, FileChangeKind, FileType, StreamErrorCode,
};
use towline_streams::{FrameReader, FrameWriter};

use crate::changes::{
    Change, Found, Kind, LeftOut, OwnPaths, PackageChange, Visitor, WalkError, What,
    packages_changed, walk,
};
use crate::credentials::RootFiles;
use crate::refusal::Refusal;

/// Changes of one part, and bytes of their paths.
const CHANGES_MAX: usize = 1000;
const PATHS_MAX: usize = 256 << 10;
/// A part is sent this often, with nothing in it too: the client sees that the walk goes on.
const PART_EVERY: Duration = Duration::from_secs(1);
/// Parts that wait for the client.
const WAITING_MAX: usize = 4;

/// The trees that are compared.
#[derive(Debug, Clone)]
pub struct Trees {
    /// The overlay's upper directory.
    pub upper: PathBuf,
    /// The image as one tree.
    pub below: PathBuf,
    /// The workload's root, which is both.
    pub root: PathBuf,
    /// Directories that the guest agent made if the image had none: the project folder, the user's
    /// home, the working directory.
    pub made: Vec<Vec<u8>>,
    /// Where the project folder is mounted, and where the agent has it.
    pub project: Option<(Vec<u8>, PathBuf)>,
}

/// Serves one diff stream whose OPEN was read.
pub async fn serve<R, W>(trees: Trees, mut reader: FrameReader<R>, mut writer: FrameWriter<W>)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let done = tokio::select! {
        done = tell(trees, &mut writer) => done,
        // The client has left, or breaks the protocol: nothing is expected of it.
        _ = reader.next() => return,
    };
    let _ = match done {
        Ok(done) => writer.send_message(FrameKind::DiffDone, &done).await,
        Err(refusal) => writer.send_message(FrameKind::Error, &refusal.to_message()).await,
    };
    let _ = writer.finish().await;
}

async fn tell<W: AsyncWrite + Unpin>(
    trees: Trees,
    writer: &mut FrameWriter<W>,
) -> Result<DiffDone, Refusal> {
    let (parts, mut waiting) = mpsc::channel(WAITING_MAX);
    let (ended, end) = oneshot::channel();
    std::thread::Builder::new()
        .name("diff".into())
        .spawn(move || {
            let _ = ended.send(trees.compare(parts));
        })
        .map_err(|error| Refusal::io("cannot start a thread for the comparison", &error))?;
    while let Some(part) = waiting.recv().await {
        if writer.send(&part).await.is_err() {
            break;
        }
    }
    // The thread sees that nobody listens.
    drop(waiting);
    let died = || Refusal::new(StreamErrorCode::Internal, "the comparison's thread died");
    end.await.unwrap_or_else(|_| Err(died()))
}

impl Trees {
    fn compare(&self, parts: mpsc::Sender<Frame>) -> Result<DiffDone, Refusal> {
        let (upper, below) = (self.open(&self.upper)?, self.open(&self.below)?);
        let own = OwnPaths::new(self.made.iter().map(Vec::as_slice));
        let mut teller = Teller::new(parts);
        walk(&upper, &below, &own, &mut teller).map_err(|error| refusal(&error))?;
        let (before, now) = (RootFiles::beneath(below), RootFiles::beneath(self.open(&self.root)?));
        let packages = packages_changed(&before, &now)
            .map_err(|error| Refusal::io("cannot read the list of packages", &error))?;
        for packages in packages.chunks(CHANGES_MAX) {
            teller.part.packages = packages.iter().map(package).collect();
            teller.send().map_err(|error| refusal(&error))?;
        }
        teller.send().map_err(|error| refusal(&error))?;
        Ok(teller.done)
    }

    /// Opens one of them.
    pub(crate) fn open(&self, path: &Path) -> Result<OwnedFd, Refusal> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty())
            .map_err(|error| Refusal::io("cannot open the sandbox's own files", &error.into()))
    }
}

/// Why there is no answer.
pub(crate) fn refusal(error: &WalkError) -> Refusal {
    match error {
        WalkError::At { source, .. } => {
            Refusal { message: error.to_string(), ..Refusal::io("", source) }
        }
        WalkError::TooDeep { .. } | WalkError::TooMany { .. } => {
            Refusal::new(StreamErrorCode::Limit, error.to_string())
        }
        WalkError::Shorter { .. } | WalkError::NotForImages { .. } => {
            Refusal::invalid(error.to_string())
        }
        WalkError::Stopped => Refusal::new(StreamErrorCode::Internal, error.to_string()),
    }
}

/// Collects changes into parts.
struct Teller {
    parts: mpsc::Sender<Frame>,
    part: DiffPart,
    paths_len: usize,
    sent: Instant,
    done: DiffDone,
}

impl Teller {
    fn new(parts: mpsc::Sender<Frame>) -> Self {
        let (part, done) = Default::default();
        Self { parts, part, paths_len: 0, sent: Instant::now(), done }
    }

    fn send(&mut self) -> Result<(), WalkError> {
        let mut part = std::mem::take(&mut self.part);
        part.looked_at = self.done.looked_at;
        (self.paths_len, self.sent) = (0, Instant::now());
        let frame = Frame::message(FrameKind::DiffPart, &part);
        self.parts.blocking_send(frame).map_err(|_| WalkError::Stopped)
    }
}

impl Visitor for Teller {
    fn change(&mut self, change: Change, _: Option<&Found>) -> Result<(), WalkError> {
        self.paths_len += change.path.len();
        self.part.changes.push(file(change));
        match self.part.changes.len() >= CHANGES_MAX || self.paths_len >= PATHS_MAX {
            true => self.send(),
            false => Ok(()),
        }
    }

    fn looked(&mut self, new: bool) -> Result<(), WalkError> {
        self.done.looked_at += u64::from(new);
        match self.sent.elapsed() >= PART_EVERY {
            true => self.send(),
            false => Ok(()),
        }
    }

    fn left_out(&mut self, why: LeftOut) {
        match why {
            LeftOut::Socket => self.done.sockets += 1,
            LeftOut::Volatile => self.done.volatile += 1,
        }
    }
}

fn file(Change { path, what }: Change) -> FileChange {
    let path = [b"/", &path[..]].concat();
    match what {
        What::Added(now) => FileChange {
            path,
            kind: FileChangeKind::Added.into(),
            r#type: file_type(now.kind).into(),
            size: now.size,
            ..FileChange::default()
        },
        What::Changed { before, now, differs } => FileChange {
            path,
            kind: FileChangeKind::Changed.into(),
            r#type: file_type(now.kind).into(),
            size: now.size,
            size_before: before.size,
            type_differs: differs.kind,
            content_differs: differs.content,
            mode_differs: differs.mode,
            owner_differs: differs.owner,
            xattrs_differ: differs.xattrs,
            links_differ: differs.links,
        },
        What::Removed(before) => FileChange {
            path,
            kind: FileChangeKind::Removed.into(),
            r#type: file_type(before.kind).into(),
            size_before: before.size,
            ..FileChange::default()
        },
    }
}

/// A kind as it is told.
pub(crate) fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Regular => FileType::Regular,
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Character => FileType::CharacterDevice,
        Kind::Block => FileType::BlockDevice,
        Kind::Fifo => FileType::Fifo,
    }
}

fn package(change: &PackageChange) -> v1::PackageChange {
    v1::PackageChange {
        manager: change.manager.into(),
        name: change.name.clone(),
        architecture: change.architecture.clone(),
        version_before: change.before.clone().unwrap_or_default(),
        version: change.now.clone().unwrap_or_default(),
    }
}
