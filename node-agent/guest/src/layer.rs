//! What `tow save` makes a layer of: each change against the image, with all of its content, in the
//! order of the paths' bytes.
//!
//! The workload is halted meanwhile, so that all is of one instant; not longer than a bound, and the
//! node is told when that was not enough. The walk is plain blocking code on a thread of its own.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::fs::{SeekFrom, major, minor, seek};
use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{
    FileType, LayerDone, LayerEntry, LayerOpen, LayerPart, LayerXattr, StreamErrorCode,
};
use towline_streams::{FrameReader, FrameWriter};

use crate::changes::{
    Change, Found, Kind, LeftOut, Meta, Node, OwnPaths, Project, Visitor, WalkError, Wanted, What,
    walk_wanted,
};
use crate::diff::{Trees, file_type, refusal};
use crate::refusal::Refusal;
use crate::workload::{Halt, Workload};
use crate::{files, root};

/// A workload is halted for no longer: what it talks to would take it for dead.
const HALT_MAX: Duration = Duration::from_secs(60);
/// Content that travels with its entry.
const SMALL_MAX: u64 = 64 << 10;
/// Bytes of a LAYER_DATA frame.
const DATA_MAX: usize = 512 << 10;
/// Entries of one part, and about how many bytes they may have.
const ENTRIES_MAX: usize = 1000;
const PART_MAX: usize = 512 << 10;
/// A part is sent this often, with nothing in it too.
const PART_EVERY: Duration = Duration::from_secs(1);
/// Frames that wait for the node.
const WAITING_MAX: usize = 4;

/// Serves one layer stream whose OPEN was read.
pub async fn serve<R, W>(
    open: LayerOpen,
    trees: Trees,
    workload: &Workload,
    mut reader: FrameReader<R>,
    mut writer: FrameWriter<W>,
) where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let done = tokio::select! {
        done = tell(open, trees, workload, &mut writer) => done,
        // The node has left, or breaks the protocol: nothing is expected of it.
        _ = reader.next() => return,
    };
    let _ = match done {
        Ok(done) => writer.send_message(FrameKind::LayerDone, &done).await,
        Err(refusal) => writer.send_message(FrameKind::Error, &refusal.to_message()).await,
    };
    let _ = writer.finish().await;
}

async fn tell<W: AsyncWrite + Unpin>(
    open: LayerOpen,
    trees: Trees,
    workload: &Workload,
    writer: &mut FrameWriter<W>,
) -> Result<LayerDone, Refusal> {
    let halted = Halted::new(workload).await;
    let project = trees.project.as_ref().filter(|_| open.with_folder);
    // What syncs the folder is no workload.
    let held = project.map(|(_, folder)| files::hold(folder));
    let holds = halted.is_some() && held.as_ref().is_none_or(Option::is_some);
    let (frames, mut waiting) = mpsc::channel(WAITING_MAX);
    let (ended, end) = oneshot::channel();
    std::thread::Builder::new()
        .name("layer".into())
        .spawn(move || {
            let _ = ended.send(trees.layer(&open, frames));
        })
        .map_err(|error| Refusal::io("cannot start a thread for the files", &error))?;
    let one_instant = {
        let mut passed = std::pin::pin!(pass_on(&mut waiting, writer));
        let in_time = tokio::select! {
            () = &mut passed => true,
            () = sleep(HALT_MAX), if halted.is_some() => false,
        };
        let one_instant = in_time && holds;
        drop((halted, held));
        if !in_time {
            passed.await;
        }
        one_instant
    };
    // The thread sees that nobody listens.
    drop(waiting);
    let died = || Refusal::new(StreamErrorCode::Internal, "the thread that reads the files died");
    let done = end.await.unwrap_or_else(|_| Err(died()))?;
    Ok(LayerDone { one_instant, ..done })
}

async fn pass_on<W: AsyncWrite + Unpin>(
    waiting: &mut mpsc::Receiver<Frame>,
    writer: &mut FrameWriter<W>,
) {
    while let Some(frame) = waiting.recv().await {
        if writer.send(&frame).await.is_err() {
            return;
        }
    }
}

/// Halts the workload for as long as it lives.
struct Halted<'a>(&'a Workload);

impl<'a> Halted<'a> {
    async fn new(workload: &'a Workload) -> Option<Self> {
        match workload.freeze(Halt::Save).await {
            Ok(()) => Some(Self(workload)),
            Err(error) => {
                crate::agent::log(&format!("the workload runs while it is saved: {error}"));
                None
            }
        }
    }
}

impl Drop for Halted<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.thaw(Halt::Save) {
            crate::agent::log(&format!("cannot thaw the workload: {error}"));
        }
    }
}

impl Trees {
    fn layer(&self, open: &LayerOpen, frames: mpsc::Sender<Frame>) -> Result<LayerDone, Refusal> {
        let (upper, below) = (self.open(&self.upper)?, self.open(&self.below)?);
        let project = open.with_folder.then(|| self.project()).transpose()?;
        let wanted = Wanted { whole: open.whole, project };
        let own = OwnPaths::new(self.made.iter().map(Vec::as_slice));
        let mut teller = Teller::new(frames);
        let walked = walk_wanted(&upper, &below, &own, &wanted, &mut teller);
        walked.and_then(|()| teller.send()).map_err(|error| refusal(&error))?;
        Ok(teller.done)
    }

    fn project(&self) -> Result<Project, Refusal> {
        let none = || {
            let why = "the sandbox has no project folder (`--no-sync`): save it without \
                       `--with-folder`";
            Refusal::invalid(why)
        };
        let (at, folder) = self.project.as_ref().ok_or_else(none)?;
        let names = at.split(|&byte| byte == b'/').filter(|name| !matches!(*name, b"" | b"."));
        let path = names.collect::<Vec<_>>().join(&b'/');
        let shown = || format!("/{}", String::from_utf8_lossy(&path));
        if OwnPaths::is_beneath_volatile(&path) {
            let why = format!(
                "the project folder is {}, of which no image holds anything: its content does not \
                 outlive a start; move the folder elsewhere, or save without `--with-folder`",
                shown()
            );
            return Err(Refusal::invalid(why));
        }
        if !root::leads_straight(&self.root, &path) {
            let why = format!(
                "the image has a link, or no directory, on the way to the project folder {}; save \
                 without `--with-folder`",
                shown()
            );
            return Err(Refusal::invalid(why));
        }
        Ok(Project { folder: self.open(folder)?, path })
    }
}

/// Sends entries and content.
struct Teller {
    frames: mpsc::Sender<Frame>,
    part: LayerPart,
    part_len: usize,
    sent: Instant,
    /// The first name of each file that has more.
    names: BTreeMap<Node, Vec<u8>>,
    done: LayerDone,
}

impl Teller {
    fn new(frames: mpsc::Sender<Frame>) -> Self {
        let (part, names, done) = Default::default();
        Self { frames, part, part_len: 0, sent: Instant::now(), names, done }
    }

    fn send(&mut self) -> Result<(), WalkError> {
        let mut part = std::mem::take(&mut self.part);
        part.looked_at = self.done.looked_at;
        (self.part_len, self.sent) = (0, Instant::now());
        self.frame(Frame::message(FrameKind::LayerPart, &part))
    }

    fn frame(&self, frame: Frame) -> Result<(), WalkError> {
        self.frames.blocking_send(frame).map_err(|_| WalkError::Stopped)
    }

    fn add(&mut self, entry: LayerEntry, len: usize) -> Result<(), WalkError> {
        self.part_len += len;
        self.part.entries.push(entry);
        match self.part.entries.len() >= ENTRIES_MAX || self.part_len >= PART_MAX {
            true => self.send(),
            false => Ok(()),
        }
    }

    fn file(&mut self, path: Vec<u8>, now: &Found) -> Result<(), WalkError> {
        let Meta { kind, mode, uid, gid, size, device, links, modified_s } = now.meta;
        let mut entry = LayerEntry {
            r#type: file_type(kind).into(),
            path: path.clone(),
            mode,
            uid,
            gid,
            modified_s,
            ..LayerEntry::default()
        };
        if kind == Kind::Regular && links > 1 {
            if let Some(first) = self.names.get(&now.node) {
                entry.hard_link = first.clone();
                let len = path.len() + first.len();
                return self.add(entry, len);
            }
            self.names.insert(now.node, path.clone());
            entry.has_links = true;
        }
        let at = |source| WalkError::At { path: path.clone(), source };
        let xattrs = now.xattrs().map_err(at)?;
        let mut len = path.len();
        for (name, value) in xattrs {
            len += name.len() + value.len();
            entry.xattrs.push(LayerXattr { name, value });
        }
        match kind {
            Kind::Symlink => {
                entry.target = now.target().map_err(at)?;
                len += entry.target.len();
            }
            Kind::Character | Kind::Block => {
                (entry.device_major, entry.device_minor) = (major(device), minor(device));
            }
            Kind::Regular => {
                entry.size = size;
                let mut file = now.content().map_err(at)?;
                if size > SMALL_MAX {
                    self.add(entry, len)?;
                    self.send()?;
                    return self.content(&path, &mut file, size);
                }
                file.take(size).read_to_end(&mut entry.content).map_err(at)?;
                if entry.content.len() as u64 != size {
                    return Err(WalkError::Shorter { path });
                }
                len += entry.content.len();
            }
            Kind::Directory | Kind::Fifo => {}
        }
        self.add(entry, len)
    }

    /// Sends as much of a file as it was said to have, without the zeros of its holes.
    fn content(&mut self, path: &[u8], file: &mut File, size: u64) -> Result<(), WalkError> {
        let at = |source| WalkError::At { path: path.to_vec(), source };
        let mut done = 0;
        while done < size {
            let data = next(file, done, size).map_err(at)?;
            if data > done {
                let zeros = (data - done).to_le_bytes().to_vec();
                self.frame(Frame::raw(FrameKind::LayerHole, zeros))?;
                done = data;
                continue;
            }
            let most = (size - done).min(DATA_MAX as u64);
            let mut piece = Vec::with_capacity(usize::try_from(most).unwrap_or(DATA_MAX));
            let len = file.take(most).read_to_end(&mut piece).map_err(at)?;
            if len == 0 {
                return Err(WalkError::Shorter { path: path.to_vec() });
            }
            done += len as u64;
            self.frame(Frame::raw(FrameKind::LayerData, Bytes::from(piece)))?;
        }
        self.sent = Instant::now();
        Ok(())
    }
}

/// Where a file has data from here on, its offset set to there; its end, if it has none.
fn next(file: &File, from: u64, size: u64) -> std::io::Result<u64> {
    let data = match seek(file.as_fd(), SeekFrom::Data(from)) {
        Ok(data) => data.min(size),
        // Nothing but a hole, or the file has become shorter: then there is nothing to read.
        Err(Errno::NXIO) if file.metadata()?.len() >= size => return Ok(size),
        Err(Errno::NXIO) => from,
        // This file system does not tell.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => from,
        Err(error) => return Err(error.into()),
    };
    seek(file.as_fd(), SeekFrom::Start(data))?;
    Ok(data)
}

impl Visitor for Teller {
    fn change(&mut self, change: Change, now: Option<&Found>) -> Result<(), WalkError> {
        let Change { path, what } = change;
        let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
        match (what, now) {
            (What::Removed(_), _) | (_, None) => {
                let len = path.len();
                let r#type = FileType::Unspecified.into();
                self.add(LayerEntry { path, r#type, ..LayerEntry::default() }, len)
            }
            (What::Added(_) | What::Changed { .. }, Some(_)) if name.starts_with(b".wh.") => {
                Err(WalkError::NotForImages { path })
            }
            (What::Added(_) | What::Changed { .. }, Some(now)) => self.file(path, now),
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
