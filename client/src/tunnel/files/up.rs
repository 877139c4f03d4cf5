//! What goes up: removals, contents, modes and times for the sandbox, pipelined; answers come back
//! while later changes are still being sent.
//!
//! Each change says what it expects in the sandbox. One that meets something else changes nothing,
//! and its path is looked at again in the next round.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc;

use prost::Message as _;
use towline_filesync::reconcile::Step;
use towline_filesync::tree::{Root, Scan, read_blocks};
use towline_filesync::wire::{self, FilesKind, PAGE_BYTES};
use towline_filesync::{BLOCK, Entry, Kind, TreePath, entry, guard};
use towline_proto::v1::{self, files_op::What};

use super::barrier::Barrier;
use super::down::nonsense;
use super::link::{Receiver, Sender, SyncError, printable};

/// Changes in one frame.
const OPS: usize = 1024;

/// One change for the sandbox.
#[derive(Debug, Clone)]
struct Job {
    path: TreePath,
    expected: Option<Entry>,
    kind: JobKind,
}

#[derive(Debug, Clone)]
enum JobKind {
    Remove,
    /// The laptop's version, with this mode.
    Put(Entry, u32),
    /// Mode and time of the laptop's version.
    Set(Entry, u32),
}

/// What was sent: its answer comes in the same order.
#[derive(Debug)]
enum Sent {
    /// A change, and the laptop's version that went up.
    Job(Box<(Job, Option<Entry>)>),
    /// It vanished or kept changing here: no answer comes.
    Raced(TreePath),
    /// It cannot be read here: no answer comes.
    Failed(TreePath, String),
}

impl Barrier {
    /// Carries out all steps that change the sandbox.
    pub(super) fn bring_up(
        &mut self,
        steps: &BTreeMap<TreePath, Step>,
        here: &Scan,
        out: &Sender,
        incoming: &mut Receiver,
    ) -> Result<(), SyncError> {
        let jobs = self.jobs(steps, here);
        if jobs.is_empty() {
            return Ok(());
        }
        self.changed_guest = true;
        let total = jobs.len();
        let root = self.root.try_clone().map_err(SyncError::local("open the folder again"))?;
        let (tell, sent) = mpsc::channel();
        std::thread::scope(|scope| {
            let out = out.clone();
            let sending = scope.spawn(move || {
                Uploader { root, out, tell, page: v1::FilesOps::default(), bytes: 0 }.send_all(jobs)
            });
            // Dropped as soon as this fails, which stops the sending thread.
            let sent = sent;
            let mut answers = Results { incoming, page: Vec::new().into_iter() };
            for (done, sent) in sent.iter().enumerate() {
                if done % 64 == 0 {
                    (self.progress)(format!("{done} of {total} changes sent"));
                }
                self.take_result(sent, &mut answers)?;
            }
            match sending.join() {
                Ok(sent) => sent,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Removals from the leaves up, then the rest downwards, branches last.
    fn jobs(&self, steps: &BTreeMap<TreePath, Step>, here: &Scan) -> Vec<Job> {
        let mut removals = Vec::new();
        let mut puts = Vec::new();
        for (path, step) in steps {
            let (now, there) = (here.entries.get(path), self.state.guest.get(path));
            let kind = match (step, now) {
                (Step::RemoveGuest, _) => JobKind::Remove,
                (Step::Conflict, _) if !self.is_aside(path) => continue,
                (Step::Conflict, None) => JobKind::Remove,
                (Step::Conflict, Some(now)) => JobKind::Put(now.clone(), now.mode),
                (Step::ToGuest(mode), Some(now)) => JobKind::Put(now.clone(), *mode),
                (Step::Mode(mode), Some(now)) if there.is_some_and(|there| there.mode != *mode) => {
                    JobKind::Set(self.settled(path, now), *mode)
                }
                (Step::Adopt, Some(now))
                    if there.is_some_and(|there| self.touched_here(path, now, there)) =>
                {
                    JobKind::Set(now.clone(), now.mode)
                }
                _ => continue,
            };
            let is_removal = matches!(kind, JobKind::Remove);
            let job = Job { path: path.clone(), expected: there.cloned(), kind };
            if is_removal { removals.push(job) } else { puts.push(job) }
        }
        removals.reverse();
        puts.sort_by_key(|job| guard::waits_for_git(&job.path));
        removals.extend(puts);
        removals
    }

    /// Whether the sandbox's version of a conflict is safe: only then may it be replaced.
    fn is_aside(&self, path: &TreePath) -> bool {
        let is_file = self.state.guest.get(path).is_some_and(|there| there.kind == Kind::File);
        !is_file
            || self.report.conflicts.iter().any(|(other, _)| other == path)
                && !self.raced.contains(path)
    }

    /// The laptop's version as the ancestor has it by now, where a mode was just set here.
    fn settled(&self, path: &TreePath, now: &Entry) -> Entry {
        let base = self.state.bases.get(path).map(|base| &base.laptop);
        base.filter(|base| base.kind == now.kind).unwrap_or(now).clone()
    }

    fn touched_here(&self, path: &TreePath, now: &Entry, there: &Entry) -> bool {
        now.kind == Kind::File && now.stamp.mtime_ns != there.stamp.mtime_ns && !self.is_news(path)
    }

    fn take_result(&mut self, sent: Sent, answers: &mut Results<'_>) -> Result<(), SyncError> {
        let (job, laptop) = match sent {
            Sent::Raced(path) => {
                self.raced.insert(path);
                return Ok(());
            }
            Sent::Failed(path, message) => {
                self.report.failed.push((path, message));
                return Ok(());
            }
            Sent::Job(sent) => *sent,
        };
        let path = &job.path;
        let result = answers.next(path)?;
        match (result.outcome, laptop) {
            (v1::FilesOutcome::Done, None) => {
                self.state.guest.remove(path);
                self.state.bases.remove(path);
                self.report.removed_there += 1;
            }
            (v1::FilesOutcome::Done, Some(laptop)) => self.went_up(&job, laptop, result.entry)?,
            (v1::FilesOutcome::Changed | v1::FilesOutcome::NotEmpty, _) => {
                self.raced.insert(path.clone());
            }
            (v1::FilesOutcome::Failed, _) => {
                self.report
                    .failed
                    .push((path.clone(), format!("in the sandbox: {}", result.message)));
            }
            (v1::FilesOutcome::Unspecified, _) => return Err(nonsense("a result says nothing")),
        }
        Ok(())
    }

    fn went_up(&mut self, job: &Job, laptop: Entry, there: Option<Entry>) -> Result<(), SyncError> {
        let there = there.ok_or_else(|| nonsense("what was put in place is not there"))?;
        let mut base = there.clone();
        let as_sent = there.kind == laptop.kind
            && (there.kind != Kind::File
                || (there.stamp.size == laptop.stamp.size
                    && there.stamp.mtime_ns == laptop.stamp.mtime_ns));
        if !as_sent {
            // Changed again by a process in the sandbox: this is not what went up.
            base.stamp = towline_filesync::Stamp::default();
        }
        if matches!(job.kind, JobKind::Put(..)) {
            self.report.went_up += 1;
            self.report.bytes += laptop.stamp.size;
        }
        self.record(&job.path, laptop, base);
        self.state.guest.insert(job.path.clone(), Entry { content: None, ..there });
        Ok(())
    }
}

/// Reads the laptop's files and sends them.
struct Uploader {
    root: Root,
    out: Sender,
    tell: mpsc::Sender<Sent>,
    page: v1::FilesOps,
    bytes: usize,
}

impl Uploader {
    fn send_all(mut self, jobs: Vec<Job>) -> Result<(), SyncError> {
        for job in jobs {
            let sent = self.send(job)?;
            // The receiving end is gone only when the barrier failed.
            if self.tell.send(sent).is_err() {
                return Ok(());
            }
        }
        self.flush()
    }

    fn send(&mut self, job: Job) -> Result<Sent, SyncError> {
        match job.kind.clone() {
            JobKind::Remove => {
                self.add(&job, What::Remove(wire::path(&job.path)), Vec::new())?;
                Ok(Sent::Job(Box::new((job, None))))
            }
            JobKind::Set(now, mode) => {
                let wanted = Entry { mode, ..now.clone() };
                self.add(&job, What::Set(wanted.to_wire(&job.path)), Vec::new())?;
                Ok(Sent::Job(Box::new((job, Some(now)))))
            }
            JobKind::Put(now, mode) if now.kind != Kind::File => {
                let wanted = Entry { mode, ..now.clone() };
                self.add(&job, What::Put(wanted.to_wire(&job.path)), Vec::new())?;
                Ok(Sent::Job(Box::new((job, Some(now)))))
            }
            JobKind::Put(_, mode) => self.send_file(job, mode),
        }
    }

    fn send_file(&mut self, job: Job, mode: u32) -> Result<Sent, SyncError> {
        let root = self.root.try_clone().map_err(SyncError::local("open the folder again"))?;
        let mut inline = Vec::new();
        let mut streamed = false;
        let mut broken = None;
        let read = read_blocks(&root, &job.path, |now, offset, block| {
            if now.stamp.size <= BLOCK as u64 {
                inline = block.to_vec();
                return Ok(());
            }
            let announced = if std::mem::replace(&mut streamed, true) {
                Ok(())
            } else {
                self.announce(&job, now, mode)
            };
            announced.and_then(|()| self.out.frame(wire::data(offset, block))).map_err(|error| {
                broken = Some(error);
                io::Error::from(io::ErrorKind::BrokenPipe)
            })
        });
        if let Some(error) = broken {
            return Err(error);
        }
        let whole = read.as_ref().is_ok_and(|read| !read.changed);
        if streamed {
            self.out.send(FilesKind::OpEnd, &v1::FilesEnd { whole, entry: None })?;
        }
        match read {
            // It was announced, so an answer comes: that nothing was changed.
            Ok(read) if streamed => Ok(Sent::Job(Box::new((job, Some(read.entry))))),
            Err(_) if streamed => {
                Ok(Sent::Job(Box::new((job, Some(Entry::new(Kind::File, mode))))))
            }
            Ok(read) if read.changed => Ok(Sent::Raced(job.path)),
            Ok(read) => {
                let wanted = Entry { mode, content: None, ..read.entry.clone() };
                self.add(&job, What::Put(wanted.to_wire(&job.path)), inline)?;
                Ok(Sent::Job(Box::new((job, Some(read.entry)))))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Sent::Raced(job.path)),
            Err(error) => Ok(Sent::Failed(job.path, error.to_string())),
        }
    }

    fn announce(&mut self, job: &Job, now: &Entry, mode: u32) -> Result<(), SyncError> {
        let wanted = Entry { mode, ..now.clone() };
        let what = Some(What::Put(wanted.to_wire(&job.path)));
        let expected = Some(entry::to_wire(&job.path, job.expected.as_ref()));
        self.page.ops.push(v1::FilesOp { expected, what, inline: Vec::new(), streamed: true });
        self.flush()
    }

    fn add(&mut self, job: &Job, what: What, inline: Vec<u8>) -> Result<(), SyncError> {
        let expected = Some(entry::to_wire(&job.path, job.expected.as_ref()));
        let op = v1::FilesOp { expected, what: Some(what), inline, streamed: false };
        self.bytes += op.encoded_len();
        self.page.ops.push(op);
        if self.bytes < PAGE_BYTES && self.page.ops.len() < OPS { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<(), SyncError> {
        self.bytes = 0;
        let page = std::mem::take(&mut self.page);
        if page.ops.is_empty() { Ok(()) } else { self.out.send(FilesKind::Ops, &page) }
    }
}

/// Answers as they come, in the order sent.
struct Results<'a> {
    incoming: &'a mut Receiver,
    page: std::vec::IntoIter<v1::FilesResult>,
}

/// A checked answer.
struct Answer {
    outcome: v1::FilesOutcome,
    entry: Option<Entry>,
    message: String,
}

impl Results<'_> {
    fn next(&mut self, asked: &TreePath) -> Result<Answer, SyncError> {
        let result = loop {
            if let Some(result) = self.page.next() {
                break result;
            }
            let page: v1::FilesResults =
                self.incoming.expect(FilesKind::Results, "waiting for its results")?;
            if page.results.is_empty() {
                return Err(nonsense("it sent an empty page"));
            }
            self.page = page.results.into_iter();
        };
        let outcome = result.outcome();
        let entry = result.entry.ok_or_else(|| nonsense("a result is about nothing"))?;
        let (path, entry) = wire::entries(vec![entry])?.remove(0);
        if path != *asked {
            return Err(nonsense("it answered for another path than was sent"));
        }
        Ok(Answer { outcome, entry, message: printable(&result.message) })
    }
}
