//! The guest's cgroups: `init` for the workload's init, `workload` with the limits, and in it one
//! per exec, so that a memory hog ends with its own exec and the exit says why.
//!
//! The agent stays in the root cgroup, which has no limits, with the least OOM score.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use tokio::time::{Instant, sleep};

use crate::exec::ExecKey;
use crate::refusal::Refusal;

/// How often the ending of all processes is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// How long killed processes may take to go: one in uninterruptible sleep does not.
const KILLED_MAX: Duration = Duration::from_secs(5);

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
}

/// The cgroup of one exec; removed when it is dropped, if nothing lives in it any more.
#[derive(Debug)]
pub(crate) struct ExecCgroup {
    path: PathBuf,
    memory: u64,
}

impl Cgroups {
    /// Makes the tree in the cgroup2 file system mounted at `base`.
    pub fn make_tree(base: &Path, limits: Limits) -> io::Result<Self> {
        let workload = base.join("workload");
        for path in [base.join("init"), workload.clone()] {
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        for path in [base, &workload] {
            fs::write(path.join("cgroup.subtree_control"), "+memory +pids")?;
        }
        fs::write(workload.join("pids.max"), limits.processes.to_string())?;
        fs::write(workload.join("memory.max"), limits.memory.to_string())?;
        Ok(Self { base: base.to_owned(), limits })
    }

    /// The cgroup of the workload's init.
    pub(crate) fn of_init(&self) -> PathBuf {
        self.base.join("init")
    }

    fn workload(&self) -> PathBuf {
        self.base.join("workload")
    }

    /// A cgroup for one exec.
    pub(crate) fn make(&self, key: &ExecKey) -> io::Result<ExecCgroup> {
        let name: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        self.sweep();
        let path = self.workload().join(name);
        fs::create_dir(&path)?;
        let cgroup = ExecCgroup { path, memory: self.limits.memory };
        fs::write(cgroup.path.join("memory.oom.group"), "1")?;
        Ok(cgroup)
    }

    /// Removes cgroups of ended execs whose last process has gone since.
    fn sweep(&self) {
        // Never one that a child is about to be cloned into: only what an ended exec has marked.
        for path in self.exec_paths() {
            if fs::read(path.join("memory.oom.group")).is_ok_and(|value| value == b"0\n") {
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

impl ExecCgroup {
    /// Its directory, to clone a process into.
    pub(crate) fn open(&self) -> Result<OwnedFd, Refusal> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(&self.path, flags, Mode::empty())
            .map_err(|error| Refusal::io("cannot open the command's cgroup", &error.into()))
    }

    /// Says so if the kernel has killed processes of it for want of memory.
    pub(crate) fn out_of_memory(&self) -> Option<String> {
        let events = fs::read_to_string(self.path.join("memory.events")).ok()?;
        let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill "))?;
        (kills != "0").then(|| format!("killed: out of memory (limit {})", human(self.memory)))
    }
}

impl Drop for ExecCgroup {
    fn drop(&mut self) {
        if fs::remove_dir(&self.path).is_err() {
            // Background processes live on; the mark says that a sweep may remove it later.
            let _ = fs::write(self.path.join("memory.oom.group"), "0");
        }
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
    use super::human;

    #[test]
    fn sizes_read_well() {
        assert_eq!(human(2_040_109_465), "1.9 GiB");
        assert_eq!(human(256 << 20), "256 MiB");
    }
}
