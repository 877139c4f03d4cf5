//! Facts about processes from /proc: what makes one the same as before.

use std::fs;
use std::path::{Path, PathBuf};

pub(super) use towline_node_helper::process::start_time;

/// Identifies this boot of the machine.
pub(super) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// The program that the process runs.
pub(super) fn executable(pid: i32) -> Option<PathBuf> {
    let path = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    // A program that was upgraded under it is still the same process.
    let text = path.to_str()?;
    Some(PathBuf::from(text.strip_suffix(" (deleted)").unwrap_or(text)))
}

/// The processes of this program that run beneath this folder in a directory that was removed.
pub(super) fn running_in_removed(folder: &Path, program: &Path) -> Vec<(i32, PathBuf)> {
    let folder = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    of_program(program)
        .filter_map(|pid| {
            let cwd = fs::read_link(format!("/proc/{pid}/cwd")).ok()?;
            let dir = PathBuf::from(cwd.to_str()?.strip_suffix(" (deleted)")?);
            dir.starts_with(&folder).then_some((pid, dir))
        })
        .collect()
}

/// The processes of this program that run in this directory.
pub(super) fn running_in(dir: &Path, program: &Path) -> Vec<i32> {
    let Ok(dir) = fs::canonicalize(dir) else { return Vec::new() };
    of_program(program)
        .filter(|pid| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == dir))
        .collect()
}

/// The processes of this program.
pub(super) fn of_program(program: &Path) -> impl Iterator<Item = i32> + use<> {
    let program = fs::canonicalize(program).unwrap_or_else(|_| program.to_owned());
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(move |&pid: &i32| executable(pid).as_deref() == Some(&program))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_is_found_by_its_directory_also_when_that_is_gone() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("one/vm");
        fs::create_dir_all(&dir).unwrap();
        let mut child = Command::new("sleep").arg("1000").current_dir(&dir).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let program = executable(pid).unwrap();
        let found = (running_in(&dir, &program), running_in_removed(root.path(), &program));
        fs::remove_dir_all(root.path().join("one")).unwrap();
        let gone = running_in_removed(root.path(), &program);
        let other = running_in_removed(&root.path().join("two"), &program);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, (vec![pid], vec![]));
        assert_eq!(gone, [(pid, fs::canonicalize(root.path()).unwrap().join("one/vm"))]);
        assert_eq!(other, []);
    }
}
