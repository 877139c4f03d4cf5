//! The root file system that the workload sees: an overlay of read-only layers, or of the laptop's
//! own system over FUSE, with the sandbox's ext4 disk on top; the project folder beside it.
//!
//! Paths that an image or a client names are resolved beneath the root, never in the agent's own.
//! All of it may block on a lower FUSE file system, so it runs off the agent's main thread.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use towline_proto::limits::PATH_DEPTH_MAX;
use towline_proto::v1::{GitIdentity, User};

use crate::boot::{Kernel, mount};
use crate::credentials::RootFiles;
use crate::disks::Disks;
use crate::{fuse, gitconfig};

/// The workload's root, as the agent sees it.
pub const ROOT: &str = "/run/towline/root";
/// The sandbox's own disk.
pub const UPPER: &str = "/run/towline/upper";
/// What the workload changed of its root, as overlayfs has it.
pub const CHANGES: &str = "/run/towline/upper/overlay/upper";
/// Several layers as one tree, without what the workload changed.
const BELOW: &str = "/run/towline/below";
/// Spools of detached execs: on the disk, outside the workload's view.
pub const SPOOL: &str = "/run/towline/upper/spool";
/// Where Towline speaks to what runs in the sandbox.
const RUN_TOWLINE: &[u8] = b"/run/towline";
/// The project folder, on the same disk beside the overlay.
pub const FOLDER: &str = "/run/towline/upper/folder";
const LAYERS: &str = "/run/towline/layers";
const LOCAL: &str = "/run/towline/local";
/// Where the kernel's modules are, in a root that has libraries at all.
const MODULES: &str = "lib/modules";
/// Group of terminals on every distribution.
const TTY_GROUP: u32 = 5;

/// What to build.
#[derive(Debug)]
pub struct RootSpec {
    /// Decides whether disks and devices are made here.
    pub kernel: Kernel,
    /// Layer disks, the lowest first.
    pub layers: u32,
    /// The local image's file system instead of layers.
    pub fuse: Option<fuse::Device>,
    /// For /etc/hostname and /etc/hosts.
    pub hostname: String,
    /// 16 bytes for /etc/machine-id; empty leaves the image's.
    pub machine_id: Vec<u8>,
    /// Where the project folder goes; empty: nowhere.
    pub folder: Vec<u8>,
    /// The image's working directory, made if it is missing.
    pub cwd: Vec<u8>,
    /// For /etc/gitconfig; absent leaves the image's.
    pub git: Option<GitIdentity>,
}

/// A mounted root.
#[derive(Debug)]
pub struct Mounted {
    /// The root directory.
    pub descriptor: OwnedFd,
    /// The image as one tree, where the agent finds it.
    pub below: PathBuf,
}

/// Builds and mounts everything but the project folder.
pub fn mount_root(spec: &RootSpec) -> io::Result<Mounted> {
    let disks = match spec.kernel {
        Kernel::Own => Disks::attach(spec.layers)?,
        Kernel::Shared => Disks::prepared(spec.layers)?,
    };
    mount_upper(&disks)?;
    let lower = match &spec.fuse {
        Some(device) => mount_local(device, spec.kernel)?,
        None => mount_layers(&disks, spec.layers)?,
    };
    mount_overlay(&lower, spec.kernel)?;
    let below = mount_below(&lower, spec.kernel)?;
    let root = open_root()?;
    mount_system(&root, spec.kernel)?;
    mount_modules(&root, &disks)?;
    write_names(&root, spec)?;
    if !spec.cwd.is_empty() {
        make_folders(&root, &spec.cwd, None)?;
    }
    Ok(Mounted { descriptor: root, below })
}

fn mount_upper(disks: &Disks) -> io::Result<()> {
    // Inode tables that the template left unwritten are written when they are needed, not in the
    // background of the first command.
    let kind = ("ext4", MountFlags::NOATIME, "noinit_itable");
    disks.mount("upper", Path::new(UPPER), kind)?;
    let upper = Path::new(UPPER);
    for folder in ["overlay/upper", "overlay/work", "folder", "spool", "names", "empty"] {
        fs::create_dir_all(upper.join(folder))?;
    }
    // Spools of an earlier boot belong to execs that no longer exist.
    for old in fs::read_dir(SPOOL)?.flatten() {
        let _ = fs::remove_file(old.path());
    }
    rustix::fs::chmod(SPOOL, Mode::from_raw_mode(0o700))?;
    Ok(())
}

/// The lower directories in overlayfs' order: the topmost first.
fn mount_layers(disks: &Disks, layers: u32) -> io::Result<String> {
    if layers == 0 {
        return Ok(format!("{UPPER}/empty"));
    }
    let mut lower = Vec::new();
    for index in (0..layers).rev() {
        let target = format!("{LAYERS}/{index}");
        let kind = ("squashfs", MountFlags::RDONLY | MountFlags::NODEV, "");
        disks.mount(&format!("layer{index}"), Path::new(&target), kind)?;
        lower.push(target);
    }
    Ok(lower.join(":"))
}

fn mount_local(device: &fuse::Device, kernel: Kernel) -> io::Result<String> {
    let options = format!(
        "fd={},rootmode=40755,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_fd().as_raw_fd()
    );
    mount("towline", Path::new(LOCAL), "fuse", MountFlags::RDONLY | MountFlags::NODEV, &options)?;
    device.mounted();
    // The number of the mount, and with it of its read-ahead, without asking its own server.
    for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        if fields.get(4) == Some(&LOCAL)
            && let Some(number) = fields.get(2)
        {
            let set = fs::write(format!("/sys/class/bdi/{number}/read_ahead_kb"), "1024");
            // The node's kernel lets no sandbox say how far to read ahead: it reads more often.
            if kernel == Kernel::Own {
                set?;
            }
        }
    }
    Ok(LOCAL.into())
}

fn mount_overlay(lower: &str, kernel: Kernel) -> io::Result<()> {
    let options = format!(
        "lowerdir={lower},upperdir={CHANGES},workdir={UPPER}/overlay/work,{}",
        overlay_options(kernel)
    );
    mount("overlay", Path::new(ROOT), "overlay", MountFlags::NOATIME, &options)
}

fn overlay_options(kernel: Kernel) -> &'static str {
    match kernel {
        Kernel::Own => "index=off,xino=off,redirect_dir=off,metacopy=off",
        // In a user namespace `trusted.` attributes cannot be written; this leaves both off too.
        Kernel::Shared => "index=off,xino=off,userxattr",
    }
}

/// The lower directories without the upper: one is a tree already, more become another overlay.
fn mount_below(lower: &str, kernel: Kernel) -> io::Result<PathBuf> {
    if !lower.contains(':') {
        return Ok(lower.into());
    }
    let options = format!("lowerdir={lower},{}", overlay_options(kernel));
    let flags = MountFlags::NOATIME | MountFlags::RDONLY | MountFlags::NODEV;
    mount("overlay", Path::new(BELOW), "overlay", flags, &options)?;
    Ok(BELOW.into())
}

fn open_root() -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(ROOT, flags, Mode::empty())?)
}

/// /sys, /dev, /run; /proc is the workload's init's to mount. /tmp is the overlay's.
fn mount_system(root: &OwnedFd, kernel: Kernel) -> io::Result<()> {
    for (path, mode) in [("proc", 0o555), ("sys", 0o555), ("dev", 0o755), ("run", 0o755)] {
        ensure_folder(root, path, mode)?;
    }
    ensure_folder(root, "tmp", 0o1777)?;
    let hard = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_at(root, "sys", "sysfs", hard | MountFlags::RDONLY, "")?;
    mount_at(root, "run", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=755")?;
    mount_at(root, "dev", "tmpfs", MountFlags::NOSUID, "mode=755,size=1m")?;
    for folder in ["dev/pts", "dev/shm"] {
        ensure_folder(root, folder, 0o755)?;
    }
    let terminals = format!("newinstance,ptmxmode=0666,mode=0620,gid={TTY_GROUP}");
    mount_at(root, "dev/pts", "devpts", MountFlags::NOSUID | MountFlags::NOEXEC, &terminals)?;
    mount_at(root, "dev/shm", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=1777")?;
    make_devices(root, kernel)
}

/// The running kernel's modules, for `modprobe` in the sandbox: they are no image's own.
fn mount_modules(root: &OwnedFd, disks: &Disks) -> io::Result<()> {
    if !disks.has("modules") {
        return Ok(());
    }
    let libraries = open_beneath(root, b"lib", OFlags::PATH | OFlags::DIRECTORY);
    if libraries.is_err() {
        return Ok(());
    }
    ensure_folder(root, MODULES, 0o755)?;
    let target = open_beneath(root, MODULES.as_bytes(), OFlags::PATH | OFlags::DIRECTORY)?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    disks.mount("modules", &own_path(target.as_fd()), ("squashfs", flags, ""))
}

fn make_devices(root: &OwnedFd, kernel: Kernel) -> io::Result<()> {
    let dev = open_beneath(root, b"dev", OFlags::PATH | OFlags::DIRECTORY)?;
    for (name, major, minor) in [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
    ] {
        let mode = Mode::from_raw_mode(0o666);
        if kernel == Kernel::Shared {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&dev, name, flags, mode)?;
            bind(&Path::new("/dev").join(name), &file)?;
            continue;
        }
        let number = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(&dev, name, FileType::CharacterDevice, mode, number)?;
        rustix::fs::chmodat(&dev, name, mode, AtFlags::empty())?;
    }
    for (name, target) in [
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        rustix::fs::symlinkat(target, &dev, name)?;
    }
    Ok(())
}

/// The files under /etc that belong to the machine, not to the image: mounted over the image's.
fn write_names(root: &OwnedFd, spec: &RootSpec) -> io::Result<()> {
    // Containers in the sandbox reach it too: it is no loopback address.
    let resolver = crate::net::RESOLVER_V4;
    let resolv = format!("nameserver {resolver}\noptions edns0\n");
    let mut files = own_names(&spec.hostname, &spec.machine_id);
    files.push(("resolv.conf", resolv.into()));
    if let Some(git) = &spec.git {
        let image = RootFiles::beneath(root.try_clone()?).read("etc/gitconfig")?;
        files.push(("gitconfig", gitconfig::with_identity(git, &image)));
    }
    make_folders(root, b"/etc", None)?;
    let etc = open_beneath(root, b"etc", OFlags::PATH | OFlags::DIRECTORY)?;
    for (name, content) in files {
        let source = Path::new(UPPER).join("names").join(name);
        fs::write(&source, content)?;
        let target = target_file(&etc, name)?;
        bind(&source, &target)?;
    }
    Ok(())
}

/// Those of them that name this very sandbox.
fn own_names(hostname: &str, machine_id: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let hosts = format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"
    );
    let mut files =
        vec![("hostname", format!("{hostname}\n").into_bytes()), ("hosts", hosts.into())];
    if machine_id.len() == 16 {
        let id: String = machine_id.iter().map(|byte| format!("{byte:02x}")).collect();
        files.push(("machine-id", format!("{id}\n").into_bytes()));
    }
    files
}

/// Gives a copy names of its own, in the files that are mounted already.
pub fn write_own_names(hostname: &str, machine_id: &[u8]) -> io::Result<()> {
    own_names(hostname, machine_id).into_iter().try_for_each(|(name, content)| {
        fs::write(Path::new(UPPER).join("names").join(name), content)
    })
}

/// Tells what runs beneath this root that it is a copy, or (with nothing) that it is none: the file
/// that is watched for it is another one afterwards.
pub fn announce_fork(root: &Path, text: &str) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, flags, Mode::empty())?;
    make_folders(&root, RUN_TOWLINE, None)?;
    let folder = open_beneath(&root, RUN_TOWLINE, OFlags::PATH | OFlags::DIRECTORY)?;
    let make = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let _ = rustix::fs::unlinkat(&folder, ".fork", AtFlags::empty());
    let file = rustix::fs::openat(&folder, ".fork", make, Mode::from_raw_mode(0o444))?;
    fs::File::from(file).write_all(text.as_bytes())?;
    rustix::fs::renameat(&folder, ".fork", &folder, "fork").map_err(io::Error::from)
}

/// A regular file to mount over; what cannot be mounted over (a link, mostly) is replaced.
fn target_file(etc: &OwnedFd, name: &str) -> io::Result<OwnedFd> {
    let look = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(etc, name, look, Mode::empty()) {
        Ok(file) => {
            let kind = FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
            if kind == FileType::RegularFile {
                return Ok(file);
            }
            let flags =
                if kind == FileType::Directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            rustix::fs::unlinkat(etc, name, flags)?;
        }
        Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let make = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(etc, name, make, Mode::from_raw_mode(0o644))?;
    Ok(rustix::fs::openat(etc, name, look, Mode::empty())?)
}

/// Mounts the project folder at its path; returns where the agent finds it.
pub fn bind_folder(path: &[u8], owner: &User) -> io::Result<PathBuf> {
    let root = open_root()?;
    let target = make_folders(&root, path, Some(owner))?;
    let folder = PathBuf::from(FOLDER);
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    rustix::fs::chown(&folder, Some(uid), Some(gid))?;
    bind(&folder, &target)?;
    Ok(folder)
}

/// Whether no link is on the way to this, relative to the root.
pub(crate) fn leads_straight(root: &Path, path: &[u8]) -> bool {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let opened = rustix::fs::open(root, flags, Mode::empty());
    opened.and_then(|root| rustix::fs::openat2(root, path, flags, Mode::empty(), beneath)).is_ok()
}

/// Makes the user's home, if it is missing.
pub fn make_home(user: &User) -> io::Result<()> {
    if user.home.first() != Some(&b'/') || user.home == b"/" {
        return Ok(());
    }
    let root = open_root()?;
    make_folders(&root, &user.home, Some(user)).map(drop)
}

/// Makes a folder and its parents beneath the root, following the image's own links. What is made at
/// or beneath the owner's home is the owner's.
fn make_folders(root: &OwnedFd, path: &[u8], owner: Option<&User>) -> io::Result<OwnedFd> {
    let mut made = Vec::new();
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let mut current = open_beneath(root, b".", flags)?;
    let names = path.split(|&b| b == b'/').filter(|name| !name.is_empty() && *name != b".");
    for (depth, name) in names.enumerate() {
        if name == b".." || depth == PATH_DEPTH_MAX {
            let path = String::from_utf8_lossy(path);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("`{path}`: bad path")));
        }
        made.push(b'/');
        made.extend_from_slice(name);
        let next = match open_beneath(root, &made[1..], flags) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                rustix::fs::mkdirat(&current, name, Mode::from_raw_mode(0o755))?;
                let owner = owner.filter(|owner| is_within(&made, &owner.home));
                if let Some(owner) = owner {
                    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
                    let flags = AtFlags::SYMLINK_NOFOLLOW;
                    rustix::fs::chownat(&current, name, Some(uid), Some(gid), flags)?;
                }
                open_beneath(root, &made[1..], flags)
            }
            result => result,
        };
        current = next.map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", String::from_utf8_lossy(&made)))
        })?;
    }
    Ok(current)
}

fn is_within(path: &[u8], home: &[u8]) -> bool {
    let home = home.strip_suffix(b"/").unwrap_or(home);
    !home.is_empty()
        && path.strip_prefix(home).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

fn ensure_folder(root: &OwnedFd, path: &str, mode: u32) -> io::Result<()> {
    match open_beneath(root, path.as_bytes(), OFlags::PATH | OFlags::DIRECTORY) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            rustix::fs::mkdirat(root, path, Mode::from_raw_mode(mode))?;
            // Whatever the umask is.
            Ok(rustix::fs::chmodat(root, path, Mode::from_raw_mode(mode), AtFlags::empty())?)
        }
        Err(error) => Err(io::Error::new(error.kind(), format!("/{path}: {error}"))),
    }
}

fn open_beneath(root: &OwnedFd, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    Ok(rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
}

/// Mounts at what a path beneath the root really is.
fn mount_at(
    root: &OwnedFd,
    path: &str,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> io::Result<()> {
    let target = open_beneath(root, path.as_bytes(), OFlags::PATH | OFlags::DIRECTORY)?;
    mount(kind, &own_path(target.as_fd()), kind, flags, options)
        .map_err(|error| io::Error::new(error.kind(), format!("/{path}: {error}")))
}

fn bind(source: &Path, target: &OwnedFd) -> io::Result<()> {
    rustix::mount::mount_bind(source, own_path(target.as_fd())).map_err(|error| {
        io::Error::other(format!("cannot mount {} into the sandbox: {error}", source.display()))
    })
}

/// A name of an open file that leads to exactly it: not even a link is followed.
pub(crate) fn own_path(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_made_beneath_the_root_whatever_its_links_say() {
        let dir = tempfile::tempdir().unwrap();
        let root: OwnedFd = fs::File::open(dir.path()).unwrap().into();
        std::os::unix::fs::symlink("/var/home", dir.path().join("home")).unwrap();
        fs::create_dir_all(dir.path().join("var/home")).unwrap();
        make_folders(&root, b"/home/ann//work/./a", None).unwrap();
        assert!(dir.path().join("var/home/ann/work/a").is_dir());

        std::os::unix::fs::symlink("../../../..", dir.path().join("out")).unwrap();
        make_folders(&root, b"/out/inside", None).unwrap();
        assert!(dir.path().join("inside").is_dir(), "a link out of the root leads to the root");
        assert!(make_folders(&root, b"/a/../../b", None).is_err());
    }

    #[test]
    fn homes_are_told_from_their_neighbours() {
        assert!(is_within(b"/home/ann", b"/home/ann"));
        assert!(is_within(b"/home/ann/x", b"/home/ann/"));
        assert!(!is_within(b"/home/anna", b"/home/ann"));
        assert!(!is_within(b"/x", b"/"));
    }
}
