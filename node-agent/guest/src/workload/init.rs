//! The workload's init: the agent's own program, started again under another name as process 1 of a
//! new pid namespace. It makes the sandbox's root its own, mounts /proc, and reaps orphans.
//!
//! It has no descriptors of the agent and takes no orders; when it ends, all of the workload ends.
#![expect(unsafe_code, reason = "clone3 has no safe form")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::{Pid, Signal};
use tokio::io::AsyncReadExt;

use crate::nonblocking::NonBlocking;

/// `argv[0]` by which `main` knows that it should be the init.
pub const INIT_NAME: &str = "towline-workload-init";
/// The descriptor on which it says that it is ready, or why not.
const READY_FD: RawFd = 3;
/// How long it may take: it only mounts.
const READY_MAX: Duration = Duration::from_secs(130);

/// A running init.
#[derive(Debug)]
pub(crate) struct Init {
    pid: Pid,
    pidfd: Arc<OwnedFd>,
}

impl Init {
    /// Starts it in new namespaces on the root file system mounted at `root`.
    pub(crate) async fn start(root: &Path, cgroup: PathBuf) -> io::Result<Self> {
        let (ready, says) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let (pid, pidfd) = clone_init(root, &says)?;
        drop(says);
        std::fs::write(cgroup.join("cgroup.procs"), pid.as_raw_nonzero().to_string())?;
        let init = Self { pid, pidfd: Arc::new(pidfd) };
        let mut message = String::new();
        let mut pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(ready)?.take(4096);
        let heard = tokio::time::timeout(READY_MAX, pipe.read_to_string(&mut message));
        match heard.await {
            Ok(Ok(_)) if message == "ready" => Ok(init),
            Ok(Ok(_)) => Err(io::Error::other(format!("the workload's init failed: {message}"))),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the workload's init was not ready in time")),
        }
    }

    /// A descriptor that stands for its namespaces.
    pub(crate) fn pidfd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.pidfd)
    }

    /// Whether it still runs; one that does not is reaped.
    pub(crate) fn is_alive(&self) -> bool {
        let options = rustix::process::WaitOptions::NOHANG;
        matches!(rustix::process::waitpid(Some(self.pid), options), Ok(None))
    }

    /// Kills it, and with it whatever is left in its namespace.
    pub(crate) async fn kill(self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        if let Ok(exit) = self.pidfd.try_clone().and_then(NonBlocking::new) {
            let _ = tokio::time::timeout(Duration::from_secs(5), exit.ready()).await;
        }
        self.is_alive();
    }
}

fn clone_init(root: &Path, says: &OwnedFd) -> io::Result<(Pid, OwnedFd)> {
    let name = CString::new(INIT_NAME)?;
    let root = CString::new(root.as_os_str().as_bytes())?;
    let argv = [name.as_ptr(), root.as_ptr(), ptr::null()];
    let env = [ptr::null()];
    let mut pidfd: RawFd = -1;
    let namespaces =
        libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    // `struct clone_args` up to tls: flags, pidfd, child_tid, parent_tid, exit_signal, stack, ….
    let mut args = [0u64; 8];
    args[0] = u64::from((libc::CLONE_PIDFD | namespaces).cast_unsigned());
    args[1] = ptr::from_mut(&mut pidfd) as u64;
    args[4] = u64::from(libc::SIGCHLD.cast_unsigned());
    let fd = says.as_raw_fd();
    // SAFETY: without CLONE_VM this is fork(2); the child only makes system calls. All pointers are
    // valid, the arrays end with NULL.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, args.as_mut_ptr(), size_of_val(&args)) };
    if pid == 0 {
        // SAFETY: as above. `fd` is at least 3: the agent keeps 0 to 2 open.
        unsafe {
            if fd == READY_FD {
                libc::fcntl(fd, libc::F_SETFD, 0);
            } else {
                libc::dup2(fd, READY_FD);
            }
            libc::execve(c"/proc/self/exe".as_ptr(), argv.as_ptr(), env.as_ptr());
            libc::_exit(127);
        }
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("clone3 returned no pid"))?;
    // SAFETY: clone3 has put a new descriptor there, which nobody else owns.
    Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// What the init does; returns only if it cannot begin.
pub fn run_init(root: &Path) -> io::Result<()> {
    // SAFETY: `clone_init` has put the pipe there, and nothing else owns it.
    let says = unsafe { OwnedFd::from_raw_fd(READY_FD) };
    rustix::io::fcntl_setfd(&says, rustix::io::FdFlags::CLOEXEC)?;
    // What `ps` in the sandbox shows.
    rustix::thread::set_name(c"towline-init")?;
    match enter_root(root) {
        Ok(()) => rustix::io::write(&says, b"ready")?,
        Err(error) => {
            let _ = rustix::io::write(&says, error.to_string().as_bytes());
            return Err(error);
        }
    };
    drop(says);
    reap_for_ever()
}

fn enter_root(root: &Path) -> io::Result<()> {
    let step = |what: &'static str| {
        move |error: rustix::io::Errno| io::Error::other(format!("{what}: {error}"))
    };
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(step("cannot make mounts private"))?;
    rustix::process::chdir(root).map_err(step("cannot enter the sandbox's root"))?;
    // The initial ramfs cannot be pivoted away; it is covered instead.
    rustix::mount::mount_move(".", "/").map_err(step("cannot move the sandbox's root"))?;
    rustix::process::chroot(".").map_err(step("cannot change to the sandbox's root"))?;
    rustix::process::chdir("/").map_err(step("cannot enter the sandbox's root"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("proc", "/proc", "proc", flags, c"")
        .map_err(step("cannot mount the workload's /proc"))?;
    Ok(())
}

fn reap_for_ever() -> io::Result<()> {
    // SAFETY: plain calls on a local set; SIGCHLD stays pending while it is blocked, so none is lost.
    let children = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
        set
    };
    loop {
        while let Ok(Some(_)) = rustix::process::wait(rustix::process::WaitOptions::NOHANG) {}
        // SAFETY: both pointers are valid.
        unsafe { libc::sigwaitinfo(&raw const children, ptr::null_mut()) };
    }
}
