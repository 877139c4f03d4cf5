//! From a sandbox's image reference to layer disks and settings, or to a server of the laptop's own
//! system.
//!
//! Blocking, and safe to repeat: what is there is used. A sandbox keeps the local image that it was
//! made with, whatever happens to the machine's files or the cache.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use towline_images::local::{self, Manifest};
use towline_images::registry::Private;
use towline_images::{Collected, Digest, ImageConfig, ImageError, Store, collect, prepare};
use towline_node_core::{Assignment, Failure};
use towline_proto::v1::StreamErrorCode;
use towline_proto::v1::image_ref::Source;

use crate::gates::Refused;
use crate::store::SandboxDir;

/// What was written within this time stays, whoever uses it: its name may be on its way. Longer than
/// a ticket lives, so that what a ticket does not know yet is always younger.
const COLLECT_GRACE: Duration = Duration::from_secs(3600);

/// A sandbox's image, ready.
#[derive(Debug)]
pub struct Image {
    /// Manifest digest, or the local image's id.
    pub digest: String,
    /// Squashfs files, the lowest first; empty for a local image.
    pub layers: Vec<PathBuf>,
    /// How its programs are started.
    pub config: ImageConfig,
    /// Serves it, if it is a local one.
    pub local: Option<Arc<local::Server>>,
}

/// The images of this node.
#[derive(Debug)]
pub struct Images {
    store: Store,
    cache: PathBuf,
    /// What local images are images of: `/`, but in tests.
    root: PathBuf,
    embedded: bool,
    private_registries: Private,
    /// Manifests in use: sandboxes of one image share one.
    manifests: Mutex<BTreeMap<String, Weak<Manifest>>>,
    /// Locked by each node agent that uses the cache.
    users: fs::File,
    looking: Looking,
}

const LOOKING: &str = "looking at this machine's own system";

/// Between two reports of who waits for the look of another.
const WAITING: Duration = Duration::from_secs(2);

/// The look at this machine's own system, which takes memory: one sandbox after another.
#[derive(Debug, Default)]
struct Looking {
    /// How many entries the look that is on has seen.
    seen: Mutex<Option<u64>>,
    ended: Condvar,
}

impl Looking {
    /// Waits for its turn; `progress` is told how far the look of the other is.
    fn begin(&self, progress: &mut dyn FnMut(String)) -> Look<'_> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(entries) = *seen {
            let waited = self.ended.wait_timeout(seen, WAITING);
            let waited = waited.unwrap_or_else(PoisonError::into_inner);
            seen = waited.0;
            if waited.1.timed_out() {
                progress(format!("{LOOKING}, for another sandbox first: {entries} entries so far"));
            }
        }
        *seen = Some(0);
        Look(self)
    }
}

/// One look; the next begins when it is dropped.
struct Look<'a>(&'a Looking);

impl Look<'_> {
    fn tell(&self, entries: u64, progress: &mut dyn FnMut(String)) {
        *self.0.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(entries);
        progress(format!("{LOOKING}: {entries} entries so far"));
    }
}

impl Drop for Look<'_> {
    fn drop(&mut self) {
        *self.0.seen.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.0.ended.notify_one();
    }
}

impl Images {
    /// Opens the store in the cache.
    pub fn open(
        cache: &Path,
        root: &Path,
        embedded: bool,
        private_registries: Private,
    ) -> Result<Self, ImageError> {
        let store = Store::open(cache)?;
        let (cache, root) = (cache.to_owned(), root.to_owned());
        let users = users_of(&cache).map_err(|source| ImageError::Io {
            what: "lock",
            path: cache.clone(),
            source,
        })?;
        let (manifests, looking) = (Mutex::default(), Looking::default());
        Ok(Self { store, cache, root, embedded, private_registries, manifests, users, looking })
    }

    /// The store, for imports.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Which registries may be on private addresses.
    pub(crate) fn private_registries(&self) -> &Private {
        &self.private_registries
    }

    /// Removes what only images that are not in `keep` need. Blocks.
    pub fn collect(&self, keep: &[String]) -> Result<Collected, Refused> {
        let parsed: Result<BTreeSet<Digest>, _> = keep.iter().map(|text| text.parse()).collect();
        let keep = parsed.map_err(|_| {
            Refused::new(StreamErrorCode::Invalid, "the list of images holds what is no digest")
        })?;
        // Of another node agent's images nothing is known here.
        if flock(&self.users, FlockOperation::NonBlockingLockExclusive).is_err() {
            let _ = flock(&self.users, FlockOperation::LockShared);
            let why = "another node agent uses this cache too: images stay while it does";
            return Err(Refused::new(StreamErrorCode::Limit, why));
        }
        let collected = collect(&self.store, &keep, COLLECT_GRACE);
        let _ = flock(&self.users, FlockOperation::LockShared);
        collected.map_err(|error| {
            let code = match error {
                ImageError::Busy => StreamErrorCode::Limit,
                _ => StreamErrorCode::Internal,
            };
            Refused::new(code, crate::chain(&error))
        })
    }

    /// Makes the image of a sandbox ready. `progress` is told what it does.
    pub fn prepare(
        &self,
        assignment: &Assignment,
        dir: &SandboxDir,
        progress: &mut dyn FnMut(String),
    ) -> Result<Image, Failure> {
        match assignment.spec.image.as_ref().and_then(|image| image.source.as_ref()) {
            Some(Source::Oci(name)) => self.prepare_oci(name, &assignment.image_digest, progress),
            Some(Source::Local(image)) => {
                let home = Path::new(std::ffi::OsStr::from_bytes(&image.home));
                self.prepare_local(home, dir, progress)
            }
            None => Err(lasting("the control plane sent a sandbox without an image".into())),
        }
    }

    fn prepare_oci(
        &self,
        name: &str,
        digest: &str,
        progress: &mut dyn FnMut(String),
    ) -> Result<Image, Failure> {
        let text = if digest.is_empty() { name } else { digest };
        let digest: Digest = text.parse().map_err(|_| {
            lasting(format!(
                "the image `{name}` has no digest here: `tow image pull` or `tow image import` brings it in"
            ))
        })?;
        let mut told = |step: towline_images::Progress| progress(format!("image: {}", step.stage));
        let prepared = prepare(&self.store, &digest, &mut told).map_err(|error| {
            let transient = matches!(error, ImageError::Io { .. });
            Failure { reason: crate::chain(&error), transient }
        })?;
        let digest = prepared.digest.to_string();
        Ok(Image { digest, layers: prepared.layers, config: prepared.config, local: None })
    }

    fn prepare_local(
        &self,
        home: &Path,
        dir: &SandboxDir,
        progress: &mut dyn FnMut(String),
    ) -> Result<Image, Failure> {
        if !self.embedded {
            let reason = "`--image local` needs a node on the same machine; name an image instead";
            return Err(lasting(reason.into()));
        }
        let failed = |error: local::LocalError| lasting(crate::chain(&error));
        let kept = dir.local_manifest();
        let manifest = if kept.exists() {
            local::open(&kept).map_err(failed)?
        } else {
            progress(LOOKING.into());
            let look = self.looking.begin(progress);
            let mut seen = |entries| look.tell(entries, progress);
            let built = local::build(&self.cache, &self.root, home, &mut seen).map_err(failed)?;
            drop(look);
            keep(&built.path, &kept).map_err(|error| not_kept(&error))?;
            built.manifest
        };
        let manifest = self.shared(manifest);
        crate::memory::give_back();
        let digest = manifest.digest().to_string();
        let server = local::serve(manifest, &self.root).map_err(failed)?;
        let config = ImageConfig::default();
        Ok(Image { digest, layers: Vec::new(), config, local: Some(Arc::new(server)) })
    }

    /// The manifest that others use already, if it is the same.
    fn shared(&self, manifest: Arc<Manifest>) -> Arc<Manifest> {
        let mut manifests = self.manifests.lock().unwrap_or_else(PoisonError::into_inner);
        manifests.retain(|_, used| used.strong_count() > 0);
        let entry = manifests.entry(manifest.digest().to_string()).or_default();
        match entry.upgrade() {
            Some(used) => used,
            None => {
                *entry = Arc::downgrade(&manifest);
                manifest
            }
        }
    }
}

/// Says that this node agent uses the cache, for as long as the file is held.
fn users_of(cache: &Path) -> io::Result<fs::File> {
    let file = fs::File::options().create(true).append(true).open(cache.join("images/.users"))?;
    flock(&file, FlockOperation::LockShared)?;
    Ok(file)
}

/// Links a file of the cache, or copies it where the cache is another file system.
fn keep(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            let new = to.with_extension("new");
            fs::copy(from, &new)?;
            fs::File::open(&new)?.sync_all()?;
            fs::rename(&new, to)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

fn not_kept(error: &io::Error) -> Failure {
    if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
        let reason = "no space left on the node for the sandbox: free some, or remove sandboxes \
                      (`tow rm`)";
        return lasting(reason.into());
    }
    // The cache may have forgotten the manifest in this moment.
    let transient = error.kind() == io::ErrorKind::NotFound;
    Failure { reason: format!("could not keep the local image's manifest: {error}"), transient }
}

/// A failure that trying again does not mend.
pub(crate) fn lasting(reason: String) -> Failure {
    Failure { reason, transient: false }
}
