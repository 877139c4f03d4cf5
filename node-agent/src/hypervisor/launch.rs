//! Starts the process of a VM: as a child of this process and as its user, or by the node's helper,
//! which gives each a user, a cgroup and a root of its own. What a driver says of a VM is the same.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::block_in_place;
use towline_node_helper::client::Helper;
use towline_node_helper::confine::{self, Files, Limits};
use towline_node_helper::protocol::{Access, Bounds, Given, Name, Spawn};

use super::vm::{Helped, LOG_FILE};
use super::{HypervisorError, Vm, VmSpec, Vmm, vm};

/// What it may write to a log where no disk is larger.
const LOGS_MAX: u64 = 64 << 20;
/// Threads of a VMM: virtual CPUs and, under load, one for each request of each disk.
const THREADS_MAX: u64 = 1024;
/// CPUs that a VMM may use besides the guest's, for its devices.
const DEVICE_CPUS: u32 = 1;

/// Who starts VMMs.
#[derive(Debug, Clone, Default)]
pub enum Starter {
    /// The node agent, under its own user.
    #[default]
    Own,
    /// The node's helper, each under a user of its own.
    Helper(Arc<Helper>),
}

/// A VMM to be started.
#[derive(Debug)]
pub(super) struct Launch<'a> {
    pub(super) program: &'a Path,
    pub(super) vmm: Vmm,
    pub(super) args: Vec<String>,
    /// Its directory, without links.
    pub(super) dir: &'a Path,
    pub(super) cpus: u32,
    /// What it may touch; its directory is among its own.
    pub(super) files: Files,
    pub(super) limits: Limits,
    pub(super) life: Life,
    /// Has this number in the program, too.
    pub(super) inherited: Option<OwnedFd>,
}

/// How long a VMM lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    /// Beyond this process.
    Lasting,
    /// As long as this process, at most.
    Bound,
    /// The same, and it has only the time that nobody else wants.
    Background,
}

/// Bounds for a VM's process that hold on any machine; a healthy one stays far below.
pub(super) fn limits(spec: &VmSpec, overhead_mib: u64) -> Limits {
    let disk = spec.upper.as_ref().and_then(|path| fs::metadata(path).ok());
    Limits {
        data_bytes: (spec.memory_mib + overhead_mib) << 20,
        file_bytes: disk.map_or(0, |disk| disk.len()).max(LOGS_MAX),
    }
}

/// Says why a VMM could not be kept to its own files whole, given the kernel's version of landlock.
pub(crate) fn require_landlock(abi: Option<u32>) -> Result<(), HypervisorError> {
    let what = match abi {
        Some(abi) if abi >= confine::ABI_WANTED => return Ok(()),
        Some(abi) => {
            format!("this kernel has ABI {abi} of it, and {} is needed", confine::ABI_WANTED)
        }
        None => "this kernel has none".to_owned(),
    };
    Err(HypervisorError::NoLandlock(what))
}

/// Waits for the helper's answer, which has a bound, while the runtime goes on with its other tasks.
pub(super) fn waiting<T>(ask: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => block_in_place(ask),
        _ => ask(),
    }
}

impl Starter {
    /// Whether a VMM has a user of its own.
    pub(crate) fn is_helper(&self) -> bool {
        matches!(self, Self::Helper(_))
    }

    /// What a VM lacks that is started like this.
    pub(super) fn missing(&self) -> Vec<String> {
        match self {
            Self::Own => vec![
                "cgroups: a VM's memory is bounded by limits, its CPU and IO are not".to_owned(),
                "users: all VMs of this node run as the node agent's (set `helper`)".to_owned(),
            ],
            Self::Helper(_) => Vec::new(),
        }
    }

    pub(super) fn start(&self, launch: Launch<'_>) -> Result<Vm, HypervisorError> {
        let log_path = launch.dir.join(LOG_FILE);
        let log = File::create(&log_path).map_err(HypervisorError::io("create", &log_path))?;
        match self {
            Self::Own => start_own(launch, log),
            Self::Helper(helper) => start_by(helper, launch, &log),
        }
    }

    /// The VM that runs in this directory with this program.
    pub(super) fn find(
        &self,
        dir: &Path,
        program: &Path,
        vmm: Vmm,
    ) -> Result<Option<Vm>, HypervisorError> {
        // As it was started in: where it is confined, there is no other path to it.
        let dir = &fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
        if let Self::Helper(helper) = self {
            let name = Name::of(dir);
            let running = waiting(|| helper.list())?;
            if let Some(running) = running.into_iter().find(|running| running.name == name) {
                let found = Vm::helped(Helped::new(helper, &running, None), dir, program, vmm);
                // A node agent that died before it could note it is one of the reasons to look.
                let _ = found.as_ref().map(Vm::note);
                return Ok(found);
            }
        }
        Ok(Vm::find(dir, program, vmm))
    }

    /// The VMs of this program that run beneath this folder in a directory that was removed.
    pub(super) fn strays(&self, folder: &Path, program: &Path, vmm: Vmm) -> Vec<Vm> {
        let mut strays = vm::strays(folder, program, vmm);
        let Self::Helper(helper) = self else { return strays };
        let folder = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
        for running in waiting(|| helper.list()).unwrap_or_default() {
            let dir = PathBuf::from(&running.dir);
            if dir.starts_with(&folder) && !dir.exists() {
                strays.extend(Vm::helped(Helped::new(helper, &running, None), &dir, program, vmm));
            }
        }
        strays
    }
}

fn start_own(launch: Launch<'_>, log: File) -> Result<Vm, HypervisorError> {
    let io = HypervisorError::io;
    let log_too = log.try_clone().map_err(io("open the log in", launch.dir))?;
    let mut command = Command::new(launch.program);
    command
        .args(&launch.args)
        .current_dir(launch.dir)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(log_too);
    let rules = confine::is_available().then(|| confine::prepare(&launch.files));
    let rules = rules.transpose().map_err(io("confine the VM in", launch.dir))?;
    confine::apply(&mut command, rules, launch.limits);
    match launch.life {
        Life::Lasting => {}
        Life::Bound => confine::end_with_starter(&mut command),
        Life::Background => confine::in_background(&mut command),
    }
    if let Some(fd) = launch.inherited {
        confine::inherit(&mut command, fd);
    }
    let child = command.spawn().map_err(|source| HypervisorError::Spawn {
        program: launch.program.display().to_string(),
        dir: launch.dir.to_owned(),
        source,
    })?;
    Vm::started(child, launch.dir, launch.vmm)
}

fn start_by(helper: &Arc<Helper>, launch: Launch<'_>, log: &File) -> Result<Vm, HypervisorError> {
    let io = HypervisorError::io;
    let (files, fds) = give(&launch.files)?;
    let (status, tells) = io::pipe().map_err(io("start the VM in", launch.dir))?;
    let name = Name::of(launch.dir);
    let memory_bytes = launch.limits.data_bytes;
    let spawn = Spawn {
        name: name.clone(),
        program: text(launch.program)?,
        args: launch.args,
        files,
        dir: text(launch.dir)?,
        bounds: Bounds {
            memory_bytes,
            data_bytes: launch.limits.data_bytes,
            file_bytes: launch.limits.file_bytes,
            processes: THREADS_MAX,
            cpus: launch.cpus + DEVICE_CPUS,
        },
        background: launch.life == Life::Background,
        bound: launch.life != Life::Lasting,
        inherit: launch.inherited.as_ref().map(AsRawFd::as_raw_fd),
    };
    let mut all: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    all.extend([log.as_fd(), tells.as_fd()]);
    all.extend(launch.inherited.as_ref().map(AsFd::as_fd));
    let running = match waiting(|| helper.spawn(spawn, &all)) {
        Ok(running) => running,
        Err(error) => {
            // It may have been started all the same, and the answer lost.
            if !matches!(error, towline_node_helper::client::HelperError::Refused(_)) {
                let _ = waiting(|| helper.end(name, true));
            }
            return Err(error.into());
        }
    };
    // The helper has the only other end.
    drop(tells);
    let helped = Helped::new(helper, &running, Some(status));
    let ended = || HypervisorError::io("watch the process of the VM in", launch.dir);
    let vm = Vm::helped(helped, launch.dir, launch.program, launch.vmm);
    let vm =
        vm.ok_or_else(|| ended()(io::Error::other(vm::ended_at_once(launch.dir, launch.vmm))))?;
    vm.note()?;
    Ok(vm)
}

/// Opens what a VMM is given: the helper opens nothing by its name.
fn give(files: &Files) -> Result<(Vec<Given>, Vec<OwnedFd>), HypervisorError> {
    let of = |paths: &[PathBuf], access: Access| {
        paths.iter().map(|path| (path.clone(), access)).collect::<Vec<_>>()
    };
    let mut all = of(&files.own, Access::Own);
    all.extend(of(&files.write, Access::Write));
    all.extend(of(&files.read, Access::Read));
    let (mut given, mut fds) = (Vec::new(), Vec::new());
    for (path, access) in all {
        let mut options = File::options();
        let opened = options.read(true).custom_flags(libc::O_PATH).open(&path);
        fds.push(opened.map_err(HypervisorError::io("open", &path))?.into());
        given.push(Given { path: text(&path)?, access });
    }
    Ok((given, fds))
}

fn text(path: &Path) -> Result<String, HypervisorError> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| HypervisorError::Spec(format!("`{}` is not UTF-8", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn landlock_that_is_required_is_refused_where_it_is_not() {
        for (abi, says) in [(None, "has none"), (Some(2), "ABI 2"), (Some(1), "ABI 1")] {
            let error = require_landlock(abi).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("landlock = \"auto\""), "{error}");
        }
        assert!(require_landlock(Some(3)).is_ok() && require_landlock(Some(7)).is_ok());
    }
}
