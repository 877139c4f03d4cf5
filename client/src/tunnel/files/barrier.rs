//! One barrier: look at both sides, reconcile, move, and look again where something raced.
//!
//! Everything that a guest sends goes through `towline_filesync::wire`; what reaches the laptop's
//! disk goes through a plan of `reconcile` and a `Stage`. State is saved whatever happens: each
//! ancestor in it is true by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use towline_filesync::reconcile::{Step, reconcile};
use towline_filesync::tree::{ENTRIES_MAX, Root, Scan, ScanOptions, content_of, scan};
use towline_filesync::wire::{self, FilesKind, PAGE_ENTRIES_MAX};
use towline_filesync::{Entry, Kind, TreePath};
use towline_proto::limits::GUEST_PROTOCOL;
use towline_proto::v1;

use super::Progress;
use super::link::{Receiver, Sender, SyncError};
use super::report::Report;
use super::state::{Base, State, Store};
use super::trees::{self, Listings, Trees};

/// How often what raced is looked at again.
const ROUNDS: usize = 4;

/// Paths in one LOOKUP or GET.
pub(super) const REQUEST: usize = 512;

/// What a barrier is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Before a command: the sandbox must see the laptop's edits.
    Up,
    /// After a command: the laptop must see the sandbox's edits.
    Down,
}

/// One barrier of one folder.
pub(super) struct Barrier {
    pub(super) root: Root,
    folder: PathBuf,
    store: Arc<Store>,
    pub(super) state: State,
    direction: Direction,
    pub(super) progress: Progress,
    pub(super) report: Report,
    /// Paths that were not as expected when they were to be changed.
    pub(super) raced: BTreeSet<TreePath>,
    /// The guest was changed: its disk must be flushed.
    pub(super) changed_guest: bool,
    /// What the last scan of the guest said is new, so that old news is not told again.
    news: BTreeSet<TreePath>,
    git_locked_there: bool,
}

impl Barrier {
    pub(super) fn new(
        folder: &Path,
        store: Arc<Store>,
        direction: Direction,
        progress: Progress,
    ) -> Result<Self, SyncError> {
        let shown = folder.display();
        let root =
            Root::open(folder).map_err(SyncError::local(format!("open the folder `{shown}`")))?;
        let state = store.load();
        Ok(Self {
            root,
            folder: folder.to_owned(),
            store,
            state,
            direction,
            progress,
            report: Report::default(),
            raced: BTreeSet::new(),
            changed_guest: false,
            news: BTreeSet::new(),
            git_locked_there: false,
        })
    }

    /// Runs it over a stream whose OPEN was sent.
    pub(super) fn run(mut self, out: &Sender, mut incoming: Receiver) -> Result<Report, SyncError> {
        let before = self.state.clone();
        let done = self.rounds(out, &mut incoming);
        if done.is_err() {
            // The next barrier asks for everything again.
            self.state.index = None;
        }
        if self.state != before {
            self.store.save(&self.state)?;
        }
        done.map(|()| self.report)
    }

    fn rounds(&mut self, out: &Sender, incoming: &mut Receiver) -> Result<(), SyncError> {
        let known_tree = self.hello(out, incoming)?;
        // Before a command the last barrier's view will do: a change that is based on anything
        // outdated is refused by the guest, and then the next round looks.
        let mut look = !(known_tree && self.direction == Direction::Up);
        for _ in 0..ROUNDS {
            if look {
                self.scan_guest(out, incoming)?;
            }
            self.round(out, incoming)?;
            look = true;
            if self.raced.is_empty() {
                break;
            }
        }
        self.report.unsettled = self.raced.iter().cloned().collect();
        if self.changed_guest {
            self.barrier(out, incoming)?;
        }
        Ok(())
    }

    /// Greets the guest; true when its tree is the one that the state describes.
    fn hello(&mut self, out: &Sender, incoming: &mut Receiver) -> Result<bool, SyncError> {
        let hello = v1::FilesHello {
            protocol: GUEST_PROTOCOL,
            excludes: global_excludes(),
            git: is_in_git(&self.folder),
        };
        out.send(FilesKind::Hello, &hello)?;
        let ready: v1::FilesReady = incoming.expect(FilesKind::Ready, "waiting for its READY")?;
        if ready.protocol != GUEST_PROTOCOL || ready.incarnation.is_empty() {
            return Err(SyncError::Protocol(format!("it speaks version {}", ready.protocol)));
        }
        if ready.incarnation != self.state.incarnation {
            // Another tree, however similar: nothing that it lacks was ever deleted.
            let kept_back = std::mem::take(&mut self.state.kept_back);
            self.state = State { incarnation: ready.incarnation, kept_back, ..State::default() };
        }
        Ok(self.state.index.is_some() && self.state.index == ready.index)
    }

    fn scan_guest(&mut self, out: &Sender, incoming: &mut Receiver) -> Result<(), SyncError> {
        (self.progress)("looking at the sandbox's files".to_owned());
        out.send(FilesKind::Scan, &v1::FilesScan { known: self.state.index.clone() })?;
        let mut changed = Vec::new();
        let mut unlisted = Vec::new();
        let scanned: v1::FilesScanned = loop {
            let frame = incoming.next("waiting for the sandbox's list of files")?;
            if !wire::is(&frame, FilesKind::Entries) {
                break wire::expect(&frame, FilesKind::Scanned, "SCANNED")?;
            }
            let page: v1::FilesEntries = wire::expect(&frame, FilesKind::Entries, "ENTRIES")?;
            changed.extend(wire::entries(page.changed)?);
            unlisted.extend(wire::paths(page.unlisted)?);
            if changed.len().max(unlisted.len()) + self.state.guest.len() > 2 * ENTRIES_MAX {
                return Err(SyncError::Protocol("it lists too many paths".to_owned()));
            }
        };
        self.take_scan(changed, unlisted, scanned)
    }

    fn take_scan(
        &mut self,
        changed: Vec<(TreePath, Option<Entry>)>,
        unlisted: Vec<TreePath>,
        scanned: v1::FilesScanned,
    ) -> Result<(), SyncError> {
        if scanned.complete {
            self.state.guest.clear();
        }
        for path in unlisted {
            self.state.guest.remove(&path);
            self.news.insert(path);
        }
        for (path, entry) in changed {
            if trees::may_come(&path)?
                && let Some(entry) = entry
            {
                // An id would be taken on trust: contents are read, or asked for by name.
                self.state.guest.insert(path.clone(), Entry { content: None, ..entry });
                self.news.insert(path);
            }
        }
        self.state.index = scanned.index;
        self.git_locked_there = scanned.git_locked;
        self.report.ignored_count = scanned.ignored;
        self.report.ignored = wire::paths(scanned.ignored_paths)?;
        for skipped in scanned.skipped.into_iter().take(1000) {
            let path = wire::paths(vec![v1::FilesPath { path: skipped.path }])?.remove(0);
            self.report.skipped.push((path, super::link::printable(&skipped.reason)));
        }
        Ok(())
    }

    fn round(&mut self, out: &Sender, incoming: &mut Receiver) -> Result<(), SyncError> {
        self.raced.clear();
        let mut here = self.scan_here()?;
        self.hold_back(&mut here);
        let excluded = self.excluded(&here, out, incoming)?;
        for path in &excluded {
            self.state.bases.remove(path);
        }
        self.read_touched(&mut here);
        let git_locked = here.git_locked || self.git_locked_there;
        let mut steps = self.plan(&here, &excluded, git_locked);
        let compare: Vec<TreePath> = paths_of(&steps, Step::Compare);
        if !compare.is_empty() {
            self.compare(&compare, &mut here, out, incoming)?;
            steps = self.plan(&here, &excluded, git_locked);
        }
        self.note_held(&steps);
        self.note_rule_changes(&steps, &here);
        self.settle(&steps, &here);
        self.bring_down(&steps, &here, out, incoming)?;
        self.bring_up(&steps, &here, out, incoming)
    }

    fn scan_here(&mut self) -> Result<Scan, SyncError> {
        (self.progress)("looking at this folder's files".to_owned());
        let excludes = global_excludes();
        let options =
            ScanOptions { git: is_in_git(&self.folder), secrets_stay: true, excludes: &excludes };
        let bases = &self.state.bases;
        let keep = |path: &TreePath| bases.contains_key(path);
        let here = scan(&self.root, options, &keep).map_err(SyncError::local("list the folder"))?;
        self.report.secrets.clone_from(&here.secrets);
        if self.direction == Direction::Up {
            self.report.skipped.clone_from(&here.skipped);
        }
        Ok(here)
    }

    /// Takes out what is no longer ignored only because the sandbox changed the rules.
    fn hold_back(&mut self, here: &mut Scan) {
        let (kept, bases) = (&self.state.kept_back, &self.state.bases);
        let is_kept = |path: &TreePath| {
            !bases.contains_key(path)
                && kept.iter().any(|other| path == other || path.is_below(other))
        };
        if !kept.is_empty() {
            self.report.kept_back =
                here.entries.keys().filter(|path| is_kept(path)).cloned().collect();
            here.entries.retain(|path, _| !is_kept(path));
        }
    }

    /// What is left alone on both sides, because one of them has it but does not list it.
    fn excluded(
        &mut self,
        here: &Scan,
        out: &Sender,
        incoming: &mut Receiver,
    ) -> Result<BTreeSet<TreePath>, SyncError> {
        let listings = self.listings(here);
        let mut excluded = trees::unlisted_here(&self.root, listings);
        excluded.extend(trees::empty_shells(listings));
        let missing = trees::missing_there(listings);
        for (path, found) in lookup(&missing, false, out, incoming)? {
            if found.is_some() {
                excluded.insert(path);
            }
        }
        Ok(excluded)
    }

    /// Files that look touched and have kept their size are read: most have kept their content.
    fn read_touched(&self, here: &mut Scan) {
        for (path, entry) in &mut here.entries {
            let Some(base) = self.state.bases.get(path) else { continue };
            let touched = entry.kind == Kind::File
                && base.laptop.kind == Kind::File
                && base.laptop.content.is_some()
                && entry.stamp.size == base.laptop.stamp.size
                && !entry.has_content_of(&base.laptop);
            if touched {
                entry.content = content_of(&self.root, path).ok().flatten();
            }
        }
    }

    /// Reads both versions of what both sides changed to the same size.
    fn compare(
        &mut self,
        paths: &[TreePath],
        here: &mut Scan,
        out: &Sender,
        incoming: &mut Receiver,
    ) -> Result<(), SyncError> {
        (self.progress)(format!("comparing {} files", paths.len()));
        for (path, found) in lookup(paths, true, out, incoming)? {
            let (Some(there), Some(entry)) = (found, here.entries.get_mut(&path)) else { continue };
            entry.content = content_of(&self.root, &path).ok().flatten();
            self.state.guest.insert(path, there);
        }
        // What could not be read stays unread; it is decided as different, and kept twice.
        for path in paths {
            let unread = |entry: Option<&Entry>| entry.is_some_and(|entry| entry.content.is_none());
            if unread(here.entries.get(path)) || unread(self.state.guest.get(path)) {
                self.raced.insert(path.clone());
            }
        }
        Ok(())
    }

    fn plan(
        &self,
        here: &Scan,
        excluded: &BTreeSet<TreePath>,
        git_locked: bool,
    ) -> BTreeMap<TreePath, Step> {
        let trees = Trees::new(self.listings(here), excluded);
        reconcile(&trees.bases, &trees.laptop, &trees.guest, git_locked)
    }

    fn listings<'a>(&'a self, here: &'a Scan) -> Listings<'a> {
        Listings { bases: &self.state.bases, laptop: &here.entries, guest: &self.state.guest }
    }

    /// Whether the sandbox changed it since the last barrier.
    pub(super) fn is_news(&self, path: &TreePath) -> bool {
        self.news.contains(path)
    }

    fn note_held(&mut self, steps: &BTreeMap<TreePath, Step>) {
        use towline_filesync::guard::Held;
        for (path, step) in steps {
            if let Step::Held(held) = step
                && *held != Held::UpOnly
                && self.news.contains(path)
                && !self.report.held.iter().any(|(other, _)| other == path)
            {
                self.report.held.push((path.clone(), *held));
            }
        }
    }

    /// A sandbox that changes ignore rules must not thereby get what they kept from it.
    fn note_rule_changes(&mut self, steps: &BTreeMap<TreePath, Step>, here: &Scan) {
        let by = |wanted: fn(&Step) -> bool| {
            steps.iter().any(|(path, step)| path.name() == b".gitignore" && wanted(step))
        };
        if by(|step| matches!(step, Step::ToGuest(_) | Step::RemoveGuest)) {
            self.state.kept_back.clear();
        }
        if by(|step| matches!(step, Step::ToLaptop(_) | Step::RemoveLaptop)) {
            self.state.kept_back.extend(here.ignored.iter().cloned());
        }
    }

    /// Records what both sides have alike, or lack alike.
    fn settle(&mut self, steps: &BTreeMap<TreePath, Step>, here: &Scan) {
        for (path, step) in steps {
            match step {
                Step::Forget => {
                    self.state.bases.remove(path);
                }
                Step::Adopt => {
                    let (Some(laptop), Some(guest)) =
                        (here.entries.get(path), self.state.guest.get(path))
                    else {
                        continue;
                    };
                    let content = laptop.content.or_else(|| {
                        self.state.bases.get(path).and_then(|base| base.laptop.content)
                    });
                    let laptop = Entry { content, ..laptop.clone() };
                    self.state.bases.insert(path.clone(), Base { laptop, guest: guest.clone() });
                }
                _ => {}
            }
        }
    }

    fn barrier(&mut self, out: &Sender, incoming: &mut Receiver) -> Result<(), SyncError> {
        (self.progress)("waiting for the sandbox's disk".to_owned());
        out.send(FilesKind::Barrier, &v1::FilesBarrier { id: 1 })?;
        let done: v1::FilesBarrierDone =
            incoming.expect(FilesKind::BarrierDone, "waiting for its disk")?;
        self.state.index = done.index;
        Ok(())
    }
}

/// Asks what is at these paths now.
fn lookup(
    paths: &[TreePath],
    contents: bool,
    out: &Sender,
    incoming: &mut Receiver,
) -> Result<Vec<(TreePath, Option<Entry>)>, SyncError> {
    let mut all = Vec::with_capacity(paths.len());
    // Contents are read before the answer: few at a time, so that answers keep coming.
    let at_once = if contents { 1 } else { PAGE_ENTRIES_MAX.min(REQUEST) };
    for asked in paths.chunks(at_once) {
        let request = v1::FilesLookup { paths: asked.iter().map(wire::path).collect(), contents };
        out.send(FilesKind::Lookup, &request)?;
        let found: v1::FilesFound = incoming.expect(FilesKind::Found, "waiting for its FOUND")?;
        let found = wire::entries(found.entries)?;
        if !found.iter().map(|(path, _)| path).eq(asked.iter()) {
            return Err(SyncError::Protocol(
                "it answered for other paths than were asked".to_owned(),
            ));
        }
        all.extend(found);
    }
    Ok(all)
}

/// The paths of one kind of step.
pub(super) fn paths_of(steps: &BTreeMap<TreePath, Step>, wanted: Step) -> Vec<TreePath> {
    steps.iter().filter(|(_, step)| **step == wanted).map(|(path, _)| path.clone()).collect()
}

/// The user's own ignore rules for all repositories.
fn global_excludes() -> Vec<u8> {
    const MAX: u64 = 64 << 10;
    let path = ignore::gitignore::gitconfig_excludes_path();
    let small = |path: &PathBuf| std::fs::metadata(path).is_ok_and(|found| found.len() <= MAX);
    path.filter(small).and_then(|path| std::fs::read(path).ok()).unwrap_or_default()
}

/// Whether the folder is part of a git repository.
fn is_in_git(folder: &Path) -> bool {
    folder.ancestors().any(|ancestor| ancestor.join(".git").symlink_metadata().is_ok())
}
