//! The guest kernel: Debian's cloud kernel package, downloaded, unpacked and kept by its digest,
//! never installed on the host.
//!
//! Calling `ensure` twice, or from several processes at once, is fine; it needs no privilege. What
//! lies under a digest's name is complete: it was renamed there as the last step.

mod bzimage;
mod modules;
mod modules_disk;
mod package;

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

/// Changes when what is kept of a package changes, so that older caches are not mistaken for it.
const LAYOUT: &str = "v5";
/// The disk of all modules.
const MODULES_DISK: &str = "modules.squashfs";

/// A guest kernel that is ready to be booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// SHA-256 of the package that it comes from, in hexadecimal.
    pub digest: String,
    /// `uname -r` in the guest.
    pub release: String,
    /// The uncompressed ELF with a PVH entry.
    pub vmlinux: PathBuf,
    /// Where its `.ko` files are.
    pub modules: PathBuf,
    /// The module files in the order of loading.
    pub module_order: Vec<String>,
    /// All of its modules as a disk for guests, where it could be made.
    pub modules_disk: Option<PathBuf>,
}

impl Kernel {
    /// Whether the guest agent loads this module; else it is built in.
    pub fn has_module(&self, name: &str) -> bool {
        let name_of = |file: &String| file.trim_end_matches(".ko").replace('-', "_");
        self.module_order.iter().any(|file| name_of(file) == name)
    }
}

/// Says why there is no guest kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A file of the cache could not be read or written.
    #[error("could not {action} `{path}` for the guest kernel's cache")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// apt or dpkg failed.
    #[error("{doing}: `{command}` {problem}")]
    Tool {
        /// What it was for.
        doing: &'static str,
        /// The command line.
        command: String,
        /// How it failed, with the end of its output.
        problem: String,
    },
    /// The package is not what a cloud kernel package should be.
    #[error("the kernel package `{package}` cannot be used: {problem}")]
    Package {
        /// The package.
        package: String,
        /// What is wrong.
        problem: String,
    },
}

/// Returns the guest kernel of this cache, fetching it when it is not there. Blocks, for minutes when
/// it must download; `progress` is told what it does then.
pub fn ensure(cache_dir: &Path, progress: &dyn Fn(&str)) -> Result<Kernel, KernelError> {
    let kernels = cache_dir.join("kernels");
    if let Some(kernel) = cached(&kernels) {
        return Ok(kernel);
    }
    fs::create_dir_all(&kernels).map_err(failed("create", &kernels))?;
    let lock_path = kernels.join("lock");
    let lock = File::create(&lock_path).map_err(failed("create", &lock_path))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        progress("waiting for another process that fetches the guest kernel");
        flock(&lock, FlockOperation::LockExclusive)
            .map_err(io::Error::from)
            .map_err(failed("lock", &lock_path))?;
    }
    if let Some(kernel) = cached(&kernels) {
        return Ok(kernel);
    }
    let work = tempfile::Builder::new()
        .prefix("unpack-")
        .tempdir_in(&kernels)
        .map_err(failed("create a directory in", &kernels))?;
    let deb = package::download(work.path(), progress)?;
    install(&kernels, work.path(), &deb, progress)
}

/// The kernel that `<kernels>/current` names, if all of it is there.
fn cached(kernels: &Path) -> Option<Kernel> {
    let name = fs::read_to_string(kernels.join("current")).ok()?;
    let digest = name.trim().strip_suffix(&format!("-{LAYOUT}"))?;
    open(&kernels.join(name.trim()), digest).ok()
}

fn open(dir: &Path, digest: &str) -> io::Result<Kernel> {
    let release = fs::read_to_string(dir.join("release"))?.trim().to_owned();
    let order = fs::read_to_string(dir.join("modules/order"))?;
    let vmlinux = dir.join("vmlinux");
    fs::metadata(&vmlinux)?;
    let modules_disk = dir.join(MODULES_DISK);
    Ok(Kernel {
        digest: digest.to_owned(),
        release,
        vmlinux,
        modules: dir.join("modules"),
        module_order: order.lines().map(str::to_owned).collect(),
        modules_disk: modules_disk.exists().then_some(modules_disk),
    })
}

fn install(
    kernels: &Path,
    work: &Path,
    deb: &Path,
    progress: &dyn Fn(&str),
) -> Result<Kernel, KernelError> {
    progress("unpacking the guest kernel");
    let digest = file_digest(deb).map_err(failed("read", deb))?;
    let unpacked = work.join("unpacked");
    package::unpack(deb, &unpacked)?;
    let (image, release) = find_image(&unpacked).map_err(|problem| bad_package(deb, problem))?;
    let bytes = fs::read(&image).map_err(failed("read", &image))?;
    let vmlinux = bzimage::vmlinux(&bytes).map_err(|problem| bad_package(deb, problem))?;
    let done = work.join("done");
    let modules = done.join("modules");
    fs::create_dir_all(&modules).map_err(failed("create", &modules))?;
    let tree = [unpacked.join("lib/modules"), unpacked.join("usr/lib/modules")]
        .map(|dir| dir.join(&release))
        .into_iter()
        .find(|dir| dir.is_dir())
        .ok_or_else(|| bad_package(deb, "it has no lib/modules".into()))?;
    let order = modules::select(&tree, &modules).map_err(|problem| bad_package(deb, problem))?;
    write_synced(&modules.join("order"), order.join("\n").as_bytes())?;
    write_synced(&done.join("vmlinux"), &vmlinux)?;
    if let Err(error) = modules_disk::make(&tree, &done.join(MODULES_DISK)) {
        progress(&format!("guests will have no /lib/modules: {error}"));
    }
    write_synced(&done.join("release"), release.as_bytes())?;
    let name = format!("{digest}-{LAYOUT}");
    let place = kernels.join(&name);
    // A rest without a `current` that names it is of a version that we would not have accepted.
    if place.exists() {
        fs::remove_dir_all(&place).map_err(failed("remove", &place))?;
    }
    fs::rename(&done, &place).map_err(failed("rename a directory to", &place))?;
    write_synced(&work.join("current"), name.as_bytes())?;
    let current = kernels.join("current");
    fs::rename(work.join("current"), &current).map_err(failed("write", &current))?;
    open(&place, &digest).map_err(failed("read", &place))
}

/// The kernel image of the unpacked package, and its release.
fn find_image(unpacked: &Path) -> Result<(PathBuf, String), String> {
    for dir in [unpacked.join("boot"), unpacked.join("usr/lib/linux")] {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if let Some(release) = name.to_str().and_then(|name| name.strip_prefix("vmlinuz-")) {
                return Ok((entry.path(), release.to_owned()));
            }
        }
    }
    Err("it has no boot/vmlinuz-*".into())
}

/// SHA-256 of a file, in hexadecimal.
fn file_digest(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let len = file.read(&mut buffer)?;
        if len == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..len]);
    }
}

/// SHA-256 of bytes, in hexadecimal.
pub(crate) fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), KernelError> {
    let write = || {
        let mut file = File::create(path)?;
        io::Write::write_all(&mut file, bytes)?;
        file.sync_all()
    };
    write().map_err(failed("write", path))
}

fn failed<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> KernelError + use<'a> {
    move |source| KernelError::Io { action, path: path.to_owned(), source }
}

fn bad_package(deb: &Path, problem: String) -> KernelError {
    let package = deb.file_name().unwrap_or_default().to_string_lossy().into_owned();
    KernelError::Package { package, problem }
}
