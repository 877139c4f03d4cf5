//! Whether KVM runs this very kernel here: a /dev/kvm that opens proves nothing, so a guest is booted
//! until it answers on its link, once, within a bound; the verdict is kept.
//!
//! A verdict counts for one kernel, one VMM and one boot of the machine.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::processes::boot_id;
use super::{HypervisorError, Starter, Vm, VmSpec};
use crate::guest_link::GuestLink;
use crate::kernel::Kernel;

/// A guest under KVM answers within a second or two; longer where KVM itself is emulated.
const PROBE_MAX: Duration = Duration::from_secs(30);
const PROBE_MEMORY_MIB: u64 = 256;
/// So many verdicts are remembered, the newest: builds of Towline share a cache.
const VERDICTS_MAX: usize = 8;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Verdict {
    kernel: String,
    initramfs: String,
    vmm: String,
    boot_id: String,
    /// Why not; absent when KVM works.
    refused: Option<String>,
}

/// What a verdict is about.
#[derive(Debug, Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) cache_dir: &'a Path,
    pub(super) driver: &'a str,
    pub(super) version: &'a str,
    pub(super) kernel: &'a Kernel,
    pub(super) initramfs: &'a Path,
    pub(super) starter: &'a Starter,
}

/// Says why KVM is not to be used, if it is not. `boot` starts a VM under it that ends with this process.
pub(super) async fn verdict(
    subject: Subject<'_>,
    boot: impl AsyncFnOnce(&VmSpec) -> Result<Vm, HypervisorError>,
) -> Result<(), String> {
    opens(subject.starter)?;
    let path = subject.cache_dir.join(format!("kvm-verdict-{}.json", subject.driver));
    let mut new = Verdict {
        kernel: subject.kernel.digest.clone(),
        initramfs: subject.initramfs.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        vmm: subject.version.to_owned(),
        boot_id: boot_id(),
        refused: None,
    };
    if let Some(known) = read(&path).into_iter().find(|known| same(known, &new)) {
        return known.refused.map_or(Ok(()), Err);
    }
    let result = probe(subject.cache_dir, boot).await;
    new.refused = result.as_ref().err().cloned();
    // A verdict that cannot be kept is reached again next time.
    let _ = remember(&path, new);
    result
}

/// Whether a VMM may use KVM at all: one that the helper starts may, wherever there is any.
fn opens(starter: &Starter) -> Result<(), String> {
    let device = Path::new("/dev/kvm");
    if starter.is_helper() && device.exists() {
        return Ok(());
    }
    match fs::OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => Ok(()),
        Err(error) => Err(match error.kind() {
            std::io::ErrorKind::NotFound => "this machine has no /dev/kvm".into(),
            std::io::ErrorKind::PermissionDenied => {
                "this user may not open /dev/kvm (add it to the group kvm)".into()
            }
            _ => format!("/dev/kvm does not open: {error}"),
        }),
    }
}

async fn probe(
    cache_dir: &Path,
    boot: impl AsyncFnOnce(&VmSpec) -> Result<Vm, HypervisorError>,
) -> Result<(), String> {
    let failed = |what: String| format!("KVM could not be tried: {what}");
    // Where what a killed process has left is removed.
    let dir = fs::create_dir_all(cache_dir).and_then(|()| tempfile::tempdir_in(cache_dir));
    let dir = dir.map_err(|error| failed(error.to_string()))?;
    let spec = VmSpec {
        cpus: 1,
        memory_mib: PROBE_MEMORY_MIB,
        processes_max: 0,
        layers: Vec::new(),
        upper: None,
        dir: dir.path().to_owned(),
        console: false,
    };
    let vm = boot(&spec).await.map_err(|error| failed(crate::chain(&error)))?;
    let answered = timeout(PROBE_MAX, GuestLink::answers(&vm)).await;
    let _ = vm.kill();
    let exit = vm.wait_exit().await;
    match answered {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(format!("a guest does not run under KVM here: {exit}")),
        Err(_) => Err(format!("a guest under KVM did not answer within {} s", PROBE_MAX.as_secs())),
    }
}

fn same(known: &Verdict, new: &Verdict) -> bool {
    (&known.kernel, &known.initramfs, &known.vmm, &known.boot_id)
        == (&new.kernel, &new.initramfs, &new.vmm, &new.boot_id)
}

fn read(path: &Path) -> Vec<Verdict> {
    let kept = fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    kept.unwrap_or_default()
}

fn remember(path: &Path, new: Verdict) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir)?;
    let mut verdicts = read(path);
    verdicts.retain(|known| !same(known, &new));
    verdicts.insert(0, new);
    verdicts.truncate(VERDICTS_MAX);
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(&serde_json::to_vec_pretty(&verdicts)?)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(initramfs: &str) -> Verdict {
        Verdict {
            kernel: "kernel".into(),
            initramfs: initramfs.into(),
            vmm: "7.2".into(),
            boot_id: "boot".into(),
            refused: None,
        }
    }

    #[test]
    fn the_newest_verdict_about_each_build_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache/verdicts.json");
        assert!(read(&path).is_empty());
        remember(&path, about("one")).unwrap();
        remember(&path, about("other")).unwrap();
        let refused = Verdict { refused: Some("no answer".into()), ..about("one") };
        remember(&path, refused).unwrap();
        let kept = read(&path);
        assert_eq!(kept.len(), 2);
        assert!(kept[0].initramfs == "one" && kept[0].refused.is_some(), "{kept:?}");
        for number in 0..20 {
            remember(&path, about(&number.to_string())).unwrap();
        }
        assert_eq!(read(&path).len(), VERDICTS_MAX);
        fs::write(&path, "{}").unwrap();
        assert!(read(&path).is_empty(), "what an earlier build wrote is not one");
    }
}
