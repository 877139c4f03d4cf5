//! Removes what no image needs: records of images that nobody keeps, then layer disks and blobs that
//! no remaining image names.
//!
//! Which images are kept is the caller's to say; what is younger than the grace age stays in any
//! case, because its image may be on its way to a name. It runs alone: whoever adds to the store
//! holds the shared lock of [`Store::scratch`]. The invariant: a file that a recorded image names is
//! never removed, and nothing is removed when one of those images cannot be read.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use crate::Digest;
use crate::document;
use crate::error::ImageError;
use crate::prepare::disks_of;
use crate::store::{Store, read_document};

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Images.
    pub images: u64,
    /// Layer disks and blobs of which nothing is left.
    pub files: u64,
    /// What they took on the disk: blocks that are free now, unless a running VM holds one still.
    pub bytes: u64,
}

/// Files that a kept image needs.
#[derive(Default)]
struct Needed {
    blobs: BTreeSet<Digest>,
    layers: BTreeSet<Digest>,
}

/// Removes all images but those in `keep` and those recorded within `grace`, and what only they
/// needed.
pub fn collect(
    store: &Store,
    keep: &BTreeSet<Digest>,
    grace: Duration,
) -> Result<Collected, ImageError> {
    let _alone = store.alone()?;
    let mut needed = Needed::default();
    let mut unwanted = Vec::new();
    for image in store.list()? {
        let path = store.image(&image.digest);
        if keep.contains(&image.digest) || is_young(&path, grace) {
            needed.add(store, &image.digest)?;
        } else {
            unwanted.push(path);
        }
    }
    let mut collected = Collected::default();
    for path in unwanted {
        collected.images += u64::from(remove(&path)?.is_some());
    }
    let layer_of = |name: &str| Digest::from_hex(name.split('.').next().unwrap_or("")).ok();
    sweep(&store.layers_folder(), grace, &mut collected, |name| {
        layer_of(name).is_some_and(|key| !needed.layers.contains(&key))
    })?;
    sweep(&store.blobs_folder(), grace, &mut collected, |name| {
        Digest::from_hex(name).is_ok_and(|blob| !needed.blobs.contains(&blob))
    })?;
    Ok(collected)
}

impl Needed {
    fn add(&mut self, store: &Store, digest: &Digest) -> Result<(), ImageError> {
        let manifest = read_document(&store.blob(digest), digest, "manifest")?;
        let manifest = document::manifest(&manifest)?;
        let of_config = manifest.config.digest;
        let config = read_document(&store.blob(&of_config), &of_config, "config")?;
        let config = document::config(&config)?;
        self.blobs.extend([*digest, of_config]);
        self.blobs.extend(manifest.layers.iter().map(|layer| layer.digest));
        self.layers.extend(disks_of(&manifest, &config)?);
        Ok(())
    }
}

/// Removes the files of a folder whose names are unwanted and that are old enough.
fn sweep(
    folder: &Path,
    grace: Duration,
    collected: &mut Collected,
    unwanted: impl Fn(&str) -> bool,
) -> Result<(), ImageError> {
    let entries = fs::read_dir(folder).map_err(|e| ImageError::io("read", folder, e))?;
    for entry in entries.flatten() {
        // What has another kind of name is not ours to judge.
        let name = entry.file_name();
        let ours = name.to_str().is_some_and(&unwanted);
        if !ours || is_young(&entry.path(), grace) {
            continue;
        }
        if let Some(bytes) = remove(&entry.path())? {
            collected.files += 1;
            collected.bytes += bytes;
        }
    }
    Ok(())
}

/// Removes a file; returns what that frees, or nothing when it was gone already.
fn remove(path: &Path) -> Result<Option<u64>, ImageError> {
    let Ok(meta) = fs::symlink_metadata(path) else { return Ok(None) };
    match fs::remove_file(path) {
        Ok(()) => Ok(Some(if meta.nlink() == 1 { meta.blocks() * 512 } else { 0 })),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ImageError::io("remove", path, error)),
    }
}

/// Whether it was written within the grace age, or its age cannot be told.
fn is_young(path: &Path, grace: Duration) -> bool {
    let age = fs::symlink_metadata(path).ok().and_then(|meta| meta.modified().ok()?.elapsed().ok());
    age.is_none_or(|age| age < grace)
}
