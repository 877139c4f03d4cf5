//! The initramfs: the static guest agent as `/init` and the kernel modules that it loads, as an
//! uncompressed cpio archive (unpacking a compressed one costs an emulated guest more).
//!
//! Kept in the cache by the digests of kernel and guest agent; the same input gives the same bytes.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::kernel::{Kernel, digest};

/// Changes when the archive's layout does.
const LAYOUT: &str = "v1";
/// How much of a digest names a file.
const DIGEST_SHOWN: usize = 20;

/// Says why there is no initramfs.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// The guest agent's program cannot be used.
    #[error(
        "the guest agent `{path}` cannot be used: {problem}; build it, or name it by `TOWLINE_GUEST_AGENT`"
    )]
    Agent {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A file could not be read or written.
    #[error("could not {action} `{path}` for the guest's initramfs")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Returns the initramfs for this kernel and guest agent, making it when it is not in the cache.
pub fn ensure(
    cache_dir: &Path,
    kernel: &Kernel,
    guest_agent: &Path,
) -> Result<PathBuf, InitramfsError> {
    let agent = read_agent(guest_agent)?;
    let agent_digest = digest(&agent);
    let dir = cache_dir.join("initramfs");
    let name = format!(
        "{}-{}-{LAYOUT}.cpio",
        &kernel.digest[..DIGEST_SHOWN.min(kernel.digest.len())],
        &agent_digest[..DIGEST_SHOWN]
    );
    let path = dir.join(name);
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(&dir).map_err(failed("create", &dir))?;
    let archive = build(kernel, &agent)?;
    let mut file =
        tempfile::NamedTempFile::new_in(&dir).map_err(failed("create a file in", &dir))?;
    file.write_all(&archive).map_err(failed("write", &path))?;
    file.as_file().sync_all().map_err(failed("write", &path))?;
    file.persist(&path).map_err(|error| failed("write", &path)(error.error))?;
    Ok(path)
}

fn read_agent(path: &Path) -> Result<Vec<u8>, InitramfsError> {
    let unusable = |problem: String| InitramfsError::Agent { path: path.to_owned(), problem };
    let bytes = fs::read(path).map_err(|error| unusable(error.to_string()))?;
    if !bytes.starts_with(b"\x7fELF") {
        return Err(unusable("it is not an ELF program".into()));
    }
    if has_interpreter(&bytes) {
        return Err(unusable("it is not linked statically".into()));
    }
    Ok(bytes)
}

/// Whether the program asks for a dynamic loader, which the guest does not have.
fn has_interpreter(elf: &[u8]) -> bool {
    let field = |at: usize, len: usize| -> Option<u64> {
        let bytes = elf.get(at..at.checked_add(len)?)?;
        Some(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    };
    let header = || {
        let table = usize::try_from(field(0x20, 8)?).ok()?;
        let size = usize::try_from(field(0x36, 2)?).ok()?;
        let count = usize::try_from(field(0x38, 2)?).ok()?;
        const PT_INTERP: u64 = 3;
        (0..count).find(|number| field(table.saturating_add(number * size), 4) == Some(PT_INTERP))
    };
    header().is_some()
}

fn build(kernel: &Kernel, agent: &[u8]) -> Result<Vec<u8>, InitramfsError> {
    let mut archive = Archive::default();
    for dir in ["dev", "proc", "sys", "run", "tmp", "modules"] {
        archive.add(dir, 0o040_755, (0, 0), &[]);
    }
    // Before devtmpfs is mounted, the kernel gives these to the guest agent.
    archive.add("dev/console", 0o020_600, (5, 1), &[]);
    archive.add("dev/null", 0o020_666, (1, 3), &[]);
    archive.add("init", 0o100_755, (0, 0), agent);
    for name in &kernel.module_order {
        let path = kernel.modules.join(name);
        let bytes = fs::read(&path).map_err(failed("read", &path))?;
        archive.add(&format!("modules/{name}"), 0o100_644, (0, 0), &bytes);
    }
    let order = kernel.module_order.join("\n") + "\n";
    archive.add("modules/order", 0o100_644, (0, 0), order.as_bytes());
    Ok(archive.finish())
}

/// A cpio archive in the "newc" format.
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let len = u32::try_from(content.len()).expect("a file of an initramfs is under 4 GiB");
        let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            len,
            0,
            0,
            device.0,
            device.1,
            u32::try_from(name.len() + 1).expect("names are short"),
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }
}

fn failed<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> InitramfsError + use<'a> {
    move |source| InitramfsError::Io { action, path: path.to_owned(), source }
}

#[cfg(test)]
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
mod tests {
    use super::*;

    fn kernel(dir: &Path) -> Kernel {
        fs::write(dir.join("a.ko"), b"module a").unwrap();
        Kernel {
            digest: "0123456789abcdef0123456789abcdef".into(),
            release: "6.1".into(),
            vmlinux: dir.join("vmlinux"),
            modules: dir.to_owned(),
            module_order: vec!["a.ko".into()],
            modules_disk: None,
        }
    }

    #[test]
    fn an_archive_holds_what_was_put_in_as_cpio_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let archive = build(&kernel(dir.path()), b"agent").unwrap();
        let mut listing = std::process::Command::new("cpio");
        listing.args(["-t", "--quiet"]).stdin(std::process::Stdio::piped());
        listing.stdout(std::process::Stdio::piped());
        let Ok(mut child) = listing.spawn() else {
            eprintln!("SKIPPED: cpio is not installed");
            return;
        };
        child.stdin.take().unwrap().write_all(&archive).unwrap();
        let output = child.wait_with_output().unwrap();
        let names = String::from_utf8(output.stdout).unwrap();
        let expected =
            "dev proc sys run tmp modules dev/console dev/null init modules/a.ko modules/order";
        assert_eq!(names.split_whitespace().collect::<Vec<_>>().join(" "), expected);
    }

    #[test]
    fn an_agent_that_is_not_a_static_program_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = kernel(dir.path());
        let script = dir.path().join("agent");
        fs::write(&script, "#!/bin/sh").unwrap();
        let error = ensure(dir.path(), &kernel, &script).unwrap_err().to_string();
        assert!(error.contains("not an ELF program"), "{error}");
        let dynamic = std::env::current_exe().unwrap();
        let error = ensure(dir.path(), &kernel, &dynamic).unwrap_err().to_string();
        assert!(error.contains("not linked statically"), "{error}");
    }
}
