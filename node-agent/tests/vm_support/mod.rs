//! What tests with real VMs share: kernel, initramfs with the echo guest, driver, directories.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a part of each test program"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use towline_node_agent::hypervisor::qemu::{AccelChoice, Qemu, QemuConfig};
use towline_node_agent::hypervisor::{DiskLimits, Starter, VmIdentity};
use towline_node_agent::{initramfs, kernel};

pub(crate) const SECRET: [u8; 32] = [0x5e; 32];
/// A boot on a machine where everything else runs too.
pub(crate) const BOOT_MAX: Duration = Duration::from_secs(90);

pub(crate) fn run_async(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(test);
}

/// A VM's directory; a VM that a failed test leaves in it is killed.
pub(crate) struct VmDir {
    dir: PathBuf,
    _guard: TempDir,
}

impl Drop for VmDir {
    fn drop(&mut self) {
        let noted = std::fs::read(self.dir.join("vm.json")).unwrap_or_default();
        let Ok(noted) = serde_json::from_slice::<VmIdentity>(&noted) else { return };
        let cwd = std::fs::read_link(format!("/proc/{}/cwd", noted.pid));
        if cwd.is_ok_and(|cwd| cwd == self.dir) {
            let _ = Command::new("kill").args(["-KILL", &noted.pid.to_string()]).status();
        }
    }
}

/// A directory of its own for a VM, with a path longer than a socket's address may be.
pub(crate) fn vm_dir() -> (VmDir, PathBuf) {
    let guard = tempfile::tempdir().unwrap();
    let dir = guard.path().join("d".repeat(60)).join("e".repeat(60));
    std::fs::create_dir_all(&dir).unwrap();
    let dir = std::fs::canonicalize(dir).unwrap();
    (VmDir { dir: dir.clone(), _guard: guard }, dir)
}

/// The cache that the product uses too, so that the kernel is downloaded once.
pub(crate) fn cache_dir() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    base.unwrap_or_else(std::env::temp_dir).join("towline")
}

/// The driver with the echo guest; `None`, with a word why, where a VM cannot be run at all.
pub(crate) async fn driver() -> Option<Qemu> {
    Some(Qemu::new(config()?).await.unwrap())
}

/// What that driver is made of.
pub(crate) fn config() -> Option<QemuConfig> {
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        eprintln!("SKIPPED: qemu-system-x86_64 is not installed");
        return None;
    }
    let cache_dir = cache_dir();
    let kernel = match kernel::ensure(&cache_dir, &|text| eprintln!("{text}")) {
        Ok(kernel) => kernel,
        Err(error @ kernel::KernelError::Tool { .. }) => {
            eprintln!("SKIPPED: no guest kernel: {error}");
            return None;
        }
        Err(error) => panic!("{error:?}"),
    };
    let initramfs = initramfs::ensure(&cache_dir, &kernel, &echo_guest()).unwrap();
    let (accel, starter, disk_limits) = (AccelChoice::Auto, Starter::Own, DiskLimits::default());
    Some(QemuConfig { cache_dir, kernel, initramfs, accel, starter, disk_limits })
}

/// Builds the static echo guest, which is quick when it is there.
fn echo_guest() -> PathBuf {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let target_dir =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let built = Command::new(env!("CARGO"))
        .current_dir(root)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .args(["build", "-q", "-p", "towline-streams", "--example", "echo_guest"])
        .args(["--profile", "guest", "--target", TARGET])
        .status()
        .unwrap();
    assert!(built.success(), "building the echo guest: {built}");
    target_dir.join(TARGET).join("guest/examples/echo_guest")
}
