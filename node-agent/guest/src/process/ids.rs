//! The sandbox's user namespace: its ids are a range of the node's that nobody else has, so that
//! root in the sandbox is nobody outside, and files on its disks are whose they are on any node.
#![expect(unsafe_code, reason = "clone3, mount_setattr and setresuid have no safe form")]

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, WaitOptions};
use rustix::thread::LinkNameSpaceType;
use towline_proto::process::IDS;

use super::says;

/// Makes a user namespace whose ids are those from `first` on. `proc` is this pid namespace's.
pub(super) fn namespace(proc: &Path, first: u32) -> io::Result<OwnedFd> {
    let holder = Holder::start()?;
    let folder = proc.join(holder.0.as_raw_nonzero().to_string());
    for map in ["uid_map", "gid_map"] {
        fs::write(folder.join(map), format!("0 {first} {IDS}\n"))
            .map_err(says("cannot map ids"))?;
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(folder.join("ns/user"), flags, Mode::empty())?)
}

/// A process that only has a user namespace, until something else holds it.
struct Holder(Pid);

impl Holder {
    fn start() -> io::Result<Self> {
        // `struct clone_args` up to tls: flags, pidfd, child_tid, parent_tid, exit_signal, ….
        let mut args = [0u64; 8];
        args[0] = u64::from(libc::CLONE_NEWUSER.cast_unsigned());
        args[4] = u64::from(libc::SIGCHLD.cast_unsigned());
        // SAFETY: without CLONE_VM this is fork(2); the child makes no call but pause(2).
        let pid = unsafe { libc::syscall(libc::SYS_clone3, args.as_mut_ptr(), size_of_val(&args)) };
        if pid == 0 {
            loop {
                // SAFETY: has no arguments.
                unsafe { libc::pause() };
            }
        }
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        pid.filter(|pid| pid.as_raw_nonzero().get() > 0)
            .map(Self)
            .ok_or_else(|| says("cannot make a user namespace")(io::Error::last_os_error()))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(self.0, Signal::KILL);
        let _ = rustix::process::waitpid(Some(self.0), WaitOptions::empty());
    }
}

/// Enters it, with all rights over what belongs to it, and none over anything else.
pub(super) fn enter(users: &OwnedFd) -> io::Result<()> {
    rustix::thread::move_into_link_name_space(users.as_fd(), Some(LinkNameSpaceType::User))
        .map_err(says("cannot enter the user namespace"))
}

/// Becomes the user namespace's root, without any of the node's groups.
pub(super) fn become_root() -> io::Result<()> {
    // SAFETY: plain system calls; there is one thread only.
    let done = unsafe {
        libc::setgroups(0, std::ptr::null()) == 0
            && libc::setresgid(0, 0, 0) == 0
            && libc::setresuid(0, 0, 0) == 0
            // A change of ids takes the rights over its own files in /proc away.
            && libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) == 0
    };
    if done { Ok(()) } else { Err(says("cannot become root")(io::Error::last_os_error())) }
}

/// Makes the files of a mount, not attached yet, those of the user namespace's ids.
pub(super) fn map_mount(mount: BorrowedFd<'_>, users: &OwnedFd) -> io::Result<()> {
    const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
    // `struct mount_attr`: attr_set, attr_clr, propagation, userns_fd.
    let fd = u64::try_from(users.as_raw_fd()).map_err(io::Error::other)?;
    let attributes = [MOUNT_ATTR_IDMAP, 0, 0, fd];
    // SAFETY: an open descriptor, an empty path, and a struct of the given size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
