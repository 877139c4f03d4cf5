//! Saves a guest to a folder, and says how such a folder is restored.
//!
//! A snapshot has the VM's configuration, its devices' state and its memory: all of it, so the zeros
//! are given back to the file system.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use rustix::fs::FallocateFlags;
use serde::Serialize;
use serde_json::Value;
use tempfile::TempDir;

use super::api::Api;
use super::config::Disk;
use crate::hypervisor::{HypervisorError, Starter, Vm};

pub(super) const PAUSE_MAX: Duration = Duration::from_secs(20);
/// Writing all of a guest's memory, on a busy disk.
const SNAPSHOT_MAX: Duration = Duration::from_secs(100);
/// The file of its configuration.
const CONFIG: &str = "config.json";
/// The file of the guest's memory.
const MEMORY: &str = "memory-ranges";
/// What is looked at at once for being zero.
const PIECE: usize = 64 << 10;

#[derive(Debug, Serialize)]
struct Destination {
    destination_url: String,
}

/// What `vm.restore` takes.
#[derive(Debug, Serialize)]
pub(super) struct Source {
    source_url: String,
    memory_restore_mode: &'static str,
}

impl Source {
    /// Of a snapshot's folder. Memory comes as it is used, where that is possible here.
    pub(super) fn new(folder: &Path, starter: &Starter) -> Result<Self, HypervisorError> {
        // By the helper, each has that device.
        let possible = match starter.is_helper() {
            true => Path::new(super::USERFAULTFD).exists(),
            false => has_userfaultfd(),
        };
        let memory_restore_mode = if possible { "OnDemand" } else { "Copy" };
        Ok(Self { source_url: url(folder)?, memory_restore_mode })
    }
}

/// Halts the guest and writes it to a new folder. The VM is of no further use.
pub(super) async fn save(vm: &Vm, to: &Path) -> io::Result<()> {
    let api = Api(vm.dir());
    api.order::<()>("vm.pause", None, PAUSE_MAX).await.map_err(io::Error::other)?;
    write(vm, to).await?;
    let to = to.to_owned();
    let settled = tokio::task::spawn_blocking(move || {
        dig_holes(&to.join(MEMORY))?;
        for entry in fs::read_dir(&to)? {
            File::open(entry?.path())?.sync_all()?;
        }
        File::open(&to)?.sync_all()
    });
    settled.await?
}

/// Writes a halted guest to a new folder.
pub(super) async fn write(vm: &Vm, to: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(to)?;
    let destination = Destination { destination_url: url(to).map_err(io::Error::other)? };
    let saved = Api(vm.dir()).order("vm.snapshot", Some(&destination), SNAPSHOT_MAX).await;
    saved.map_err(io::Error::other)
}

/// Makes the folder that a copy is restored from: what was saved, with the copy's own disks. It is
/// needed only until the VM runs.
pub(super) fn of_copy(saved: &Path, dir: &Path, disks: &[Disk]) -> io::Result<TempDir> {
    let own = tempfile::Builder::new().prefix(".new-").tempdir_in(dir)?;
    let saved = fs::canonicalize(saved)?;
    for entry in fs::read_dir(&saved)? {
        let name = entry?.file_name();
        if name != CONFIG {
            symlink(saved.join(&name), own.path().join(&name))?;
        }
    }
    let mut config: Value = serde_json::from_slice(&fs::read(saved.join(CONFIG))?)?;
    with_disks(&mut config, disks)?;
    fs::write(own.path().join(CONFIG), config.to_string())?;
    Ok(own)
}

/// Gives a saved configuration other files for its disks; it must have these and no others.
fn with_disks(config: &mut Value, disks: &[Disk]) -> io::Result<()> {
    let wrong = |what: String| Err(io::Error::other(format!("its configuration {what}")));
    let Some(saved) = config["disks"].as_array_mut() else {
        return wrong("has no disks".into());
    };
    if saved.len() != disks.len() {
        return wrong(format!("has {} disks, not {}", saved.len(), disks.len()));
    }
    for disk in disks {
        let Some(one) = saved.iter_mut().find(|one| one["id"] == disk.id()) else {
            return wrong(format!("has no disk `{}`", disk.id()));
        };
        one["path"] = disk.path().into();
    }
    Ok(())
}

fn url(folder: &Path) -> Result<String, HypervisorError> {
    let text = folder.to_str().ok_or_else(|| {
        HypervisorError::Spec(format!("the path `{}` is not UTF-8", folder.display()))
    })?;
    Ok(format!("file://{text}"))
}

/// Whether a VMM of this process may have the guest's memory come as it is used.
pub(crate) fn has_userfaultfd() -> bool {
    const SETTING: &str = "/proc/sys/vm/unprivileged_userfaultfd";
    let device = OpenOptions::new().read(true).write(true).open(super::USERFAULTFD);
    device.is_ok() || fs::read_to_string(SETTING).is_ok_and(|text| text.trim() == "1")
}

/// Gives pieces of a file that are zero back: a guest that has just booted used little.
fn dig_holes(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(0).open(path)?;
    let len = file.metadata()?.len();
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < len {
        let part = usize::try_from(len - at).unwrap_or(PIECE).min(PIECE);
        file.read_exact_at(&mut piece[..part], at)?;
        if piece[..part].iter().all(|&byte| byte == 0) {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(&file, flags, at, part as u64) {
                Ok(()) => {}
                // A file system without holes holds it whole.
                Err(rustix::io::Errno::OPNOTSUPP) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        at += part as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_copy_has_disks_of_its_own_and_no_others() {
        let saved = || {
            serde_json::json!({"disks": [
                {"id": "modules", "path": "/m"}, {"id": "upper", "path": "/theirs", "readonly": false}
            ], "memory": 7})
        };
        let disks = [Disk::new("upper", "/ours"), Disk::new("modules", "/m")];
        let mut config = saved();
        with_disks(&mut config, &disks).unwrap();
        assert_eq!(config["disks"][1]["path"], "/ours");
        assert_eq!((&config["disks"][0]["path"], &config["memory"]), (&"/m".into(), &7.into()));
        for wrong in [&disks[..1], &[Disk::new("upper", "/o"), Disk::new("layer0", "/m")]] {
            assert!(with_disks(&mut saved(), wrong).is_err());
        }
        assert!(with_disks(&mut serde_json::json!({}), &disks).is_err());
    }

    #[test]
    fn zeros_take_no_room_and_all_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(MEMORY);
        let mut bytes = vec![0u8; 3 * PIECE + 100];
        bytes[PIECE + 5] = 7;
        bytes[3 * PIECE + 99] = 9;
        fs::write(&path, &bytes).unwrap();
        let before = fs::metadata(&path).unwrap().blocks();
        dig_holes(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), bytes);
        let after = fs::metadata(&path).unwrap().blocks();
        assert!(after <= before, "{after} {before}");
    }
}
