//! A small Debian of this machine's own release, from a mirror that this machine already uses.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::cluster::in_path;
use crate::run::Running;

/// Of downloading about 40 MB and unpacking them, with all that it starts.
const BOUND_S: &str = "300";
/// Of that and some.
const BOUND: Duration = Duration::from_secs(360);
/// What slim images leave out.
const WITHOUT: [&str; 3] = ["doc", "locale", "man"];

/// Makes an archive of its root file system in `folder`, unless one is there. `Err` says what is
/// missing on this machine.
pub fn archive(folder: &Path) -> Result<PathBuf, String> {
    let release = release().ok_or("this machine is no Debian")?;
    let archive = folder.join(format!("debian-{release}.tar"));
    if archive.is_file() {
        return Ok(archive);
    }
    if !in_path("mmdebstrap") {
        return Err("`mmdebstrap` is not installed: make test installs it".into());
    }
    let mirror = mirror(&release).ok_or("apt knows no mirror of this machine's release")?;
    let scratch = tempfile::tempdir_in(folder).map_err(|error| error.to_string())?;
    let made = scratch.path().join("debian.tar");
    let mut command = Command::new("timeout");
    command.args([BOUND_S, "mmdebstrap", "--quiet", "--variant=essential"]);
    command.args(WITHOUT.map(|share| format!("--dpkgopt=path-exclude=/usr/share/{share}/*")));
    command.arg(release).arg(&made).arg(mirror).env("TMPDIR", scratch.path());
    let done = Running::start(&mut command, None).finish(BOUND);
    if done.code != 0 {
        return Err(format!("mmdebstrap ended with {}: {}", done.code, done.err().trim_end()));
    }
    std::fs::rename(made, &archive).map_err(|error| error.to_string())?;
    Ok(archive)
}

/// Its codename.
fn release() -> Option<String> {
    let text = std::fs::read_to_string("/etc/os-release").ok()?;
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
    value("ID=").filter(|id| *id == "debian").and(value("VERSION_CODENAME=")).map(str::to_owned)
}

fn mirror(release: &str) -> Option<String> {
    let mut command = Command::new("apt-get");
    command.args(["indextargets", "--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)"]);
    command.args(["Created-By: Packages", "Origin: Debian"]);
    let targets = String::from_utf8(command.output().ok()?.stdout).ok()?;
    let main = format!("{release} main ");
    targets.lines().find_map(|line| line.strip_prefix(&main)).map(str::to_owned)
}
