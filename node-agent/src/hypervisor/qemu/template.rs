//! Templates: guests that were saved right after their hello, one per shape, so that a start need not
//! boot. They know nothing of a sandbox: no disk, no network, no secret; see `guest/src/boot.rs`.
//!
//! A template counts for one machine (kernel, initramfs, QEMU, processor) and one boot of the host,
//! is tried before it is kept, and can always be thrown away. What lies under its name is complete.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use serde_json::json;
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use super::{Qemu, Start, command};
use crate::guest_link::GuestLink;
use crate::hypervisor::processes::boot_id;
use crate::hypervisor::qmp::Qmp;
use crate::hypervisor::{Vm, VmShape, VmSpec, Vmm};
use crate::kernel::digest;

/// Largest file: a guest that has just booted holds about 100 MiB that are not zero.
pub(super) const SIZE_MAX: u64 = 1 << 30;
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
/// Writing it: 100 MB, on a busy disk.
const SAVE_MAX: Duration = Duration::from_secs(120);
const QUIT_MAX: Duration = Duration::from_secs(2);
const SUFFIX: &str = "template";
const MAKING: &str = "making-";

/// The templates of one cache.
#[derive(Debug)]
pub(super) struct Templates {
    dir: PathBuf,
    /// What they are templates of.
    pub(super) key: String,
    drops: Mutex<BTreeMap<VmShape, u32>>,
}

/// Everything that a saved guest must find again.
pub(super) fn key(qemu: &Qemu) -> String {
    let accel = qemu.capabilities.accel;
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processor: Vec<&str> = processor
        .split("\n\n")
        .next()
        .unwrap_or_default()
        .lines()
        .filter(|line| line.starts_with("model name") || line.starts_with("flags"))
        .collect();
    let program = fs::metadata(&qemu.program).map(|meta| (meta.len(), meta.mtime())).ok();
    let parts = json!([
        command::MACHINE,
        qemu.kernel.digest,
        qemu.initramfs.file_name().map(|name| name.to_string_lossy()),
        qemu.capabilities.version,
        program,
        accel.as_str(),
        command::cpu(accel),
        processor,
        boot_id(),
    ]);
    digest(parts.to_string().as_bytes())[..24].to_owned()
}

impl Templates {
    pub(super) fn new(cache_dir: &Path) -> Self {
        Self { dir: cache_dir.join("templates"), key: String::new(), drops: Mutex::default() }
    }

    /// The template of a shape, to read.
    pub(super) fn open(&self, shape: VmShape) -> Option<OwnedFd> {
        let file = File::open(self.path(shape)).ok()?;
        // The last used are kept.
        let _ = file.set_modified(SystemTime::now());
        Some(file.into())
    }

    /// Forgets a template that did not work. After a few times there will be no other.
    pub(super) fn drop(&self, shape: VmShape) {
        let mut drops = self.drops.lock().unwrap_or_else(PoisonError::into_inner);
        *drops.entry(shape).or_default() += 1;
        let _ = fs::remove_file(self.path(shape));
    }

    /// Makes the template of a shape, unless it is there or another process makes one now.
    pub(super) async fn make(&self, qemu: &Qemu, shape: VmShape) -> Result<(), String> {
        let dropped =
            self.drops.lock().unwrap_or_else(PoisonError::into_inner).get(&shape).copied();
        let hopeless =
            shape.memory_mib > MEMORY_MAX_MIB || dropped.is_some_and(|drops| drops >= DROPS_MAX);
        if hopeless || self.path(shape).exists() {
            return Ok(());
        }
        let Some(_lock) = self.lock().map_err(|error| error.to_string())? else { return Ok(()) };
        self.clean(&qemu.program);
        let work = tempfile::Builder::new()
            .prefix(MAKING)
            .tempdir_in(&self.dir)
            .map_err(|error| format!("no directory for it: {error}"))?;
        let file = save(qemu, shape, &work).await?;
        try_it(qemu, shape, &work, &file).await?;
        fs::rename(&file, self.path(shape)).map_err(|error| format!("not kept: {error}"))?;
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
    fn clean(&self, program: &Path) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(MAKING) {
                for place in [SAVED_IN, TRIED_IN] {
                    if let Some(vm) = Vm::find(&entry.path().join(place), program, Vmm::Qemu) {
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
            .filter_map(|path| Some((fs::metadata(&path).ok()?.modified().ok()?, path)))
            .collect();
        templates.sort();
        let many = templates.len().saturating_sub(KEPT_MAX);
        for (_, path) in &templates[..many] {
            let _ = fs::remove_file(path);
        }
    }
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

async fn save(qemu: &Qemu, shape: VmShape, work: &TempDir) -> Result<PathBuf, String> {
    let spec = spec(shape, work, SAVED_IN)?;
    let accel = qemu.capabilities.accel;
    let vm = qemu.spawn(&spec, accel, Start::ToBeSaved).map_err(|error| crate::chain(&error))?;
    let vm = Temporary(vm);
    let link = hello(&vm.0).await?;
    sleep(SETTLE).await;
    let path = work.path().join("template");
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(|error| error.to_string())?;
    timeout(SAVE_MAX, migrate(&vm.0, &file))
        .await
        .map_err(|_| format!("it could not be saved within {} s", SAVE_MAX.as_secs()))?
        .map_err(|error| format!("it could not be saved: {error}"))?;
    drop(link);
    vm.0.quit(QUIT_MAX).await.map_err(|error| error.to_string())?;
    let synced = tokio::task::spawn_blocking(move || file.sync_all()).await;
    synced.map_err(io::Error::other).flatten().map_err(|error| format!("not written: {error}"))?;
    Ok(path)
}

/// Restores it once, as a start would: a template that does not answer is none.
async fn try_it(qemu: &Qemu, shape: VmShape, work: &TempDir, file: &Path) -> Result<(), String> {
    let spec = spec(shape, work, TRIED_IN)?;
    let saved = File::open(file).map_err(|error| error.to_string())?;
    let start = Start::Restore(saved.into());
    let accel = qemu.capabilities.accel;
    let vm = qemu.spawn(&spec, accel, start).map_err(|error| crate::chain(&error))?;
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

/// Halts the guest and writes memory and devices to the file.
async fn migrate(vm: &Vm, file: &File) -> io::Result<()> {
    const NAME: &str = "template";
    let mut qmp = Qmp::connect(vm.dir()).await?;
    let events = json!([{ "capability": "events", "state": true }]);
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": events })).await?;
    // Its default is made for networks.
    qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 40 })).await?;
    qmp.execute("stop", json!({})).await?;
    qmp.hand_over(NAME, file.as_fd()).await?;
    qmp.execute("migrate", json!({ "uri": format!("fd:{NAME}") })).await?;
    loop {
        let status = qmp.event("MIGRATION").await?;
        match status["status"].as_str().unwrap_or_default() {
            "completed" => return Ok(()),
            "failed" | "cancelled" => {
                let info = qmp.execute("query-migrate", json!({})).await?;
                let reason = info["error-desc"].as_str().unwrap_or("QEMU does not say why");
                return Err(io::Error::other(reason.to_owned()));
            }
            _ => {}
        }
    }
}
