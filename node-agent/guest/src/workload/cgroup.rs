//! The guest's cgroups: `init` for the workload's init, `workload` with the limits, and in it one
//! per exec, so that a memory hog ends with its own exec and the exit says why.
//!
//! The agent stays in the root cgroup, which has no limits, with the least OOM score. Where the
//! kernel is the node's, the root is the sandbox's cgroup, whose limits the node has set, and the
//! agent is in `agent`; controllers may be missing there (they are bound to cgroup v1).

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;
use tokio::time::{Instant, sleep};

use crate::boot::{Kernel, mount};
use crate::exec::ExecKey;
use crate::refusal::Refusal;

/// How often the ending of all processes is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// How long killed processes may take to go: one in uninterruptible sleep does not.
const KILLED_MAX: Duration = Duration::from_secs(5);

const FREEZE: &str = "cgroup.freeze";
/// How long the workload may take to halt: a process that waits for a disk does not before that has
/// answered.
const FREEZE_MAX: Duration = Duration::from_secs(20);
/// Between two looks whether it has.
const FREEZE_LOOK: Duration = Duration::from_millis(2);
/// Where the memory controller is mounted, if it is one of cgroup v1.
const MEMORY_V1: &str = "/run/towline/memory";
/// Says of an exec's cgroup, by 0, that the exec has ended.
const ENDED_MARK: &str = "cgroup.max.descendants";

/// What the workload as a whole may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Processes and threads.
    pub processes: u32,
    /// Bytes of memory.
    pub memory: u64,
}

/// The tree of cgroups.
#[derive(Debug)]
pub struct Cgroups {
    base: PathBuf,
    limits: Limits,
    memory: Memory,
    halts: Mutex<Halts>,
}

/// What the workload is halted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Halt {
    /// A copy of the whole guest. In the copy nothing may run before it has become another one,
    /// whatever else it was halted for.
    Fork,
    /// A look at its files.
    Save,
}

/// For what it is halted now: it goes on when that is nothing any more.
#[derive(Debug, Default)]
struct Halts {
    fork: bool,
    saves: u32,
}

/// Who tells that memory has run out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Memory {
    /// Each exec's own cgroup.
    Own,
    /// The sandbox's cgroup of version 1, for all execs together.
    Together,
    /// Nobody.
    Untold,
}

/// The cgroup of one exec; removed when it is dropped, if nothing lives in it any more.
#[derive(Debug)]
pub(crate) struct ExecCgroup {
    path: PathBuf,
    limit: u64,
    memory: Memory,
    /// How often memory had run out before.
    before: u64,
}

impl Cgroups {
    /// Makes the tree in the cgroup2 file system mounted at `base`.
    pub fn make_tree(base: &Path, limits: Limits, kernel: Kernel) -> io::Result<Self> {
        let workload = base.join("workload");
        for path in [base.join("init"), workload.clone()] {
            make_folder(&path)?;
        }
        if kernel == Kernel::Shared {
            // Only the root of all may hold processes beside cgroups with limits.
            let agents = base.join("agent");
            make_folder(&agents)?;
            fs::write(agents.join("cgroup.procs"), "0")?;
        }
        let memory = match kernel {
            Kernel::Shared if !has_controllers(base) => memory_v1(),
            Kernel::Own | Kernel::Shared => {
                for path in [base, &workload] {
                    fs::write(path.join("cgroup.subtree_control"), "+memory +pids")?;
                }
                fs::write(workload.join("pids.max"), limits.processes.to_string())?;
                fs::write(workload.join("memory.max"), limits.memory.to_string())?;
                Memory::Own
            }
        };
        Ok(Self { base: base.to_owned(), limits, memory, halts: Mutex::default() })
    }

    /// The cgroup of the workload's init.
    pub(crate) fn of_init(&self) -> PathBuf {
        self.base.join("init")
    }

    fn workload(&self) -> PathBuf {
        self.base.join("workload")
    }

    /// Halts all processes of the workload, and those that are started meanwhile.
    pub(crate) async fn freeze(&self, halt: Halt) -> io::Result<()> {
        {
            let mut halts = self.halts();
            match halt {
                Halt::Fork => halts.fork = true,
                Halt::Save => halts.saves += 1,
            }
        }
        // Whoever does not wait to the end has not halted it.
        let mut given_up = Thaw { cgroups: self, halt, armed: true };
        fs::write(self.workload().join(FREEZE), "1")?;
        let until = Instant::now() + FREEZE_MAX;
        loop {
            let events = fs::read_to_string(self.workload().join("cgroup.events"))?;
            if events.lines().any(|line| line == "frozen 1") {
                given_up.armed = false;
                return Ok(());
            }
            if Instant::now() >= until {
                let bound = FREEZE_MAX.as_secs();
                let what = format!("a process of it did not halt within {bound} s");
                return Err(io::Error::other(what));
            }
            sleep(FREEZE_LOOK).await;
        }
    }

    /// Lets them go on, unless they are halted for something else too.
    pub(crate) fn thaw(&self, halt: Halt) -> io::Result<()> {
        let mut halts = self.halts();
        match halt {
            Halt::Fork => halts.fork = false,
            Halt::Save => halts.saves = halts.saves.saturating_sub(1),
        }
        match halts.fork || halts.saves > 0 {
            true => Ok(()),
            false => fs::write(self.workload().join(FREEZE), "0"),
        }
    }

    fn halts(&self) -> std::sync::MutexGuard<'_, Halts> {
        self.halts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A cgroup for one exec.
    pub(crate) fn make(&self, key: &ExecKey) -> io::Result<ExecCgroup> {
        let name: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        self.sweep();
        let path = self.workload().join(name);
        fs::create_dir(&path)?;
        let (limit, memory) = (self.limits.memory, self.memory);
        let mut cgroup = ExecCgroup { path, limit, memory, before: 0 };
        if memory == Memory::Own {
            fs::write(cgroup.path.join("memory.oom.group"), "1")?;
        }
        cgroup.before = cgroup.kills().unwrap_or(0);
        Ok(cgroup)
    }

    /// Removes cgroups of ended execs whose last process has gone since.
    fn sweep(&self) {
        // Never one that a child is about to be cloned into: only what an ended exec has marked.
        for path in self.exec_paths() {
            if fs::read(path.join(ENDED_MARK)).is_ok_and(|value| value == b"0\n") {
                let _ = fs::remove_dir(path);
            }
        }
    }

    fn exec_paths(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.workload()) else { return Vec::new() };
        entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
    }

    /// TERM to all, KILL after the grace; returns when all are gone or will not go.
    pub(crate) async fn end_all(&self, grace: Duration) {
        for path in self.exec_paths() {
            for pid in fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default().lines() {
                let pid = pid.parse().ok().and_then(rustix::process::Pid::from_raw);
                if let Some(pid) = pid {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
                    // A stopped process sees TERM only when it goes on.
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::CONT);
                }
            }
        }
        if !self.is_empty_within(grace).await {
            let _ = fs::write(self.workload().join("cgroup.kill"), "1");
            self.is_empty_within(KILLED_MAX).await;
        }
    }

    async fn is_empty_within(&self, bound: Duration) -> bool {
        let until = Instant::now() + bound;
        loop {
            let events = fs::read_to_string(self.workload().join("cgroup.events"));
            if events.is_ok_and(|events| events.lines().any(|line| line == "populated 0")) {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            sleep(LOOK).await;
        }
    }
}

/// Lets the workload go on when it is dropped.
struct Thaw<'a> {
    cgroups: &'a Cgroups,
    halt: Halt,
    armed: bool,
}

impl Drop for Thaw<'_> {
    fn drop(&mut self) {
        if self.armed {
            let _ = self.cgroups.thaw(self.halt);
        }
    }
}

impl ExecCgroup {
    /// Its directory, to clone a process into.
    pub(crate) fn open(&self) -> Result<OwnedFd, Refusal> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(&self.path, flags, Mode::empty())
            .map_err(|error| Refusal::io("cannot open the command's cgroup", &error.into()))
    }

    /// Says so if the kernel has killed processes of it for want of memory.
    pub(crate) fn out_of_memory(&self) -> Option<String> {
        let again = self.kills()? > self.before;
        again.then(|| format!("killed: out of memory (limit {})", human(self.limit)))
    }

    fn kills(&self) -> Option<u64> {
        let events = match self.memory {
            Memory::Own => self.path.join("memory.events"),
            Memory::Together => Path::new(MEMORY_V1).join("memory.oom_control"),
            Memory::Untold => return None,
        };
        let events = fs::read_to_string(events).ok()?;
        events.lines().find_map(|line| line.strip_prefix("oom_kill "))?.parse().ok()
    }
}

impl Drop for ExecCgroup {
    fn drop(&mut self) {
        if fs::remove_dir(&self.path).is_err() {
            // Background processes live on; the mark says that a sweep may remove it later.
            let _ = fs::write(self.path.join(ENDED_MARK), "0");
        }
    }
}

fn make_folder(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Whether memory and processes can be limited here.
fn has_controllers(base: &Path) -> bool {
    let controllers = fs::read_to_string(base.join("cgroup.controllers")).unwrap_or_default();
    ["memory", "pids"].iter().all(|wanted| controllers.split_whitespace().any(|c| c == *wanted))
}

/// The sandbox's own cgroup of version 1 tells when it was out of memory, if there is one.
fn memory_v1() -> Memory {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    match mount("cgroup", Path::new(MEMORY_V1), "cgroup", flags, "memory") {
        Ok(()) => Memory::Together,
        Err(_) => Memory::Untold,
    }
}

/// As people read sizes: `1.9 GiB`.
#[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
fn human(bytes: u64) -> String {
    const MIB: f64 = 1024.0 * 1024.0;
    let mib = bytes as f64 / MIB;
    if mib >= 1024.0 { format!("{:.1} GiB", mib / 1024.0) } else { format!("{mib:.0} MiB") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's part, done by the test: a workload that halts as soon as it is told to.
    #[tokio::test]
    async fn what_is_halted_for_two_reasons_goes_on_after_both() {
        let dir = tempfile::tempdir().unwrap();
        let workload = dir.path().join("workload");
        fs::create_dir(&workload).unwrap();
        fs::write(workload.join("cgroup.events"), "populated 1\nfrozen 1\n").unwrap();
        let cgroups = Cgroups {
            base: dir.path().to_owned(),
            limits: Limits { processes: 1, memory: 1 },
            memory: Memory::Untold,
            halts: Mutex::default(),
        };
        let is_halted = || fs::read(workload.join(FREEZE)).unwrap() == b"1";
        cgroups.freeze(Halt::Save).await.unwrap();
        cgroups.freeze(Halt::Fork).await.unwrap();
        // A copy: the one who saved has gone, and it has not become another one yet.
        cgroups.thaw(Halt::Save).unwrap();
        assert!(is_halted());
        cgroups.thaw(Halt::Fork).unwrap();
        assert!(!is_halted());
        for _ in 0..2 {
            cgroups.freeze(Halt::Save).await.unwrap();
        }
        cgroups.thaw(Halt::Fork).unwrap();
        cgroups.thaw(Halt::Save).unwrap();
        assert!(is_halted());
        cgroups.thaw(Halt::Save).unwrap();
        assert!(!is_halted());
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(human(2_040_109_465), "1.9 GiB");
        assert_eq!(human(256 << 20), "256 MiB");
    }
}
