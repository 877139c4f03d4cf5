//! Applies the node's GuestConfigure, once per boot: entropy and clock first, then names, the root
//! file system, and last the workload's namespaces.
//!
//! The node is trusted here, but what it passes on comes from clients: everything is checked.

use std::io;
use std::path::Path;

use rustix::time::{ClockId, Timespec};
use towline_proto::v1::{GuestConfigure, User};

use crate::boot::{self, Kernel};
use crate::credentials::{self, RootFiles};
use crate::diff::Trees;
use crate::exec::ExecTable;
use crate::refusal::Refusal;
use crate::root::{self, RootSpec};
use crate::serve::Services;
use crate::settings::Settings;
use crate::workload::{Cgroups, Limits, Workload};

/// Memory that stays for the kernel and the agent, at least.
const RESERVED_MEMORY: u64 = 64 << 20;
/// Least entropy: what seeds the kernel's generator.
pub(crate) const ENTROPY_MIN: usize = 32;
/// Processes of a workload when the node names no bound.
const PROCESSES_DEFAULT: u32 = 4096;

/// Does all of it. `fuse` is the device of a local image, whose requests are served meanwhile.
pub async fn configure(
    configure: &GuestConfigure,
    fuse: Option<crate::fuse::Device>,
    kernel: Kernel,
) -> Result<Services, Refusal> {
    if kernel == Kernel::Own {
        // First of all: a guest that was restored would share its random numbers with others.
        if configure.entropy.len() < ENTROPY_MIN {
            return Err(Refusal::invalid("the node gave too little entropy"));
        }
        boot::add_entropy(&configure.entropy)
            .map_err(|error| Refusal::io("cannot take the node's entropy", &error))?;
        set_clock(configure.unix_ns)?;
        boot::finish().map_err(|error| Refusal::io("cannot set the machine up", &error))?;
    }
    let hostname = checked_hostname(&configure.hostname)?;
    rustix::system::sethostname(hostname.as_bytes())
        .map_err(|error| Refusal::io("cannot set the hostname", &error.into()))?;
    let spec = RootSpec {
        kernel,
        layers: configure.layers,
        fuse,
        hostname,
        machine_id: configure.machine_id.clone(),
        folder: configure.folder.clone(),
        cwd: configure.cwd.clone(),
        git: configure.git.clone(),
    };
    // Touches the lower file system, which a local image serves through this very runtime.
    let (mounted, spec) = blocking(move || root::mount_root(&spec).map(|mounted| (mounted, spec)))
        .await
        .map_err(|error| Refusal::io("cannot make the root file system", &error))?;
    let files = RootFiles::beneath(mounted.descriptor);
    let mut made = vec![spec.folder.clone(), spec.cwd.clone()];
    blocking(|| root::announce_fork(Path::new(root::ROOT), ""))
        .await
        .map_err(|error| Refusal::io("cannot make /run/towline", &error))?;
    let settings = Settings::new(configure, files);
    let user = user(&settings).await?;
    made.push(user.home.clone());
    let owner = user.clone();
    blocking(move || root::make_home(&owner))
        .await
        .map_err(|error| Refusal::io("cannot make the user's home", &error))?;
    let folder = if spec.folder.is_empty() {
        None
    } else {
        let (owner, path) = (user.clone(), spec.folder);
        let agents = blocking(move || root::bind_folder(&path, &owner))
            .await
            .map_err(|error| Refusal::io("cannot make the project folder", &error))?;
        Some((agents, user.clone()))
    };
    let project = folder.as_ref().map(|(agents, _)| (made[0].clone(), agents.clone()));
    let cgroups = Cgroups::make_tree(Path::new("/sys/fs/cgroup"), limits(configure)?, kernel)
        .map_err(|error| Refusal::io("cannot set the workload's limits", &error))?;
    let workload =
        Workload::sandbox(Path::new(root::ROOT), Path::new(root::SPOOL), cgroups).await?;
    let execs = ExecTable::new(workload, settings);
    let mut services = Services::new(execs, folder, user, root::ROOT.into());
    services.trees = Some(Trees {
        upper: root::CHANGES.into(),
        below: mounted.below,
        root: root::ROOT.into(),
        made,
        project,
    });
    Ok(services)
}

/// Runs on the blocking pool; a panic there is an error here.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Whose the project folder and the home are.
async fn user(settings: &Settings) -> Result<User, Refusal> {
    let settings = settings.clone();
    let user = move || match &settings.user {
        Some(user) => credentials::complete(user.clone(), &settings.files)
            .map_err(|error| Refusal::io("cannot read the image's /etc/passwd", &error)),
        None => credentials::of_image(&settings.image_user, &settings.files),
    };
    tokio::task::spawn_blocking(user)
        .await
        .map_err(|error| Refusal::io("cannot look the user up", &io::Error::other(error)))?
}

/// Sets the wall clock; zero leaves it.
pub fn set_clock(unix_ns: u64) -> Result<(), Refusal> {
    if unix_ns == 0 {
        return Ok(());
    }
    let seconds = i64::try_from(unix_ns / 1_000_000_000);
    let nanos = i64::try_from(unix_ns % 1_000_000_000);
    let (Ok(tv_sec), Ok(tv_nsec)) = (seconds, nanos) else {
        return Err(Refusal::invalid("the clock is set too far ahead"));
    };
    rustix::time::clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec })
        .map_err(|error| Refusal::io("cannot set the clock", &error.into()))
}

pub(crate) fn checked_hostname(name: &str) -> Result<String, Refusal> {
    let name = if name.is_empty() { "sandbox" } else { name };
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
    if name.len() > 64 || !name.bytes().all(allowed) {
        return Err(Refusal::invalid(format!(
            "`{name}` is no hostname: at most 64 letters, digits, dots and hyphens are"
        )));
    }
    Ok(name.into())
}

/// The workload's limits: never so much memory that the agent would have none.
fn limits(configure: &GuestConfigure) -> Result<Limits, Refusal> {
    let meminfo = std::fs::read_to_string("/proc/meminfo")
        .map_err(|error| Refusal::io("cannot read /proc/meminfo", &error))?;
    let total = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .ok_or_else(|| Refusal::invalid("/proc/meminfo tells no MemTotal"))?
        * 1024;
    Ok(bounded(total, configure.memory_max_bytes, configure.processes_max))
}

fn bounded(total: u64, memory: u64, processes: u32) -> Limits {
    let most = total - RESERVED_MEMORY.max(total / 20).min(total / 4);
    Limits {
        memory: if memory == 0 { most } else { memory.min(most) },
        processes: if processes == 0 { PROCESSES_DEFAULT } else { processes },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_always_keeps_memory_for_itself() {
        assert_eq!(bounded(2 << 30, 0, 0).memory, (2 << 30) - (2 << 30) / 20);
        assert_eq!(bounded(256 << 20, 1 << 40, 7), Limits { memory: 192 << 20, processes: 7 });
        assert_eq!(bounded(1 << 30, 100 << 20, 0).memory, 100 << 20);
    }

    #[test]
    fn hostnames_are_checked() {
        assert_eq!(checked_hostname("").unwrap(), "sandbox");
        assert!(checked_hostname("my-box.local").is_ok());
        assert!(checked_hostname("a b").is_err());
        assert!(checked_hostname(&"x".repeat(65)).is_err());
    }
}
