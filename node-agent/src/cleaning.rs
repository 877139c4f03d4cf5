//! What dead runs leave behind and no record names: temporary files of writers that were killed, and
//! VMs whose folder was removed under them.
//!
//! Left to `driver`: what a folder's record says. The invariant: in the data directory, which this
//! process holds alone, every temporary file is a dead one's; in the cache, which others share, only
//! one that is older than any writer takes.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::hypervisor::{Hypervisor, Vm};

/// How the names of files and folders begin that get their own name only when they are whole.
const TEMPORARY: &[&str] = &[".tmp", ".new-", ".disk-", ".template-", "unpack-"];
/// Folders of the cache that this process writes to; `images/tmp` has locks of its own.
const CACHE_FOLDERS: &[&str] = &["", "kernels", "initramfs", "disks", "images/local"];
/// The slowest writer, which downloads and unpacks the guest kernel, is done or dead by then.
const WRITER_MAX: Duration = Duration::from_secs(2 * 3600);
/// Data directory, `sandboxes`, a sandbox, its VM's folder.
const DEPTH_MAX: u32 = 3;

/// Removes the temporary files of dead runs. A failure leaves one more file, which does no harm.
pub fn remove_temporary(data: &Path, cache: &Path) {
    remove_in(data, Duration::ZERO, DEPTH_MAX);
    for folder in CACHE_FOLDERS {
        remove_in(&cache.join(folder), WRITER_MAX, 0);
    }
}

fn remove_in(folder: &Path, older: Duration, depth: u32) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(meta) = entry.metadata() else { continue };
        let name = entry.file_name();
        let temporary = name.to_str().is_some_and(is_temporary);
        let age = meta.modified().ok().and_then(|at| at.elapsed().ok()).unwrap_or_default();
        if temporary && age >= older {
            tracing::info!(path = %path.display(), "temporary file of a dead run removed");
            let _ = if meta.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        } else if meta.is_dir() && depth > 0 {
            remove_in(&path, older, depth - 1);
        }
    }
}

fn is_temporary(name: &str) -> bool {
    TEMPORARY.iter().any(|prefix| name.starts_with(prefix))
}

/// Ends VMs that run in a folder of `sandboxes` which is no longer there: their data directory was
/// removed, and nobody else would ever end them.
pub async fn end_strays(hypervisor: &dyn Hypervisor, sandboxes: &Path) {
    for vm in hypervisor.strays(sandboxes) {
        let pid = vm.identity().pid;
        tracing::warn!(pid, dir = %vm.dir().display(), "vm whose folder was removed is ended");
        end(&vm).await;
    }
}

async fn end(vm: &Vm) {
    match vm.kill() {
        Ok(()) => drop(vm.wait_exit().await),
        Err(error) => tracing::error!(%error, "it could not be killed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_dead_writer_left_goes() {
        let (data, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let vm = data.path().join("sandboxes/sandbox_x/vm");
        fs::create_dir_all(&vm).unwrap();
        fs::create_dir_all(cache.path().join("disks")).unwrap();
        fs::create_dir_all(cache.path().join("kernels/unpack-a/deep")).unwrap();
        let files = [
            (vm.join(".tmpAb"), false),
            (vm.join("vm.json"), true),
            (vm.parent().unwrap().join(".disk-1"), false),
            (data.path().join(".new-2"), false),
            (cache.path().join("disks/.template-3"), true),
            (cache.path().join("disks/ext4-1-v1.img"), true),
        ];
        for (path, _) in &files {
            fs::write(path, "x").unwrap();
        }
        remove_temporary(data.path(), cache.path());
        for (path, stays) in &files {
            assert_eq!(path.exists(), *stays, "{}", path.display());
        }
        // The cache's own go once nobody can be writing them any more.
        remove_in(&cache.path().join("disks"), Duration::ZERO, 0);
        remove_in(&cache.path().join("kernels"), Duration::ZERO, 0);
        assert!(!cache.path().join("disks/.template-3").exists());
        assert!(!cache.path().join("kernels/unpack-a").exists());
    }
}
