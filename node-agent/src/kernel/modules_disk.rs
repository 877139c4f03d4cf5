//! All modules of the guest kernel as one read-only disk, which every guest finds at /lib/modules:
//! with `modprobe` in its image, root in a sandbox can load what docker and others ask for.
//!
//! Made once per kernel. What finds modules by name (`modules.dep` and its like) is made by depmod.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::package::run;
use super::{KernelError, failed};

const TOOL_MAX: Duration = Duration::from_secs(300);

/// Makes the disk of a module tree (`lib/modules/<release>`) at `path`.
pub(super) fn make(tree: &Path, path: &Path) -> Result<(), KernelError> {
    let (Some(modules), Some(release)) = (tree.parent(), tree.file_name()) else { return Ok(()) };
    let work = path.with_extension("work");
    // depmod looks for lib/modules beneath a base, wherever the package has it.
    let base = work.join("lib");
    fs::create_dir_all(&base).map_err(failed("create", &base))?;
    let link = base.join("modules");
    std::os::unix::fs::symlink(modules, &link).map_err(failed("create", &link))?;
    let mut depmod = tool("depmod");
    depmod.arg("-b").arg(&work).arg(release);
    let indexed = run("listing the guest kernel's modules (package kmod)", depmod, &work, TOOL_MAX);
    fs::remove_dir_all(&work).map_err(failed("remove", &work))?;
    indexed?;
    let mut squash = tool("mksquashfs");
    squash.arg(modules).arg(path).args(["-noappend", "-quiet", "-no-progress", "-no-xattrs"]);
    squash.args(["-all-root", "-comp", "lz4", "-mkfs-time", "0"]);
    let made = run("making the disk of the guest kernel's modules", squash, path, TOOL_MAX);
    if made.is_err() {
        // A part of it must not be taken for the whole.
        let _ = fs::remove_file(path);
    }
    made.map(drop)
}

/// Debian keeps some where an ordinary user's PATH does not look.
fn tool(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin");
    command.env_remove("SOURCE_DATE_EPOCH");
    command
}
