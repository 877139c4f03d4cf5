//! The child's way from clone3 to execve. It is a copy of one thread of the agent, so it may only
//! make system calls: everything that it needs was allocated before.
//!
//! It tells its parent over a close-on-exec pipe: first its pid as the workload sees it, then, if
//! something failed, at which stage and why. Silence and the end of the pipe mean success.
#![expect(unsafe_code, reason = "between clone and execve only raw system calls are allowed")]

use std::ffi::{CString, c_char};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::Arc;

use super::plan::Plan;

/// Where the child failed. Numbers go over the pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stage {
    /// Not a failure: the pid inside.
    Pid = 0,
    Namespaces = 1,
    Terminal = 2,
    User = 3,
    WorkingDirectory = 4,
    Execute = 5,
    /// The file is there but what should run it is not, or it is no program.
    Interpreter = 6,
}

impl Stage {
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        [
            Self::Pid,
            Self::Namespaces,
            Self::Terminal,
            Self::User,
            Self::WorkingDirectory,
            Self::Execute,
            Self::Interpreter,
        ]
        .into_iter()
        .find(|stage| *stage as u8 == number)
    }
}

/// Bytes of one report on the pipe: stage, then a number.
pub(crate) const REPORT_LEN: usize = 5;

/// The plan with all pointers made, and the descriptors that the child uses.
#[derive(Debug)]
pub(crate) struct Child {
    plan: Plan,
    argv: Vec<*const c_char>,
    env: Vec<*const c_char>,
    /// argv of `/bin/sh` for a script without an interpreter line.
    shell_argv: Vec<*const c_char>,
    stdio: [OwnedFd; 3],
    report: OwnedFd,
    /// The number of `report`, which the child moves.
    report_number: RawFd,
    /// A pidfd of the workload's init, whose namespaces are entered.
    namespaces: Option<Arc<OwnedFd>>,
    /// The cgroup's directory.
    cgroup: Option<OwnedFd>,
}

// SAFETY: the pointers lead into `plan`, which is owned, never changed and moves with them.
unsafe impl Send for Child {}

impl Child {
    /// Prepares everything.
    pub(crate) fn new(
        plan: Plan,
        stdio: [OwnedFd; 3],
        report: OwnedFd,
        namespaces: Option<Arc<OwnedFd>>,
        cgroup: Option<OwnedFd>,
    ) -> Self {
        let pointers = |all: &[CString]| -> Vec<*const c_char> {
            all.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
        };
        let argv = pointers(&plan.argv);
        let env = pointers(&plan.env);
        let mut shell_argv = vec![plan.shell.as_ptr(), ptr::null()];
        shell_argv.extend(argv.iter().skip(1));
        let report_number = report.as_raw_fd();
        Self { argv, env, shell_argv, plan, stdio, report, report_number, namespaces, cgroup }
    }

    /// Clones; the child runs the plan and never returns. Returns its pid and pidfd.
    pub(crate) fn spawn(mut self) -> std::io::Result<(rustix::process::Pid, OwnedFd)> {
        use std::os::fd::FromRawFd;
        let mut pidfd: RawFd = -1;
        let mut flags = u64::from(libc::CLONE_PIDFD.cast_unsigned());
        let mut cgroup = 0;
        if let Some(fd) = &self.cgroup {
            flags |= CLONE_INTO_CGROUP;
            cgroup = u64::from(fd.as_raw_fd().cast_unsigned());
        }
        let args = CloneArgs {
            flags,
            pidfd: ptr::from_mut(&mut pidfd) as u64,
            exit_signal: u64::from(libc::SIGCHLD.cast_unsigned()),
            cgroup,
            ..CloneArgs::default()
        };
        // SAFETY: without CLONE_VM this is fork(2): the child has its own copy of the memory, and
        // `run` only makes system calls. `args` and `pidfd` outlive the call.
        let pid = unsafe {
            libc::syscall(libc::SYS_clone3, ptr::from_ref(&args), size_of::<CloneArgs>())
        };
        match pid {
            0 => self.run(),
            pid if pid < 0 => Err(std::io::Error::last_os_error()),
            pid => {
                let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
                let pid = pid.ok_or_else(|| std::io::Error::other("clone3 returned no pid"))?;
                // SAFETY: clone3 has put a new descriptor there, which nobody else owns.
                Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
            }
        }
    }

    fn run(&mut self) -> ! {
        // SAFETY: getpid is a plain system call. Namespaces are entered already: a pid namespace
        // by the spawning thread's setns, so this is the pid that the workload sees.
        let pid = unsafe { libc::getpid() };
        self.report(Stage::Pid, pid);
        let (stage, errno) = self.try_run();
        self.report(stage, errno);
        // SAFETY: ends this process at once, with no destructor of the copied agent.
        unsafe { libc::_exit(127) }
    }

    fn report(&self, stage: Stage, number: i32) {
        let mut bytes = [0; REPORT_LEN];
        bytes[0] = stage as u8;
        bytes[1..].copy_from_slice(&number.to_le_bytes());
        // SAFETY: `bytes` is valid for its length. Nothing can be done if it fails.
        unsafe { libc::write(self.report_number, bytes.as_ptr().cast(), bytes.len()) };
    }

    /// Returns only a failure.
    fn try_run(&mut self) -> (Stage, i32) {
        let failed = if !self.enter() {
            Stage::Namespaces
        } else if !self.take_stdio() {
            Stage::Terminal
        } else if !self.become_user() {
            Stage::User
        } else if !self.change_directory() {
            Stage::WorkingDirectory
        } else {
            return self.execute();
        };
        (failed, errno())
    }

    fn enter(&self) -> bool {
        // SAFETY: plain system calls with constants, valid C strings and open descriptors.
        unsafe {
            // The agent's protection from the OOM killer must not be inherited.
            let fd =
                libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            if fd >= 0 {
                libc::write(fd, c"0".as_ptr().cast(), 1);
            }
            libc::setsid();
            if let Some(init) = &self.namespaces {
                let kinds = libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC;
                if libc::setns(init.as_raw_fd(), kinds) != 0 {
                    return false;
                }
                // Not fatal: a workload may have lower hard limits of its own.
                let files = libc::rlimit { rlim_cur: FILES_SOFT, rlim_max: FILES_HARD };
                libc::setrlimit(libc::RLIMIT_NOFILE, &raw const files);
            }
            libc::umask(0o022);
        }
        true
    }

    /// Keeps its standard descriptors and the report, and closes the others now rather than at execve:
    /// looking up its program may wait for a local image, and a child that waits with a copy of the
    /// FUSE device would keep waiting when the agent is killed, as only the device's last end tells
    /// the kernel that nobody will answer. A process that waits like that cannot be killed.
    fn take_stdio(&mut self) -> bool {
        const REPORT: RawFd = 3;
        // SAFETY: plain system calls on open descriptors. All are above 2 (the agent keeps 0 to 2
        // open), so no dup2 overwrites one that is still needed.
        unsafe {
            for (target, fd) in (0..3).zip(&self.stdio) {
                if libc::dup2(fd.as_raw_fd(), target) < 0 {
                    return false;
                }
            }
            let report = self.report.as_raw_fd();
            let moved = report == REPORT || libc::dup3(report, REPORT, libc::O_CLOEXEC) == REPORT;
            if !moved || libc::syscall(libc::SYS_close_range, REPORT + 1, u32::MAX, 0) != 0 {
                return false;
            }
            self.report_number = REPORT;
            if self.plan.terminal.is_some() && libc::ioctl(0, libc::TIOCSCTTY, 0) != 0 {
                return false;
            }
            reset_signals();
        }
        true
    }

    fn become_user(&self) -> bool {
        let Some(user) = &self.plan.user else { return true };
        // SAFETY: the groups are valid for their length. Raw calls: glibc's would signal the
        // threads that this copy does not have.
        unsafe {
            libc::syscall(libc::SYS_setgroups, user.groups.len(), user.groups.as_ptr()) == 0
                && libc::syscall(libc::SYS_setresgid, user.gid, user.gid, user.gid) == 0
                && libc::syscall(libc::SYS_setresuid, user.uid, user.uid, user.uid) == 0
        }
    }

    fn change_directory(&self) -> bool {
        // SAFETY: a valid C string.
        unsafe { libc::chdir(self.plan.cwd.as_ptr()) == 0 }
    }

    /// As a shell: the first file of the PATH that runs; what is found but cannot run is told from
    /// what is not found.
    fn execute(&mut self) -> (Stage, i32) {
        let mut denied = false;
        for index in 0..self.plan.candidates.len() {
            let file = self.plan.candidates[index].as_ptr();
            // SAFETY: NULL-terminated arrays of valid C strings.
            unsafe { libc::execve(file, self.argv.as_ptr(), self.env.as_ptr()) };
            match errno() {
                // SAFETY: a valid C string.
                libc::ENOENT if unsafe { libc::access(file, libc::F_OK) } == 0 => {
                    return (Stage::Interpreter, libc::ENOENT);
                }
                libc::ENOENT | libc::ENOTDIR | libc::ENAMETOOLONG => {}
                libc::EACCES => denied = true,
                libc::ENOEXEC => return self.execute_script(file),
                other => return (Stage::Execute, other),
            }
        }
        (Stage::Execute, if denied { libc::EACCES } else { libc::ENOENT })
    }

    /// A file without an interpreter line is the shell's, if it looks like text.
    fn execute_script(&mut self, file: *const c_char) -> (Stage, i32) {
        let mut head = [0u8; 128];
        // SAFETY: a valid C string, and a buffer valid for its length.
        let got = unsafe {
            let fd = libc::open(file, libc::O_RDONLY | libc::O_CLOEXEC);
            libc::read(fd, head.as_mut_ptr().cast(), head.len())
        };
        let head = &head[..usize::try_from(got).unwrap_or(0).min(128)];
        if head.is_empty() || head.contains(&0) {
            return (Stage::Interpreter, libc::ENOEXEC);
        }
        self.shell_argv[1] = file;
        // SAFETY: NULL-terminated arrays of valid C strings.
        unsafe {
            libc::execve(self.plan.shell.as_ptr(), self.shell_argv.as_ptr(), self.env.as_ptr());
        }
        (Stage::Interpreter, libc::ENOEXEC)
    }
}

/// Descriptors that a workload may have open: enough for servers, yet loops to the soft limit end.
const FILES_SOFT: u64 = 65_536;
const FILES_HARD: u64 = 1 << 20;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args`, up to the cgroup (kernel 5.7).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// What the agent ignores or blocks, a command must not inherit.
///
/// # Safety
/// Only in the child.
unsafe fn reset_signals() {
    // SAFETY: plain system calls on local values.
    unsafe {
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
    }
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}
