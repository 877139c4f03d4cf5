//! Writes an image out of the store as one tar archive that is an OCI image layout and what `docker
//! load` reads at once: both name the same files under `blobs/sha256`.
//!
//! The same image under the same name gives the same bytes. Blobs are checked while they are
//! written, and the end of one is held back until all of it is known to be right: an archive with
//! damage in it ends in the middle of a file, so that no reader takes it for a whole one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};

use serde_json::json;

use crate::Digest;
use crate::digest::Hashing;
use crate::document::{self, Blob, Manifest};
use crate::error::ImageError;
use crate::registry;
use crate::store::{OnProgress, Progress, Store, read_document};
use crate::tar::{Header, Type, Writer};

/// Bytes written between two reports of progress.
const REPORT_EVERY: u64 = 4 << 20;

/// What the config is called in errors.
pub(crate) const CONFIG: &str = "the config";

/// An image of the store that is to go somewhere else.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) digest: Digest,
    /// The manifest as it is, and what it is called by.
    pub(crate) bytes: Vec<u8>,
    pub(crate) media_type: String,
    pub(crate) manifest: Manifest,
}

impl Stored {
    /// Reads an image's manifest.
    pub(crate) fn open(store: &Store, digest: &Digest) -> Result<Stored, ImageError> {
        if !store.has_image(digest) {
            return Err(ImageError::Unknown(*digest));
        }
        let bytes = match read_document(&store.blob(digest), digest, "manifest") {
            Err(ImageError::MissingBlob { .. }) => {
                return Err(ImageError::LostBlob { what: "the manifest".into(), digest: *digest });
            }
            Err(ImageError::WrongDigest { .. }) => {
                return Err(damaged(store, "the manifest".into(), digest));
            }
            read => read?,
        };
        let manifest = document::manifest(&bytes)?;
        let media_type = document::media_type(&bytes)?;
        Ok(Stored { digest: *digest, bytes, media_type, manifest })
    }

    /// Returns the layers' blobs, each once, with what they are in words.
    pub(crate) fn layers(&self) -> Vec<(Blob, String)> {
        let count = self.manifest.layers.len();
        let layers = self.manifest.layers.iter().enumerate();
        let mut seen = BTreeSet::new();
        layers
            .filter(|(_, layer)| seen.insert(layer.digest))
            .map(|(number, layer)| (*layer, format!("layer {} of {count}", number + 1)))
            .collect()
    }
}

/// Opens a blob's file, which must be as long as the manifest says.
pub(crate) fn open_blob(store: &Store, blob: Blob, what: &str) -> Result<File, ImageError> {
    let path = store.blob(&blob.digest);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(ImageError::LostBlob { what: what.to_owned(), digest: blob.digest });
        }
        Err(error) => return Err(ImageError::io("open", path, error)),
    };
    let size = file.metadata().map_err(|e| ImageError::io("read", &path, e))?.len();
    if size != blob.size {
        return Err(damaged(store, what.to_owned(), &blob.digest));
    }
    Ok(file)
}

/// Says that a blob's file is not what its name says.
pub(crate) fn damaged(store: &Store, what: String, digest: &Digest) -> ImageError {
    ImageError::DamagedBlob { what, path: store.blob(digest) }
}

/// Writes an image as an archive; `name` is what `docker load` and others will call it, if it can be
/// a name there. Returns the archive's bytes.
pub fn export(
    store: &Store,
    digest: &Digest,
    name: &str,
    out: impl Write,
    progress: OnProgress<'_>,
) -> Result<u64, ImageError> {
    // While it is held nothing is collected: what is here now stays until it is sent.
    let _adding = store.scratch()?;
    let image = Stored::open(store, digest)?;
    let of_manifest = Blob { digest: *digest, size: image.bytes.len() as u64 };
    let mut blobs = image.layers();
    blobs.push((image.manifest.config, CONFIG.into()));
    blobs.push((of_manifest, "the manifest".into()));
    blobs.sort_by_key(|(blob, _)| blob.digest);
    blobs.dedup_by_key(|(blob, _)| blob.digest);
    // Before the first byte goes out: what is missing altogether is said at once.
    for (blob, what) in &blobs {
        open_blob(store, *blob, what)?;
    }
    let total = blobs.iter().map(|(blob, _)| blob.size).sum();
    let mut counted = Counting { inner: out, bytes: 0 };
    let mut tar = Writer::new(&mut counted);
    for (path, bytes) in documents(&image, name) {
        entry(&mut tar, path, bytes.len() as u64, &mut &bytes[..]).map_err(ImageError::Output)?;
    }
    let mut done = 0;
    for (blob, what) in blobs {
        let mut told = 0;
        let mut on_read = |read: u64| {
            if read - told >= REPORT_EVERY {
                told = read;
                progress(Progress { stage: "sending".into(), done: done + read, total });
            }
        };
        let file = open_blob(store, blob, &what)?;
        let mut checked = Checked::new(file, blob, &mut on_read);
        let path = format!("blobs/sha256/{}", blob.digest.hex());
        let wrote = entry(&mut tar, &path, blob.size, &mut checked);
        wrote.map_err(|error| match checked.fault.take() {
            Some(Fault::Damaged) => damaged(store, what, &blob.digest),
            Some(Fault::Read(error)) => ImageError::io("read", store.blob(&blob.digest), error),
            None => ImageError::Output(error),
        })?;
        done += blob.size;
        progress(Progress { stage: "sending".into(), done, total });
    }
    tar.finish().map_err(ImageError::Output)?;
    Ok(counted.bytes)
}

fn entry<W: Write>(
    tar: &mut Writer<W>,
    path: &str,
    size: u64,
    content: &mut impl Read,
) -> io::Result<()> {
    tar.header(&Header {
        kind: Type::Regular,
        path: path.as_bytes().to_vec(),
        link: Vec::new(),
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: 0,
        size,
        device: (0, 0),
        xattrs: Vec::new(),
    })?;
    tar.data(size, content)
}

/// The layout's own files and docker's, by path.
fn documents(image: &Stored, name: &str) -> [(&'static str, Vec<u8>); 3] {
    let blob = |digest: &Digest| format!("blobs/sha256/{}", digest.hex());
    let mut descriptor = json!({
        "mediaType": image.media_type,
        "digest": image.digest.to_string(),
        "size": image.bytes.len(),
        "platform": { "os": "linux", "architecture": crate::error::wanted_architecture() },
    });
    let names = registry::names(name);
    if let Some((short, whole)) = &names {
        // The second is where podman and containerd look first.
        descriptor["annotations"] = BTreeMap::from([
            ("org.opencontainers.image.ref.name", short),
            ("io.containerd.image.name", whole),
        ])
        .into_iter()
        .map(|(key, value)| (key.to_owned(), json!(value)))
        .collect();
    }
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [descriptor],
    });
    let docker = json!([{
        "Config": blob(&image.manifest.config.digest),
        "RepoTags": names.map(|(short, _)| vec![short]),
        "Layers": image.manifest.layers.iter().map(|l| blob(&l.digest)).collect::<Vec<_>>(),
    }]);
    [
        ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
        ("index.json", index.to_string().into_bytes()),
        ("manifest.json", docker.to_string().into_bytes()),
    ]
}

/// Why a blob could not be read to its end.
#[derive(Debug)]
enum Fault {
    Damaged,
    Read(io::Error),
}

/// Reads a blob and gives its last bytes only when its digest is right.
struct Checked<'p> {
    inner: Hashing<File>,
    blob: Blob,
    read: u64,
    found: Option<Digest>,
    fault: Option<Fault>,
    on_read: &'p mut dyn FnMut(u64),
}

impl<'p> Checked<'p> {
    fn new(file: File, blob: Blob, on_read: &'p mut dyn FnMut(u64)) -> Checked<'p> {
        let inner = Hashing::new(file);
        Checked { inner, blob, read: 0, found: None, fault: None, on_read }
    }
}

impl Read for Checked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = match self.inner.read(buffer) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
            Err(error) => {
                self.fault = Some(Fault::Read(error));
                return Err(io::ErrorKind::Other.into());
            }
        };
        self.read += n as u64;
        let ended = n == 0 || self.read >= self.blob.size;
        if ended && self.found.is_none() {
            self.found = Some(self.inner.digest());
        }
        if self.found.is_some_and(|found| found != self.blob.digest) {
            self.fault = Some(Fault::Damaged);
            return Err(io::ErrorKind::InvalidData.into());
        }
        (self.on_read)(self.read);
        Ok(n)
    }
}

struct Counting<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buffer)?;
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
