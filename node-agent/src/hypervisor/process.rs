//! The `process` driver: a sandbox is processes of this machine's kernel in namespaces, cgroups and a
//! system call filter, with the same guest agent as its first process, on a Unix socket.
//!
//! Weaker than a VM, as the kernel is shared, and so only for those who ask for it on a node that
//! allows it. The guest agent makes the sandbox from within (`node-agent/guest/src/process.rs`);
//! here is what must be done from outside, before it may start and after it has ended.

mod connections;
mod filter;
mod spawn;

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::BoxFuture;
use prost::Message;
use sha2::{Digest, Sha256};
use towline_node_helper::cgroups::{Cgroup, Limits, Tree};
use towline_proto::process::{IDS, PROCESS_NAME, ProcessSetup};
use towline_proto::v1::Isolation;

use super::processes::of_program;
use super::{Accel, Capabilities, Hypervisor, HypervisorError, LINK_SOCKET, Vm, VmSpec};
use spawn::Stdio;

/// What a process of a sandbox runs, as /proc shows it: the guest agent, from memory.
pub(super) const PROGRAM: &str = "/memfd:towline-guest-agent";
/// The guest agent's own processes and threads, beside the workload's.
const AGENTS_PROCESSES: u64 = 64;
/// Folder of all sandboxes' cgroups, in each hierarchy.
const CGROUPS: &str = "towline";
/// What the guest agent may say about its end.
const LOG_MAX: u64 = 64 << 10;
/// The ids that are for containers, by convention of systemd: the first of them, and how many
/// sandboxes they are enough for.
const IDS_FIRST: u32 = 0x0008_0000;
const IDS_SANDBOXES: u32 = (0x7000_0000 - IDS_FIRST) / IDS;

/// The driver.
#[derive(Debug)]
pub struct Process {
    program: File,
    filter: Vec<u8>,
    cgroups: Arc<Tree>,
    capabilities: Capabilities,
}

impl Process {
    /// Takes the static guest agent into memory, where no sandbox can change it.
    pub fn new(guest_agent: &Path) -> Result<Self, HypervisorError> {
        let io = HypervisorError::io;
        if !rustix::process::geteuid().is_root() {
            return Err(HypervisorError::NoPrivileges);
        }
        let content = fs::read(guest_agent).map_err(io("read", guest_agent))?;
        let program = spawn::sealed(c"towline-guest-agent", &content, true)
            .map_err(io("copy to memory", guest_agent))?;
        let cgroups = Tree::find(CGROUPS).map_err(|error| match error.kind() {
            io::ErrorKind::Unsupported => {
                HypervisorError::Spec(format!("the `process` driver needs cgroups: {error}"))
            }
            _ => io("look for cgroups in", Path::new("/proc/self/mounts"))(error),
        });
        let cgroups = Arc::new(cgroups?);
        cgroups.sweep();
        let capabilities = Capabilities {
            driver: "process",
            version: env!("CARGO_PKG_VERSION").into(),
            isolation: Isolation::Process,
            accel: Accel::None,
            accel_reason: String::new(),
            snapshot: false,
            hotplug: false,
            gpu: false,
            landlock: false,
            own_kernel: false,
            disk_limit: true,
            memory_limit: cgroups.limits("memory"),
            memory_limit_ends_commands: cgroups.limits_within(),
            process_limit: cgroups.limits("pids"),
            missing: cgroups.missing(),
        };
        Ok(Self { program, filter: filter::program()?, cgroups, capabilities })
    }

    fn spawn(&self, spec: &VmSpec) -> Result<Vm, HypervisorError> {
        spec.check()?;
        let io = HypervisorError::io;
        let dir = fs::canonicalize(&spec.dir).map_err(io("find", &spec.dir))?;
        let Some(upper) = &spec.upper else {
            return Err(HypervisorError::Spec("a process sandbox needs a writable disk".into()));
        };
        let first_id = first_id(&dir);
        let path = |path: &PathBuf| -> Result<Vec<u8>, HypervisorError> {
            let path = fs::canonicalize(path).map_err(io("find", path))?;
            Ok(path.into_os_string().into_encoded_bytes())
        };
        let setup = ProcessSetup {
            place: dir.as_os_str().as_bytes().to_vec(),
            layers: spec.layers.iter().map(path).collect::<Result<_, _>>()?,
            upper: path(upper)?,
            first_id: Some(first_id),
            filter: self.filter.clone(),
        };
        let cgroup = self.cgroups.of(&dir);
        let limits = Limits {
            memory_bytes: spec.memory_mib << 20,
            processes: u64::from(spec.processes_max) + AGENTS_PROCESSES,
            cpus: spec.cpus,
        };
        remove(&cgroup).map_err(io("clean the cgroup of", &dir))?;
        cgroup.make(&limits, first_id).map_err(io("make the cgroup of", &dir))?;
        let started = self.start(&setup, &dir, &cgroup);
        if started.is_err() {
            let _ = cgroup.remove();
        }
        started
    }

    /// Starts the first process, and lets it go on only when it can be found again.
    fn start(
        &self,
        setup: &ProcessSetup,
        dir: &Path,
        cgroup: &Cgroup,
    ) -> Result<Vm, HypervisorError> {
        let io = HypervisorError::io;
        let link = listen(dir).map_err(io("listen in", dir))?;
        let setup = spawn::sealed(c"towline-setup", &setup.encode_to_vec(), false);
        let setup = setup.map_err(io("prepare", dir))?;
        let log = spawn::bounded(c"towline-log", LOG_MAX).map_err(io("prepare", dir))?;
        let null = File::open("/dev/null").map_err(io("open", Path::new("/dev/null")))?;
        let (gate, opens) = io::pipe().map_err(io("prepare", dir))?;
        let stdio = Stdio {
            null: null.as_fd(),
            log: log.as_fd(),
            setup: setup.as_fd(),
            link: link.as_fd(),
            gate: gate.as_fd(),
        };
        let name = CString::new(PROCESS_NAME).expect("a name without NUL");
        let place = CString::new(dir.as_os_str().as_bytes()).expect("a path without NUL");
        let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWPID;
        let failed = |source| HypervisorError::Spawn {
            program: PROCESS_NAME.into(),
            dir: dir.to_owned(),
            source,
        };
        let spawned = spawn::spawn(self.program.as_fd(), [&name, &place], &stdio, namespaces);
        let mut spawned = spawned.map_err(failed)?;
        let runs = spawned.runs();
        let vm = Vm::sandbox(spawned.pid, dir, log, cgroup.clone())?;
        runs.map_err(failed)?;
        cgroup.enter(spawned.pid).map_err(io("fill the cgroup of", dir))?;
        vm.note()?;
        // Were the node agent to end before this, the pipe's end would end the sandbox.
        (&opens).write_all(b"g").map_err(io("let go on", dir))?;
        Ok(vm)
    }
}

impl Hypervisor for Process {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn boot<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<Vm, HypervisorError>> {
        Box::pin(async move { self.spawn(spec) })
    }

    fn adopt(&self, dir: &Path) -> Result<Option<Vm>, HypervisorError> {
        // A folder that is gone has no VM; its cgroup is named by what it was.
        let dir = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
        let cgroup = self.cgroups.of(&dir);
        match Vm::find_sandbox(&dir, cgroup.clone()) {
            Some(vm) => Ok(Some(vm)),
            None => {
                remove(&cgroup).map_err(HypervisorError::io("clean the cgroup of", &dir))?;
                Ok(None)
            }
        }
    }

    fn strays(&self, folder: &Path) -> Vec<Vm> {
        let folder = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
        let found = of_program(Path::new(PROGRAM)).filter_map(|pid| {
            let place = Self::place_of(pid)?;
            let is_stray = place.starts_with(&folder) && !place.exists();
            is_stray.then(|| Vm::stray(pid, &place, self.cgroups.of(&place)))?
        });
        found.collect()
    }
}

impl Process {
    /// The folder that a process is the first of a sandbox of, as its arguments name it.
    fn place_of(pid: i32) -> Option<PathBuf> {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let mut arguments = arguments.split(|&byte| byte == 0);
        let is_first = arguments.next()? == PROCESS_NAME.as_bytes();
        is_first.then_some(PathBuf::from(OsStr::from_bytes(arguments.next()?)))
    }
}

/// Kills all that is left of a sandbox, also what waits for an answer that nobody will give.
pub(super) fn kill(cgroup: &Cgroup) {
    // What is not there cannot be killed.
    let _ = cgroup.kill();
    if let Err(error) = connections::abort(&cgroup.processes()) {
        tracing::warn!(%error, "local image of a killed sandbox not ended");
    }
}

/// Kills what is left in it and removes it.
fn remove(cgroup: &Cgroup) -> io::Result<()> {
    kill(cgroup);
    cgroup.remove()
}

/// The guest link's socket: listening before anybody could connect, by a path of any length.
fn listen(dir: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(dir.join(LINK_SOCKET)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let folder = File::open(dir)?;
    let path = format!("/proc/self/fd/{}/{LINK_SOCKET}", folder.as_raw_fd());
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// The range of ids of the sandbox in this folder; two sandboxes rarely have the same, and are kept
/// apart by more than that.
fn first_id(dir: &Path) -> u32 {
    let digest = Sha256::digest(OsStr::as_bytes(dir.as_os_str()));
    let number = u32::from_le_bytes([digest[28], digest[29], digest[30], digest[31]]);
    IDS_FIRST + number % IDS_SANDBOXES * IDS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandboxs_ids_are_no_users() {
        for dir in ["/a", "/b", "/home/ann/.local/share/towline/node/sandboxes/x/vm"] {
            let first = first_id(Path::new(dir));
            assert!(first >= 524_288 && first.is_multiple_of(IDS), "{first}");
            assert!(u64::from(first) + u64::from(IDS) <= 0x7000_0000);
        }
    }
}
