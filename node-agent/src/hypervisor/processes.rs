//! Facts about processes from /proc: what makes one the same as before.

use std::fs;
use std::path::{Path, PathBuf};

/// Identifies this boot of the machine.
pub(super) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// When the process was started, in clock ticks since boot; `None` if it is not there or a zombie.
pub(super) fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in parentheses that may hold anything.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The program that the process runs.
pub(super) fn executable(pid: i32) -> Option<PathBuf> {
    let path = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    // A program that was upgraded under it is still the same process.
    let text = path.to_str()?;
    Some(PathBuf::from(text.strip_suffix(" (deleted)").unwrap_or(text)))
}

/// The processes of this program that run in this directory.
pub(super) fn running_in(dir: &Path, program: &Path) -> Vec<i32> {
    let Ok(dir) = fs::canonicalize(dir) else { return Vec::new() };
    let program = fs::canonicalize(program).unwrap_or_else(|_| program.to_owned());
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|&pid: &i32| {
            executable(pid).as_deref() == Some(&program)
                && fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == dir)
        })
        .collect()
}
