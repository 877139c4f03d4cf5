//! What this machine offers to sandboxes, and the machine's facts that come with it.
//!
//! Memory is the real bound: an embedded node offers three quarters of it. CPUs and an embedded
//! node's disk are promised several times over, because sandboxes wait more than they compute and
//! their disks are sparse; what that may cost is a slow sandbox, or one that meets a full disk.

use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Resource, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use towline_proto::v1::Capacity;

use crate::config::Config;

/// Share of the machine's memory that an embedded node offers, in percent. The rest is the user's.
const EMBEDDED_MEMORY_PERCENT: u64 = 75;
/// A node of its own keeps this much for itself.
const NODE_MEMORY_PERCENT: u64 = 90;
/// How often each CPU is promised.
pub const CPU_OVERSUBSCRIPTION: u32 = 8;
/// How often an embedded node promises its free disk: disks are sparse and mostly empty.
pub const EMBEDDED_DISK_OVERSUBSCRIPTION: u64 = 4;

/// Share of this process' descriptors that sandboxes' connections may hold, in percent.
const SOCKETS_PERCENT: u64 = 50;

/// Connections that all sandboxes of this node may have together. Raises this process' own limit of
/// descriptors as far as it may first.
pub fn sockets_max() -> usize {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!(%error, "limit of descriptors not raised");
    }
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::from(u32::MAX));
    let share = usize::try_from(descriptors * SOCKETS_PERCENT / 100).unwrap_or(usize::MAX);
    share.min(tokio::sync::Semaphore::MAX_PERMITS)
}

/// What this node offers.
pub fn capacity(config: &Config) -> io::Result<Capacity> {
    let cpus = machine_cpus()?.saturating_mul(CPU_OVERSUBSCRIPTION);
    let percent = if config.embedded { EMBEDDED_MEMORY_PERCENT } else { NODE_MEMORY_PERCENT };
    let disk = disk_mib(&config.data_dir)?;
    let factor = if config.embedded { EMBEDDED_DISK_OVERSUBSCRIPTION } else { 1 };
    Ok(Capacity {
        cpus: config.cpus.unwrap_or(cpus),
        memory_mib: config.memory_mib.unwrap_or(memory_mib()? * percent / 100),
        disk_mib: config.disk_mib.unwrap_or(disk * factor),
    })
}

/// CPUs of this machine: a sandbox has no more.
pub fn machine_cpus() -> io::Result<u32> {
    let cpus = std::thread::available_parallelism()?.get();
    Ok(u32::try_from(cpus).unwrap_or(u32::MAX))
}

fn memory_mib() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.map(|kib| kib >> 10).ok_or_else(|| io::Error::other("/proc/meminfo has no MemTotal"))
}

/// What is free, and what our sandboxes hold already: both can be promised.
fn disk_mib(data_dir: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(data_dir)?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize) >> 20;
    Ok(free + used_mib(&data_dir.join("sandboxes")))
}

fn used_mib(sandboxes: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = std::fs::read_dir(sandboxes) else { return 0 };
    let disks = entries.flatten().map(|entry| entry.path().join(crate::store::UPPER));
    disks.filter_map(|disk| Some(disk.metadata().ok()?.blocks() * 512)).sum::<u64>() >> 20
}

/// Time since the machine was booted, sleep included.
pub fn boottime() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// The kernel's id of this boot.
pub fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.map(|id| id.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_memory_and_a_boot() {
        assert!(memory_mib().unwrap() > 100);
        assert_eq!(boot_id().len(), 36);
        assert!(boottime() > Duration::ZERO);
        assert!(disk_mib(Path::new("/")).unwrap() > 0);
    }
}
