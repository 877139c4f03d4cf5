//! The other way to start: as process 1 of a sandbox that shares the node's kernel (`--isolation
//! process`). Makes the sandbox's namespaces and a small root with its disks, and gives up what the
//! rest of the agent does not need. After it the agent finds much the same machine as in a VM.
//!
//! Everything that the node's system has is let go of here: its mounts, its ids, its descriptors.
//! Runs before there is any thread. Root's way and an ordinary user's differ in who makes the user
//! namespace, and in that only root can mount images.
#![expect(unsafe_code, reason = "inherited descriptors, prctl and ids have no safe form")]

mod ids;
mod loops;
mod sources;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use prost::Message;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::{CapabilitySet, UnshareFlags};
use towline_proto::process::{GATE_FD, LINK_FD, ProcessSetup, SETUP_FD};

use crate::boot::mount;
use sources::Sources;

/// Where the agent finds layers and upper, mounted already.
pub(crate) const PREPARED: &str = "/prepared";
/// The devices that there are, with their numbers.
const DEVICES: [(&str, u32, u32); 8] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
    ("fuse", 10, 229),
    ("net/tun", 10, 200),
];
/// Rights over the kernel that no sandbox gets, though most mean nothing in a user namespace.
const GIVEN_UP: [CapabilitySet; 14] = [
    CapabilitySet::SYS_MODULE,
    CapabilitySet::SYS_RAWIO,
    CapabilitySet::SYS_PACCT,
    CapabilitySet::SYS_TIME,
    CapabilitySet::SYS_TTY_CONFIG,
    CapabilitySet::SYSLOG,
    CapabilitySet::WAKE_ALARM,
    CapabilitySet::BLOCK_SUSPEND,
    CapabilitySet::MAC_OVERRIDE,
    CapabilitySet::MAC_ADMIN,
    CapabilitySet::AUDIT_CONTROL,
    CapabilitySet::AUDIT_READ,
    CapabilitySet::PERFMON,
    CapabilitySet::BPF,
];

/// Makes the sandbox; returns the guest link's listening socket.
pub fn prepare() -> io::Result<UnixListener> {
    let setup = receive()?;
    let link: UnixListener = inherited(LINK_FD)?.into();
    let place = Path::new(std::ffi::OsStr::from_bytes(&setup.place));
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(says("cannot make mounts private"))?;
    let sources = Sources::open(&setup)?;
    let by_root = setup.first_id.is_some();
    if !by_root {
        // The node agent has made the user namespace, and mapped its ids.
        ids::become_root()?;
        own_namespaces(UnshareFlags::empty())?;
    }
    make_root(place, by_root)?;
    let users =
        setup.first_id.map(|first| ids::namespace(&place.join("proc"), first)).transpose()?;
    sources.mount(&place.join(&PREPARED[1..]), users.as_ref())?;
    leave_host(place)?;
    protect_from_oom();
    if let Some(users) = users {
        ids::enter(&users)?;
        own_namespaces(UnshareFlags::NEWNS)?;
        ids::become_root()?;
    }
    mount_own()?;
    take_standard_descriptors()?;
    give_up_capabilities()?;
    filter_system_calls(&setup.filter)?;
    Ok(link)
}

/// Namespaces that belong to the user namespace, but for that of pids.
fn own_namespaces(more: UnshareFlags) -> io::Result<()> {
    let own = UnshareFlags::NEWNET
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWCGROUP;
    // SAFETY: no descriptor table is unshared.
    unsafe { rustix::thread::unshare_unsafe(own | more) }.map_err(says("cannot make namespaces"))
}

/// Takes the setup, and waits until the node agent has noted this process down.
fn receive() -> io::Result<ProcessSetup> {
    let mut bytes = Vec::new();
    File::from(inherited(SETUP_FD)?).read_to_end(&mut bytes)?;
    let mut go = [0];
    File::from(inherited(GATE_FD)?).read_exact(&mut go).map_err(|error| {
        io::Error::new(error.kind(), "the node agent ended before it let the sandbox start")
    })?;
    ProcessSetup::decode(bytes.as_slice()).map_err(io::Error::other)
}

fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the node agent has put it there for this function, which is asked once for each.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// The small file system that becomes the agent's root. Its owner is root of the node: once in its
/// user namespace, the sandbox can change nothing of it.
fn make_root(place: &Path, by_root: bool) -> io::Result<()> {
    let quiet = MountFlags::NOSUID | MountFlags::NOATIME;
    mount("tmpfs", place, "tmpfs", quiet, "mode=755,size=1m,nr_inodes=256")?;
    for folder in ["proc", "sys", "dev", "dev/net", "run", "tmp", &PREPARED[1..]] {
        std::fs::create_dir(place.join(folder))?;
    }
    let hard = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", &place.join("proc"), "proc", hard, "")?;
    // In a user namespace a new one may be mounted only where one is seen.
    mount("sysfs", &place.join("sys"), "sysfs", hard, "")?;
    DEVICES.iter().try_for_each(|device| make_device(&place.join("dev"), device, by_root))
}

fn make_device(folder: &Path, device: &(&str, u32, u32), by_root: bool) -> io::Result<()> {
    let (name, major, minor) = *device;
    let path = folder.join(name);
    let at = |error: io::Error| io::Error::new(error.kind(), format!("/dev/{name}: {error}"));
    if by_root {
        let mode = Mode::from_raw_mode(0o666);
        let number = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::CharacterDevice, mode, number)
            .and_then(|()| rustix::fs::chmod(&path, mode))
            .map_err(|error| at(error.into()))
    } else {
        let hosts = Path::new("/dev").join(name);
        // Without FUSE there are no local images; without TUN the guest agent ends and says so.
        if !hosts.exists() {
            return Ok(());
        }
        File::create(&path).map_err(at)?;
        rustix::mount::mount_bind(&hosts, &path).map_err(|error| at(error.into()))
    }
}

/// Makes the small root this mount namespace's, and lets go of all mounts of the node.
fn leave_host(place: &Path) -> io::Result<()> {
    rustix::process::chdir(place).map_err(says("cannot enter the sandbox's root"))?;
    rustix::process::pivot_root(".", ".").map_err(says("cannot change to the sandbox's root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(says("cannot leave the node's"))?;
    rustix::process::chdir("/").map_err(says("cannot enter the sandbox's root"))
}

/// The agent is the last to go when memory is short; what it starts is not protected. An ordinary
/// user may not ask for it.
fn protect_from_oom() {
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
}

/// What must be mounted from within the new namespaces, to be theirs.
fn mount_own() -> io::Result<()> {
    let hard = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("sysfs", Path::new("/sys"), "sysfs", hard, "")?;
    mount("cgroup2", Path::new("/sys/fs/cgroup"), "cgroup2", hard, "")?;
    for folder in ["/run", "/tmp"] {
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount("tmpfs", Path::new(folder), "tmpfs", flags, "mode=755,size=16m")?;
    }
    Ok(())
}

/// Standard input and output are the sandbox's own /dev/null; standard error is the log, whose size
/// the node agent has fixed.
fn take_standard_descriptors() -> io::Result<()> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty())?;
    rustix::stdio::dup2_stdin(null.as_fd())?;
    rustix::stdio::dup2_stdout(null.as_fd())?;
    Ok(())
}

fn give_up_capabilities() -> io::Result<()> {
    let mut given_up = CapabilitySet::empty();
    for capability in GIVEN_UP {
        given_up |= capability;
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // An older kernel that does not know it has nothing to give up.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(says("cannot give up capabilities")(error)),
        }
    }
    let mut sets = rustix::thread::capabilities(None)?;
    sets.effective -= given_up;
    sets.permitted -= given_up;
    sets.inheritable = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, sets).map_err(says("cannot give up capabilities"))
}

fn filter_system_calls(filter: &[u8]) -> io::Result<()> {
    let mut instructions: Vec<libc::sock_filter> = filter
        .chunks_exact(size_of::<libc::sock_filter>())
        .map(|bytes| libc::sock_filter {
            code: u16::from_ne_bytes([bytes[0], bytes[1]]),
            jt: bytes[2],
            jf: bytes[3],
            k: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        })
        .collect();
    let program = libc::sock_fprog {
        len: u16::try_from(instructions.len()).map_err(io::Error::other)?,
        filter: instructions.as_mut_ptr(),
    };
    // SAFETY: the program points to that many instructions, and the kernel copies them.
    let result = unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program, 0, 0)
    };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(io::Error::new(error.kind(), format!("cannot filter system calls: {error}")))
}

/// Puts what was tried before what went wrong.
fn says<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> io::Error {
    move |error| io::Error::other(format!("{what}: {error}"))
}
