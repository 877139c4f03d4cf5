//! Makes an image of what a sandbox changed: one layer more on top of the image that it was of, or one
//! layer of all that it has.
//!
//! The guest says file by file what changed, and is believed nothing: each entry is checked, and what
//! it says is bounded. The same state gives the same bytes: the order is the guest's, which is checked
//! too, the times are clamped, and nothing of this node, of now, or of a name goes in. Nothing of the
//! image has a name in the store before all of it is there.

mod document;
pub(crate) mod entry;
mod layer;
mod scan;

use std::fmt;
use std::io::Write as _;

use towline_proto::v1::{FileType, LayerEntry};

use crate::Digest;
use crate::document::{config as checked_config, manifest as checked_manifest};
use crate::error::ImageError;
use crate::secrets::Finding;
use crate::store::{Scratch, Store, StoredImage, read_document};
use document::Documents;
use entry::Order;
use layer::Writer;
use scan::Scan;

/// What kind of image is wanted.
#[derive(Debug, Clone)]
pub struct SaveRequest {
    /// Manifest digest of the image that the sandbox is of.
    pub base: Digest,
    /// What that image was called.
    pub base_name: String,
    /// One layer of all that the sandbox has, instead of one more on top of the base's.
    pub squash: bool,
    /// What becomes of files' times.
    pub times: Times,
    /// How the layer is packed.
    pub compression: Compression,
    /// What the image says otherwise than its base.
    pub settings: Settings,
    /// Files whose secrets may be in the image.
    pub allowed: Vec<Allowed>,
}

/// A file, or a directory with all beneath it, whose secrets may be in an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// Relative to the root.
    pub path: Vec<u8>,
    /// Why; it is written into the image.
    pub reason: String,
}

/// What becomes of files' times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Times {
    /// Later ones become the time at which the base was made.
    Base,
    /// Later ones become this, in seconds since 1970.
    Clamp(i64),
    /// They stay; so the same state at another time may be another image.
    Keep,
}

/// How a layer is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Small and quick; docker reads it from version 23 on.
    Zstd,
    /// Read by everything.
    Gzip,
}

/// Changes of an image's settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// Arguments, or the command where there is no entrypoint.
    pub cmd: Option<Vec<String>>,
    /// What is always started; clears the arguments unless they are given too.
    pub entrypoint: Option<Vec<String>>,
    /// Name and value.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub workdir: Option<String>,
    /// `user[:group]`.
    pub user: Option<String>,
    /// Name and value.
    pub labels: Vec<(String, String)>,
    /// For the history; empty for none.
    pub message: String,
}

/// An image that was saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedImage {
    /// It is in the store now.
    pub image: StoredImage,
    /// Files of the new layer.
    pub entries: u64,
    /// Bytes of the new layer, packed and unpacked; 0 where nothing changed.
    pub layer_bytes: u64,
    /// See `layer_bytes`.
    pub layer_unpacked_bytes: u64,
    /// Secrets in it that the request let through.
    pub allowed: Vec<Finding>,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// One file cannot be in the image.
    #[error("/{path}: {why}")]
    Entry {
        /// Which.
        path: String,
        /// Why.
        why: String,
    },
    /// The guest does not keep to the protocol.
    #[error("the sandbox does not say what changed as it should: {0}")]
    Guest(String),
    /// More than an image may have.
    #[error("the sandbox has {0}: no image may have as much")]
    Limit(String),
    /// It would give secrets away.
    #[error("the image would give {} secrets away", found.len())]
    Secrets {
        /// Those, up to a bound.
        found: Vec<Finding>,
        /// There were more.
        more: bool,
    },
    /// A layer of the base is not on this node any more.
    #[error(
        "the image {base} is not whole on this node any more: bring it in again with `tow image pull` or `tow image import`"
    )]
    NoBase {
        /// Which image.
        base: Digest,
    },
    /// The store, or a document of the base.
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl SaveError {
    fn entry(path: &[u8], why: &str) -> Self {
        let path = String::from_utf8_lossy(&path[..path.len().min(1024)]).into_owned();
        Self::Entry { path, why: why.into() }
    }
}

/// An image that is being saved. Takes what the guest says, in its order.
pub struct Save {
    store: Store,
    request: SaveRequest,
    base: Documents,
    created_s: i64,
    order: Order,
    layer: Option<Writer>,
    /// The file at hand.
    path: Vec<u8>,
    scan: Scan,
    /// Until the image is recorded, nothing of the store is collected.
    scratch: Scratch,
}

impl fmt::Debug for Save {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Save").field("request", &self.request).finish_non_exhaustive()
    }
}

impl Save {
    /// Begins one; the base must be on this node, whole.
    pub fn begin(store: &Store, request: SaveRequest) -> Result<Self, SaveError> {
        let scratch = store.scratch()?;
        let base = &request.base;
        let no_base = || SaveError::NoBase { base: *base };
        if !store.has_image(base) {
            return Err(no_base());
        }
        let manifest = read_document(&store.blob(base), base, "manifest")?;
        let parts = checked_manifest(&manifest)?;
        if parts.layers.iter().any(|layer| !store.blob(&layer.digest).exists()) {
            return Err(no_base());
        }
        let of_config = parts.config.digest;
        let config = read_document(&store.blob(&of_config), &of_config, "config")?;
        checked_config(&config)?;
        let base = Documents::parse(&manifest, &config)?;
        let created_s = match request.times {
            Times::Clamp(seconds) => seconds,
            // A base that says no time was made in 1970: any other would be of now.
            Times::Base | Times::Keep => base.created_s().unwrap_or(0),
        };
        let store = store.clone();
        let (order, layer, path) = (Order::default(), None, Vec::new());
        let scan = Scan::new(request.allowed.clone());
        Ok(Self { store, request, base, created_s, order, layer, path, scan, scratch })
    }

    /// Takes one entry. The content of the one before must have come whole.
    pub fn entry(&mut self, entry: &LayerEntry) -> Result<(), SaveError> {
        let mut header = self.order.header(entry)?;
        if self.request.squash && entry.r#type() == FileType::Unspecified {
            return Err(SaveError::Guest("something was removed from nothing".into()));
        }
        header.mtime = match self.request.times {
            Times::Keep => header.mtime,
            Times::Base | Times::Clamp(_) => header.mtime.min(self.created_s),
        };
        self.path.clone_from(&entry.path);
        let layer = match &mut self.layer {
            Some(layer) => layer,
            none => {
                let path = self.scratch.path("layer");
                none.insert(Writer::new(&self.store, path, self.request.compression)?)
            }
        };
        layer.header(&header)?;
        self.scan.entry(&header);
        match entry.content.is_empty() {
            true => Ok(()),
            false => self.data(&entry.content),
        }
    }

    /// Takes more of the newest file's content.
    pub fn data(&mut self, bytes: &[u8]) -> Result<(), SaveError> {
        let none = || SaveError::Guest("content of no file".into());
        self.layer.as_mut().ok_or_else(none)?.data(&self.path, bytes)?;
        self.scan.data(bytes);
        Ok(())
    }

    /// Takes so many zeros of it.
    pub fn hole(&mut self, zeros: u64) -> Result<(), SaveError> {
        let none = || SaveError::Guest("content of no file".into());
        self.layer.as_mut().ok_or_else(none)?.hole(&self.path, zeros)?;
        self.scan.zeros(zeros);
        Ok(())
    }

    /// Ends the layer and puts the image into the store.
    pub fn finish(mut self) -> Result<SavedImage, SaveError> {
        let layer = self.layer.take().map(Writer::finish).transpose()?;
        let settings = &self.request.settings;
        let allowed = std::mem::take(&mut self.scan).finish(settings)?;
        let mut documents = self.base.clone();
        let set = documents.set(settings)?;
        let same_layers = match &layer {
            None => !self.request.squash,
            // It was squashed before.
            Some(layer) => self.request.squash && documents.is_of(&layer.digest),
        };
        if same_layers && !set && settings.message.is_empty() {
            return self.unchanged();
        }
        if self.request.squash {
            documents.squash()?;
        }
        let created = document::time(self.created_s)?;
        let compression = self.request.compression;
        documents.add(layer.as_ref(), compression, &created, &settings.message)?;
        let (config, manifest) =
            documents.finish(&created, &self.request, &scan::record(&allowed, &self.request))?;
        // What others would refuse is not made.
        let checked = checked_manifest(&manifest)?;
        checked_config(&config)?;
        let (entries, mut unpacked, mut layer_bytes) = (self.order.entries(), 0, 0);
        if let Some(layer) = layer {
            (unpacked, layer_bytes) = (layer.unpacked, layer.bytes);
            self.store.publish_file(&layer.path, &self.store.blob(&layer.digest))?;
        }
        let digest = self.publish(&config).and_then(|_| self.publish(&manifest))?;
        let image = StoredImage {
            digest,
            bytes: checked.layers.iter().map(|layer| layer.size).sum(),
            layers: u32::try_from(checked.layers.len()).unwrap_or(u32::MAX),
        };
        self.store.record(&image)?;
        Ok(SavedImage { image, entries, layer_bytes, layer_unpacked_bytes: unpacked, allowed })
    }

    /// The base itself: nothing is to be added.
    fn unchanged(&self) -> Result<SavedImage, SaveError> {
        let digest = self.request.base;
        let image = self.store.list()?.into_iter().find(|image| image.digest == digest);
        let image = image.ok_or(SaveError::NoBase { base: digest })?;
        let (entries, layer_bytes, layer_unpacked_bytes) = (0, 0, 0);
        let allowed = Vec::new();
        Ok(SavedImage { image, entries, layer_bytes, layer_unpacked_bytes, allowed })
    }

    fn publish(&self, bytes: &[u8]) -> Result<Digest, ImageError> {
        let digest = Digest::of(bytes);
        self.store.publish(&self.store.blob(&digest), |file| file.write_all(bytes))?;
        Ok(digest)
    }
}
