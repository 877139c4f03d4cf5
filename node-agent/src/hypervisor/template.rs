//! Templates: guests that were saved right after their hello, one per shape, so that a start need not
//! boot. They know nothing of a sandbox: no disk, no network, no secret; see `guest/src/boot.rs`.
//!
//! A template counts for one machine (kernel, initramfs, QEMU, processor) and one boot of the host,
//! is tried before it is kept, sealed, and can always be thrown away. What lies under its name is
//! complete; without its seal it is none.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use prost::Message as _;
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use super::processes::boot_id;
use super::{HypervisorError, Vm, VmShape, VmSpec};
use crate::guest_link::GuestLink;
use crate::kernel::{Kernel, digest};
use crate::seal::{Key, Seal};

/// Larger guests are booted: what a kernel notes about each page makes their files large too.
const MEMORY_MAX_MIB: u64 = 16 << 10;
/// Templates that are kept, of all machines that share the cache: the last used.
const KEPT_MAX: usize = 4;
/// How often a shape is tried again after its template did not work.
const DROPS_MAX: u32 = 3;
/// A boot at the lowest priority, on a machine that has other things to do.
const BOOT_MAX: Duration = Duration::from_secs(300);
/// For what the guest's kernel still does after the hello.
const SETTLE: Duration = Duration::from_millis(300);
/// Writing it: QEMU some 100 MB, Cloud Hypervisor all of the memory; at the lowest priority, on a busy
/// disk.
const SAVE_MAX: Duration = Duration::from_secs(120);
const SAVE_MIB_S_MIN: u64 = 8;
const QUIT_MAX: Duration = Duration::from_secs(2);
const SUFFIX: &str = "template";
const MAKING: &str = "making-";

/// What makes templates of itself.
pub(super) trait Saves: Sync {
    /// The guest that runs in this directory, which a killed maker has left.
    fn find(&self, dir: &Path) -> Option<Vm>;

    /// Starts a guest that is to be saved, in the background.
    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<Vm, HypervisorError>>;

    /// Halts the guest and writes all of it to `to`, which is not there yet.
    fn save<'a>(&'a self, vm: &'a Vm, to: &'a Path) -> BoxFuture<'a, io::Result<()>>;

    /// Starts a guest from what was saved.
    fn restore<'a>(
        &'a self,
        spec: &'a VmSpec,
        saved: &'a Path,
    ) -> BoxFuture<'a, Result<Vm, HypervisorError>>;
}

/// The templates of one cache.
#[derive(Debug)]
pub(super) struct Templates {
    dir: PathBuf,
    /// What they are templates of.
    key: String,
    drops: Mutex<BTreeMap<VmShape, u32>>,
}

/// Everything that a saved guest must find again, but its shape.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fits<'a> {
    pub(super) program: &'a Path,
    pub(super) version: &'a str,
    pub(super) kernel: &'a Kernel,
    pub(super) initramfs: &'a Path,
    /// What the driver makes of a shape.
    pub(super) machine: &'a [&'a str],
}

impl Fits<'_> {
    fn key(&self) -> String {
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let processor: Vec<&str> = processor
            .split("\n\n")
            .next()
            .unwrap_or_default()
            .lines()
            .filter(|line| line.starts_with("model name") || line.starts_with("flags"))
            .collect();
        let program = fs::metadata(self.program).map(|meta| (meta.len(), meta.mtime())).ok();
        let parts: Value = json!([
            self.machine,
            self.kernel.digest,
            self.initramfs.file_name().map(|name| name.to_string_lossy()),
            self.version,
            program,
            processor,
            boot_id(),
        ]);
        digest(parts.to_string().as_bytes())[..24].to_owned()
    }
}

impl Templates {
    pub(super) fn new(cache_dir: &Path, fits: &Fits<'_>) -> Self {
        Self { dir: cache_dir.join("templates"), key: fits.key(), drops: Mutex::default() }
    }

    /// What they are templates of.
    pub(super) fn key(&self) -> &str {
        &self.key
    }

    /// The template of a shape: its path, and what keeps it until it is read.
    pub(super) fn open(&self, shape: VmShape) -> Option<(PathBuf, File)> {
        let path = self.path(shape);
        let file = File::open(&path).ok()?;
        let seal = seal_of(&path);
        if let Err(problem) = self.check(&path, &seal) {
            // It may just be made.
            if problem.kind() == io::ErrorKind::NotFound {
                return None;
            }
            tracing::warn!(path = %path.display(), %problem, "template is removed");
            remove(&path);
            return None;
        }
        // The last used are kept.
        let _ = File::open(&seal).and_then(|file| file.set_modified(SystemTime::now()));
        Some((path, file))
    }

    /// Notes what it was when it was made.
    fn seal(&self, path: &Path) -> io::Result<()> {
        let name = file_name(path);
        let seal = self.seals()?.seal(&self.dir, &[&name], name.as_bytes())?;
        let mut file = tempfile::NamedTempFile::new_in(&self.dir)?;
        file.write_all(&seal.encode_to_vec())?;
        file.persist(seal_of(path))?;
        Ok(())
    }

    fn check(&self, path: &Path, seal: &Path) -> io::Result<()> {
        let name = file_name(path);
        let seal = Seal::decode(&*fs::read(seal)?).map_err(io::Error::other)?;
        self.seals()?.check(&seal, &self.dir, &[&name], name.as_bytes())
    }

    fn seals(&self) -> io::Result<Key> {
        Key::open(&self.dir.join("key"))
    }

    /// Forgets a template that did not work. After a few times there will be no other.
    pub(super) fn drop(&self, shape: VmShape) {
        let mut drops = self.drops.lock().unwrap_or_else(PoisonError::into_inner);
        *drops.entry(shape).or_default() += 1;
        remove(&self.path(shape));
    }

    /// Makes the template of a shape, unless it is there or another process makes one now.
    pub(super) async fn make(&self, vmm: &dyn Saves, shape: VmShape) -> Result<(), String> {
        let dropped =
            self.drops.lock().unwrap_or_else(PoisonError::into_inner).get(&shape).copied();
        let hopeless =
            shape.memory_mib > MEMORY_MAX_MIB || dropped.is_some_and(|drops| drops >= DROPS_MAX);
        if hopeless || seal_of(&self.path(shape)).exists() {
            return Ok(());
        }
        let Some(_lock) = self.lock().map_err(|error| error.to_string())? else { return Ok(()) };
        self.clean(vmm);
        let work = tempfile::Builder::new()
            .prefix(MAKING)
            .tempdir_in(&self.dir)
            .map_err(|error| format!("no directory for it: {error}"))?;
        let saved = save(vmm, shape, &work).await?;
        try_it(vmm, shape, &work, &saved).await?;
        let path = self.path(shape);
        remove(&path);
        let kept = fs::rename(&saved, &path).and_then(|()| self.seal(&path));
        kept.map_err(|error| format!("not kept: {error}"))?;
        self.forget_old();
        Ok(())
    }

    fn path(&self, shape: VmShape) -> PathBuf {
        let VmShape { cpus, memory_mib } = shape;
        self.dir.join(format!("{}-{cpus}x{memory_mib}.{SUFFIX}", self.key))
    }

    /// Only one is made at a time; `None` while another process makes one.
    fn lock(&self) -> io::Result<Option<File>> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.dir.join("lock"))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(lock)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends and removes what a killed process has left; the lock is ours, so nobody is at it.
    fn clean(&self, vmm: &dyn Saves) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(MAKING) {
                for place in [SAVED_IN, TRIED_IN] {
                    if let Some(vm) = vmm.find(&entry.path().join(place)) {
                        let _ = vm.kill();
                    }
                }
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    /// Removes all but the last used, whoever made them. VMs that were restored need none.
    fn forget_old(&self) {
        let mut templates: Vec<_> = fs::read_dir(&self.dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|ext| ext == SUFFIX))
            .map(|path| (fs::metadata(seal_of(&path)).and_then(|seal| seal.modified()).ok(), path))
            .collect();
        templates.sort();
        let many = templates.len().saturating_sub(KEPT_MAX);
        for (_, path) in &templates[..many] {
            remove(path);
        }
    }
}

/// The file that seals a template.
fn seal_of(path: &Path) -> PathBuf {
    path.with_extension("seal")
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A template is a file or a folder.
fn remove(path: &Path) {
    let _ = fs::remove_file(seal_of(path));
    let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}

const SAVED_IN: &str = "save";
const TRIED_IN: &str = "try";

/// A VM that ends with its holder.
struct Temporary(Vm);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}

fn spec(shape: VmShape, work: &TempDir, place: &str) -> Result<VmSpec, String> {
    let dir = work.path().join(place);
    DirBuilder::new().mode(0o700).create(&dir).map_err(|error| error.to_string())?;
    let VmShape { cpus, memory_mib } = shape;
    let (layers, processes_max) = (Vec::new(), 0);
    Ok(VmSpec { cpus, memory_mib, processes_max, layers, upper: None, dir, console: false })
}

async fn save(vmm: &dyn Saves, shape: VmShape, work: &TempDir) -> Result<PathBuf, String> {
    let spec = spec(shape, work, SAVED_IN)?;
    let vm = vmm.start(&spec).await.map_err(|error| crate::chain(&error))?;
    let vm = Temporary(vm);
    let link = hello(&vm.0).await?;
    sleep(SETTLE).await;
    let to = work.path().join("template");
    let bound = SAVE_MAX + Duration::from_secs(shape.memory_mib / SAVE_MIB_S_MIN);
    timeout(bound, vmm.save(&vm.0, &to))
        .await
        .map_err(|_| format!("it could not be saved within {} s", bound.as_secs()))?
        .map_err(|error| format!("it could not be saved: {error}"))?;
    drop(link);
    vm.0.quit(QUIT_MAX).await.map_err(|error| error.to_string())?;
    Ok(to)
}

/// Restores it once, as a start would: a template that does not answer is none.
async fn try_it(
    vmm: &dyn Saves,
    shape: VmShape,
    work: &TempDir,
    saved: &Path,
) -> Result<(), String> {
    let spec = spec(shape, work, TRIED_IN)?;
    let vm = vmm.restore(&spec, saved).await.map_err(|error| crate::chain(&error))?;
    let vm = Temporary(vm);
    hello(&vm.0).await.map_err(|problem| format!("restored, {problem}"))?;
    vm.0.quit(QUIT_MAX).await.map_err(|error| error.to_string()).map(drop)
}

async fn hello(vm: &Vm) -> Result<GuestLink, String> {
    let link =
        GuestLink::connect(vm, [0; 32], BOOT_MAX).await.map_err(|error| crate::chain(&error))?;
    if link.hello.configured {
        return Err("the guest says that it is configured already".into());
    }
    Ok(link)
}
