//! The end of the machine: the workload's processes, then the disk, then the power.
//!
//! The disk is synced before anything that could hang is tried, and again after.
#![expect(unsafe_code, reason = "ending a process at once has no safe form")]

use std::path::Path;
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags};
use rustix::system::RebootCommand;

use crate::boot::Kernel;
use crate::workload::Workload;

/// Longest grace that a node may ask for.
const GRACE_MAX: Duration = Duration::from_secs(600);

/// Ends the workload and powers off. Does not return in a guest.
pub async fn shut_down(workload: Option<&Workload>, grace: Duration, kernel: Kernel) {
    sync(kernel);
    if let Some(workload) = workload {
        workload.end(grace.min(GRACE_MAX)).await;
    }
    // Blocking: the runtime has nothing else to do any more, but a lower FUSE may need it.
    let _ = tokio::task::spawn_blocking(move || power_off(kernel)).await;
}

/// Unmounts what can be, syncs and switches off; on the node's kernel it ends itself, and all that it
/// has started with it.
pub fn power_off(kernel: Kernel) {
    sync(kernel);
    for mount in [crate::root::ROOT, crate::root::UPPER] {
        let path = Path::new(mount);
        if rustix::mount::unmount(path, UnmountFlags::empty()).is_err() {
            let _ = rustix::mount::mount_remount(path, MountFlags::RDONLY, c"");
        }
    }
    sync(kernel);
    if kernel == Kernel::Shared {
        // SAFETY: ends the process at once; nothing is left to be tidied.
        unsafe { libc::_exit(0) };
    }
    let _ = rustix::system::reboot(RebootCommand::PowerOff);
    // A machine that cannot switch itself off ends by the VMM's no-reboot.
    let _ = rustix::system::reboot(RebootCommand::Restart);
}

/// Writes out what the sandbox wrote. What others have written on the node's kernel is not ours.
fn sync(kernel: Kernel) {
    match kernel {
        Kernel::Own => rustix::fs::sync(),
        Kernel::Shared => {
            if let Ok(disk) = std::fs::File::open(crate::root::UPPER) {
                let _ = rustix::fs::syncfs(disk);
            }
        }
    }
}
