//! What `tow doctor --fix` can mend by itself: the user's own folders, sockets, processes and
//! certificate, and an embedded cluster that died.
//!
//! It never becomes another user and removes nothing that holds somebody's work. Each fix may be
//! made twice. Left to `doctor`: finding out what is wrong.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::embedded::{self, Layout};
use crate::output::Printer;

/// Something that can be done about a failed check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fix {
    /// Give a folder of ours the mode that it must have.
    Mode(PathBuf, u32),
    /// Remove a socket that nobody listens on.
    Socket(PathBuf),
    /// Start the embedded cluster, which died.
    Start,
    /// Get a new certificate from the embedded cluster.
    Renew,
    /// End VMs whose folder was removed.
    End(Vec<i32>),
}

impl Fix {
    /// What it would do, for people.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Mode(path, mode) => format!("set the mode of `{}` to {mode:04o}", path.display()),
            Self::Socket(path) => format!("remove `{}`", path.display()),
            Self::Start => "start the embedded cluster".into(),
            Self::Renew => "get a new certificate from the embedded cluster".into(),
            Self::End(pids) => format!("end the processes {pids:?}"),
        }
    }

    /// Does it; says what was done.
    pub(super) async fn apply(&self, layout: &Layout, printer: &Printer) -> anyhow::Result<String> {
        match self {
            Self::Mode(path, mode) => {
                fs::set_permissions(path, fs::Permissions::from_mode(*mode))
                    .with_context(|| format!("could not change `{}`", path.display()))?;
                Ok(format!("`{}` has mode {mode:04o} now", path.display()))
            }
            Self::Socket(path) => match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(error).with_context(|| format!("could not remove `{}`", path.display()))
                }
                _ => Ok(format!("removed `{}`, which nobody listened on", path.display())),
            },
            Self::Start => {
                embedded::ensure_started(layout, printer).await?;
                Ok("started the embedded cluster".into())
            }
            Self::Renew => {
                embedded::renew_user(layout).await?;
                Ok("got a new certificate".into())
            }
            Self::End(pids) => {
                let strays = strays(layout);
                let ended = pids.iter().filter(|pid| strays.contains(pid) && kill(**pid)).count();
                Ok(format!("ended {ended} processes"))
            }
        }
    }
}

/// A folder that we must be able to write to: what is wrong with it, and what would mend it.
pub(super) fn folder(path: &Path) -> Result<(), (String, Option<Fix>)> {
    let meta = match fs::metadata(path) {
        // Whoever needs it makes it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err((format!("`{}`: {error}", path.display()), None)),
        Ok(meta) => meta,
    };
    let ours = meta.uid() == rustix::process::geteuid().as_raw();
    if !ours && !rustix::process::geteuid().is_root() {
        return Err((format!("`{}` belongs to uid {}", path.display(), meta.uid()), None));
    }
    let mode = meta.mode() & 0o7777;
    if !meta.is_dir() {
        return Err((format!("`{}` is not a folder", path.display()), None));
    }
    if mode & 0o700 != 0o700 {
        let fix = Fix::Mode(path.to_owned(), mode | 0o700);
        return Err((format!("`{}` has mode {mode:04o}", path.display()), Some(fix)));
    }
    match tempfile::Builder::new().prefix(".tow-doctor-").tempfile_in(path) {
        Ok(_) => Ok(()),
        Err(error) => Err((format!("`{}` cannot be written to: {error}", path.display()), None)),
    }
}

/// VMs of this embedded node whose folder is gone: nobody else will end them while no node agent
/// is started.
pub(super) fn strays(layout: &Layout) -> Vec<i32> {
    let sandboxes = layout.node().join("sandboxes");
    let parent = fs::canonicalize(&layout.data).unwrap_or_else(|_| layout.data.clone());
    let real = parent.join("node/sandboxes");
    let is_stray = |pid: &i32| {
        let link = |name: &str| fs::read_link(format!("/proc/{pid}/{name}")).ok();
        let program =
            link("exe").and_then(|exe| Some(exe.file_name()?.to_string_lossy().into_owned()));
        let vmm = program.is_some_and(|name| name.starts_with("qemu-system-"));
        let gone = link("cwd")
            .and_then(|cwd| Some(PathBuf::from(cwd.to_str()?.strip_suffix(" (deleted)")?)));
        vmm && gone.is_some_and(|dir| dir.starts_with(&real) || dir.starts_with(&sandboxes))
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_stray).collect()
}

fn kill(pid: i32) -> bool {
    let fd = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    fd.is_some_and(|fd| pidfd_send_signal(&fd, Signal::KILL).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_lost_its_rights_is_mended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        assert_eq!(folder(&path), Ok(()), "what is missing is made when needed");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o500)).unwrap();
        let (_, fix) = folder(&path).unwrap_err();
        let Some(Fix::Mode(_, mode)) = fix else { panic!("{fix:?}") };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!((mode, folder(&path)), (0o700, Ok(())));
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(folder(&dir.path().join("file")).unwrap_err().0.contains("not a folder"));
    }
}
