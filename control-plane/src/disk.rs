//! The write-ahead log's files: real ones, in one directory that one process may hold at a time.
//! Every new or removed name is made durable by a sync of the directory.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use towline_control_core::wal::{Disk, DiskError};

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
const LOCK_FILE: &str = "lock";

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error(
        "`{0}` is in use by another control plane: stop that one first, or give this one another \
         data_dir"
    )]
    InUse(PathBuf),
    /// The system refused.
    #[error("could not open the data directory `{path}`")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Takes the data directory for this process until the lock is dropped.
pub fn lock(dir: &Path) -> Result<File, OpenError> {
    let failed = |source| OpenError::Io { path: dir.to_owned(), source };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(dir.join(LOCK_FILE))
        .map_err(failed)?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::InUse(dir.to_owned())),
        Err(errno) => Err(failed(errno.into())),
    }
}

/// Files of one directory.
#[derive(Debug)]
pub struct FileDisk {
    dir: PathBuf,
    handle: File,
    open: BTreeMap<String, File>,
}

impl FileDisk {
    /// Opens the directory, making it if it is not there.
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Io { path: dir.to_owned(), source };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
        let handle = File::open(dir).map_err(failed)?;
        Ok(Self { dir: dir.to_owned(), handle, open: BTreeMap::new() })
    }

    fn file(&mut self, name: &str) -> io::Result<&File> {
        if !self.open.contains_key(name) {
            let file = OpenOptions::new().read(true).write(true).open(self.dir.join(name))?;
            self.open.insert(name.to_owned(), file);
        }
        self.open.get(name).ok_or_else(|| io::Error::other("not open"))
    }

    fn create_durable(&mut self, name: &str, start: &[u8], size: u64) -> io::Result<()> {
        let path = self.dir.join(name);
        let new = self.dir.join(format!("{name}.new"));
        let mut file =
            OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
        file.write_all(start)?;
        let mut left = size.saturating_sub(start.len() as u64);
        while left > 0 {
            let piece = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROS.len());
            file.write_all(&ZEROS[..piece])?;
            left -= piece as u64;
        }
        file.sync_all()?;
        std::fs::rename(&new, &path)?;
        self.open.remove(name);
        self.handle.sync_all()
    }
}

impl Disk for FileDisk {
    fn list(&mut self) -> Result<Vec<String>, DiskError> {
        let names = || -> io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in std::fs::read_dir(&self.dir)? {
                names.extend(entry?.file_name().into_string());
            }
            Ok(names)
        };
        let names = names().map_err(|error| failed("list", ".", &error))?;
        for unfinished in names.iter().filter(|name| name.ends_with(".new")) {
            let removed = std::fs::remove_file(self.dir.join(unfinished));
            removed.map_err(|error| failed("remove", unfinished, &error))?;
        }
        Ok(names)
    }

    fn read(&mut self, name: &str) -> Result<Vec<u8>, DiskError> {
        std::fs::read(self.dir.join(name)).map_err(|error| failed("read", name, &error))
    }

    fn create(&mut self, name: &str, start: &[u8], size: u64) -> Result<(), DiskError> {
        self.create_durable(name, start, size).map_err(|error| failed("create", name, &error))
    }

    fn write_at(&mut self, name: &str, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let written = self.file(name).and_then(|file| file.write_all_at(bytes, offset));
        written.map_err(|error| failed("write", name, &error))
    }

    fn sync(&mut self, name: &str) -> Result<(), DiskError> {
        let synced = self.file(name).and_then(File::sync_data);
        synced.map_err(|error| failed("sync", name, &error))
    }

    fn remove(&mut self, name: &str) -> Result<(), DiskError> {
        self.open.remove(name);
        let removed =
            std::fs::remove_file(self.dir.join(name)).and_then(|()| self.handle.sync_all());
        removed.map_err(|error| failed("remove", name, &error))
    }
}

fn failed(what: &'static str, name: &str, error: &io::Error) -> DiskError {
    DiskError { what, name: name.to_owned(), reason: error.to_string() }
}
