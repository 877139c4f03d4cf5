//! The handle of a running VM: a process that is ours or adopted, watched by its pidfd.
//!
//! Dropping the handle leaves the VM running.
#![expect(unsafe_code, reason = "tokio asks for a promise about the pidfd")]

use std::fmt;
use std::fs::{self, File};
use std::io::{self, PipeReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::time::timeout;

use super::cloud_hypervisor;
use super::launch::waiting;
use super::process;
use super::processes::{boot_id, executable, running_in, running_in_removed, start_time};
use super::qmp::Qmp;
use super::{HypervisorError, LINK_SOCKET};
use towline_node_helper::cgroups::Cgroup;
use towline_node_helper::client::Helper;
use towline_node_helper::protocol::{Name, Running};

const IDENTITY_FILE: &str = "vm.json";
/// What the VMM writes to its standard error.
pub(super) const LOG_FILE: &str = "vmm.log";
/// Where a QEMU listens for orders.
pub(super) const ORDERS_SOCKET: &str = "qmp.sock";
/// Port of the guest link, where it goes over vsock: the guest agent listens.
const VSOCK_PORT: u32 = towline_proto::mux::VSOCK_PORT;
/// Longest answer to a CONNECT: `OK` and a number.
const CONNECTED_MAX: usize = 32;
/// Longest text about an end, and how long after it the helper may take to say it.
const STATUS_MAX: u64 = 64;
const STATUS_WAIT: Duration = Duration::from_secs(2);
/// How much of the log explains an exit.
const LOG_SHOWN: u64 = 2048;

/// What makes a process the one that was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmIdentity {
    /// The machine's boot.
    pub boot_id: String,
    /// Process id.
    pub pid: i32,
    /// Start of the process in clock ticks since boot.
    pub start_time: u64,
    /// Its program.
    pub executable: PathBuf,
}

/// How a VM's process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmExit {
    /// Which process ended, as people know it.
    pub what: &'static str,
    /// `exit status: 0`, `signal: 9 (SIGKILL)`; empty when it was adopted, as only a parent is told.
    pub status: String,
    /// The end of what it wrote to its log.
    pub log: String,
}

impl fmt::Display for VmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ended", self.what)?;
        if !self.status.is_empty() {
            write!(f, " ({})", self.status)?;
        }
        if !self.log.is_empty() {
            write!(f, ": {}", self.log)?;
        }
        Ok(())
    }
}

/// A running VM.
#[derive(Debug)]
pub struct Vm {
    identity: VmIdentity,
    dir: PathBuf,
    pidfd: AsyncFd<OwnedFd>,
    kind: Kind,
    /// The helper that started it, and alone can end it.
    helped: Option<Helped>,
    status: Mutex<String>,
    /// A connection to the guest link that nobody has taken yet.
    ahead: Mutex<Option<UnixStream>>,
}

/// A program that runs VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    /// Its guest link is a serial port: whoever connects is there at once.
    Qemu,
    /// Its guest link is a vsock: whoever connects names a port, which may not be listened at yet.
    CloudHypervisor,
}

impl Vmm {
    /// As `vmm` of the configuration names it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::CloudHypervisor => "cloud-hypervisor",
        }
    }

    /// What its process is called in an exit.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Qemu => "the VM's process (QEMU)",
            Self::CloudHypervisor => "the VM's process (Cloud Hypervisor)",
        }
    }
}

/// What the node's helper knows of a VM that it started.
#[derive(Debug)]
pub(super) struct Helped {
    helper: Arc<Helper>,
    running: Running,
    /// Says how it ended, to who had it started.
    status: tokio::sync::Mutex<Option<PipeReader>>,
}

impl Helped {
    pub(super) fn new(helper: &Arc<Helper>, running: &Running, status: Option<PipeReader>) -> Self {
        let (helper, running) = (Arc::clone(helper), running.clone());
        Self { helper, running, status: tokio::sync::Mutex::new(status) }
    }

    fn name(&self) -> Name {
        self.running.name.clone()
    }

    /// How it ended, once; a helper that was started again since then does not know.
    async fn ended(&self) -> Option<String> {
        let pipe = self.status.lock().await.take()?;
        let pipe = pipe::Receiver::from_owned_fd(pipe.into()).ok()?;
        let mut text = String::new();
        let mut pipe = pipe.take(STATUS_MAX);
        timeout(STATUS_WAIT, pipe.read_to_string(&mut text)).await.ok()?.ok()?;
        let (how, number) = text.split_once(' ')?;
        let number: i32 = number.parse().ok()?;
        let raw = if how == "signal" { number } else { number << 8 };
        Some(ExitStatus::from_raw(raw).to_string())
    }
}

/// What it is a process of.
#[derive(Debug)]
enum Kind {
    /// A VMM, which takes orders and writes a log.
    Vmm(Vmm),
    /// A sandbox without a VM: its process 1, with whose end the kernel ends all others. Its log is
    /// lost with the node agent that started it.
    Sandbox { log: Option<File>, cgroup: Mutex<Option<Cgroup>> },
}

/// What a sandbox's process 1 is called in an exit.
const SANDBOX: &str = "the sandbox's first process";

impl Vm {
    /// What to know it by.
    pub fn identity(&self) -> &VmIdentity {
        &self.identity
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The socket of the guest link.
    pub fn link_socket(&self) -> PathBuf {
        self.dir.join(LINK_SOCKET)
    }

    /// Whether what the guest says may wait for a connection after the present one.
    pub fn link_can_be_held_up(&self) -> bool {
        matches!(self.kind, Kind::Vmm(Vmm::Qemu))
    }

    /// Connects to the guest link of one that may be halted, before it goes on. A QEMU (7.2) that drops
    /// a connection while it is halted does not tell its serial port, and what the guest writes before
    /// there is another one holds the port up.
    pub async fn open_link_ahead(&self) {
        if self.link_can_be_held_up() {
            let opened = self.open_link().await.ok();
            *self.ahead.lock().unwrap_or_else(PoisonError::into_inner) = opened;
        }
    }

    /// Connects to the guest link. Fails while nobody is there to answer.
    pub async fn open_link(&self) -> io::Result<UnixStream> {
        if let Some(ahead) = self.ahead.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Ok(ahead);
        }
        let mut stream = connect(&self.dir, LINK_SOCKET).await?;
        if matches!(self.kind, Kind::Vmm(Vmm::CloudHypervisor)) {
            stream.write_all(format!("CONNECT {VSOCK_PORT}\n").as_bytes()).await?;
            read_connected(&mut stream).await?;
        }
        Ok(stream)
    }

    /// Waits until the process has ended. Cancel-safe, and may be called again.
    pub async fn wait_exit(&self) -> VmExit {
        // An error here could only mean that the runtime goes down.
        let _ = self.pidfd.readable().await.map(|mut guard| guard.retain_ready());
        let told = match &self.helped {
            Some(helped) => helped.ended().await,
            None => None,
        };
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ended) = told.or_else(|| self.reap().map(|ended| ended.to_string())) {
            *status = ended;
        }
        let status = status.clone();
        match &self.kind {
            Kind::Vmm(vmm) => {
                VmExit { what: vmm.name(), status, log: log_end(&self.dir.join(LOG_FILE)) }
            }
            Kind::Sandbox { log, cgroup } => {
                // Once: a later run of the sandbox has a cgroup of the same name. It is empty, as
                // process 1 is the last of its namespace to go, so this does not take long.
                let cgroup = cgroup.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(Err(error)) = cgroup.map(|cgroup| cgroup.remove()) {
                    tracing::warn!(%error, dir = %self.dir.display(), "cgroup not removed");
                }
                let log = log.as_ref().map(memory_log).unwrap_or_default();
                VmExit { what: SANDBOX, status, log }
            }
        }
    }

    /// Takes the status of a child that has ended: there is one only of children, and only once.
    fn reap(&self) -> Option<ExitStatus> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let ended = waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), options).ok()??;
        let signal = ended.terminating_signal().unwrap_or(0);
        Some(ExitStatus::from_raw(ended.exit_status().unwrap_or(0) << 8 | signal))
    }

    /// Whether the process is still there.
    pub fn is_running(&self) -> bool {
        start_time(self.identity.pid) == Some(self.identity.start_time)
    }

    /// Kills the process. That it is gone already is fine.
    pub fn kill(&self) -> io::Result<()> {
        if let Some(helped) = &self.helped {
            return self.end_by(helped, true);
        }
        match pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
        if let Kind::Sandbox { cgroup, .. } = &self.kind
            && let Some(cgroup) = &*cgroup.lock().unwrap_or_else(PoisonError::into_inner)
        {
            process::kill(cgroup);
        }
        Ok(())
    }

    fn end_by(&self, helped: &Helped, kill: bool) -> io::Result<()> {
        match waiting(|| helped.helper.end(helped.name(), kill)) {
            // It is gone already.
            Err(_) if !self.is_running() => Ok(()),
            result => result.map_err(|error| io::Error::other(crate::chain(&error))),
        }
    }

    /// Ends the process: asks it to write its disks out and quit, and kills it after the bound.
    pub async fn quit(&self, bound: Duration) -> io::Result<VmExit> {
        let asked = timeout(bound, async {
            // What a process has written is the kernel's already.
            if matches!(self.kind, Kind::Sandbox { .. }) || self.ask_to_quit().await.is_err() {
                return None;
            }
            Some(self.wait_exit().await)
        });
        if let Ok(Some(exit)) = asked.await {
            return Ok(exit);
        }
        self.kill()?;
        Ok(self.wait_exit().await)
    }

    async fn ask_to_quit(&self) -> io::Result<()> {
        if matches!(self.kind, Kind::Vmm(Vmm::CloudHypervisor)) {
            // It ends its VM in order then, and itself.
            if let Some(helped) = &self.helped {
                return self.end_by(helped, false);
            }
            return Ok(pidfd_send_signal(self.pidfd.get_ref(), Signal::TERM)?);
        }
        let mut orders = connect(&self.dir, ORDERS_SOCKET).await?;
        orders.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n").await?;
        // Its answers are of no interest, but reading them keeps it from waiting for us.
        let mut answers = [0; 1024];
        while orders.read(&mut answers).await.is_ok_and(|len| len > 0) {}
        Ok(())
    }

    /// Halts it with all that it has in memory. One that is halted stays so.
    pub async fn pause(&self) -> io::Result<()> {
        match &self.kind {
            Kind::Vmm(Vmm::Qemu) => {
                let mut qmp = Qmp::connect(&self.dir).await?;
                qmp.execute("stop", json!({})).await.map(drop)
            }
            Kind::Vmm(Vmm::CloudHypervisor) => cloud_hypervisor::pause(&self.dir).await,
            Kind::Sandbox { .. } => self.freeze(true).await,
        }
    }

    /// Lets it go on; returns whether it was halted.
    pub async fn resume(&self) -> io::Result<bool> {
        match &self.kind {
            Kind::Vmm(Vmm::Qemu) => {
                let mut qmp = Qmp::connect(&self.dir).await?;
                let before = qmp.execute("query-status", json!({})).await?;
                qmp.execute("cont", json!({})).await?;
                Ok(before["running"] != true)
            }
            Kind::Vmm(Vmm::CloudHypervisor) => cloud_hypervisor::resume(&self.dir).await,
            // Its clock is this machine's, which has gone on.
            Kind::Sandbox { .. } => self.freeze(false).await.map(|()| false),
        }
    }

    async fn freeze(&self, frozen: bool) -> io::Result<()> {
        let Kind::Sandbox { cgroup, .. } = &self.kind else { return Ok(()) };
        let cgroup = cgroup.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(cgroup) = cgroup else { return Err(io::Error::other("it has ended")) };
        tokio::task::spawn_blocking(move || cgroup.freeze(frozen)).await?
    }

    /// Takes a process that was just spawned, and notes its identity in its directory.
    pub fn started(mut child: Child, dir: &Path, vmm: Vmm) -> Result<Self, HypervisorError> {
        let pid = i32::try_from(child.id()).unwrap_or(-1);
        let Some(vm) = attach(pid, dir, Kind::Vmm(vmm)) else {
            // It is a zombie: it has ended already.
            let status = child.wait().map(|status| status.to_string()).unwrap_or_default();
            let log = log_end(&dir.join(LOG_FILE));
            let error = io::Error::other(VmExit { what: vmm.name(), status, log }.to_string());
            return Err(HypervisorError::io("watch the process of the VM in", dir)(error));
        };
        vm.note()?;
        Ok(vm)
    }

    /// Takes a process of the helper's, if it still runs.
    pub(super) fn helped(helped: Helped, dir: &Path, program: &Path, vmm: Vmm) -> Option<Self> {
        let Running { pid, start_time: started, .. } = helped.running;
        let pidfd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::NONBLOCK).ok()?;
        // The pidfd is that of the process that was meant only if that is still there.
        if start_time(pid)? != started {
            return None;
        }
        let executable = program.to_owned();
        let identity = VmIdentity { boot_id: boot_id(), pid, start_time: started, executable };
        let mut vm = of(identity, dir, pidfd, Kind::Vmm(vmm))?;
        vm.helped = Some(helped);
        Some(vm)
    }

    /// Takes a sandbox's process 1, a child that was just cloned. One that has ended is reaped.
    pub(super) fn sandbox(
        pid: i32,
        dir: &Path,
        log: File,
        cgroup: Cgroup,
    ) -> Result<Self, HypervisorError> {
        let said = log.try_clone();
        attach(pid, dir, Kind::Sandbox { log: Some(log), cgroup: Mutex::new(Some(cgroup)) })
            .ok_or_else(|| {
                if let Some(pid) = Pid::from_raw(pid) {
                    let _ =
                        rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
                }
                let log = said.map(|log| memory_log(&log)).unwrap_or_default();
                let exit = VmExit { what: SANDBOX, status: String::new(), log };
                HypervisorError::io("start the sandbox in", dir)(io::Error::other(exit.to_string()))
            })
    }

    /// The sandbox whose process 1 this is, in a directory that was removed.
    pub(super) fn stray(pid: i32, dir: &Path, cgroup: Cgroup) -> Option<Self> {
        attach(pid, dir, Kind::Sandbox { log: None, cgroup: Mutex::new(Some(cgroup)) })
    }

    /// Notes in its directory what to know it by.
    pub(super) fn note(&self) -> Result<(), HypervisorError> {
        write_identity(&self.dir, &self.identity)
            .map_err(HypervisorError::io("write the VM's identity in", &self.dir))
    }

    /// The sandbox without a VM that runs in this directory. It was noted before it could do
    /// anything, so there is no other way to find it.
    pub(super) fn find_sandbox(dir: &Path, cgroup: Cgroup) -> Option<Self> {
        let noted = read_identity(dir).filter(is_sandbox)?;
        let cgroup = Mutex::new(Some(cgroup));
        let vm = attach(noted.pid, dir, Kind::Sandbox { log: None, cgroup })?;
        (vm.identity == noted).then_some(vm)
    }

    /// What the VM that is noted in this directory runs under, if it still does. A driver takes up
    /// the VMs of its own program only.
    pub fn vmm_in(dir: &Path) -> Option<Vmm> {
        let noted = read_identity(dir).filter(|noted| !is_sandbox(noted))?;
        let runs = noted.boot_id == boot_id()
            && start_time(noted.pid) == Some(noted.start_time)
            // That of another user cannot be read, and is the same by the rest.
            && executable(noted.pid).is_none_or(|executable| executable == noted.executable);
        let name = noted.executable.file_name()?.to_string_lossy();
        let is_qemu = name.starts_with("qemu-system");
        runs.then_some(if is_qemu { Vmm::Qemu } else { Vmm::CloudHypervisor })
    }

    /// The VM that is noted in this directory, whatever its program.
    pub(crate) fn noted(dir: &Path) -> Option<Self> {
        let vmm = Self::vmm_in(dir)?;
        Self::find(dir, &read_identity(dir)?.executable, vmm)
    }

    /// The VM that runs in this directory with this program: the one noted there, or, when a node
    /// agent died before it could note it, the one that is found.
    pub fn find(dir: &Path, program: &Path, vmm: Vmm) -> Option<Self> {
        if let Some(noted) = read_identity(dir)
            && !is_sandbox(&noted)
            && noted.boot_id == boot_id()
            && noted.executable == program
            && let Some(vm) = attach(noted.pid, dir, Kind::Vmm(vmm))
            && vm.identity == noted
        {
            return Some(vm);
        }
        let attach = |pid| attach(pid, dir, Kind::Vmm(vmm));
        let found = running_in(dir, program).into_iter().find_map(attach)?;
        let _ = found.note();
        Some(found)
    }
}

/// Removes a socket that an earlier VMM has left.
pub(super) fn remove_stale(path: &Path) -> Result<(), HypervisorError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(HypervisorError::io("remove", path)(error)),
    }
}

/// The VMs of this program that run beneath this folder in a directory that was removed.
pub(super) fn strays(folder: &Path, program: &Path, vmm: Vmm) -> Vec<Vm> {
    let found = running_in_removed(folder, program);
    found.into_iter().filter_map(|(pid, dir)| attach(pid, &dir, Kind::Vmm(vmm))).collect()
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.reap();
    }
}

/// In words, how a VM ended before anybody could look.
pub(super) fn ended_at_once(dir: &Path, vmm: Vmm) -> String {
    let (status, log) = (String::new(), log_end(&dir.join(LOG_FILE)));
    VmExit { what: vmm.name(), status, log }.to_string()
}

fn is_sandbox(identity: &VmIdentity) -> bool {
    identity.executable == Path::new(process::PROGRAM)
}

/// Connects to a socket in a directory whose path may be too long for a socket's address.
pub(crate) async fn connect(dir: &Path, name: &str) -> io::Result<UnixStream> {
    use std::os::fd::AsRawFd;
    let dir = File::open(dir)?;
    UnixStream::connect(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd())).await
}

/// Reads the VMM's answer to a CONNECT, and no byte of what follows it.
async fn read_connected(stream: &mut UnixStream) -> io::Result<()> {
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        if answer.len() == CONNECTED_MAX {
            return Err(io::Error::other("the VMM does not answer CONNECT with OK"));
        }
        // It hangs up where the guest does not listen.
        answer.push(stream.read_u8().await?);
    }
    if answer.starts_with(b"OK ") {
        return Ok(());
    }
    Err(io::Error::other("the VMM does not answer CONNECT with OK"))
}

fn attach(pid: i32, dir: &Path, kind: Kind) -> Option<Vm> {
    let before = start_time(pid)?;
    let pidfd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::NONBLOCK).ok()?;
    let executable = executable(pid)?;
    // The pidfd is that of the process of which the rest was read only if it did not change.
    if start_time(pid)? != before {
        return None;
    }
    of(VmIdentity { boot_id: boot_id(), pid, start_time: before, executable }, dir, pidfd, kind)
}

fn of(identity: VmIdentity, dir: &Path, pidfd: OwnedFd, kind: Kind) -> Option<Vm> {
    Some(Vm {
        identity,
        dir: dir.to_owned(),
        pidfd: watch(pidfd).ok()?,
        kind,
        helped: None,
        status: Mutex::new(String::new()),
        ahead: Mutex::default(),
    })
}

fn watch(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is one descriptor, which stays the same and open until it is dropped.
    unsafe { Ok(AsyncFd::register_with_interest(pidfd, Interest::READABLE)?) }
}

fn read_identity(dir: &Path) -> Option<VmIdentity> {
    serde_json::from_slice(&fs::read(dir.join(IDENTITY_FILE)).ok()?).ok()
}

fn write_identity(dir: &Path, identity: &VmIdentity) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(&serde_json::to_vec(identity)?)?;
    file.as_file().sync_all()?;
    file.persist(dir.join(IDENTITY_FILE))?;
    Ok(())
}

fn log_end(path: &Path) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(LOG_SHOWN)))?;
        let mut bytes = Vec::new();
        file.take(LOG_SHOWN).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    };
    read().unwrap_or_default()
}

/// The end of a log in memory, whose unwritten part is NULs.
fn memory_log(log: &File) -> String {
    use std::os::unix::fs::FileExt;
    let len = log.metadata().map(|meta| meta.len()).unwrap_or(0);
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    let read = log.read_at(&mut bytes, 0).unwrap_or(0);
    let written = bytes[..read].iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let shown = written.saturating_sub(usize::try_from(LOG_SHOWN).unwrap_or(0));
    String::from_utf8_lossy(&bytes[shown..written]).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn what_runs_in_a_directory_is_known_until_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Vm::vmm_in(dir.path()), None);
        let child = Command::new("sleep").arg("1000").current_dir(dir.path()).spawn().unwrap();
        let vm = Vm::started(child, dir.path(), Vmm::CloudHypervisor).unwrap();
        let while_it_ran = Vm::vmm_in(dir.path());
        let noted = Vm::noted(dir.path()).map(|noted| noted.identity().clone());
        assert_eq!(noted.as_ref(), Some(vm.identity()));
        vm.kill().unwrap();
        vm.wait_exit().await;
        assert_eq!(while_it_ran, Some(Vmm::CloudHypervisor));
        assert_eq!(Vm::vmm_in(dir.path()), None);
        assert!(Vm::noted(dir.path()).is_none());
    }
}
