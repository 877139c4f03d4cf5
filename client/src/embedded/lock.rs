//! Who supervises: a lock on a file that holds the supervisor's pid.
//!
//! The kernel gives the lock back when its holder dies, however it dies. A pid is used only while
//! the lock is held by somebody, through a pidfd taken before that was checked again.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::config::ensure_private_dir;

/// The lock, held until dropped.
#[derive(Debug)]
pub(super) struct Lock(#[expect(dead_code, reason = "closing it gives the lock back")] File);

impl Lock {
    /// Takes the lock; `None` when somebody else has it.
    pub(super) fn try_take(path: &Path) -> io::Result<Option<Self>> {
        let mut file = open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        file.set_len(0)?;
        write!(file, "{}", std::process::id())?;
        Ok(Some(Self(file)))
    }
}

/// The running supervisor of another process.
#[derive(Debug)]
pub struct Holder {
    /// Its pid.
    pub pid: u32,
    fd: OwnedFd,
}

impl Holder {
    /// Returns whoever holds the lock.
    pub fn find(path: &Path) -> io::Result<Option<Self>> {
        let Some(pid) = read_held(path)? else { return Ok(None) };
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let Some(raw) = raw else { return Ok(None) };
        let fd = match pidfd_open(raw, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // The pid may have been another process's by the time it was opened.
        Ok((read_held(path)? == Some(pid)).then_some(Self { pid, fd }))
    }

    /// Asks it to stop.
    pub fn terminate(&self) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.fd, Signal::TERM)?)
    }

    /// Waits until it is gone; false when the time is over.
    pub fn wait(&self, bound: Duration) -> io::Result<bool> {
        let bound = Timespec::try_from(bound).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        Ok(poll(&mut fds, Some(&bound))? > 0)
    }
}

/// Returns the pid in the file if the file is locked.
fn read_held(path: &Path) -> io::Result<Option<u32>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => return Ok(None),
        Err(rustix::io::Errno::WOULDBLOCK) => {}
        Err(error) => return Err(error.into()),
    }
    let mut text = String::new();
    file.rewind()?;
    file.read_to_string(&mut text)?;
    Ok(text.trim().parse().ok())
}

fn open(path: &Path) -> io::Result<File> {
    if let Some(dir) = path.parent() {
        ensure_private_dir(dir)?;
    }
    File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_holds_it_and_others_see_who() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        assert!(Holder::find(&path).unwrap().is_none(), "no file, no holder");
        let held = Lock::try_take(&path).unwrap().unwrap();
        assert!(Lock::try_take(&path).unwrap().is_none());
        assert_eq!(Holder::find(&path).unwrap().unwrap().pid, std::process::id());
        drop(held);
        assert!(Holder::find(&path).unwrap().is_none(), "a pid without a lock is nobody");
        assert!(Lock::try_take(&path).unwrap().is_some());
    }
}
