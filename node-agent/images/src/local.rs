//! The laptop's own system as an image (`--image local`).
//!
//! [`build`] walks the allowed folders ([`rules`]) and keeps a [`Manifest`] of metadata; a
//! [`Server`] answers the guest's FUSE requests from it and reads content straight from the
//! machine, which is the same one. Content is therefore neither copied nor hashed here: a file's
//! identity (device, inode, size, times) is checked around each read instead.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

mod files;
mod fuse;
pub mod manifest;
pub mod rules;
mod server;
mod walk;

pub use manifest::Manifest;
pub use server::{READ_MAX, Server};
pub use walk::{Summary, WalkError};

use crate::Digest;

/// Manifests kept in the cache besides those that somebody linked elsewhere.
const KEPT: usize = 4;

/// A local image that was built.
#[derive(Debug)]
pub struct Built {
    /// The image's id: the digest of its manifest.
    pub id: Digest,
    /// The manifest's file. The cache forgets old ones: who needs it for longer hard-links it.
    pub path: PathBuf,
    /// The manifest itself.
    pub manifest: Arc<Manifest>,
    /// What is in it and what was left out.
    pub summary: Summary,
    /// Some of what the deny list kept out, for a user who misses a file.
    pub denied: Vec<PathBuf>,
}

/// A local image could not be built or opened.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// The home given cannot be part of an image.
    #[error("the home `{0}` is not an absolute path of a folder below `/`")]
    Home(String),
    /// The walk failed.
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// The kept manifest is damaged.
    #[error("the local image at `{path}` cannot be used; run again with --new")]
    Damaged {
        /// The manifest's file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: manifest::BadManifest,
    },
    /// The machine's own error.
    #[error("could not {what} `{path}`")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// Builds the image of the machine under `root` (`/`, but in tests) for the user whose home is
/// `home`, and keeps its manifest under `<cache>/images/local`. The same machine unchanged gives
/// the same id and file. Takes about a second for 300,000 entries; where it takes longer, `progress`
/// is told every few seconds how many entries were seen.
pub fn build(
    cache: &Path,
    root: &Path,
    home: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<Built, LocalError> {
    let home = checked_home(home)?;
    let root = open_root(root)?;
    let walk::Walked { manifest: bytes, summary, denied } =
        walk::walk(root.as_fd(), &home, progress)?;
    let denied = denied.into_iter().map(|path| Path::new("/").join(OsStr::from_bytes(&path)));
    let folder = cache.join("images/local");
    let keep = |what, source| LocalError::Io { what, path: folder.clone(), source };
    std::fs::create_dir_all(&folder).map_err(|e| keep("make", e))?;
    let manifest = Manifest::parse(bytes)
        .map_err(|source| LocalError::Damaged { path: folder.clone(), source })?;
    let id = manifest.digest();
    let path = folder.join(format!("{}.manifest", id.hex()));
    if std::fs::metadata(&path).is_ok_and(|found| found.len() == manifest.bytes().len() as u64) {
        // Used now: the newest are kept.
        let touched = File::options().append(true).open(&path);
        let _ = touched.and_then(|file| file.set_modified(std::time::SystemTime::now()));
    } else {
        write_whole(&folder, &path, manifest.bytes())
            .map_err(|e| keep("write a manifest in", e))?;
        forget_old(&folder);
    }
    Ok(Built { id, path, manifest: Arc::new(manifest), summary, denied: denied.collect() })
}

/// Opens a manifest that [`build`] wrote, for a server of a sandbox that lives on.
pub fn open(path: &Path) -> Result<Arc<Manifest>, LocalError> {
    let read = |source| LocalError::Io { what: "read", path: path.to_owned(), source };
    let bytes = std::fs::read(path).map_err(read)?;
    let damaged = |source| LocalError::Damaged { path: path.to_owned(), source };
    Ok(Arc::new(Manifest::parse(bytes).map_err(damaged)?))
}

/// Makes a server of an image of the machine under `root`.
pub fn serve(manifest: Arc<Manifest>, root: &Path) -> Result<Server, LocalError> {
    Ok(Server::new(manifest, open_root(root)?))
}

fn open_root(root: &Path) -> Result<OwnedFd, LocalError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(root, flags, Mode::empty()).map_err(|error| LocalError::Io {
        what: "open",
        path: root.to_owned(),
        source: error.into(),
    })
}

/// Returns the home relative to the root, if it can be one.
fn checked_home(home: &Path) -> Result<Vec<u8>, LocalError> {
    let bad = || LocalError::Home(home.display().to_string());
    let path = home.as_os_str().as_bytes().strip_prefix(b"/").ok_or_else(bad)?;
    let path = path.strip_suffix(b"/").unwrap_or(path);
    let plain = |name: &[u8]| {
        !name.is_empty() && !matches!(name, b"." | b"..") && name.len() <= 255 && !name.contains(&0)
    };
    if path.len() > 4000 || !path.split(|b| *b == b'/').all(plain) {
        return Err(bad());
    }
    Ok(path.to_vec())
}

fn write_whole(folder: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    File::open(folder)?.sync_all()
}

/// Removes all but the newest manifests; a failure leaves more than needed, which does no harm.
fn forget_old(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let mut found: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.file_name().as_bytes().ends_with(b".manifest"))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    found.sort();
    for (_, path) in found.iter().rev().skip(KEPT) {
        let _ = std::fs::remove_file(path);
    }
}
