//! Starts a VMM: a child of this process that makes its own root, gives away what it may, and becomes
//! the program.
#![expect(unsafe_code, reason = "fork, and what a process gives away")]

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Gid, Pid, PidfdFlags, Uid, pidfd_open};

use crate::cgroups::Cgroup;
use crate::confine::{self, Files, Limits};
use crate::jail;
use crate::protocol::{Access, Spawn};

/// How long a child may take to become its program.
const START_MAX: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };
/// Longest text about what went wrong before.
const PROBLEM_MAX: u64 = 4096;

/// What comes with a start.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) spawn: Spawn,
    /// One for each of its files.
    pub(crate) files: Vec<OwnedFd>,
    pub(crate) log: OwnedFd,
    pub(crate) inherited: Option<OwnedFd>,
    /// Who owns what is given.
    pub(crate) agent: (u32, u32),
    pub(crate) uid: u32,
    /// An empty folder to make a root in.
    pub(crate) place: PathBuf,
}

/// Starts it in its cgroup; returns its process when the program runs.
pub(crate) fn start(order: &Order, cgroup: &Cgroup) -> io::Result<(i32, OwnedFd)> {
    let users = jail::map_users(order.agent, (order.uid, order.uid))?;
    let (failure, tells) = io::pipe()?;
    // SAFETY: this process has one thread, so its child may do what it could.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        drop(failure);
        let mut tells = tells;
        let error = become_vmm(order, cgroup, &users, &mut tells);
        let _ = tells.write_all(error.to_string().as_bytes());
        // SAFETY: ends the child, without what this process would do at its end.
        unsafe { libc::_exit(127) };
    }
    drop(tells);
    let child = Pid::from_raw(pid).filter(|_| pid > 0).ok_or_else(io::Error::last_os_error)?;
    let watched = pidfd_open(child, PidfdFlags::NONBLOCK).map_err(io::Error::from);
    match watched.and_then(|pidfd| became(failure).map(|()| pidfd)) {
        Ok(pidfd) => Ok((pid, pidfd)),
        Err(error) => {
            let _ = rustix::process::kill_process(child, rustix::process::Signal::KILL);
            let _ = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
            Err(error)
        }
    }
}

/// Waits until the child runs its program: its end of the pipe is closed with nothing said.
fn became(failure: PipeReader) -> io::Result<()> {
    let mut ready = [PollFd::new(&failure, PollFlags::IN)];
    if poll(&mut ready, Some(&START_MAX))? == 0 {
        return Err(io::Error::other(format!("it did not start within {} s", START_MAX.tv_sec)));
    }
    let mut problem = String::new();
    failure.take(PROBLEM_MAX).read_to_string(&mut problem)?;
    if problem.is_empty() { Ok(()) } else { Err(io::Error::other(problem)) }
}

/// In the child. Returns only when it failed.
fn become_vmm(order: &Order, cgroup: &Cgroup, users: &File, tells: &mut PipeWriter) -> io::Error {
    let mut work = || -> io::Result<io::Error> {
        let pid = i32::try_from(std::process::id()).map_err(io::Error::other)?;
        cgroup.enter(pid)?;
        rustix::process::setsid()?;
        default_signals();
        let Order { spawn, files, .. } = order;
        let program = Path::new(&spawn.program);
        let contents = jail::take(&spawn.files, files, program, users.as_fd())?;
        let (uid, gid) = (Uid::from_raw(order.uid), Gid::from_raw(order.uid));
        contents.enter(&order.place, (uid, gid))?;
        if spawn.background {
            confine::background_self()?;
        }
        let rules = confine::is_available().then(|| confine::prepare(&allowed(spawn)));
        let rules = rules.transpose()?;
        become_user(uid, gid)?;
        let limits =
            Limits { data_bytes: spawn.bounds.data_bytes, file_bytes: spawn.bounds.file_bytes };
        rustix::process::chdir(&spawn.dir)?;
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        rustix::stdio::dup2_stdout(&order.log)?;
        rustix::stdio::dup2_stderr(&order.log)?;
        confine::confine_self(rules, limits)?;
        if let (Some(fd), Some(number)) = (&order.inherited, spawn.inherit) {
            if tells.as_raw_fd() == number {
                *tells = tells.try_clone()?;
            }
            inherit_as(fd, number)?;
        }
        Ok(Command::new(program).args(&spawn.args).env_clear().exec())
    };
    work().unwrap_or_else(|error| error)
}

/// What landlock lets it touch, in its own root.
fn allowed(spawn: &Spawn) -> Files {
    let with = |access: Access| {
        let given = spawn.files.iter().filter(move |given| given.access == access);
        given.map(|given| PathBuf::from(&given.path)).collect()
    };
    Files {
        program: spawn.program.clone().into(),
        read: with(Access::Read),
        write: with(Access::Write),
        own: with(Access::Own),
        devices: vec!["/dev/kvm".into(), "/dev/userfaultfd".into()],
    }
}

/// Gives up root for good: groups, ids, and with them all capabilities.
fn become_user(uid: Uid, gid: Gid) -> io::Result<()> {
    // SAFETY: plain system calls, in a process of one thread.
    unsafe {
        let (uid, gid) = (uid.as_raw(), gid.as_raw());
        let done = libc::setgroups(0, std::ptr::null()) == 0
            && libc::setresgid(gid, gid, gid) == 0
            && libc::setresuid(uid, uid, uid) == 0;
        if !done {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// Has the program find this descriptor under that number.
fn inherit_as(fd: &OwnedFd, number: i32) -> io::Result<()> {
    if fd.as_raw_fd() == number {
        return Ok(rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?);
    }
    // SAFETY: plain numbers. What has that number is lost, which would end with exec anyway.
    if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Signals as a new process has them, whatever this one does about them.
fn default_signals() {
    // SAFETY: plain system calls on a local value.
    unsafe {
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}
