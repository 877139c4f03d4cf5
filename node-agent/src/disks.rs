//! Writable disks: sparse files with an empty ext4 file system, copied from a template made once per
//! size, so that a start does not wait for mke2fs.
//!
//! A disk appears under its name only when it is complete. The host never mounts one.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use tempfile::NamedTempFile;

/// Changes when the options of the file system do.
const LAYOUT: &str = "v1";
/// Smallest disk on which ext4 and an overlay are of use.
pub const DISK_MIN_MIB: u64 = 16;
const COPY_STEP: usize = 1 << 20;

/// Says why there is no disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The node's own disk is full.
    #[error("no space left on the node for `{path}`: free some, or remove sandboxes (`tow rm`)")]
    NoSpace {
        /// What was being written.
        path: PathBuf,
    },
    /// Any other failure.
    #[error("could not {action} `{path}`")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// mke2fs is missing or failed.
    #[error("could not make a file system with mke2fs (package e2fsprogs): {0}")]
    Format(String),
    /// Nonsense size.
    #[error("a disk of {0} MiB is too small; the least is {DISK_MIN_MIB} MiB")]
    TooSmall(u64),
}

/// Makes a writable disk of this size at `path`. One that is there already is kept.
pub fn create(cache_dir: &Path, path: &Path, size_mib: u64) -> Result<(), DiskError> {
    if path.exists() {
        return Ok(());
    }
    let file = copy_beside(&template(cache_dir, size_mib)?, path)?;
    file.as_file().sync_all().map_err(failed("write", path))?;
    file.persist(path).map_err(|error| failed("write", path)(error.error))?;
    Ok(())
}

/// Puts a copy of a disk at `path`, in the place of any that is there. It shares blocks where the file
/// system can.
pub fn replace(from: &Path, path: &Path) -> Result<(), DiskError> {
    let file = copy_beside(from, path)?;
    file.persist(path).map_err(|error| failed("write", path)(error.error))?;
    Ok(())
}

/// A copy that is to become `path`.
fn copy_beside(from: &Path, path: &Path) -> Result<NamedTempFile, DiskError> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let file = tempfile::Builder::new()
        .prefix(".disk-")
        .tempfile_in(parent)
        .map_err(failed("create a file in", parent))?;
    copy_sparse(from, file.as_file()).map_err(failed("write", path))?;
    Ok(file)
}

/// Makes the template for disks of this size, if it is not there; a node does so ahead of time for
/// the usual size.
pub fn template(cache_dir: &Path, size_mib: u64) -> Result<PathBuf, DiskError> {
    if size_mib < DISK_MIN_MIB {
        return Err(DiskError::TooSmall(size_mib));
    }
    let dir = cache_dir.join("disks");
    let path = dir.join(format!("ext4-{size_mib}-{LAYOUT}.img"));
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(&dir).map_err(failed("create", &dir))?;
    let file = tempfile::Builder::new()
        .prefix(".template-")
        .tempfile_in(&dir)
        .map_err(failed("create a file in", &dir))?;
    file.as_file().set_len(size_mib << 20).map_err(failed("size", &path))?;
    format(file.path())?;
    file.as_file().sync_all().map_err(failed("write", &path))?;
    file.persist(&path).map_err(|error| failed("write", &path)(error.error))?;
    Ok(path)
}

fn format(path: &Path) -> Result<(), DiskError> {
    // Debian keeps it where an ordinary user's PATH does not look.
    let path_env = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = Command::new("mke2fs")
        .env("PATH", path_env)
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal"])
        .args(["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0", "-L", "towline"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| DiskError::Format(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if text.contains("No space left") {
        return Err(DiskError::NoSpace { path: path.to_owned() });
    }
    Err(DiskError::Format(text))
}

/// Copies only what is not a hole; shares the blocks where the file system can.
fn copy_sparse(from: &Path, to: &File) -> io::Result<()> {
    let from = File::open(from)?;
    let len = from.metadata()?.len();
    to.set_len(len)?;
    if ioctl_ficlone(to, &from).is_ok() {
        return Ok(());
    }
    let mut at = 0;
    while at < len {
        let start = match seek(&from, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(&from, SeekFrom::Hole(start))?;
        copy_range(&from, to, start, end)?;
        at = end;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, mut at: u64, end: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; COPY_STEP];
    while at < end {
        let step = usize::try_from(end - at).unwrap_or(COPY_STEP).min(COPY_STEP);
        let len = from.read_at(&mut buffer[..step], at)?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        to.write_all_at(&buffer[..len], at)?;
        at += len as u64;
    }
    Ok(())
}

fn failed<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> DiskError + use<'a> {
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            DiskError::NoSpace { path: path.to_owned() }
        }
        _ => DiskError::Io { action, path: path.to_owned(), source },
    }
}

#[cfg(test)]
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_disk_is_large_to_its_guest_and_small_on_the_node() {
        if !Path::new("/usr/sbin/mke2fs").exists() && !Path::new("/sbin/mke2fs").exists() {
            eprintln!("SKIPPED: mke2fs is not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("upper.img");
        create(dir.path(), &disk, 20 << 10).unwrap();
        let meta = fs::metadata(&disk).unwrap();
        assert_eq!(meta.len(), 20 << 30);
        assert!(meta.blocks() * 512 < 64 << 20, "{} blocks", meta.blocks());
        // Made again, it stays what it is.
        let inode = meta.ino();
        create(dir.path(), &disk, 20 << 10).unwrap();
        assert_eq!(fs::metadata(&disk).unwrap().ino(), inode);
        let check = Command::new("/sbin/e2fsck").args(["-n", "-f"]).arg(&disk).output();
        if let Ok(check) = check {
            assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
        }
    }

    #[test]
    fn a_full_node_says_so() {
        let error = failed("write", Path::new("/x"))(io::Error::from_raw_os_error(28));
        assert!(matches!(error, DiskError::NoSpace { .. }), "{error}");
        assert!(matches!(template(Path::new("/nonexistent"), 1), Err(DiskError::TooSmall(1))));
    }
}
