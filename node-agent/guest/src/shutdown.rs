//! The end of the machine: the workload's processes, then the disk, then the power.
//!
//! The disk is synced before anything that could hang is tried, and again after.

use std::path::Path;
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags};
use rustix::system::RebootCommand;

use crate::workload::Workload;

/// Longest grace that a node may ask for.
const GRACE_MAX: Duration = Duration::from_secs(600);

/// Ends the workload and powers off. Does not return in a guest.
pub async fn shut_down(workload: Option<&Workload>, grace: Duration) {
    rustix::fs::sync();
    if let Some(workload) = workload {
        workload.end(grace.min(GRACE_MAX)).await;
    }
    // Blocking: the runtime has nothing else to do any more, but a lower FUSE may need it.
    let _ = tokio::task::spawn_blocking(power_off).await;
}

/// Unmounts what can be, syncs and switches off.
pub fn power_off() {
    rustix::fs::sync();
    for mount in [crate::root::ROOT, crate::root::UPPER] {
        let path = Path::new(mount);
        if rustix::mount::unmount(path, UnmountFlags::empty()).is_err() {
            let _ = rustix::mount::mount_remount(path, MountFlags::RDONLY, c"");
        }
    }
    rustix::fs::sync();
    let _ = rustix::system::reboot(RebootCommand::PowerOff);
    // A machine that cannot switch itself off ends by the VMM's no-reboot.
    let _ = rustix::system::reboot(RebootCommand::Restart);
}
