//! Ends the FUSE connections of a sandbox that is being killed. A process that waits for an answer
//! which was promised cannot be killed before the connection ends, and that ends by itself only when
//! nobody holds its device any more; where a thread of the server itself waits, somebody always does.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// What the guest agent calls its mount: no other is touched.
const SOURCE: &str = "towline";

/// Aborts the connections of the local images that these processes see.
pub(super) fn abort(processes: &[i32]) -> io::Result<()> {
    let connections: BTreeSet<u32> = processes.iter().flat_map(|&pid| seen_by(pid)).collect();
    if connections.is_empty() {
        return Ok(());
    }
    let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let none = MountAttrFlags::empty();
    let control = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, none)?;
    for connection in connections {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        match openat(&control, format!("{connection}/abort"), flags, Mode::empty()) {
            Ok(abort) => drop(rustix::io::write(abort, b"1")?),
            // It has ended meanwhile.
            Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Of each thread: one that ends shows nothing any more, while others still wait.
fn seen_by(pid: i32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mounts =
        threads.filter_map(|thread| fs::read_to_string(thread.path().join("mountinfo")).ok());
    mounts.flat_map(|text| text.lines().filter_map(connection).collect::<Vec<_>>()).collect()
}

/// The number of the connection in a line of a mountinfo, if it is one of a local image.
fn connection(line: &str) -> Option<u32> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut file_system = file_system.split(' ');
    if (file_system.next()?, file_system.next()?) != ("fuse", SOURCE) {
        return None;
    }
    mount.split(' ').nth(2)?.strip_prefix("0:")?.parse().ok()
}

#[cfg(test)]
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::process::{Command, Stdio};

    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

    use super::*;

    #[test]
    fn only_local_images_are_told_from_other_mounts() {
        let line = "45 44 0:39 / /lower ro,nodev - fuse towline ro,user_id=0,group_id=0";
        assert_eq!(connection(line), Some(39));
        for other in [
            "45 44 0:39 / /x rw shared:1 - fuse sshfs rw",
            "45 44 0:39 / /x rw - ext4 towline rw",
            "45 44 8:1 / /x rw - fuse towline rw",
            "",
        ] {
            assert_eq!(connection(other), None, "{other}");
        }
    }

    #[test]
    fn who_waits_for_ever_is_let_go() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: mounting needs root");
            return;
        }
        let place = tempfile::tempdir().unwrap();
        let device = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(device) => device,
            Err(error) => {
                eprintln!("SKIPPED: /dev/fuse: {error}");
                return;
            }
        };
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0\0", device.as_raw_fd());
        let options = std::ffi::CStr::from_bytes_with_nul(options.as_bytes()).unwrap();
        mount(SOURCE, place.path(), "fuse", MountFlags::empty(), options).unwrap();
        // Nobody answers, and the device stays open here.
        let mut waits = Command::new("cat")
            .arg(place.path().join("file"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pid = i32::try_from(waits.id()).unwrap();
        while !fs::read_to_string(format!("/proc/{pid}/comm")).unwrap().starts_with("cat") {
            std::thread::yield_now();
        }
        assert_eq!(waits.try_wait().unwrap(), None);
        let aborted = abort(&[pid]);
        let ended = waits.wait().unwrap();
        unmount(place.path(), UnmountFlags::DETACH).unwrap();
        aborted.unwrap();
        assert!(!ended.success());
    }
}
