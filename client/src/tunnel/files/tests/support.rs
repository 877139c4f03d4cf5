//! A laptop's and a sandbox's tree in scratch directories, and streams between their two ends.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use tempfile::TempDir;
use tokio::io::{DuplexStream, ReadHalf, WriteHalf, duplex, split};
use towline_proto::v1::FilesOpen;
use towline_streams::{FrameReader, FrameWriter};

use crate::tunnel::files::{Direction, Report, Target, pull, push, synchronise};

pub(super) type Stream =
    (FrameReader<ReadHalf<DuplexStream>>, FrameWriter<WriteHalf<DuplexStream>>);

/// Two trees and the state between them.
pub(super) struct Pair {
    _scratch: TempDir,
    guest: PathBuf,
    target: Target,
}

impl Pair {
    pub(super) fn new() -> Self {
        Self::within(tempfile::tempdir().unwrap())
    }

    /// In memory where the machine has such a place: for many small cases that wait for a disk.
    pub(super) fn quick() -> Self {
        let in_memory = tempfile::tempdir_in("/dev/shm");
        Self::within(in_memory.or_else(|_| tempfile::tempdir()).unwrap())
    }

    fn within(scratch: TempDir) -> Self {
        let target =
            Target { folder: scratch.path().join("laptop"), state: scratch.path().join("state") };
        let guest = scratch.path().join("guest");
        fs::create_dir(&target.folder).unwrap();
        fs::create_dir(&guest).unwrap();
        Self { _scratch: scratch, guest, target }
    }

    pub(super) fn laptop(&self) -> &Path {
        &self.target.folder
    }

    pub(super) fn guest(&self) -> &Path {
        &self.guest
    }

    /// The same tree behind an agent that knows nothing of it.
    pub(super) fn restart_guest(&mut self) {
        let new =
            self.guest.with_extension(format!("{}", fs::metadata(&self.guest).unwrap().ino()));
        let new = if new.exists() || new == self.guest { new.with_extension("again") } else { new };
        fs::rename(&self.guest, &new).unwrap();
        self.guest = new;
    }

    pub(super) async fn push(&self) -> Report {
        push(async |open| Ok(self.serve(open)), &self.target, quiet()).await.unwrap()
    }

    pub(super) async fn pull(&self) -> Report {
        pull(async |open| Ok(self.serve(open)), &self.target, quiet()).await.unwrap()
    }

    pub(super) async fn attempt(
        &self,
        direction: Direction,
        open: impl AsyncFn(FilesOpen) -> anyhow::Result<Stream>,
    ) -> anyhow::Result<Report> {
        synchronise(open, &self.target, direction, quiet()).await
    }

    /// A stream with a real guest's end behind it.
    pub(super) fn serve(&self, open: FilesOpen) -> Stream {
        let (near, far) = duplex(64 << 10);
        self.serve_on(open, far);
        framed(near)
    }

    pub(super) fn serve_on(&self, open: FilesOpen, far: DuplexStream) {
        let root = self.guest.clone();
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let (reader, writer) = framed(far);
        tokio::spawn(async move {
            towline_guest_agent::files::serve(open, reader, writer, &root, uid, gid).await;
        });
    }
}

pub(super) fn framed(stream: DuplexStream) -> Stream {
    let (reader, writer) = split(stream);
    (FrameReader::new(reader), FrameWriter::new(writer))
}

fn quiet() -> crate::tunnel::files::Progress {
    Arc::new(|_| {})
}

/// Writes a file that was written a while ago, at a time of its own: what is written at this moment
/// is looked at twice, which tests of exact counts do not want.
pub(super) fn write(path: &Path, text: &str) {
    static TIME: AtomicU64 = AtomicU64::new(1);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
    let time = Duration::new(1_700_000_000 + TIME.fetch_add(1, Ordering::Relaxed), 5);
    fs::File::options().write(true).open(path).unwrap().set_modified(UNIX_EPOCH + time).unwrap();
}

pub(super) fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Everything that is synced of a tree, but for what is ours.
pub(super) fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    walk(root, Path::new(""), &mut all);
    all
}

fn walk(root: &Path, at: &Path, all: &mut BTreeMap<PathBuf, String>) {
    for item in fs::read_dir(root.join(at)).unwrap() {
        let item = item.unwrap();
        let path = at.join(item.file_name());
        if path == Path::new(".tow") {
            continue;
        }
        let meta = fs::symlink_metadata(root.join(&path)).unwrap();
        let what = if meta.is_dir() {
            walk(root, &path, all);
            format!("directory {:o}", meta.permissions().mode() & 0o777)
        } else if meta.is_symlink() {
            format!("link {:?}", fs::read_link(root.join(&path)).unwrap())
        } else {
            let text = fs::read(root.join(&path)).unwrap();
            let mode = meta.permissions().mode() & 0o777;
            format!(
                "file {mode:o} {}.{} {:?}",
                meta.mtime(),
                meta.mtime_nsec(),
                blake3::hash(&text)
            )
        };
        all.insert(path, what);
    }
}
