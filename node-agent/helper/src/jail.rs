//! A VMM's own root: an empty file system in memory with the system's programs and libraries, the
//! devices that a VMM uses, and the files that it was given, each under the path that it has outside.
//!
//! What was given is mounted with the node agent's user mapped to the VMM's (idmapped mounts,
//! `mount_setattr(2)`, Linux 5.12): what the node agent owns is the VMM's own there, and what the VMM
//! makes is the node agent's on the disk. Everybody else's files are nobody's, so a descriptor of one
//! gives the VMM no more than strangers have.
#![expect(unsafe_code, reason = "mount_setattr and unshare have no safe wrapper")]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{Gid, Pid, Uid, chdir, pivot_root};

use crate::protocol::{Access, Given};

/// Devices that a VMM has, where this machine has them. What not everybody may use is its own.
const DEVICES: [(&str, Mode); 4] = [
    ("/dev/null", Mode::from_bits_retain(0o666)),
    ("/dev/urandom", Mode::from_bits_retain(0o444)),
    ("/dev/kvm", Mode::from_bits_retain(0o600)),
    ("/dev/userfaultfd", Mode::from_bits_retain(0o600)),
];
/// What it has of the system: programs with their libraries and data, and what says of its own process
/// and of memory how they are.
const SYSTEM: [&str; 7] =
    ["/usr", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/proc", "/sys/kernel/mm"];
/// Enough for the folders, links and places to mount on that it holds.
const ROOT_SIZE: &str = "1m";

/// What will be in the root, taken hold of before it is made.
#[derive(Debug)]
pub(crate) struct Contents {
    mounts: Vec<(PathBuf, OwnedFd)>,
    links: Vec<(PathBuf, PathBuf)>,
    devices: Vec<(PathBuf, u64, Mode)>,
}

/// Takes hold of what was given and of the system's files. Descriptors name what was opened in this
/// mount namespace: a node agent in one of its own has nothing to give.
pub(crate) fn take(
    given: &[Given],
    fds: &[OwnedFd],
    program: &Path,
    users: BorrowedFd<'_>,
) -> io::Result<Contents> {
    let mut contents = Contents { mounts: Vec::new(), links: Vec::new(), devices: Vec::new() };
    for path in SYSTEM.iter().map(Path::new) {
        contents.add_system(path)?;
    }
    if !SYSTEM.iter().any(|tree| program.starts_with(tree)) {
        contents.add_system(program)?;
    }
    for (given, fd) in given.iter().zip(fds) {
        let tree = clone_tree(fd, "", true).map_err(|error| not_taken(&given.path, &error))?;
        let read_only = given.access == Access::Read;
        set_attributes(&tree, read_only, Some(users))
            .map_err(|error| not_mapped(&given.path, &error))?;
        contents.mounts.push((given.path.clone().into(), tree));
    }
    for (path, mode) in DEVICES {
        if let Ok(stat) = rustix::fs::stat(path) {
            contents.devices.push((path.into(), stat.st_rdev, mode));
        }
    }
    Ok(contents)
}

impl Contents {
    /// A part of the system to read: what is a link outside is one inside.
    fn add_system(&mut self, path: &Path) -> io::Result<()> {
        let Ok(meta) = fs::symlink_metadata(path) else { return Ok(()) };
        if meta.is_symlink() {
            self.links.push((path.to_owned(), fs::read_link(path)?));
            return Ok(());
        }
        let tree = clone_tree(CWD, path, false)?;
        set_attributes(&tree, true, None)?;
        self.mounts.push((path.to_owned(), tree));
        Ok(())
    }

    /// Makes the root in namespaces of its own (mounts, network, IPC, names) and goes there.
    pub(crate) fn enter(self, place: &Path, owner: (Uid, Gid)) -> io::Result<()> {
        let spaces =
            libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        // SAFETY: a plain system call; this process has one thread.
        if unsafe { libc::unshare(spaces) } != 0 {
            return Err(io::Error::last_os_error());
        }
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        let root = new_root()?;
        attach(&root, place)?;
        chdir(place)?;
        pivot_root(".", ".")?;
        unmount(".", UnmountFlags::DETACH)?;
        chdir("/")?;
        self.fill(owner)?;
        set_attributes(&root, true, None)
    }

    fn fill(&self, (uid, gid): (Uid, Gid)) -> io::Result<()> {
        fs::create_dir("/dev")?;
        for (path, number, mode) in &self.devices {
            rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, *mode, *number)?;
            // Whatever the umask is.
            rustix::fs::chmodat(CWD, path, *mode, rustix::fs::AtFlags::empty())?;
            if mode.contains(Mode::WUSR) && !mode.contains(Mode::WOTH) {
                rustix::fs::chown(path, Some(uid), Some(gid))?;
            }
        }
        for (path, target) in &self.links {
            std::os::unix::fs::symlink(target, path)?;
        }
        // What holds others comes before them.
        let mut mounts: Vec<_> = self.mounts.iter().collect();
        mounts.sort_by_key(|(path, _)| path.components().count());
        let mut done: Vec<&Path> = Vec::new();
        for (path, tree) in mounts {
            // It is there already, in the same or with more rights; or asked for twice.
            if done.iter().any(|above| path.starts_with(above)) {
                continue;
            }
            make_place(path, tree)?;
            attach(tree, path)?;
            done.push(path);
        }
        Ok(())
    }
}

/// A file or folder to mount on. Nothing was mounted above it, and nobody else writes here.
fn make_place(path: &Path, tree: &OwnedFd) -> io::Result<()> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(tree)?.st_mode);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    match kind {
        FileType::Directory => fs::create_dir_all(path),
        _ => File::create(path).map(drop),
    }
}

fn new_root() -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "size", ROOT_SIZE)?;
    fsconfig_set_string(context.as_fd(), "mode", "0755")?;
    fsconfig_create(context.as_fd())?;
    Ok(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NOSUID)?)
}

fn attach(tree: &OwnedFd, to: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(tree.as_fd(), "", CWD, to, flags)?)
}

fn clone_tree(fd: impl AsFd, path: impl rustix::path::Arg, empty: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if empty {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    Ok(open_tree(fd, path, flags)?)
}

/// `struct mount_attr` of Linux.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    users: u64,
}

/// Takes rights from a mount; with `users`, has it show the users of that namespace's map.
fn set_attributes(
    tree: &OwnedFd,
    read_only: bool,
    users: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    const RDONLY: u64 = 0x1;
    const NOSUID: u64 = 0x2;
    const NODEV: u64 = 0x4;
    const NOEXEC: u64 = 0x8;
    const IDMAP: u64 = 0x0010_0000;
    // What is mounted outside later is none of its business.
    const PRIVATE: u64 = 1 << 18;
    let mut attributes = MountAttributes { set: NOSUID, clear: 0, propagation: PRIVATE, users: 0 };
    if read_only {
        attributes.set |= RDONLY;
    }
    if let Some(users) = users {
        attributes.set |= IDMAP | NODEV | NOEXEC;
        attributes.users = u64::try_from(users.as_raw_fd()).map_err(io::Error::other)?;
    }
    // SAFETY: the descriptor is open, the path is an empty C string, and the structure is as long as
    // is said.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A user namespace whose map says: what is `from`'s on the disk is `to`'s in a mount with it.
pub(crate) fn map_users(from: (u32, u32), to: (u32, u32)) -> io::Result<File> {
    // SAFETY: this process has one thread, so the child may go on as it likes; it makes system calls
    // only.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: plain system calls, then the end.
        unsafe {
            let made = libc::unshare(libc::CLONE_NEWUSER) == 0;
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if made {
                // Until the parent has taken hold of the namespace, and kills this.
                libc::raise(libc::SIGSTOP);
            }
            libc::_exit(i32::from(!made));
        }
    }
    let child = Pid::from_raw(pid).filter(|_| pid > 0).ok_or_else(io::Error::last_os_error)?;
    let namespace = stopped(child).and_then(|()| {
        let write =
            |map: &str, from, to| fs::write(format!("/proc/{pid}/{map}"), format!("{from} {to} 1"));
        write("uid_map", from.0, to.0)?;
        write("gid_map", from.1, to.1)?;
        File::open(format!("/proc/{pid}/ns/user"))
    });
    let _ = rustix::process::kill_process(child, rustix::process::Signal::KILL);
    let _ = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
    namespace
}

/// Waits until the child has made its namespace.
fn stopped(child: Pid) -> io::Result<()> {
    let options = rustix::process::WaitOptions::UNTRACED;
    match rustix::process::waitpid(Some(child), options)? {
        Some((_, status)) if status.stopped() => Ok(()),
        _ => {
            Err(io::Error::other("this kernel gives no user namespace (user.max_user_namespaces)"))
        }
    }
}

fn not_taken(path: &str, error: &io::Error) -> io::Error {
    let hint = match error.raw_os_error() {
        Some(libc::EINVAL) => {
            "; the node agent and its helper must see the same mounts (no PrivateTmp=, \
             ProtectSystem= or the like in the unit of either)"
        }
        _ => "",
    };
    io::Error::new(error.kind(), format!("could not take `{path}`: {error}{hint}"))
}

fn not_mapped(path: &str, error: &io::Error) -> io::Error {
    let hint = match error.raw_os_error() {
        Some(libc::EINVAL) => {
            "; its file system has no idmapped mounts: put data_dir and cache_dir on ext4, XFS or \
             Btrfs"
        }
        _ => "",
    };
    io::Error::new(error.kind(), format!("could not map the users of `{path}`: {error}{hint}"))
}
