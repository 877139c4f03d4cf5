//! Pipes a plain tar stream into `mksquashfs`, which makes the layer disk.
//!
//! What it is fed is our own normalised stream, never a stranger's bytes. Its options are part of
//! the disk's name: another version or option makes another disk.

use std::io::{self, BufWriter, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::error::ImageError;

use super::listing::Meta;
use super::normal::WriteError;

/// Part of every layer disk's name: counts up when what we write changes.
const VERSION: &str = "towline layer 1, squashfs lz4";

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
        .args(["-processors", &processors.to_string()])
        .args(["-root-mode", &format!("{:o}", root.mode)])
        .args(["-root-uid", &root.uid.to_string(), "-root-gid", &root.gid.to_string()])
        .args(["-root-time", &root.mtime.clamp(0, i64::from(u32::MAX)).to_string()])
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
        Ok(_) if status.success() => Ok(()),
        Ok(output) => Err(failed(path, status.to_string(), output)),
        Err((WriteError::Image(error), _)) => Err(error),
        // A broken pipe says less than what mksquashfs said before.
        Err((WriteError::Output(error), output)) => Err(failed(path, error.to_string(), output)),
    }
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
