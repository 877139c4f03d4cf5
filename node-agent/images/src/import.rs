//! Takes an image in, from an OCI image layout (a tar stream or a folder) or an archive of `docker
//! save`: blobs are checked as they are copied, and the image is recorded only when its layer disks
//! are made.

pub(crate) mod docker;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use self::docker::Docker;
use crate::Digest;
use crate::document::{self, Blob};
use crate::error::ImageError;
use crate::layer::compression::{self, BoundMet};
use crate::layer::normal::shown;
use crate::limits;
use crate::prepare::make_layers;
use crate::store::{OnProgress, Progress, Scratch, Store, StoredImage, copy_blob, read_document};
use crate::tar::{Reader, TarError, Type};

/// Indexes within indexes that are followed.
const NESTED_MAX: usize = 4;

/// An image that is now in the store, its layer disks made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// Digest of its manifest: the image's name for [`crate::prepare()`].
    pub digest: Digest,
    /// Compressed bytes of its layers.
    pub bytes: u64,
    /// How many layers it has.
    pub layers: u32,
}

/// Imports an OCI image layout or an archive of `docker save` from a tar archive (plain, gzip or
/// zstd), read as it comes. One that is both is read as the layout.
pub fn import(
    store: &Store,
    archive: impl Read,
    progress: OnProgress<'_>,
) -> Result<Imported, ImageError> {
    let mut staged = Staged::new(store)?;
    let input = compression::unpack(archive, limits::IMAGE_BYTES_MAX).map_err(ImageError::Input)?;
    staged.read_archive(input, progress)?;
    staged.finish(progress)
}

/// Imports an OCI image layout from a folder.
pub fn import_layout(
    store: &Store,
    folder: &Path,
    progress: OnProgress<'_>,
) -> Result<Imported, ImageError> {
    let mut staged = Staged::new(store)?;
    for name in ["oci-layout", "index.json"] {
        let path = folder.join(name);
        match File::open(&path) {
            Ok(file) => staged.document(name, file)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(ImageError::io("open", path, error)),
        }
    }
    staged.folder = Some(folder.join("blobs/sha256"));
    staged.finish(progress)
}

/// Blobs on their way into the store.
struct Staged<'s> {
    store: &'s Store,
    scratch: Scratch,
    blobs: BTreeMap<Digest, u64>,
    index: Option<Vec<u8>>,
    layout: Option<Vec<u8>>,
    docker: Docker,
    /// Where blobs are fetched from on demand.
    folder: Option<PathBuf>,
}

impl<'s> Staged<'s> {
    fn new(store: &'s Store) -> Result<Staged<'s>, ImageError> {
        Ok(Staged {
            store,
            scratch: store.scratch()?,
            blobs: BTreeMap::new(),
            index: None,
            layout: None,
            docker: Docker::default(),
            folder: None,
        })
    }

    fn read_archive(
        &mut self,
        input: impl Read,
        progress: OnProgress<'_>,
    ) -> Result<(), ImageError> {
        let mut reader = Reader::new(input);
        let mut read = 0u64;
        let mut entries = 0u64;
        while let Some(header) = reader.next().map_err(damaged)? {
            let entry = shown(entries, &header.path);
            entries += 1;
            if entries > limits::BLOBS_MAX as u64 {
                return Err(ImageError::Limit {
                    what: "entries in the archive".into(),
                    limit: limits::BLOBS_MAX.to_string(),
                });
            }
            let path = header.path.strip_prefix(b"./").unwrap_or(&header.path);
            match (header.kind, path) {
                (Type::Regular, b"oci-layout") => self.document("oci-layout", &mut reader)?,
                (Type::Regular, b"index.json") => self.document("index.json", &mut reader)?,
                (Type::Regular, b"manifest.json") => self.document("manifest.json", &mut reader)?,
                (Type::Regular, path) => {
                    let mut copied = |n| {
                        let before = read;
                        read += n;
                        if before >> 22 != read >> 22 {
                            progress(Progress { stage: "reading".into(), done: read, total: 0 });
                        }
                    };
                    let name = path.strip_prefix(b"blobs/sha256/");
                    match name.and_then(|name| std::str::from_utf8(name).ok()) {
                        Some(name) => {
                            let Ok(digest) = Digest::from_hex(name) else {
                                let why = "a blob that is not named by its SHA-256".into();
                                let archive = ARCHIVE.into();
                                return Err(ImageError::BadEntry { archive, entry, why });
                            };
                            self.blob(digest, header.size, &mut reader, &mut copied)?;
                        }
                        None if docker::is_part(path) => {
                            let number = entries;
                            let size = header.size;
                            self.part(path, (number, size), &mut reader, &mut copied)?;
                        }
                        // Anything else is not ours to read: docker adds files of its own.
                        None => {}
                    }
                }
                (Type::Symlink | Type::HardLink, path) if docker::is_part(path) => {
                    self.docker.add_link(path, &header.link, header.kind == Type::HardLink);
                }
                (Type::Directory, _) => {}
                _ => {
                    let why = "an image layout has only files and folders".into();
                    return Err(ImageError::BadEntry { archive: ARCHIVE.into(), entry, why });
                }
            }
        }
        Ok(())
    }

    fn document(&mut self, name: &str, input: impl Read) -> Result<(), ImageError> {
        let mut bytes = Vec::new();
        input.take(limits::DOCUMENT_MAX + 1).read_to_end(&mut bytes).map_err(input_error)?;
        if bytes.len() as u64 > limits::DOCUMENT_MAX {
            let limit = format!("{} MiB", limits::DOCUMENT_MAX >> 20);
            return Err(ImageError::Limit { what: format!("size of {name}"), limit });
        }
        match name {
            "oci-layout" => self.layout = Some(bytes),
            "manifest.json" => self.docker.set_manifest(bytes),
            _ => self.index = Some(bytes),
        }
        Ok(())
    }

    /// Copies one blob to the scratch folder, unless the store has it, and checks its digest.
    fn blob(
        &mut self,
        digest: Digest,
        size: u64,
        input: &mut dyn Read,
        copied: &mut dyn FnMut(u64),
    ) -> Result<(), ImageError> {
        if self.blobs.contains_key(&digest) || self.store.blob(&digest).exists() {
            return Ok(());
        }
        self.store.check_space(size)?;
        let path = self.scratch.path(&digest.hex());
        let (found, bytes) = copy_blob(input, &path, copied).map_err(|error| match error {
            ImageError::Input(error) => input_error(error),
            other => other,
        })?;
        if found != digest {
            let what = format!("blob {}", digest.hex());
            return Err(ImageError::WrongDigest { what, expected: digest, found });
        }
        self.blobs.insert(digest, bytes);
        Ok(())
    }

    /// Copies a file that may be a part of docker's image: nobody has said its digest yet.
    fn part(
        &mut self,
        path: &[u8],
        (number, size): (u64, u64),
        input: &mut dyn Read,
        copied: &mut dyn FnMut(u64),
    ) -> Result<(), ImageError> {
        self.store.check_space(size)?;
        let scratch = self.scratch.path(&format!("part-{number}"));
        let (digest, size) = copy_blob(input, &scratch, copied).map_err(|error| match error {
            ImageError::Input(error) => input_error(error),
            other => other,
        })?;
        self.docker.add_part(path, Blob { digest, size });
        let known = self.blobs.contains_key(&digest) || self.store.blob(&digest).exists();
        if known {
            return fs::remove_file(&scratch).map_err(|e| ImageError::io("remove", scratch, e));
        }
        let to = self.scratch.path(&digest.hex());
        fs::rename(&scratch, &to).map_err(|e| ImageError::io("rename to", to, e))?;
        self.blobs.insert(digest, size);
        Ok(())
    }

    /// Writes the manifest that docker's archive amounts to.
    fn docker_manifest(&mut self) -> Result<Digest, ImageError> {
        let find = |digest: &Digest| {
            let size = fs::metadata(self.path_of(digest)).ok()?.len();
            Some(Blob { digest: *digest, size })
        };
        let bytes = self.docker.to_manifest(&find)?.into_bytes();
        let digest = Digest::of(&bytes);
        self.blob(digest, bytes.len() as u64, &mut &bytes[..], &mut |_| {})?;
        Ok(digest)
    }

    /// Where a blob is: in the store, or still in the scratch folder.
    fn path_of(&self, digest: &Digest) -> PathBuf {
        if self.blobs.contains_key(digest) {
            return self.scratch.path(&digest.hex());
        }
        self.store.blob(digest)
    }

    fn read(&self, digest: &Digest, what: &'static str) -> Result<Vec<u8>, ImageError> {
        read_document(&self.path_of(digest), digest, what)
    }

    /// Makes sure that a blob is here.
    fn want(&mut self, digest: Digest, what: &'static str) -> Result<(), ImageError> {
        if self.path_of(&digest).exists() {
            return Ok(());
        }
        if let Some(folder) = self.folder.clone() {
            let path = folder.join(digest.hex());
            let mut file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(ImageError::MissingBlob { what, digest });
                }
                Err(error) => return Err(ImageError::io("open", path, error)),
            };
            let size = file.metadata().map_or(0, |meta| meta.len());
            self.blob(digest, size, &mut file, &mut |_| {})?;
        }
        if !self.path_of(&digest).exists() {
            return Err(ImageError::MissingBlob { what, digest });
        }
        Ok(())
    }

    /// Gives a blob its name in the store; only of an image that is whole and good.
    fn keep(&mut self, digest: Digest) -> Result<(), ImageError> {
        if self.blobs.remove(&digest).is_some() {
            let from = self.scratch.path(&digest.hex());
            self.store.publish_file(&from, &self.store.blob(&digest))?;
        }
        Ok(())
    }

    fn want_sized(&mut self, blob: Blob, what: &'static str) -> Result<(), ImageError> {
        self.want(blob.digest, what)?;
        let path = self.path_of(&blob.digest);
        let size = fs::metadata(&path).map_err(|e| ImageError::io("read", path, e))?.len();
        if size != blob.size {
            let why = format!("{what} {} has {size} bytes, not {}", blob.digest, blob.size);
            return Err(ImageError::document("manifest", why));
        }
        Ok(())
    }

    /// Chooses the image, takes in its blobs, makes its layers and records it.
    fn finish(mut self, progress: OnProgress<'_>) -> Result<Imported, ImageError> {
        let digest = self.choose()?;
        let manifest = document::manifest(&self.read(&digest, "manifest")?)?;
        self.want_sized(manifest.config, "config")?;
        let config = document::config(&self.read(&manifest.config.digest, "config")?)?;
        for layer in &manifest.layers {
            self.want_sized(*layer, "layer")?;
        }
        let mut path_of = |blob: &Digest| self.path_of(blob);
        make_layers(self.store, &manifest, &config, &mut path_of, progress)?;
        for blob in [&manifest.config].into_iter().chain(&manifest.layers) {
            self.keep(blob.digest)?;
        }
        self.keep(digest)?;
        let bytes = manifest.layers.iter().map(|layer| layer.size).sum();
        let layers = u32::try_from(manifest.layers.len()).unwrap_or(u32::MAX);
        self.store.record(&StoredImage { digest, bytes, layers })?;
        Ok(Imported { digest, bytes, layers })
    }

    /// Follows the index to the one image for this machine.
    fn choose(&mut self) -> Result<Digest, ImageError> {
        let Some(index) = self.index.take() else {
            if self.docker.is_there() {
                return self.docker_manifest();
            }
            let why = "there is neither index.json nor docker's manifest.json";
            return Err(ImageError::NotALayout(why.into()));
        };
        self.check_layout()?;
        let mut indexes = vec![(document::index(&index)?, 0)];
        let mut manifests = Vec::new();
        let mut others = Vec::new();
        while let Some((index, depth)) = indexes.pop() {
            manifests.extend(index.manifests);
            others.extend(index.others);
            for digest in index.indexes {
                if depth >= NESTED_MAX || indexes.len() >= limits::BLOBS_MAX {
                    return Err(ImageError::document("index", "indexes within indexes"));
                }
                self.want(digest, "index")?;
                let bytes = self.read(&digest, "index")?;
                indexes.push((document::index(&bytes)?, depth + 1));
            }
        }
        manifests.sort();
        manifests.dedup();
        match &manifests[..] {
            [digest] => {
                self.want(*digest, "manifest")?;
                Ok(*digest)
            }
            [] if others.is_empty() => Err(ImageError::document("index", "it names no image")),
            [] => {
                others.dedup();
                Err(ImageError::OtherPlatform { found: others.join(", ") })
            }
            several => Err(ImageError::document(
                "index",
                format!("it names {} images: export one alone", several.len()),
            )),
        }
    }

    fn check_layout(&self) -> Result<(), ImageError> {
        #[derive(serde::Deserialize)]
        struct Layout {
            #[serde(rename = "imageLayoutVersion")]
            version: String,
        }
        let Some(bytes) = &self.layout else {
            return Err(ImageError::NotALayout("there is no file oci-layout".into()));
        };
        let layout: Layout =
            serde_json::from_slice(bytes).map_err(|e| ImageError::document("oci-layout", e))?;
        if layout.version.starts_with("1.") {
            return Ok(());
        }
        Err(ImageError::document("oci-layout", "its version is not 1"))
    }
}

const ARCHIVE: &str = "the archive";

fn damaged(error: TarError) -> ImageError {
    match error {
        TarError::Input(error) => input_error(error),
        TarError::Bad(why) => ImageError::BadArchive { archive: ARCHIVE.into(), why },
    }
}

fn input_error(error: io::Error) -> ImageError {
    let archive = ARCHIVE.into();
    if let Some(bound) = error.get_ref().and_then(|e| e.downcast_ref::<BoundMet>()) {
        return ImageError::BadArchive { archive, why: bound.0.clone() };
    }
    match error.kind() {
        // The decompressors and the tar reader say so of what a stranger wrote.
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::Other => {
            ImageError::BadArchive { archive, why: error.to_string() }
        }
        _ => ImageError::Input(error),
    }
}
