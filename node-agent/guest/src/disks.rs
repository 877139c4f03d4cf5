//! The machine's disks, known by their serials. A machine has room for more disks than its sandbox
//! has, so that a saved one fits every sandbox; the rest stays without a driver and out of sight.
//!
//! Disks are taken in the order of the bus until all that are wanted were found: the node puts those
//! first that every sandbox has.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::mount::MountFlags;

use crate::boot::mount;
use crate::process;

const DEVICES: &str = "/sys/bus/virtio/devices";
const BIND: &str = "/sys/bus/virtio/drivers/virtio_blk/bind";
/// What a virtio device of this kind says in `device`.
const BLOCK: &str = "0x0002";
/// How long disks may take to be seen that were plugged in just now: after a warm start.
const PLUGGED_MAX: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(2);
/// Most layer disks, as the node makes them.
const LAYERS_MAX: u32 = 16;

/// The disks that were found, by serial.
#[derive(Debug, Default)]
pub(crate) struct Disks(BTreeMap<String, PathBuf>);

/// A file system, how to mount it, and its options.
pub(crate) type Kind<'a> = (&'a str, MountFlags, &'a str);

impl Disks {
    /// Takes the sandbox's own disk, the kernel's modules, and the layers.
    pub(crate) fn attach(layers: u32) -> io::Result<Self> {
        if layers > LAYERS_MAX {
            return Err(io::Error::other(format!(
                "{layers} layers; at most {LAYERS_MAX} are possible"
            )));
        }
        let needed: Vec<_> = ["upper".to_owned()]
            .into_iter()
            .chain((0..layers).map(|index| format!("layer{index}")))
            .collect();
        let until = Instant::now() + PLUGGED_MAX;
        loop {
            let wanted = needed.iter().cloned().chain(["modules".to_owned()]).collect();
            let bind = |device: &str| fs::write(BIND, device);
            let disks = Self::attach_from(Path::new(DEVICES), wanted, bind)?;
            if needed.iter().all(|serial| disks.has(serial)) || Instant::now() > until {
                return Ok(disks);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Those that are mounted already, where the kernel is the node's: folders instead of devices.
    pub(crate) fn prepared(layers: u32) -> io::Result<Self> {
        if layers > LAYERS_MAX {
            return Err(io::Error::other(format!(
                "{layers} layers; at most {LAYERS_MAX} are possible"
            )));
        }
        let folder = |name: &str| Path::new(process::PREPARED).join(name);
        let layers = (0..layers).map(|index| (format!("layer{index}"), folder(&index.to_string())));
        let upper = ("upper".to_owned(), folder("upper"));
        Ok(Self(layers.chain([upper]).collect()))
    }

    /// Whether there is a disk with this serial.
    pub(crate) fn has(&self, serial: &str) -> bool {
        self.0.contains_key(serial)
    }

    /// Mounts the disk with this serial; one that is mounted already is shown at the target.
    pub(crate) fn mount(&self, serial: &str, target: &Path, kind: Kind<'_>) -> io::Result<()> {
        let disk = self.get(serial)?;
        let (kind, flags, options) = kind;
        if !disk.is_dir() {
            return mount(&disk.to_string_lossy(), target, kind, flags, options);
        }
        fs::create_dir_all(target)?;
        rustix::mount::mount_bind(disk, target)
            .map_err(|error| io::Error::other(format!("cannot mount the disk `{serial}`: {error}")))
    }

    /// The disk with this serial.
    fn get(&self, serial: &str) -> io::Result<&Path> {
        self.0.get(serial).map(PathBuf::as_path).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("the machine has no disk `{serial}`"))
        })
    }

    fn attach_from(
        devices: &Path,
        mut wanted: Vec<String>,
        bind: impl Fn(&str) -> io::Result<()>,
    ) -> io::Result<Self> {
        let mut found = BTreeMap::new();
        for device in block_devices(devices)? {
            if wanted.is_empty() {
                break;
            }
            let folder = devices.join(&device).join("block");
            if !folder.exists() {
                bind(&device).map_err(|error| {
                    io::Error::new(error.kind(), format!("disk {device}: {error}"))
                })?;
            }
            let Disk { serial, name, is_empty } = describe(&folder)?;
            let Some(at) = wanted.iter().position(|wanted| *wanted == serial) else { continue };
            wanted.swap_remove(at);
            if !is_empty {
                found.insert(serial, Path::new("/dev").join(name));
            }
        }
        Ok(Self(found))
    }
}

/// The names of the virtio disks, in the order of the bus.
fn block_devices(devices: &Path) -> io::Result<Vec<String>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(devices)? {
        let entry = entry?;
        let kind = fs::read_to_string(entry.path().join("device"));
        let number =
            entry.file_name().to_str().and_then(|name| name.strip_prefix("virtio")?.parse().ok());
        if let (Some(number), Ok(kind)) = (number, kind)
            && kind.trim_end() == BLOCK
        {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers.into_iter().map(|number: u32| format!("virtio{number}")).collect())
}

struct Disk {
    serial: String,
    name: String,
    /// A place of the machine that holds no disk.
    is_empty: bool,
}

/// The disk behind a device that has its driver.
fn describe(folder: &Path) -> io::Result<Disk> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, "a disk's driver shows no disk");
    let entry = fs::read_dir(folder)?.next().ok_or_else(missing)??;
    let serial = fs::read_to_string(entry.path().join("serial"))?.trim_end().to_owned();
    let is_empty = fs::read_to_string(entry.path().join("size"))?.trim() == "0";
    Ok(Disk { serial, name: entry.file_name().to_string_lossy().into_owned(), is_empty })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// A bus as sysfs shows it; binding makes the disk appear.
    struct Bus(tempfile::TempDir, RefCell<Vec<String>>);

    impl Bus {
        fn new(kinds: &[(u32, &str)]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            for (number, kind) in kinds {
                let device = dir.path().join(format!("virtio{number}"));
                fs::create_dir(&device).unwrap();
                fs::write(device.join("device"), format!("{kind}\n")).unwrap();
            }
            Self(dir, RefCell::default())
        }

        fn bind(&self, device: &str, serial: &str, size: &str) -> io::Result<()> {
            let name = format!("vd{}", self.1.borrow().len());
            let folder = self.0.path().join(device).join("block").join(name);
            fs::create_dir_all(&folder)?;
            fs::write(folder.join("serial"), serial)?;
            fs::write(folder.join("size"), size)?;
            self.1.borrow_mut().push(device.to_owned());
            Ok(())
        }
    }

    #[test]
    fn only_the_disks_that_are_wanted_get_a_driver() {
        let bus = Bus::new(&[
            (0, "0x0003"),
            (1, BLOCK),
            (2, BLOCK),
            (3, BLOCK),
            (10, BLOCK),
            (4, "0x0004"),
        ]);
        let wanted = ["upper", "modules", "layer0"].map(str::to_owned).to_vec();
        let disks = Disks::attach_from(bus.0.path(), wanted, |device| match device {
            "virtio1" => bus.bind(device, "upper", "2048\n"),
            "virtio2" => bus.bind(device, "modules", "0\n"),
            "virtio3" => bus.bind(device, "layer0", "8\n"),
            _ => bus.bind(device, "layer1", "8\n"),
        });
        let disks = disks.unwrap();
        assert_eq!(disks.get("upper").unwrap(), Path::new("/dev/vd0"));
        assert_eq!(disks.get("layer0").unwrap(), Path::new("/dev/vd2"));
        let error = disks.get("modules").unwrap_err().to_string();
        assert_eq!(error, "the machine has no disk `modules`");
        assert_eq!(*bus.1.borrow(), ["virtio1", "virtio2", "virtio3"]);

        let bus = Bus::new(&[(1, BLOCK), (2, BLOCK), (3, BLOCK)]);
        let wanted = ["upper"].map(str::to_owned).to_vec();
        let bind = |device: &str| bus.bind(device, "upper", "2048\n");
        Disks::attach_from(bus.0.path(), wanted, bind).unwrap();
        assert_eq!(*bus.1.borrow(), ["virtio1"]);
        assert!(Disks::attach(17).unwrap_err().to_string().contains("at most 16"));
    }
}
