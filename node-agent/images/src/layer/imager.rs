//! Pipes a plain tar stream into `mksquashfs`, which makes the layer disk.
//!
//! What it is fed is our own normalised stream, never a stranger's bytes. Its options are part of
//! the disk's name: another version or option makes another disk.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::error::ImageError;

use super::listing::Meta;
use super::normal::WriteError;

/// Part of every layer disk's name: counts up when what we write changes.
const VERSION: &str = "towline layer 2, squashfs lz4";

/// Most of what mksquashfs says that is kept for an error.
const OUTPUT_MAX: u64 = 16 << 10;

/// Returns what makes the disks of this machine different from another's.
pub(crate) fn version() -> Result<String, ImageError> {
    let said = Command::new("mksquashfs").arg("-version").output().map_err(ImageError::NoImager)?;
    let said = String::from_utf8_lossy(&said.stdout);
    Ok(format!("{VERSION}, {}", said.lines().next().unwrap_or_default()))
}

/// Makes a disk at `path` of the stream that `write` writes.
pub(crate) fn make(
    path: &Path,
    root: &Meta,
    write: impl FnOnce(&mut dyn Write) -> Result<(), WriteError>,
) -> Result<(), ImageError> {
    let processors = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
    let mut child = Command::new("mksquashfs")
        .arg("-")
        .arg(path)
        .args(["-tar", "-noappend", "-quiet", "-no-progress", "-exit-on-error"])
        // A third larger than zstd, but reading it costs a third, which is what counts in a guest
        // whose processor is emulated.
        .args(["-comp", "lz4", "-b", "131072"])
        .args(["-mkfs-time", "0", "-no-exports", "-mem", "256M"])
        // Uncompressed inodes, so that the root's can be mended: see `set_root_time`.
        .arg("-noI")
        .args(["-processors", &processors.to_string()])
        .args(["-root-mode", &format!("{:o}", root.mode)])
        .args(["-root-uid", &root.uid.to_string(), "-root-gid", &root.gid.to_string()])
        .env_remove("SOURCE_DATE_EPOCH")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(ImageError::NoImager)?;
    let result = feed(&mut child, write);
    if result.is_err() {
        // It may wait for more input, or write a disk that nobody wants.
        let _ = child.kill();
    }
    let status = child.wait().map_err(|e| ImageError::io("wait for mksquashfs for", path, e))?;
    match result {
        Ok(_) if status.success() => {
            let time = u32::try_from(root.mtime.max(0)).unwrap_or(u32::MAX);
            set_root_time(path, time).map_err(|e| ImageError::io("finish", path, e))
        }
        Ok(output) => Err(failed(path, status.to_string(), output)),
        Err((WriteError::Image(error), _)) => Err(error),
        // A broken pipe says less than what mksquashfs said before.
        Err((WriteError::Output(error), output)) => Err(failed(path, error.to_string(), output)),
    }
}

/// Sets the root folder's time in a finished disk. mksquashfs 4.5 gives a root that a tar stream
/// does not describe the time of day, whatever its options say, and then no two disks are alike.
fn set_root_time(path: &Path, time: u32) -> io::Result<()> {
    /// From the squashfs 4.0 format: where the superblock says what, and the size of a metadata
    /// block, each of which begins with its length, the highest bit set if it is not compressed.
    const ROOT_INODE: usize = 32;
    const INODE_TABLE: usize = 64;
    const BLOCK: u64 = 8192;
    const INODE_TIME: u64 = 8;

    let bad = || io::Error::new(io::ErrorKind::InvalidData, "not a squashfs as it was asked for");
    let disk = File::options().read(true).write(true).open(path)?;
    let mut head = [0; 96];
    disk.read_exact_at(&mut head, 0)?;
    let word = |at: usize| {
        head[at..at + 8].iter().rev().fold(0, |word, byte| (word << 8) | u64::from(*byte))
    };
    let (root, table) = (word(ROOT_INODE), word(INODE_TABLE));
    let block = table.checked_add(root >> 16).ok_or_else(bad)?;
    let mut length = [0; 2];
    disk.read_exact_at(&mut length, block)?;
    if !head.starts_with(b"hsqs") || length[1] & 0x80 == 0 {
        return Err(bad());
    }
    for (at, byte) in (0..).zip(time.to_le_bytes()) {
        let inside = (root & 0xffff) + INODE_TIME + at;
        // Past the end of its block, an inode goes on behind the next one's length.
        let lengths = 2 * (1 + inside / BLOCK);
        disk.write_all_at(&[byte], block + lengths + inside)?;
    }
    Ok(())
}

type Fed = Result<String, (WriteError, String)>;

/// Writes the stream into the child while its output is read beside.
fn feed(child: &mut Child, write: impl FnOnce(&mut dyn Write) -> Result<(), WriteError>) -> Fed {
    let stdin = child.stdin.take();
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        let out = scope.spawn(move || stdout.map(keep_some).unwrap_or_default());
        let err = scope.spawn(move || stderr.map(keep_some).unwrap_or_default());
        let wrote = match stdin {
            Some(stdin) => {
                let mut stdin = BufWriter::with_capacity(256 << 10, stdin);
                let wrote = write(&mut stdin).and_then(|()| Ok(stdin.flush()?));
                if wrote.is_err() {
                    // Not finished: what is buffered must not be flushed by dropping.
                    let _ = stdin.into_parts();
                    let _ = child.kill();
                }
                wrote
            }
            None => Err(io::Error::from(io::ErrorKind::BrokenPipe).into()),
        };
        let said = [err.join().unwrap_or_default(), out.join().unwrap_or_default()].concat();
        match wrote {
            Ok(()) => Ok(said),
            Err(error) => Err((error, said)),
        }
    })
}

fn keep_some(mut from: impl Read) -> String {
    let mut kept = Vec::new();
    let _ = (&mut from).take(OUTPUT_MAX).read_to_end(&mut kept);
    let _ = io::copy(&mut from, &mut io::sink());
    String::from_utf8_lossy(&kept).into_owned()
}

fn failed(path: &Path, status: String, output: String) -> ImageError {
    if output.contains("No space left") || output.contains("Disk quota exceeded") {
        return ImageError::io("write", path, io::ErrorKind::StorageFull.into());
    }
    ImageError::Imager { status, output: output.trim().to_owned() }
}
