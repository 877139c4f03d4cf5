//! From an image in the store to the disks that a microVM mounts.
//!
//! A disk's name is the digest of the layers up to it and of how disks are made, so images share
//! the disks of their common lower layers, and a disk is made once however many ask for it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::PathBuf;

use crate::Digest;
use crate::document::{self, Blob, Config, ImageConfig, Manifest};
use crate::error::ImageError;
use crate::layer::imager;
use crate::layer::listing::Listing;
use crate::layer::normal::{self, Archive, Budget};
use crate::limits;
use crate::store::{OnProgress, Progress, Store, read_document};
use tokio::sync::OwnedSemaphorePermit;

/// An image ready to be mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// Digest of the image's manifest.
    pub digest: Digest,
    /// Squashfs files, the lowest layer first; at least one, at most
    /// [`limits::LAYER_DISKS_MAX`].
    pub layers: Vec<PathBuf>,
    /// How its programs are started.
    pub config: ImageConfig,
}

/// Returns an imported image's disks, making those that are not there.
pub fn prepare(
    store: &Store,
    digest: &Digest,
    progress: OnProgress<'_>,
) -> Result<Prepared, ImageError> {
    if !store.has_image(digest) {
        return Err(ImageError::Unknown(*digest));
    }
    let manifest = document::manifest(&read_document(&store.blob(digest), digest, "manifest")?)?;
    let of_config = manifest.config.digest;
    let config = document::config(&read_document(&store.blob(&of_config), &of_config, "config")?)?;
    let mut here = |blob: &Digest| store.blob(blob);
    let layers = make_layers(store, &manifest, &config, &mut here, progress)?;
    Ok(Prepared { digest: *digest, layers, config: config.config })
}

/// One disk to be: the layers in it, and its name.
struct Disk {
    layers: Vec<(usize, Blob, Digest)>,
    key: Digest,
    count: usize,
}

/// The blobs that disks are made of.
pub(crate) trait Blobs {
    /// Where a blob's file is, or will be.
    fn path(&self, digest: &Digest) -> PathBuf;

    /// Returns when these blobs are here.
    fn wait(&mut self, _blobs: &[Blob]) -> Result<(), ImageError> {
        Ok(())
    }

    /// Waits for the right to use the machine for one disk; held while it is made.
    fn turn(&mut self) -> Option<OwnedSemaphorePermit> {
        None
    }
}

/// Blobs that are all here.
impl<F: Fn(&Digest) -> PathBuf> Blobs for F {
    fn path(&self, digest: &Digest) -> PathBuf {
        self(digest)
    }
}

/// Makes the disks of an image.
pub(crate) fn make_layers(
    store: &Store,
    manifest: &Manifest,
    config: &Config,
    blobs: &mut dyn Blobs,
    progress: OnProgress<'_>,
) -> Result<Vec<PathBuf>, ImageError> {
    if manifest.layers.len() != config.diff_ids.len() {
        let why = format!(
            "it has {} layers, the config {}",
            manifest.layers.len(),
            config.diff_ids.len()
        );
        return Err(ImageError::document("manifest", why));
    }
    let disks = plan(manifest, config, &imager::version()?);
    let mut budget = Budget::default();
    let mut below: Option<&Disk> = None;
    let mut files = Vec::new();
    for disk in &disks {
        let is_empty = match state(store, disk) {
            Some(is_empty) => is_empty,
            None => {
                // Before the lock, which others wait for: blobs may take long to come.
                let needed: Vec<_> = disk.layers.iter().map(|(_, blob, _)| *blob).collect();
                blobs.wait(&needed)?;
                let _lock = store.lock(&disk.key, progress)?;
                match state(store, disk) {
                    Some(is_empty) => is_empty,
                    None => {
                        let _turn = blobs.turn();
                        make_disk(store, disk, below, blobs, &mut budget, progress)?
                    }
                }
            }
        };
        if !is_empty {
            files.push(store.layer(&disk.key, "squashfs"));
        }
        below = Some(disk);
    }
    if files.is_empty() {
        files.push(make_empty_root(store, progress)?);
    }
    Ok(files)
}

/// The names of an image's disks, of those that may be empty too, as this node would make them.
pub(crate) fn disks_of(manifest: &Manifest, config: &Config) -> Result<Vec<Digest>, ImageError> {
    let imager = imager::version()?;
    let mut names: Vec<_> =
        plan(manifest, config, &imager).into_iter().map(|disk| disk.key).collect();
    names.push(empty_root(&imager));
    Ok(names)
}

fn empty_root(imager: &str) -> Digest {
    Digest::of(format!("{imager}\nempty root\n").as_bytes())
}

/// Makes the one disk of an image without a single file: a root to mount.
fn make_empty_root(store: &Store, progress: OnProgress<'_>) -> Result<PathBuf, ImageError> {
    let key = empty_root(&imager::version()?);
    let path = store.layer(&key, "squashfs");
    let _lock = store.lock(&key, progress)?;
    if !path.exists() {
        let scratch = store.scratch()?;
        let made = scratch.path("disk");
        let empty = normal::scan(&[], &Listing::default(), &mut Budget::default())?;
        imager::make(&made, &empty.root, |mut out| normal::write(&[], &empty, &mut out).map(drop))?;
        store.publish_file(&made, &path)?;
    }
    Ok(path)
}

fn plan(manifest: &Manifest, config: &Config, imager: &str) -> Vec<Disk> {
    let count = manifest.layers.len();
    let layers: Vec<_> = manifest
        .layers
        .iter()
        .zip(&config.diff_ids)
        .enumerate()
        .map(|(number, (blob, diff_id))| (number, *blob, *diff_id))
        .collect();
    let alone = if count > limits::LAYER_DISKS_MAX { limits::LAYER_DISKS_MAX - 1 } else { count };
    let mut groups: Vec<Vec<_>> = layers[..alone].iter().map(|layer| vec![*layer]).collect();
    if alone < count {
        groups.push(layers[alone..].to_vec());
    }
    let mut chain = String::new();
    groups
        .into_iter()
        .map(|layers| {
            for (_, _, diff_id) in &layers {
                // The OCI specification's chain id.
                chain = if chain.is_empty() {
                    diff_id.to_string()
                } else {
                    Digest::of(format!("{chain} {diff_id}").as_bytes()).to_string()
                };
            }
            let squashed = layers.len();
            let name = format!("{imager}\n{chain}\n{squashed} layers\n");
            let key = Digest::of(name.as_bytes());
            Disk { layers, key, count }
        })
        .collect()
}

/// Says whether a disk is made, and then whether it is empty and has no file.
fn state(store: &Store, disk: &Disk) -> Option<bool> {
    let mut flag = [0];
    File::open(store.layer(&disk.key, "listing")).ok()?.read_exact(&mut flag).ok()?;
    match &flag {
        b"e" => Some(true),
        b"d" => store.layer(&disk.key, "squashfs").exists().then_some(false),
        _ => None,
    }
}

fn make_disk(
    store: &Store,
    disk: &Disk,
    below: Option<&Disk>,
    blobs: &dyn Blobs,
    budget: &mut Budget,
    progress: OnProgress<'_>,
) -> Result<bool, ImageError> {
    if let (Some((first, ..)), Some((last, ..))) = (disk.layers.first(), disk.layers.last()) {
        let stage = if first == last {
            format!("layer {} of {}", first + 1, disk.count)
        } else {
            format!("layers {} to {} of {}", first + 1, last + 1, disk.count)
        };
        progress(Progress { stage, done: 0, total: 0 });
    }
    let lower = match below {
        Some(below) => read_listing(store, &below.key)?,
        None => Listing::default(),
    };
    let archives: Vec<_> = disk.layers.iter().map(|layer| archive(blobs, *layer)).collect();
    let outcome = normal::scan(&archives, &lower, budget)?;
    let is_empty = outcome.is_empty();
    if !is_empty {
        // About what the layers took compressed; a full disk in spite of this is noticed too.
        store.check_space(disk.layers.iter().map(|(_, blob, _)| blob.size * 5 / 4).sum())?;
        let scratch = store.scratch()?;
        let made = scratch.path("disk");
        imager::make(&made, &outcome.root, |mut out| {
            normal::write(&archives, &outcome, &mut out).map(drop)
        })?;
        store.publish_file(&made, &store.layer(&disk.key, "squashfs"))?;
    }
    // Last: with its listing a disk counts as made.
    store.publish(&store.layer(&disk.key, "listing"), |file| {
        file.write_all(if is_empty { b"e" } else { b"d" })?;
        outcome.merged.write(file)
    })?;
    Ok(is_empty)
}

fn read_listing(store: &Store, key: &Digest) -> Result<Listing, ImageError> {
    let path = store.layer(key, "listing");
    let read = || {
        let mut file = File::open(&path)?;
        file.read_exact(&mut [0])?;
        Listing::read(file)
    };
    read().map_err(|error| {
        // Without it the disk counts as not made: the next preparation makes both again.
        let _ = fs::remove_file(&path);
        ImageError::io("read", path.clone(), error)
    })
}

fn archive<'a>(blobs: &dyn Blobs, (number, blob, diff_id): (usize, Blob, Digest)) -> Archive<'a> {
    let path = blobs.path(&blob.digest);
    Archive {
        name: format!("layer {}", number + 1),
        diff_id: Some(diff_id),
        open: Box::new(move || {
            let file = File::open(&path).map_err(|e| ImageError::io("open", &path, e))?;
            Ok(Box::new(file))
        }),
    }
}
