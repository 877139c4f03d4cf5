//! The folder that images are kept in, by content: `<cache>/images/{blobs/sha256,partial,layers,
//! images,locks,tmp}`.
//!
//! A file appears under its final name only when it is whole and on disk (written in `tmp`,
//! synced, renamed), so whoever finds a file may use it, and work that was cut off leaves nothing
//! but leftovers in `tmp`, which the next [`Store::open`] removes, and in `partial`, which the next
//! pull goes on from.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::digest::{Digest, Hashing};
use crate::error::{ImageError, free_mib};
use crate::limits;

/// How long one import waits for another that makes the same layer.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(1800);

/// How long making a folder in `tmp` waits for the removal of leftovers, and the other way round.
const MAKING_WAIT_MAX: Duration = Duration::from_secs(10);

/// What an import or a preparation is doing, for whoever waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// In words: "reading", "layer 2 of 5".
    pub stage: String,
    /// Bytes or layers done.
    pub done: u64,
    /// Of how many; 0 when nobody knows.
    pub total: u64,
}

/// Called with each step; must be quick.
pub type OnProgress<'p> = &'p mut dyn FnMut(Progress);

/// An image that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    /// Digest of its manifest.
    pub digest: Digest,
    /// Compressed bytes of its layers.
    pub bytes: u64,
    /// How many layers it has.
    pub layers: u32,
}

#[derive(Serialize, Deserialize)]
struct Record {
    bytes: u64,
    layers: u32,
}

/// The content-addressed folder. Cheap to open and to clone; any number of processes share one.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// Opens the store under a cache folder, making it if needed, and removes what interrupted
    /// imports left.
    pub fn open(cache: &Path) -> Result<Store, ImageError> {
        let root = cache.join("images");
        for folder in ["blobs/sha256", "partial", "layers", "images", "locks", "tmp"] {
            let folder = root.join(folder);
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&folder)
                .map_err(|e| ImageError::io("make", folder, e))?;
        }
        let store = Store { root };
        store.remove_leftovers();
        store.remove_old_partials();
        Ok(store)
    }

    /// Returns the images that are kept, by digest.
    pub fn list(&self) -> Result<Vec<StoredImage>, ImageError> {
        let folder = self.root.join("images");
        let entries = fs::read_dir(&folder).map_err(|e| ImageError::io("read", &folder, e))?;
        let mut images: Vec<_> = entries
            .flatten()
            .filter_map(|entry| {
                let digest = Digest::from_hex(entry.file_name().to_str()?).ok()?;
                let record: Record = serde_json::from_slice(&fs::read(entry.path()).ok()?).ok()?;
                Some(StoredImage { digest, bytes: record.bytes, layers: record.layers })
            })
            .collect();
        images.sort_by_key(|image| image.digest);
        Ok(images)
    }

    pub(crate) fn has_image(&self, digest: &Digest) -> bool {
        self.image(digest).exists()
    }

    /// The record of an image.
    pub(crate) fn image(&self, digest: &Digest) -> PathBuf {
        self.root.join("images").join(digest.hex())
    }

    pub(crate) fn blobs_folder(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    pub(crate) fn layers_folder(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// Records an image whose blobs are all here.
    pub(crate) fn record(&self, image: &StoredImage) -> Result<(), ImageError> {
        let record = Record { bytes: image.bytes, layers: image.layers };
        let bytes = serde_json::to_vec(&record).map_err(|e| ImageError::document("record", e))?;
        self.publish(&self.image(&image.digest), |file| file.write_all(&bytes))
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    /// Where a blob is while it is downloaded.
    pub(crate) fn partial(&self, digest: &Digest) -> PathBuf {
        self.root.join("partial").join(digest.hex())
    }

    /// The file of a layer disk, or of what belongs to it.
    pub(crate) fn layer(&self, key: &Digest, suffix: &str) -> PathBuf {
        self.root.join("layers").join(format!("{}.{suffix}", key.hex()))
    }

    /// Makes a temporary folder that a later [`Store::open`] removes if this process dies. While it
    /// is there, nothing is collected: what its holder found in the store stays.
    pub(crate) fn scratch(&self) -> Result<Scratch, ImageError> {
        let adding = self.lock_file(".adding", FlockOperation::NonBlockingLockShared)?;
        // Between making the folder and holding its lock it looks like a dead one's.
        let _making = self.lock_making(FlockOperation::NonBlockingLockShared)?;
        let tmp = self.root.join("tmp");
        let folder = tempfile::Builder::new()
            .prefix("import-")
            .tempdir_in(&tmp)
            .map_err(|e| ImageError::io("make a folder in", &tmp, e))?;
        let path = folder.path().join("lock");
        let lock = File::create(&path).map_err(|e| ImageError::io("make", &path, e))?;
        let io = |e: rustix::io::Errno| ImageError::io("lock", &path, e.into());
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(io)?;
        Ok(Scratch { folder, _lock: lock, _adding: adding })
    }

    /// The right to remove what no image needs; fails when somebody adds to the store for long.
    pub(crate) fn alone(&self) -> Result<File, ImageError> {
        self.lock_file(".adding", FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            match error {
                ImageError::Io { source, .. } if source.kind() == io::ErrorKind::WouldBlock => {
                    ImageError::Busy
                }
                error => error,
            }
        })
    }

    /// Shared: a folder in `tmp` is being made. Exclusive: leftovers are being removed.
    fn lock_making(&self, how: FlockOperation) -> Result<File, ImageError> {
        self.lock_file(".making", how)
    }

    fn lock_file(&self, name: &str, how: FlockOperation) -> Result<File, ImageError> {
        let path = self.root.join(name);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| ImageError::io("make", &path, e))?;
        let deadline = Instant::now() + MAKING_WAIT_MAX;
        loop {
            match rustix::fs::flock(&file, how) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => return Err(ImageError::io("lock", &path, error.into())),
            }
        }
    }

    /// Moves a whole file from a scratch folder to its final name.
    pub(crate) fn publish_file(&self, from: &Path, to: &Path) -> Result<(), ImageError> {
        File::open(from)
            .and_then(|file| file.sync_all())
            .map_err(|e| ImageError::io("write", from, e))?;
        fs::rename(from, to).map_err(|e| ImageError::io("rename to", to, e))?;
        self.sync_folder_of(to)
    }

    /// Writes a file and gives it its name only when it is whole.
    pub(crate) fn publish(
        &self,
        to: &Path,
        write: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> Result<(), ImageError> {
        let failed = |e| ImageError::io("write", to, e);
        let tmp = self.root.join("tmp");
        let mut file = tempfile::Builder::new().prefix("file-").tempfile_in(tmp).map_err(failed)?;
        write(file.as_file_mut()).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
        file.persist(to).map_err(|e| failed(e.error))?;
        self.sync_folder_of(to)
    }

    fn sync_folder_of(&self, path: &Path) -> Result<(), ImageError> {
        let folder = path.parent().unwrap_or(&self.root);
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(|e| ImageError::io("sync", folder, e))
    }

    /// Fails when there is not room for so many more bytes.
    pub(crate) fn check_space(&self, bytes: u64) -> Result<(), ImageError> {
        let free_mib = free_mib(&self.root);
        let need_mib = (bytes >> 20) + limits::SPACE_LEFT_MIB;
        if need_mib > free_mib {
            return Err(ImageError::NoSpace { at: self.root.clone(), need_mib, free_mib });
        }
        Ok(())
    }

    /// Holds the right to make one layer; waits for whoever makes it now.
    pub(crate) fn lock(&self, key: &Digest, progress: OnProgress<'_>) -> Result<Lock, ImageError> {
        let path = self.root.join("locks").join(key.hex());
        let failed = |e: io::Error| ImageError::io("lock", &path, e);
        let deadline = Instant::now() + LOCK_WAIT_MAX;
        loop {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(&path)
                .map_err(failed)?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // The last holder removes the file: what was locked must still be the one there.
                Ok(()) if is_same(&file, &path) => return Ok(Lock { path, _file: file }),
                Ok(()) => continue,
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {}
                Err(error) => return Err(failed(error.into())),
            }
            progress(Progress {
                stage: "waiting for another import of the same layer".into(),
                done: 0,
                total: 0,
            });
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// A download that nobody went on with for long is not wanted any more.
    fn remove_old_partials(&self) {
        const AGE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
        let Ok(entries) = fs::read_dir(self.root.join("partial")) else { return };
        for entry in entries.flatten() {
            let age = entry.metadata().and_then(|meta| meta.modified());
            let age = age.ok().and_then(|at| at.elapsed().ok());
            if age.is_none_or(|age| age <= AGE_MAX) {
                continue;
            }
            let Ok(file) = File::open(entry.path()) else { continue };
            if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// A folder or file in `tmp` that nobody holds is of a process that died.
    fn remove_leftovers(&self) {
        /// A file is written within this time, or its writer is gone.
        const FILE_AGE_MAX: Duration = Duration::from_secs(24 * 3600);
        // Where that takes long, the next time will do.
        let Ok(_alone) = self.lock_making(FlockOperation::NonBlockingLockExclusive) else { return };
        let Ok(entries) = fs::read_dir(self.root.join("tmp")) else { return };
        for entry in entries.flatten() {
            let path = entry.path();
            let Ok(meta) = entry.metadata() else { continue };
            let old = meta.modified().ok().and_then(|at| at.elapsed().ok());
            let old = old.is_some_and(|age| age > FILE_AGE_MAX);
            if !meta.is_dir() {
                if old {
                    let _ = fs::remove_file(&path);
                }
                continue;
            }
            let unheld = match File::open(path.join("lock")) {
                Ok(lock) => {
                    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
                }
                // Just being made, or half removed.
                Err(_) => old,
            };
            if unheld {
                let _ = fs::remove_dir_all(&path);
            }
        }
    }
}

/// A temporary folder of one import, removed when dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    folder: tempfile::TempDir,
    _lock: File,
    _adding: File,
}

impl Scratch {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// The right to make one layer.
#[derive(Debug)]
pub(crate) struct Lock {
    path: PathBuf,
    _file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before the lock itself goes, so that nobody locks a file without a name for long.
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether an open file is still the one of this name.
pub(crate) fn is_same(file: &File, path: &Path) -> bool {
    let id = |meta: fs::Metadata| (meta.dev(), meta.ino());
    file.metadata()
        .ok()
        .map(id)
        .is_some_and(|locked| fs::metadata(path).ok().map(id) == Some(locked))
}

/// Copies a blob into a file, leaving holes for zeros, and returns its digest and size.
pub(crate) fn copy_blob(
    input: &mut dyn Read,
    to: &Path,
    mut copied: impl FnMut(u64),
) -> Result<(Digest, u64), ImageError> {
    let failed = |e| ImageError::io("write", to, e);
    let mut file = File::create_new(to).map_err(failed)?;
    let mut input = Hashing::new(input);
    let mut buffer = vec![0; 128 << 10];
    let mut total = 0u64;
    loop {
        let n = match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(ImageError::Input(error)),
        };
        total += n as u64;
        if buffer[..n].iter().all(|byte| *byte == 0) {
            file.seek(SeekFrom::Start(total)).map_err(failed)?;
        } else {
            file.write_all(&buffer[..n]).map_err(failed)?;
        }
        copied(n as u64);
    }
    file.set_len(total).map_err(failed)?;
    let (_, digest, bytes) = input.finish();
    Ok((digest, bytes))
}

/// Reads a document of a bounded size from a blob's file, checked against its digest.
pub(crate) fn read_document(
    path: &Path,
    digest: &Digest,
    what: &'static str,
) -> Result<Vec<u8>, ImageError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(ImageError::MissingBlob { what, digest: *digest });
        }
        Err(error) => return Err(ImageError::io("open", path, error)),
    };
    let mut bytes = Vec::new();
    file.take(limits::DOCUMENT_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| ImageError::io("read", path, e))?;
    if bytes.len() as u64 > limits::DOCUMENT_MAX {
        let limit = format!("{} MiB", limits::DOCUMENT_MAX >> 20);
        return Err(ImageError::Limit { what: format!("size of the {what}"), limit });
    }
    let found = Digest::of(&bytes);
    if found != *digest {
        return Err(ImageError::WrongDigest { what: what.into(), expected: *digest, found });
    }
    Ok(bytes)
}
