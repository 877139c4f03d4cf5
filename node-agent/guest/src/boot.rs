//! What a kernel needs before anything else works: standard descriptors, the first mounts, modules,
//! protection from the OOM killer; and what waits until it is known whose guest this is.
//!
//! A guest may be saved when it has said hello and restored many times (a warm start). So nothing
//! before `finish` touches a disk, the network, or what the kernel draws from its random pool once.
//! A step that fails is an error with its name: the node shows the last words of a guest's console.
#![expect(
    unsafe_code,
    reason = "finit_module, SIOCSIFFLAGS and the entropy calls have no safe form"
)]

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;

/// Where the modules and their order are in the initramfs.
const MODULES: &str = "/modules";
/// Modules whose devices are this sandbox's own: they are loaded by `finish` only.
const LATE_MODULES: [&str; 2] = ["virtio_rng", "virtio_blk"];
/// Modules for devices on a bus that a VMM has or has not: loading them for nothing takes time.
const PCI_MODULES: [&str; 6] = [
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
];
/// The other bus, and what is only ever on it.
const MMIO_MODULES: [&str; 2] = ["virtio_mmio", "virtio_console"];
const PCI_DEVICES: &str = "/sys/bus/pci/devices";
/// Whether a driver takes the devices that it finds.
const AUTOPROBE: &str = "/sys/bus/virtio/drivers_autoprobe";
/// Descriptors that the agent may have open: a stream of each client and an exec's pipes.
const FILES_MAX: u64 = 65_536;

/// Whose kernel the guest runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Its own, in a VM.
    Own,
    /// The node's (`--isolation process`): clock, random numbers and power are the node's affair,
    /// disks are mounted already, devices cannot be made.
    Shared,
}

/// Does what is left to do where another has made the machine.
pub fn prepare_own_part() -> io::Result<()> {
    // More than the node agent was given is the node's to refuse.
    if let Err(error) = raise_files_limit()
        && error.kind() != io::ErrorKind::PermissionDenied
    {
        return Err(error);
    }
    bring_loopback_up()
}

/// Does what comes before the hello.
pub fn prepare() -> io::Result<()> {
    for (what, target, kind, flags) in [
        ("proc", "/proc", "proc", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC),
        ("sysfs", "/sys", "sysfs", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC),
        ("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID),
        ("tmpfs", "/run", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV),
        ("tmpfs", "/tmp", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV),
    ] {
        mount(what, Path::new(target), kind, flags, "")?;
    }
    open_standard_descriptors()?;
    let cgroup = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("cgroup2", Path::new("/sys/fs/cgroup"), "cgroup2", cgroup, "")?;
    // Nothing here could answer the kernel's wish for a further module: asking costs a process each.
    fs::write("/proc/sys/kernel/modprobe", "\n")?;
    let has_pci = fs::read_dir(PCI_DEVICES).is_ok_and(|mut devices| devices.next().is_some());
    let other_bus: &[&str] = if has_pci { &MMIO_MODULES } else { &PCI_MODULES };
    load_modules(|name| !LATE_MODULES.contains(&name) && !other_bus.contains(&name))?;
    fs::write("/proc/self/oom_score_adj", "-1000")?;
    raise_files_limit()
}

/// Does what comes with the configuration, after the entropy: the devices of this sandbox, and the
/// network's first use, at which the kernel draws its secrets.
pub fn finish() -> io::Result<()> {
    load_modules(|name| name == "virtio_rng")?;
    // The machine has room for more disks than this sandbox has; `disks` takes only those.
    fs::write(AUTOPROBE, "0")?;
    load_modules(|name| name == "virtio_blk")?;
    fs::write(AUTOPROBE, "1")?;
    bring_loopback_up()
}

/// Makes the folder and mounts; says what failed.
pub(crate) fn mount(
    source: &str,
    target: &Path,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> io::Result<()> {
    let options = CString::new(options)?;
    fs::create_dir_all(target)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", target.display())))?;
    rustix::mount::mount(source, target, kind, flags, options.as_c_str()).map_err(|error| {
        io::Error::new(
            io::Error::from(error).kind(),
            format!("cannot mount {kind} at {}: {error}", target.display()),
        )
    })
}

/// Without a console the kernel gives the first process none; a pipe must never get such a number.
fn open_standard_descriptors() -> io::Result<()> {
    loop {
        let null: OwnedFd = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty())?;
        if null.as_raw_fd() > 2 {
            return Ok(());
        }
        std::mem::forget(null);
    }
}

/// Loads those of the modules that `order` names, one per line, in that order.
fn load_modules(wanted: impl Fn(&str) -> bool) -> io::Result<()> {
    let folder = Path::new(MODULES);
    let order = match fs::read_to_string(folder.join("order")) {
        Ok(order) => order,
        // A kernel with all that is needed built in.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for name in order.lines().map(str::trim).filter(|name| !name.is_empty()) {
        if !wanted(&name.trim_end_matches(".ko").replace('-', "_")) {
            continue;
        }
        load_module(&folder.join(name))
            .map_err(|error| io::Error::new(error.kind(), format!("module {name}: {error}")))?;
    }
    Ok(())
}

fn load_module(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: an open descriptor and an empty C string.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    match io::Error::last_os_error() {
        _ if result == 0 => Ok(()),
        error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        error => Err(error),
    }
}

fn raise_files_limit() -> io::Result<()> {
    let limit = rustix::process::Rlimit { current: Some(FILES_MAX), maximum: Some(1 << 20) };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit)?;
    Ok(())
}

/// Programs expect to reach themselves on 127.0.0.1, with no other network too.
fn bring_loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    // SAFETY: all-zero is a valid ifreq, whose name keeps its final NUL; the kernel only reads it.
    let result = unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(c"lo".to_bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP).unwrap_or_default();
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Credits bytes to the kernel's random pool and reseeds from it at once.
pub(crate) fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    let random = rustix::fs::open("/dev/urandom", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // `struct rand_pool_info`: bits, size, words.
    let len = bytes.len().min(512);
    let mut info = [0u32; 2 + 128];
    info[0] = u32::try_from(len * 8).unwrap_or(0);
    info[1] = u32::try_from(len).unwrap_or(0);
    for (word, piece) in info[2..].iter_mut().zip(bytes[..len].chunks(4)) {
        let mut four = [0; 4];
        four[..piece.len()].copy_from_slice(piece);
        *word = u32::from_ne_bytes(four);
    }
    let fd = random.as_fd().as_raw_fd();
    // SAFETY: the struct is as long as its size says.
    let added = unsafe { libc::ioctl(fd, RNDADDENTROPY, info.as_ptr()) };
    // SAFETY: takes no argument.
    if added != 0 || unsafe { libc::ioctl(fd, RNDRESEEDCRNG, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
