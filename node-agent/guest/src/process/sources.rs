//! What a sandbox's root is made of: images that root mounts, or folders, opened before the node's
//! file system is left.
//!
//! An image is mounted by a loop device for this mount namespace only: nothing is left behind. The
//! writable one is locked, and the lock goes with the loop device, so it is never mounted twice.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};
use towline_proto::process::ProcessSetup;

use super::{ids, loops, says};

/// How long the mount of the run before may take to go.
const LOCK_MAX: Duration = Duration::from_secs(20);
const LOCK_LOOK: Duration = Duration::from_millis(10);

/// Opened, each with what it is for messages.
pub(super) struct Sources {
    layers: Vec<Source>,
    upper: Source,
}

enum Source {
    Image(File),
    Folder(OwnedFd),
}

impl Sources {
    pub(super) fn open(setup: &ProcessSetup) -> io::Result<Self> {
        let open = |path: &Vec<u8>, writable: bool| {
            let path = Path::new(std::ffi::OsStr::from_bytes(path));
            open(path, writable).map_err(|error| {
                io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            })
        };
        let layers = setup.layers.iter().map(|path| open(path, false)).collect::<Result<_, _>>()?;
        Ok(Self { layers, upper: open(&setup.upper, true)? })
    }

    /// Mounts `upper`, and each layer at its number, in the folder.
    pub(super) fn mount(&self, folder: &Path, users: Option<&OwnedFd>) -> io::Result<()> {
        for (index, layer) in self.layers.iter().enumerate() {
            layer.mount("squashfs", &folder.join(index.to_string()), users)?;
        }
        self.upper.mount("ext4", &folder.join("upper"), users)
    }
}

fn open(path: &Path, writable: bool) -> io::Result<Source> {
    if path.is_dir() {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        return Ok(Source::Folder(rustix::fs::open(path, flags, Mode::empty())?));
    }
    let file = OpenOptions::new().read(true).write(writable).open(path)?;
    let until = Instant::now() + LOCK_MAX;
    while writable && flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        if Instant::now() >= until {
            return Err(io::Error::other("the disk is still in use by an earlier run"));
        }
        std::thread::sleep(LOCK_LOOK);
    }
    Ok(Source::Image(file))
}

impl Source {
    fn mount(&self, kind: &'static str, at: &Path, users: Option<&OwnedFd>) -> io::Result<()> {
        std::fs::create_dir(at)?;
        let writable = kind == "ext4";
        match self {
            Self::Folder(folder) => {
                use std::os::fd::AsRawFd;
                let name = format!("/proc/self/fd/{}", folder.as_raw_fd());
                rustix::mount::mount_bind(name, at).map_err(says("cannot mount a folder"))
            }
            Self::Image(file) => {
                let device = loops::attach(file, writable).map_err(says("loop device"))?;
                let mount = mount_image(kind, &device.path, writable)?;
                if let Some(users) = users {
                    ids::map_mount(mount.as_fd(), users).map_err(|error| {
                        io::Error::new(
                            error.kind(),
                            format!(
                                "this kernel cannot map the ids of {kind} (Linux 6.2 can): {error}"
                            ),
                        )
                    })?;
                }
                let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                rustix::mount::move_mount(&mount, "", rustix::fs::CWD, at, flags)
                    .map_err(says("cannot attach a disk"))
            }
        }
    }
}

/// Mounts a device, attached nowhere yet.
fn mount_image(kind: &'static str, device: &Path, writable: bool) -> io::Result<OwnedFd> {
    let failed =
        |error: rustix::io::Errno| io::Error::other(format!("cannot mount {kind}: {error}"));
    let fs = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed)?;
    rustix::mount::fsconfig_set_string(&fs, "source", device).map_err(failed)?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NODEV;
    if writable {
        // As in a VM: inode tables are written when they are needed.
        rustix::mount::fsconfig_set_flag(&fs, "noinit_itable").map_err(failed)?;
        attributes |= MountAttrFlags::MOUNT_ATTR_NOATIME;
    } else {
        rustix::mount::fsconfig_set_flag(&fs, "ro").map_err(failed)?;
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    rustix::mount::fsconfig_create(&fs).map_err(failed)?;
    rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed)
}
