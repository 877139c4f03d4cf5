//! Walks the machine's allowed folders and makes the manifest of them.
//!
//! Two threads read folders by descriptors beneath the root, following no symlink, and keep what
//! the rules let through; the result is then laid out breadth first, so that it does not depend on
//! which thread came first. What is left out is counted, so that a user can be told.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, RawDir, ResolveFlags, Stat};

use super::manifest::{BadManifest, DEPTH_MAX, ENTRIES_MAX, Identity, Kind, NewEntry, Writer};
use super::rules::{self, Rules};

/// Threads that read folders: more do not help on the machines this is for, and the laptop is in
/// use.
const THREADS: usize = 2;

/// Between two reports of how far the walk is.
const NEWS: Duration = Duration::from_secs(2);

/// Descriptor-relative opening that cannot leave the root or follow a symlink.
pub(crate) const BENEATH: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// The walk could not be done.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// A folder that should be there could not be opened.
    #[error("could not read `{path}` for the local image")]
    Open {
        /// What was read.
        path: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// More entries than a manifest takes.
    #[error("the local image has more than {ENTRIES_MAX} entries: use an OCI image instead")]
    TooMany,
    /// Something that no manifest can hold.
    #[error(transparent)]
    Manifest(#[from] BadManifest),
}

/// How much of the machine is in the image, and what was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// Entries served.
    pub entries: u64,
    /// Bytes of the regular files served.
    pub bytes: u64,
    /// Entries of allowed folders that only some users may read.
    pub not_world_readable: u64,
    /// Entries that the deny list keeps out.
    pub denied: u64,
    /// Sockets, devices and the like, and folders of other file systems.
    pub other: u64,
}

/// What the walk does at one path: the allow list as a tree.
#[derive(Debug, Default)]
struct Plan {
    /// Take what the machine has here, by the rules.
    walk: bool,
    /// Take this instead of what the machine has.
    made: Option<Made>,
    children: BTreeMap<Vec<u8>, Plan>,
}

#[derive(Debug, Clone)]
enum Made {
    Folder(u16),
    EmptyFile,
    Symlink(Vec<u8>),
    /// With the real one's owner and mode.
    FolderLike,
}

impl Plan {
    fn at(&mut self, path: &[u8]) -> &mut Plan {
        path.split(|b| *b == b'/')
            .filter(|name| !name.is_empty())
            .fold(self, |plan, name| plan.children.entry(name.to_vec()).or_default())
    }

    /// Plans for a home, given without symlinks; `links` is the way to it that people type.
    fn new(root: BorrowedFd<'_>, home: &[u8], links: &[Link]) -> Plan {
        let mut plan = Plan::default();
        for (path, mode) in rules::EMPTY_FOLDERS {
            plan.at(path.as_bytes()).made = Some(Made::Folder(*mode));
        }
        for path in rules::EMPTY_FILES {
            plan.at(path.as_bytes()).made = Some(Made::EmptyFile);
        }
        for (path, target) in rules::SYMLINKS {
            plan.at(path.as_bytes()).made = Some(Made::Symlink(target.as_bytes().to_vec()));
        }
        // Homes may lie inside an allowed folder: nothing of them is served by that.
        for other in login_homes(root) {
            let (other, _) = follow(root, &other);
            plan.at(&other).made.get_or_insert(Made::Folder(0o755));
        }
        plan.at(home).made = Some(Made::FolderLike);
        plan.keep_links(links);
        for allowed in rules::SYSTEM {
            plan.allow(root, allowed.path.as_bytes(), home);
        }
        for allowed in rules::HOME {
            plan.allow(root, &rules::join(home, allowed.path.as_bytes()), home);
        }
        plan
    }

    /// Takes a folder in, and where it is a symlink, what it leads to: a toolchain may live on
    /// another disk. A link to the home or what holds it takes nothing in.
    fn allow(&mut self, root: BorrowedFd<'_>, path: &[u8], home: &[u8]) {
        let (real, links) = follow(root, path);
        self.at(path).walk = true;
        if real == path || real == home || rules::is_under(home, &real) {
            return;
        }
        self.keep_links(&links);
        let at = self.at(&real);
        at.walk = at.made.is_none();
    }

    fn keep_links(&mut self, links: &[Link]) {
        for (path, target) in links {
            let at = self.at(path);
            if !at.walk {
                at.made = Some(Made::Symlink(target.clone()));
            }
        }
    }
}

/// A symlink on the way to something: where it is, and where it leads.
type Link = (Vec<u8>, Vec<u8>);

/// Follows a path through the machine's symlinks, beneath the root. What does not exist is taken
/// as it is written.
fn follow(root: BorrowedFd<'_>, path: &[u8]) -> (Vec<u8>, Vec<Link>) {
    /// As Linux bounds it.
    const HOPS_MAX: usize = 40;
    let split = |path: &[u8]| -> Vec<Vec<u8>> {
        path.rsplit(|b| *b == b'/').filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect()
    };
    let mut at = Vec::new();
    let mut links = Vec::new();
    let mut waiting = split(path);
    while let Some(name) = waiting.pop() {
        match &*name {
            b"." => continue,
            b".." => {
                at.truncate(at.iter().rposition(|b| *b == b'/').unwrap_or(0));
                continue;
            }
            _ => {}
        }
        let next = rules::join(&at, &name);
        match rustix::fs::readlinkat(root, &*next, Vec::new()) {
            Ok(target) if links.len() < HOPS_MAX => {
                let target = target.into_bytes();
                if target.starts_with(b"/") {
                    at.clear();
                }
                waiting.extend(split(&target));
                links.push((next, target));
            }
            _ => at = next,
        }
    }
    (at, links)
}

struct Job<'p> {
    number: usize,
    path: Vec<u8>,
    depth: usize,
    device: u64,
    plan: Option<&'p Plan>,
    walk: bool,
}

/// What is served of one folder, and which of its entries are folders to read next.
type Listed<'p> = (Vec<Found>, Vec<(usize, Job<'p>)>);

struct Found {
    name: Vec<u8>,
    kind: Kind,
    permissions: u16,
    uid: u32,
    gid: u32,
    identity: Identity,
    target: Vec<u8>,
    /// Folders: which listing holds the children.
    listing: usize,
}

#[derive(Default)]
struct Queue<'p> {
    jobs: Vec<Job<'p>>,
    running: usize,
    next: usize,
    failed: Option<WalkError>,
}

struct Walk<'a> {
    root: BorrowedFd<'a>,
    rules: &'a Rules,
    home: &'a [u8],
    secret_inodes: BTreeSet<(u64, u64)>,
    denied_inodes: Mutex<BTreeSet<(u64, u64)>>,
    /// Seen so far, whether served or not.
    seen: AtomicU64,
    entries: AtomicUsize,
    not_world_readable: AtomicU64,
    denied: AtomicU64,
    denied_paths: Mutex<Vec<Vec<u8>>>,
    other: AtomicU64,
}

/// Paths that the deny list kept out and that are remembered for the user.
const DENIED_NAMED_MAX: usize = 200;

/// What a walk found.
pub(crate) struct Walked {
    pub(crate) manifest: Vec<u8>,
    pub(crate) summary: Summary,
    /// Some of what the deny list kept out, sorted.
    pub(crate) denied: Vec<Vec<u8>>,
}

/// Walks the machine under `root`. `home` is relative to the root. `progress` is told every few
/// seconds how many entries were seen.
pub(crate) fn walk(
    root: BorrowedFd<'_>,
    home: &[u8],
    progress: &mut dyn FnMut(u64),
) -> Result<Walked, WalkError> {
    let (home, links) = follow(root, home);
    let home = &*home;
    let rules = Rules::new(home);
    let plan = Plan::new(root, home, &links);
    let walk = Walk {
        root,
        rules: &rules,
        home,
        secret_inodes: secret_inodes(root, home),
        denied_inodes: Mutex::default(),
        seen: AtomicU64::new(0),
        entries: AtomicUsize::new(0),
        not_world_readable: AtomicU64::new(0),
        denied: AtomicU64::new(0),
        denied_paths: Mutex::default(),
        other: AtomicU64::new(0),
    };
    let root_stat = rustix::fs::fstat(root).map_err(|error| open_error(b"/", error))?;
    let first = Job {
        number: 0,
        path: Vec::new(),
        depth: 0,
        device: root_stat.st_dev,
        plan: Some(&plan),
        walk: false,
    };
    let listings = walk.run(first, progress)?;
    let denied_inodes = walk.denied_inodes.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut summary = Summary {
        not_world_readable: walk.not_world_readable.into_inner(),
        denied: walk.denied.into_inner(),
        other: walk.other.into_inner(),
        ..Summary::default()
    };
    let mut denied = walk.denied_paths.into_inner().unwrap_or_else(PoisonError::into_inner);
    denied.sort();
    let manifest = lay_out(listings, &denied_inodes, &mut summary)?;
    Ok(Walked { manifest, summary, denied })
}

impl Walk<'_> {
    fn run(
        &self,
        first: Job<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Vec<Vec<Found>>, WalkError> {
        let queue = Mutex::new(Queue { jobs: vec![first], next: 1, ..Queue::default() });
        let more = Condvar::new();
        let mut all: Vec<(usize, Vec<Found>)> = std::thread::scope(|scope| {
            let (working, ended) = mpsc::channel::<()>();
            let (queue, more) = (&queue, &more);
            let threads: Vec<_> = (0..THREADS)
                .map(|_| {
                    let working = working.clone();
                    scope.spawn(move || {
                        let _dropped_at_the_end = working;
                        self.work(queue, more)
                    })
                })
                .collect();
            drop(working);
            while ended.recv_timeout(NEWS) == Err(RecvTimeoutError::Timeout) {
                progress(self.seen.load(Ordering::Relaxed));
            }
            threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect()
        });
        let queue = queue.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = queue.failed {
            return Err(error);
        }
        all.sort_unstable_by_key(|(number, _)| *number);
        Ok(all.into_iter().map(|(_, listing)| listing).collect())
    }

    fn work<'p>(&self, queue: &Mutex<Queue<'p>>, more: &Condvar) -> Vec<(usize, Vec<Found>)> {
        let mut mine = Vec::new();
        let mut buffer = Vec::with_capacity(64 << 10);
        loop {
            let Some(job) = next_job(queue, more) else { return mine };
            let number = job.number;
            let listed = self.list(&job, &mut buffer);
            let mut queue = lock(queue);
            queue.running -= 1;
            match listed {
                Ok((mut listing, folders)) => {
                    for (at, mut job) in folders {
                        job.number = queue.next;
                        listing[at].listing = queue.next;
                        queue.next += 1;
                        queue.jobs.push(job);
                    }
                    mine.push((number, listing));
                }
                Err(error) => queue.failed = Some(error),
            }
            more.notify_all();
        }
    }

    /// Reads one folder: what is served of it, and the folders to read next.
    fn list<'p>(&self, job: &Job<'p>, buffer: &mut Vec<u8>) -> Result<Listed<'p>, WalkError> {
        let mut listing = Vec::new();
        let mut folders = Vec::new();
        let folder = self.open_folder(&job.path)?;
        if let Some(folder) = folder.as_ref().filter(|_| job.walk) {
            self.read_entries(folder.as_fd(), job, buffer, &mut listing, &mut folders);
        }
        if let Some(plan) = job.plan {
            for (name, plan) in &plan.children {
                let path = rules::join(&job.path, name);
                let found = self.planned(folder.as_ref(), job.walk, &path, name, plan);
                listing.retain(|other: &Found| other.name != *name);
                folders.retain(|(_, other): &(usize, Job<'_>)| other.path != path);
                let Some((found, walk)) = found else { continue };
                if found.kind == Kind::Folder {
                    folders.push((usize::MAX, self.job(job, path, &found, Some(plan), walk)));
                }
                listing.push(found);
            }
        }
        listing.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        for (at, job) in &mut folders {
            let name = job.path.rsplit(|b| *b == b'/').next().unwrap_or_default();
            *at = listing
                .binary_search_by(|found| found.name.as_slice().cmp(name))
                .expect("a folder to read next is an entry of this listing");
        }
        if self.entries.fetch_add(listing.len(), Ordering::Relaxed) > ENTRIES_MAX {
            return Err(WalkError::TooMany);
        }
        Ok((listing, folders))
    }

    fn job<'p>(
        &self,
        parent: &Job<'p>,
        path: Vec<u8>,
        found: &Found,
        plan: Option<&'p Plan>,
        walk: bool,
    ) -> Job<'p> {
        let device = found.identity.device;
        Job { number: 0, path, depth: parent.depth + 1, device, plan, walk }
    }

    /// A folder that is not there, or not ours to read, is listed as an empty one.
    fn open_folder(&self, path: &[u8]) -> Result<Option<OwnedFd>, WalkError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        if path.is_empty() {
            let fd = rustix::fs::openat(self.root, c".", flags, Mode::empty());
            return fd.map(Some).map_err(|error| open_error(b"/", error));
        }
        Ok(rustix::fs::openat2(self.root, path, flags, Mode::empty(), BENEATH).ok())
    }

    fn read_entries<'p>(
        &self,
        folder: BorrowedFd<'_>,
        job: &Job<'p>,
        buffer: &mut Vec<u8>,
        listing: &mut Vec<Found>,
        folders: &mut Vec<(usize, Job<'p>)>,
    ) {
        let mut entries = RawDir::new(folder, buffer.spare_capacity_mut());
        // A folder that vanishes while it is read ends here, with what was read.
        while let Some(Ok(entry)) = entries.next() {
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            count(&self.seen);
            if job.plan.is_some_and(|plan| plan.children.contains_key(name)) {
                continue;
            }
            let Ok(stat) = rustix::fs::statat(folder, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)
            else {
                continue;
            };
            let path = rules::join(&job.path, name);
            let Some(found) = self.real(folder, &path, name, &stat) else { continue };
            if found.kind == Kind::Folder {
                if job.depth >= DEPTH_MAX || !self.enters(&path, job.device, stat.st_dev) {
                    count(&self.other);
                } else {
                    folders.push((0, self.job(job, path, &found, None, true)));
                    listing.push(found);
                }
                continue;
            }
            listing.push(found);
        }
    }

    /// Applies the rules to one entry that the machine has.
    fn real(&self, folder: BorrowedFd<'_>, path: &[u8], name: &[u8], stat: &Stat) -> Option<Found> {
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Kind::Folder,
            FileType::RegularFile => Kind::File,
            FileType::Symlink => Kind::Symlink,
            _ => {
                count(&self.other);
                return None;
            }
        };
        let found = found(name, kind, stat);
        if self.rules.denies(path, kind == Kind::Folder) {
            self.deny(path);
            self.remember_denied(&found);
            return None;
        }
        let readable = match kind {
            Kind::Folder => stat.st_mode & 0o005 == 0o005,
            Kind::File => stat.st_mode & 0o004 != 0,
            Kind::Symlink => true,
        };
        if !readable {
            count(&self.not_world_readable);
            return None;
        }
        let id = (found.identity.device, found.identity.inode);
        if kind == Kind::File && self.secret_inodes.contains(&id) {
            self.deny(path);
            return None;
        }
        if kind == Kind::File && self.rules.wants_look(path) && !self.looks_clean(path, &found) {
            self.deny(path);
            self.remember_denied(&found);
            return None;
        }
        if kind == Kind::Symlink {
            let target = rustix::fs::readlinkat(folder, name, Vec::new()).ok()?;
            return Some(Found { target: target.into_bytes(), ..found });
        }
        Some(found)
    }

    fn deny(&self, path: &[u8]) {
        count(&self.denied);
        let mut paths = lock(&self.denied_paths);
        if paths.len() < DENIED_NAMED_MAX {
            paths.push(path.to_vec());
        }
    }

    /// A denied file may have another name that no rule knows: its inode is kept out everywhere.
    fn remember_denied(&self, found: &Found) {
        if found.kind == Kind::File && found.identity.links > 1 {
            let id = (found.identity.device, found.identity.inode);
            lock(&self.denied_inodes).insert(id);
        }
    }

    /// Reads a small file and says whether it is still the one that was seen and holds no secret.
    fn looks_clean(&self, path: &[u8], found: &Found) -> bool {
        if found.identity.size > rules::CONTENT_CHECKED_MAX {
            return false;
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(fd) = rustix::fs::openat2(self.root, path, flags, Mode::empty(), BENEATH) else {
            return false;
        };
        let mut content = Vec::new();
        let mut file = File::from(fd);
        if (&mut file).take(rules::CONTENT_CHECKED_MAX + 1).read_to_end(&mut content).is_err() {
            return false;
        }
        let same = rustix::fs::fstat(&file).is_ok_and(|stat| identity(&stat) == found.identity);
        same && !rules::holds_secret(&content, rules::is_under(path, self.home))
    }

    /// Other file systems are entered only where reading them is local and their names are files.
    fn enters(&self, path: &[u8], from: u64, to: u64) -> bool {
        // From <linux/magic.h>: ext, xfs, btrfs, f2fs, tmpfs, overlay, squashfs, erofs, zfs,
        // bcachefs.
        const LOCAL: [u64; 10] = [
            0xef53,
            0x5846_5342,
            0x9123_683e,
            0xf2f5_2010,
            0x0102_1994,
            0x794c_7630,
            0x7371_7368,
            0xe0f5_e1e2,
            0x2fc1_2fc1,
            0xca45_1a4e,
        ];
        if from == to {
            return true;
        }
        let Ok(Some(folder)) = self.open_folder(path) else { return false };
        rustix::fs::fstatfs(&folder)
            .is_ok_and(|statfs| LOCAL.contains(&(statfs.f_type.cast_unsigned() & 0xffff_ffff)))
    }

    /// Makes the entry at a path of the plan; the flag says whether the machine's own folder is
    /// read there.
    fn planned(
        &self,
        folder: Option<&OwnedFd>,
        walked: bool,
        path: &[u8],
        name: &[u8],
        plan: &Plan,
    ) -> Option<(Found, bool)> {
        let stat =
            folder.and_then(|fd| rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW).ok());
        let wanted = plan.walk || (walked && plan.made.is_none());
        let real = stat.filter(|_| wanted).zip(folder);
        if let Some(found) = real.and_then(|(stat, fd)| self.real(fd.as_fd(), path, name, &stat)) {
            let walk = found.kind == Kind::Folder;
            return Some((found, walk));
        }
        match &plan.made {
            Some(Made::Folder(mode)) => Some((made(name, Kind::Folder, *mode), false)),
            Some(Made::EmptyFile) => Some((made(name, Kind::File, 0o644), false)),
            Some(Made::Symlink(target)) => {
                let link = made(name, Kind::Symlink, 0o777);
                Some((Found { target: target.clone(), ..link }, false))
            }
            Some(Made::FolderLike) => Some((self.like(stat, name), false)),
            None if plan.children.values().any(|child| child.made.is_some()) => {
                Some((self.like(stat, name), false))
            }
            // The way to something allowed: there only when the machine has it.
            None if !plan.children.is_empty() && stat.is_some_and(is_folder) => {
                Some((self.like(stat, name), false))
            }
            None => None,
        }
    }

    /// A made folder with the owner and mode of the machine's own, if it has one.
    fn like(&self, stat: Option<Stat>, name: &[u8]) -> Found {
        match stat.filter(|stat| is_folder(*stat)) {
            Some(stat) => found(name, Kind::Folder, &stat),
            None => made(name, Kind::Folder, 0o755),
        }
    }
}

fn is_folder(stat: Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

fn found(name: &[u8], kind: Kind, stat: &Stat) -> Found {
    Found {
        name: name.to_vec(),
        kind,
        permissions: u16::try_from(stat.st_mode & 0o7777).unwrap_or_default(),
        uid: stat.st_uid,
        gid: stat.st_gid,
        identity: identity(stat),
        target: Vec::new(),
        listing: 0,
    }
}

fn made(name: &[u8], kind: Kind, permissions: u16) -> Found {
    Found {
        name: name.to_vec(),
        kind,
        permissions,
        uid: 0,
        gid: 0,
        identity: Identity::default(),
        target: Vec::new(),
        listing: 0,
    }
}

/// Returns what a file must still be when it is read.
pub(crate) fn identity(stat: &Stat) -> Identity {
    let nanoseconds = |seconds: i64, nanos: u64| {
        seconds.saturating_mul(1_000_000_000).saturating_add_unsigned(nanos)
    };
    Identity {
        device: stat.st_dev,
        inode: stat.st_ino,
        size: u64::try_from(stat.st_size).unwrap_or_default(),
        mtime_ns: nanoseconds(stat.st_mtime, stat.st_mtime_nsec),
        ctime_ns: nanoseconds(stat.st_ctime, stat.st_ctime_nsec),
        links: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
    }
}

/// Lays listings out breadth first and writes the manifest.
fn lay_out(
    mut listings: Vec<Vec<Found>>,
    denied_inodes: &BTreeSet<(u64, u64)>,
    summary: &mut Summary,
) -> Result<Vec<u8>, WalkError> {
    let hard_linked = |found: &Found| {
        (found.kind == Kind::File && found.identity.links > 1 && found.identity.inode != 0)
            .then_some((found.identity.device, found.identity.inode))
    };
    for listing in &mut listings {
        let before = listing.len();
        listing.retain(|found| hard_linked(found).is_none_or(|id| !denied_inodes.contains(&id)));
        summary.denied += (before - listing.len()) as u64;
    }
    let mut names: BTreeMap<(u64, u64), (u32, u32)> = BTreeMap::new();
    for id in listings.iter().flatten().filter_map(hard_linked) {
        names.entry(id).or_insert((u32::MAX, 0)).1 += 1;
    }
    let index = |at: usize| u32::try_from(at).map_err(|_| WalkError::TooMany);
    let mut writer = Writer::default();
    let root = made(b"", Kind::Folder, 0o755);
    let root_children = index(listings.first().map_or(0, Vec::len))?;
    writer.push(&new_entry(&root, 0, 1, root_children))?;
    // (listing, its folder's index), in the order in which the folders were written.
    let mut queue = std::collections::VecDeque::from([(0, 0)]);
    let mut written = 1;
    let mut next_child = 1 + root_children;
    while let Some((listing, parent)) = queue.pop_front() {
        for found in listings.get(listing).map(Vec::as_slice).unwrap_or_default() {
            let (first, number) = match found.kind {
                Kind::Folder => {
                    let children = index(listings.get(found.listing).map_or(0, Vec::len))?;
                    queue.push_back((found.listing, written));
                    let first = next_child;
                    next_child += children;
                    (first, children)
                }
                Kind::File => match hard_linked(found).and_then(|id| names.get_mut(&id)) {
                    Some((first, number)) => {
                        *first = (*first).min(written);
                        (*first, *number)
                    }
                    None => (written, 1),
                },
                Kind::Symlink => (0, 1),
            };
            writer.push(&new_entry(found, parent, first, number))?;
            written += 1;
            summary.entries += 1;
            if found.kind == Kind::File {
                summary.bytes += found.identity.size;
            }
        }
    }
    Ok(writer.finish()?)
}

fn new_entry(found: &Found, parent: u32, first: u32, number: u32) -> NewEntry<'_> {
    NewEntry {
        kind: found.kind,
        permissions: found.permissions,
        uid: found.uid,
        gid: found.gid,
        identity: found.identity,
        parent,
        first,
        number,
        name: &found.name,
        target: &found.target,
    }
}

/// Homes of people by the machine's own list, relative to the root. They are never walked as part
/// of a system folder.
fn login_homes(root: BorrowedFd<'_>) -> Vec<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let Ok(fd) = rustix::fs::openat2(root, c"etc/passwd", flags, Mode::empty(), BENEATH) else {
        return Vec::new();
    };
    let mut text = Vec::new();
    if File::from(fd).take(4 << 20).read_to_end(&mut text).is_err() {
        return Vec::new();
    }
    text.split(|b| *b == b'\n')
        .filter_map(|line| {
            let fields: Vec<&[u8]> = line.split(|b| *b == b':').collect();
            let uid: u32 = std::str::from_utf8(fields.get(2)?).ok()?.parse().ok()?;
            let home = fields.get(5)?.strip_prefix(b"/")?;
            let person = (uid == 0 || uid >= 1000) && uid != 65534;
            (person && !home.is_empty()).then(|| home.to_vec())
        })
        .collect()
}

/// Inodes of the home's secrets that have more than one name: the other name may lie in an allowed
/// folder.
fn secret_inodes(root: BorrowedFd<'_>, home: &[u8]) -> BTreeSet<(u64, u64)> {
    /// Bound on the look around; a folder of secrets is small.
    const LOOKED_AT_MAX: usize = 20_000;
    let places = [
        ".ssh",
        ".gnupg",
        ".aws",
        ".azure",
        ".config",
        ".kube",
        ".docker",
        ".password-store",
        ".mozilla",
        ".thunderbird",
        ".local/share/keyrings",
        ".local/share/uv/credentials",
        ".cargo",
        ".m2",
        ".gradle",
        ".terraform.d",
        ".oci",
        "snap",
        "",
    ];
    let mut secret = BTreeSet::new();
    let mut left = LOOKED_AT_MAX;
    let mut waiting: Vec<(Vec<u8>, u32)> = places
        .iter()
        // The home and toolchain folders' own files only: what lies deeper is not a secret place.
        .map(|place| {
            let deep = if matches!(*place, "" | ".cargo" | ".m2" | ".gradle") { 0 } else { 6 };
            (rules::join(home, place.as_bytes()), deep)
        })
        .collect();
    while let Some((path, deep)) = waiting.pop() {
        let path = path.strip_suffix(b"/").unwrap_or(&path).to_vec();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(fd) = rustix::fs::openat2(root, &*path, flags, Mode::empty(), BENEATH) else {
            continue;
        };
        let Ok(folder) = Dir::read_from(&fd) else { continue };
        for entry in folder.flatten() {
            let name = entry.file_name();
            if left == 0 || matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            left -= 1;
            let Ok(stat) = rustix::fs::statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            if is_folder(stat) && deep > 0 {
                waiting.push((rules::join(&path, name.to_bytes()), deep - 1));
            } else if stat.st_nlink > 1 && !is_folder(stat) {
                secret.insert((stat.st_dev, stat.st_ino));
            }
        }
    }
    secret
}

fn next_job<'p>(queue: &Mutex<Queue<'p>>, more: &Condvar) -> Option<Job<'p>> {
    let mut queue = lock(queue);
    loop {
        if queue.failed.is_some() {
            return None;
        }
        if let Some(job) = queue.jobs.pop() {
            queue.running += 1;
            return Some(job);
        }
        if queue.running == 0 {
            return None;
        }
        // Woken by the other thread when it has listed its folder, which always ends.
        queue = more.wait(queue).unwrap_or_else(PoisonError::into_inner);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn open_error(path: &[u8], error: rustix::io::Errno) -> WalkError {
    let path = String::from_utf8_lossy(path).into_owned();
    WalkError::Open { path, source: error.into() }
}
