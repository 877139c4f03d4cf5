//! What comes down: removals, directories, links and contents from the sandbox, and its versions
//! that are kept aside. Everything is put in place beneath the root by compare-and-swap.
//!
//! A guest may say anything: an answer counts only for the path that was asked, blocks only within
//! the size that was announced, and the disk is never filled to the brim.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use rustix::io::Errno;
use towline_filesync::reconcile::Step;
use towline_filesync::tree::{Outcome, Scan, Stage, StagedFile};
use towline_filesync::wire::{self, FilesKind};
use towline_filesync::{BLOCK, ContentHasher, ContentId, Entry, Kind, TreePath, guard};
use towline_proto::frame::Frame;
use towline_proto::v1;

use super::barrier::{Barrier, REQUEST};
use super::link::{Receiver, Sender, SyncError};
use super::state::Base;

/// Files up to this number are flushed one by one as they come, more are flushed together.
const FLUSHED_ALONE: usize = 32;

/// Room that is left on the laptop's disk whatever a sandbox sends.
const DISK_RESERVE: u64 = 64 << 20;

/// Bytes between two looks at the room left.
const DISK_CHECK: u64 = 8 << 20;

/// Names tried for a version that is kept aside.
const ASIDE_MAX: u32 = 1000;

/// A file to fetch.
#[derive(Debug)]
struct Wanted {
    path: TreePath,
    place: Place,
}

/// Where a fetched file goes.
#[derive(Debug)]
enum Place {
    /// Into the folder, with this mode.
    Folder(u32),
    /// Beside it: both sides changed it.
    Aside,
}

impl Barrier {
    /// Carries out all steps that change the laptop.
    pub(super) fn bring_down(
        &mut self,
        steps: &BTreeMap<TreePath, Step>,
        here: &Scan,
        out: &Sender,
        incoming: &mut Receiver,
    ) -> Result<(), SyncError> {
        let wanted = self.wanted(steps);
        let changes = |step: &Step| {
            matches!(
                step,
                Step::ToLaptop(_)
                    | Step::RemoveLaptop
                    | Step::Mode(_)
                    | Step::Conflict
                    | Step::Adopt
            )
        };
        if wanted.is_empty() && !steps.values().any(changes) {
            return Ok(());
        }
        let alone = wanted.len() <= FLUSHED_ALONE;
        let mut stage = LazyStage { stage: None, alone };
        let done = self
            .remove_here(steps, here, &mut stage)
            .and_then(|()| self.shape_here(steps, here, &mut stage))
            .and_then(|()| self.fetch_all(wanted, here, &mut stage, out, incoming));
        let Some(open) = stage.stage else { return done };
        let closed = open.close().map_err(SyncError::local("finish changes in the folder"));
        if !alone {
            // The ancestors are saved after this: they must not outlive the files they speak of.
            self.root.sync().map_err(SyncError::local("flush the disk"))?;
        }
        done.and(closed)
    }

    /// Removals, from the leaves up.
    fn remove_here(
        &mut self,
        steps: &BTreeMap<TreePath, Step>,
        here: &Scan,
        stage: &mut LazyStage,
    ) -> Result<(), SyncError> {
        for (path, _) in steps.iter().rev().filter(|(_, step)| **step == Step::RemoveLaptop) {
            let outcome = stage.get(self)?.remove(path, here.entries.get(path));
            match self.judge(path, outcome)? {
                Some(Outcome::Done(_)) => {
                    self.state.bases.remove(path);
                    self.report.removed_here += 1;
                }
                // Ignored files of the user's are in it: it stays, and is no longer synced.
                Some(Outcome::NotEmpty) => {
                    self.state.bases.remove(path);
                }
                Some(Outcome::Changed(_)) | None => {}
            }
        }
        Ok(())
    }

    /// Directories, links, modes and times: what needs no content.
    fn shape_here(
        &mut self,
        steps: &BTreeMap<TreePath, Step>,
        here: &Scan,
        stage: &mut LazyStage,
    ) -> Result<(), SyncError> {
        for (path, step) in steps {
            let now = here.entries.get(path);
            let Some(there) = self.state.guest.get(path).cloned() else { continue };
            if *step == Step::Conflict && there.kind == Kind::Symlink {
                self.link_aside(path, &there, stage)?;
                continue;
            }
            let outcome = match step {
                Step::ToLaptop(mode) if there.kind == Kind::Directory => {
                    stage.get(self)?.directory(path, *mode | 0o700, now)
                }
                Step::ToLaptop(_) if there.kind == Kind::Symlink => {
                    let stage = stage.get(self)?;
                    stage.symlink(&there.target).and_then(|link| stage.put(path, link, now))
                }
                Step::Mode(mode) => match now {
                    Some(now) if now.mode != *mode => {
                        stage.get(self)?.set(path, *mode, now.stamp.mtime_ns, now)
                    }
                    _ => continue,
                },
                Step::Adopt => match now {
                    // Touched there: builds go by times.
                    Some(now) if self.news_time(path, now, &there) => {
                        stage.get(self)?.set(path, now.mode, there.stamp.mtime_ns, now)
                    }
                    _ => continue,
                },
                _ => continue,
            };
            if let Some(Outcome::Done(Some(done))) = self.judge(path, outcome)? {
                if matches!(step, Step::ToLaptop(_)) {
                    self.report.came_down += 1;
                }
                let content = self.state.bases.get(path).and_then(|base| base.laptop.content);
                self.record(path, Entry { content, ..done }, there);
            }
        }
        Ok(())
    }

    /// Whether only the sandbox's version of an unchanged file has a new time.
    fn news_time(&self, path: &TreePath, now: &Entry, there: &Entry) -> bool {
        now.kind == Kind::File && now.stamp.mtime_ns != there.stamp.mtime_ns && self.is_news(path)
    }

    fn wanted(&self, steps: &BTreeMap<TreePath, Step>) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        for (path, step) in steps {
            let is_file = self.state.guest.get(path).is_some_and(|there| there.kind == Kind::File);
            let place = match step {
                Step::ToLaptop(mode) if is_file => Place::Folder(*mode),
                Step::Conflict if is_file => Place::Aside,
                _ => continue,
            };
            wanted.push(Wanted { path: path.clone(), place });
        }
        // Objects before the branches that name them.
        wanted.sort_by_key(|wanted| guard::waits_for_git(&wanted.path));
        wanted
    }

    fn fetch_all(
        &mut self,
        wanted: Vec<Wanted>,
        here: &Scan,
        stage: &mut LazyStage,
        out: &Sender,
        incoming: &mut Receiver,
    ) -> Result<(), SyncError> {
        let total = wanted.len();
        let requests: Vec<v1::FilesGet> = wanted
            .chunks(REQUEST)
            .map(|chunk| v1::FilesGet {
                paths: chunk.iter().map(|wanted| wire::path(&wanted.path)).collect(),
            })
            .collect();
        std::thread::scope(|scope| {
            let out = out.clone();
            let asking = scope.spawn(move || {
                requests.iter().try_for_each(|request| out.send(FilesKind::Get, request))
            });
            let mut answers = Answers::new(incoming);
            for (done, wanted) in wanted.into_iter().enumerate() {
                if done % 64 == 0 {
                    (self.progress)(format!("{done} of {total} files fetched"));
                }
                self.fetch(&wanted, here, stage, &mut answers)?;
            }
            match asking.join() {
                Ok(asked) => asked,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Takes the answer for one file and puts it in its place.
    fn fetch(
        &mut self,
        wanted: &Wanted,
        here: &Scan,
        stage: &mut LazyStage,
        answers: &mut Answers<'_>,
    ) -> Result<(), SyncError> {
        let path = &wanted.path;
        let fetched = answers.next(path, self, stage)?;
        let (there, file, content) = match fetched {
            Fetched::File { entry, file, content } => (entry, file, content),
            Fetched::Changed => {
                self.raced.insert(path.clone());
                return Ok(());
            }
            Fetched::Failed(message) => {
                self.report.failed.push((path.clone(), format!("in the sandbox: {message}")));
                return Ok(());
            }
        };
        self.report.bytes += there.stamp.size;
        match wanted.place {
            Place::Folder(mode) => self.put(path, mode, there, content, file, here, stage),
            Place::Aside => self.put_aside(path, &there, file, stage),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "what was fetched, and where it goes")]
    fn put(
        &mut self,
        path: &TreePath,
        mode: u32,
        there: Entry,
        content: ContentId,
        file: StagedFile,
        here: &Scan,
        stage: &mut LazyStage,
    ) -> Result<(), SyncError> {
        let now = here.entries.get(path);
        if let Some(now) = now.filter(|now| self.is_known_here(path, now, content)) {
            // It was touched there, or might have been: only its time and mode come.
            stage.get(self)?.discard(file);
            return self.put_time(path, mode, content, now, there, stage);
        }
        let stage = stage.get(self)?;
        let mtime_ns = there.stamp.mtime_ns;
        let outcome =
            stage.finish(file, mode, mtime_ns).and_then(|staged| stage.put(path, staged, now));
        if let Some(Outcome::Done(Some(done))) = self.judge(path, outcome)? {
            self.report.came_down += 1;
            let mut laptop = Entry { content: Some(content), ..done };
            if laptop.stamp.mtime_ns != mtime_ns || laptop.stamp.size != there.stamp.size {
                // Edited again already: this is not what the sandbox has.
                laptop.stamp = towline_filesync::Stamp::default();
            }
            self.record(path, laptop, there);
        }
        Ok(())
    }

    /// Whether the laptop's version, as listed, holds exactly this already.
    fn is_known_here(&self, path: &TreePath, now: &Entry, content: ContentId) -> bool {
        let base = self.state.bases.get(path).map(|base| &base.laptop);
        let known = match now.content {
            Some(id) => Some(id),
            None => base.filter(|base| now.has_content_of(base)).and_then(|base| base.content),
        };
        now.kind == Kind::File && known == Some(content)
    }

    fn put_time(
        &mut self,
        path: &TreePath,
        mode: u32,
        content: ContentId,
        now: &Entry,
        there: Entry,
        stage: &mut LazyStage,
    ) -> Result<(), SyncError> {
        let mtime_ns = there.stamp.mtime_ns;
        if (now.mode, now.stamp.mtime_ns) == (mode, mtime_ns) {
            self.record(path, Entry { content: Some(content), ..now.clone() }, there);
            return Ok(());
        }
        let outcome = stage.get(self)?.set(path, mode, mtime_ns, now);
        if let Some(Outcome::Done(Some(done))) = self.judge(path, outcome)? {
            self.report.came_down += 1;
            self.record(path, Entry { content: Some(content), ..done }, there);
        }
        Ok(())
    }

    /// A symlink is kept aside as a file that holds its target.
    fn link_aside(
        &mut self,
        path: &TreePath,
        there: &Entry,
        stage: &mut LazyStage,
    ) -> Result<(), SyncError> {
        let open = stage.get(self)?;
        let begun = open.file(there.target.len() as u64).and_then(|mut file| {
            file.block(0, &there.target)?;
            Ok(file)
        });
        let file = begun.map_err(SyncError::local(format!("keep `{path}` aside")))?;
        self.put_aside(path, there, file, stage)
    }

    /// Keeps the sandbox's version of a conflict, under a name that no tool obeys.
    fn put_aside(
        &mut self,
        path: &TreePath,
        there: &Entry,
        file: StagedFile,
        stage: &mut LazyStage,
    ) -> Result<(), SyncError> {
        let failed = SyncError::local(format!("keep the sandbox's version of `{path}` aside"));
        let stage = stage.get(self)?;
        let keep = || -> io::Result<TreePath> {
            let mut staged =
                stage.finish(file, there.mode & 0o666 | 0o600, there.stamp.mtime_ns)?;
            for number in 1..=ASIDE_MAX {
                let aside = aside(path, number)?;
                match stage.try_aside(&aside, staged)? {
                    None => return Ok(aside),
                    Some(again) => staged = again,
                }
            }
            Err(io::Error::other("there are too many versions of it already"))
        };
        let aside = keep().map_err(failed)?;
        self.report.conflicts.push((path.clone(), PathBuf::from(aside.as_path())));
        Ok(())
    }

    /// Sorts out what became of a change on the laptop; `None` when it failed for good.
    fn judge(
        &mut self,
        path: &TreePath,
        outcome: io::Result<Outcome>,
    ) -> Result<Option<Outcome>, SyncError> {
        match outcome {
            Ok(Outcome::Changed(now)) => {
                self.raced.insert(path.clone());
                Ok(Some(Outcome::Changed(now)))
            }
            Ok(outcome) => Ok(Some(outcome)),
            Err(error)
                if matches!(Errno::from_io_error(&error), Some(Errno::NOSPC | Errno::DQUOT)) =>
            {
                Err(SyncError::local(format!("write `{path}`"))(error))
            }
            Err(error) => {
                self.report.failed.push((path.clone(), error.to_string()));
                Ok(None)
            }
        }
    }

    /// Both sides have this now.
    pub(super) fn record(&mut self, path: &TreePath, laptop: Entry, guest: Entry) {
        let guest = Entry { content: None, ..guest };
        self.state.guest.insert(path.clone(), guest.clone());
        self.state.bases.insert(path.clone(), Base { laptop, guest });
    }
}

/// A stage that is opened when there is something for it.
struct LazyStage {
    stage: Option<Stage>,
    alone: bool,
}

impl LazyStage {
    fn get(&mut self, barrier: &Barrier) -> Result<&mut Stage, SyncError> {
        let stage = match self.stage.take() {
            Some(stage) => stage,
            None => Stage::open(&barrier.root, None, self.alone)
                .map_err(SyncError::local("prepare changes in the folder"))?,
        };
        Ok(self.stage.insert(stage))
    }
}

/// What came for one path.
enum Fetched {
    File { entry: Entry, file: StagedFile, content: ContentId },
    Changed,
    Failed(String),
}

/// Contents as they come, in the order asked.
struct Answers<'a> {
    incoming: &'a mut Receiver,
    page: std::vec::IntoIter<v1::FilesContent>,
}

impl<'a> Answers<'a> {
    fn new(incoming: &'a mut Receiver) -> Self {
        Self { incoming, page: Vec::new().into_iter() }
    }

    /// The answer for this path: for long files its blocks come first.
    fn next(
        &mut self,
        path: &TreePath,
        barrier: &Barrier,
        stage: &mut LazyStage,
    ) -> Result<Fetched, SyncError> {
        let first = self.content()?;
        let (announced, streamed) = (checked(&first, path)?, first.streamed);
        if !streamed {
            return self.finish(first, announced, None, barrier, stage);
        }
        let announced = announced.ok_or_else(|| nonsense("it streams what is not there"))?;
        let received = self.blocks(&announced, barrier, stage)?;
        let last = self.content()?;
        let entry = checked(&last, path)?;
        self.finish(last, entry, Some(received), barrier, stage)
    }

    fn finish(
        &self,
        content: v1::FilesContent,
        entry: Option<Entry>,
        received: Option<Received>,
        barrier: &Barrier,
        stage: &mut LazyStage,
    ) -> Result<Fetched, SyncError> {
        let drop = |received: Option<Received>, stage: &mut LazyStage| {
            if let (Some(received), Some(stage)) = (received, &mut stage.stage) {
                stage.discard(received.file);
            }
        };
        let entry = match (content.outcome(), entry) {
            (v1::FilesOutcome::Done, Some(entry)) if entry.kind == Kind::File => entry,
            (v1::FilesOutcome::Failed, _) => {
                drop(received, stage);
                return Ok(Fetched::Failed(super::link::printable(&content.message)));
            }
            _ => {
                drop(received, stage);
                return Ok(Fetched::Changed);
            }
        };
        let size = entry.stamp.size;
        let mut received = match received {
            Some(received) if received.size != size => {
                return Err(nonsense("a file came in another size"));
            }
            Some(received) => received,
            None => Received::new(size, barrier, stage)?,
        };
        if !content.inline.is_empty() {
            if content.inline.len() > BLOCK {
                return Err(nonsense("it sent more than a block at once"));
            }
            received.block(0, &content.inline, barrier)?;
        }
        let id = received.hasher.finish(size);
        Ok(Fetched::File { entry, file: received.file, content: id })
    }

    fn blocks(
        &mut self,
        announced: &Entry,
        barrier: &Barrier,
        stage: &mut LazyStage,
    ) -> Result<Received, SyncError> {
        let mut received = Received::new(announced.stamp.size, barrier, stage)?;
        loop {
            let frame = self.incoming.next("waiting for a file's content")?;
            if !wire::is(&frame, FilesKind::Data) {
                let _: v1::FilesEnd =
                    wire::expect(&frame, FilesKind::ContentEnd, "DATA or CONTENT_END")?;
                return Ok(received);
            }
            let (offset, block) = split(&frame)?;
            received.block(offset, &block, barrier)?;
        }
    }

    fn content(&mut self) -> Result<v1::FilesContent, SyncError> {
        loop {
            if let Some(content) = self.page.next() {
                return Ok(content);
            }
            let page: v1::FilesContents =
                self.incoming.expect(FilesKind::Contents, "waiting for files")?;
            if page.contents.is_empty() {
                return Err(nonsense("it sent an empty page"));
            }
            self.page = page.contents.into_iter();
        }
    }
}

/// A file that is being received.
struct Received {
    file: StagedFile,
    hasher: ContentHasher,
    size: u64,
    until_check: u64,
}

impl Received {
    fn new(size: u64, barrier: &Barrier, stage: &mut LazyStage) -> Result<Self, SyncError> {
        let file = stage
            .get(barrier)?
            .file(size)
            .map_err(SyncError::local("begin a file in the folder"))?;
        Ok(Self { file, hasher: ContentHasher::default(), size, until_check: 0 })
    }

    fn block(&mut self, offset: u64, block: &[u8], barrier: &Barrier) -> Result<(), SyncError> {
        let length = block.len() as u64;
        if self.until_check < length {
            leave_room(barrier)?;
            self.until_check = DISK_CHECK;
        }
        self.until_check -= length;
        self.hasher.block(offset, block);
        let written = self.file.block(offset, block);
        written.map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => nonsense(&error.to_string()),
            _ => SyncError::local("write a file in the folder")(error),
        })
    }
}

fn leave_room(barrier: &Barrier) -> Result<(), SyncError> {
    let free =
        barrier.root.free_bytes().map_err(SyncError::local("see how much room the disk has"))?;
    if free < DISK_RESERVE + DISK_CHECK {
        let error = io::Error::from(io::ErrorKind::StorageFull);
        return Err(SyncError::local("bring the sandbox's files back without filling this disk")(
            error,
        ));
    }
    Ok(())
}

fn split(frame: &Frame) -> Result<(u64, bytes::Bytes), SyncError> {
    Ok(wire::split_data(frame)?)
}

/// The entry of an answer, which must be about the path that was asked.
fn checked(content: &v1::FilesContent, asked: &TreePath) -> Result<Option<Entry>, SyncError> {
    let entry = content.entry.clone().ok_or_else(|| nonsense("it answered about nothing"))?;
    let (path, entry) = wire::entries(vec![entry])?.remove(0);
    if path != *asked {
        return Err(nonsense("it answered for another path than was asked"));
    }
    Ok(entry)
}

pub(super) fn nonsense(what: &str) -> SyncError {
    SyncError::Protocol(what.to_owned())
}

/// `.tow/conflicts/PATH.N`; for guarded names one flat name, which nothing obeys.
fn aside(path: &TreePath, number: u32) -> io::Result<TreePath> {
    let guarded = guard::guarded(path, |_| false).is_some() || guard::dot_git_held(path).is_some();
    let in_git = path.components().any(|name| name.eq_ignore_ascii_case(b".git"));
    let shown = if guarded || in_git {
        path.components().collect::<Vec<_>>().join(&b'%')
    } else {
        path.as_bytes().to_vec()
    };
    let suffix = format!(".{number}");
    let mut full = b".tow/conflicts/".to_vec();
    full.extend(shown);
    let start = full.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
    full.truncate(full.len().min(start + 255 - suffix.len()));
    full.extend(suffix.as_bytes());
    TreePath::from_bytes(&full).map_err(io::Error::other)
}
