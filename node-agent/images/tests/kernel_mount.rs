//! The local image through this machine's own kernel: a FUSE mount served by [`Server::handle`].
#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "a test that fails, fails here")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustix::mount::{MountFlags, UnmountFlags};
use towline_images::local::{self, Server};

/// A mount that ends with the test, also when it fails.
struct Mount(tempfile::TempDir);

impl Mount {
    /// Mounts a server; `None`, with a word why, where this user or machine cannot.
    fn new(server: Server) -> Option<Mount> {
        let device = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(device) => device,
            Err(error) => {
                eprintln!("SKIPPED: /dev/fuse: {error}");
                return None;
            }
        };
        let at = tempfile::tempdir().unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions",
            device.as_raw_fd()
        );
        let options = std::ffi::CString::new(options).unwrap();
        let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID;
        if let Err(error) =
            rustix::mount::mount("towline", at.path(), "fuse", flags, Some(options.as_c_str()))
        {
            eprintln!("SKIPPED: mounting FUSE needs root: {error}");
            return None;
        }
        let server = Arc::new(server);
        for _ in 0..2 {
            let (device, server) = (device.try_clone().unwrap(), Arc::clone(&server));
            // Ends when the mount does: reading the device then fails.
            std::thread::spawn(move || serve(device, &server));
        }
        Some(Mount(at))
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

fn serve(mut device: File, server: &Server) {
    const INIT: u32 = 26;
    let mut buffer = vec![0; (1 << 20) + 8192];
    while let Ok(n) = device.read(&mut buffer) {
        let request = &buffer[..n];
        let opcode = u32::from_le_bytes(request[4..8].try_into().unwrap());
        let answer = if opcode == INIT { Some(init(request)) } else { server.handle(request) };
        // An answer to what was interrupted is refused: nothing to do about it.
        let _ = answer.map(|answer| device.write(&answer));
    }
}

/// What the guest agent answers: async reads, READDIRPLUS, no OPEN, up to 256 pages a request.
fn init(request: &[u8]) -> Vec<u8> {
    const FLAGS: u32 = 1 | 1 << 13 | 1 << 14 | 1 << 17 | 1 << 22 | 1 << 23 | 1 << 24;
    let mut out = vec![0; 80];
    out[..4].copy_from_slice(&80u32.to_le_bytes());
    out[8..16].copy_from_slice(&request[8..16]);
    out[16..20].copy_from_slice(&7u32.to_le_bytes());
    out[20..24].copy_from_slice(&31u32.to_le_bytes());
    out[24..28].copy_from_slice(&(1u32 << 20).to_le_bytes());
    out[28..32].copy_from_slice(&FLAGS.to_le_bytes());
    out[36..40].copy_from_slice(&(1u32 << 20).to_le_bytes());
    out[44..46].copy_from_slice(&256u16.to_le_bytes());
    out
}

/// Compares two trees entry by entry: names, kinds, modes, owners, sizes, times, content.
fn compare(one: &Path, other: &Path, compared: &mut usize) {
    let meta = |path: &Path| {
        let meta = fs::symlink_metadata(path).unwrap();
        let size = if meta.is_dir() { 0 } else { meta.size() };
        (meta.mode(), meta.uid(), meta.gid(), size, meta.mtime(), meta.mtime_nsec())
    };
    assert_eq!(meta(one), meta(other), "{}", one.display());
    *compared += 1;
    let kind = fs::symlink_metadata(one).unwrap().file_type();
    if kind.is_symlink() {
        assert_eq!(fs::read_link(one).unwrap(), fs::read_link(other).unwrap());
    } else if kind.is_dir() {
        let names = |path: &Path| {
            let mut names: Vec<_> =
                fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(one), names(other), "{}", one.display());
        for name in names(one) {
            compare(&one.join(&name), &other.join(&name), compared);
        }
    } else {
        assert!(fs::read(one).unwrap() == fs::read(other).unwrap(), "{}", one.display());
    }
}

#[test]
fn a_kernel_sees_the_same_tree() {
    let machine = tempfile::tempdir().unwrap();
    let cache = tempfile::tempdir().unwrap();
    let at = |path: &str| machine.path().join(path);
    fs::create_dir_all(at("usr/lib/many")).unwrap();
    fs::create_dir_all(at("usr/bin")).unwrap();
    for folder in ["usr", "usr/lib", "usr/lib/many", "usr/bin"] {
        fs::set_permissions(at(folder), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let write = |path: &str, mode: u32, content: &[u8]| {
        fs::write(at(path), content).unwrap();
        fs::set_permissions(at(path), fs::Permissions::from_mode(mode)).unwrap();
    };
    let big: Vec<u8> = (0..1_500_000u32).flat_map(u32::to_le_bytes).collect();
    write("usr/lib/big", 0o644, &big);
    write("usr/lib/empty", 0o444, b"");
    write("usr/bin/tool", 0o755, b"#!/bin/sh\necho it runs\n");
    for n in 0..2000 {
        write(&format!("usr/lib/many/{}-{n}", "long".repeat(n % 60)), 0o644, &[7; 100]);
    }
    symlink("../bin/tool", at("usr/lib/link")).unwrap();
    fs::hard_link(at("usr/bin/tool"), at("usr/bin/same")).unwrap();

    let built =
        local::build(cache.path(), machine.path(), Path::new("/home/u"), &mut |_| {}).unwrap();
    let Some(mount) = Mount::new(local::serve(built.manifest, machine.path()).unwrap()) else {
        return;
    };
    let mut compared = 0;
    compare(&at("usr"), &mount.path("usr"), &mut compared);
    assert_eq!(compared, 2009);
    // Again, from what the kernel remembers.
    compare(&at("usr"), &mount.path("usr"), &mut compared);
    let inode = |path| fs::metadata(mount.path(path)).unwrap().ino();
    assert_eq!(inode("usr/bin/tool"), inode("usr/bin/same"));
    assert!(fs::metadata(mount.path("usr/lib/none")).is_err());
    assert!(fs::metadata(mount.path("home/u")).unwrap().is_dir());
    let out = Command::new(mount.path("usr/bin/tool")).output().unwrap();
    assert_eq!(out.stdout, b"it runs\n");
    assert!(fs::write(mount.path("usr/x"), b"").is_err());

    // A file changed on the machine is an error to the reader of what the kernel has not kept.
    write("usr/lib/many/-0", 0o644, &[8; 101]);
    fs::write(at("usr/lib/big"), &big[..big.len() - 4]).unwrap();
    let file = File::open(mount.path("usr/lib/big")).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let error = (&file).read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(116), "ESTALE, {error}");
}

#[test]
fn this_machines_own_headers_come_through() {
    if !Path::new("/usr/include").is_dir() {
        eprintln!("SKIPPED: there is no /usr/include here");
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    let built =
        local::build(cache.path(), Path::new("/"), Path::new("/nobody-s-home"), &mut |_| {})
            .unwrap();
    let Some(mount) = Mount::new(local::serve(built.manifest, Path::new("/")).unwrap()) else {
        return;
    };
    let out = Command::new("diff")
        .args(["-r", "--no-dereference", "/usr/include"])
        .arg(mount.path("usr/include"))
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
    let shadow = mount.path("etc/shadow");
    assert_eq!(fs::read(shadow).unwrap_err().kind(), std::io::ErrorKind::NotFound);
}
