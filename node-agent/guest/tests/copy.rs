//! Copies as the guest agent does them: beneath the root whatever links say, with the user's rights,
//! and whole or refused.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::time::Duration;

use towline_guest_agent::copy::{Copier, serve};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{CopyDirection, CopyDone, CopyOpen, StreamError, StreamErrorCode, User};
use towline_streams::{FrameReader, FrameWriter};

const BOUND: Duration = Duration::from_secs(60);

fn me() -> User {
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    User { uid, gid, ..User::default() }
}

fn from(path: &str) -> CopyOpen {
    let direction = CopyDirection::FromSandbox.into();
    CopyOpen { direction, path: path.into(), ..CopyOpen::default() }
}

fn to(path: &str, name: &str) -> CopyOpen {
    let direction = CopyDirection::ToSandbox.into();
    CopyOpen { direction, path: path.into(), name: name.into(), ..CopyOpen::default() }
}

/// One copy: what is sent, and what came back: an archive, and the last word.
async fn copy(
    root: &Path,
    user: User,
    open: CopyOpen,
    send: &[u8],
) -> (Vec<u8>, Result<CopyDone, StreamError>) {
    let (near, far) = tokio::io::duplex(100_000);
    let copier = Copier { root, folder: b"/work", user };
    let guest = async {
        let (read, write) = tokio::io::split(far);
        serve(copier, open, FrameReader::new(read), FrameWriter::new(write)).await;
    };
    let laptop = async {
        let (read, write) = tokio::io::split(near);
        let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
        let sending = async {
            for piece in send.chunks(50_000).chain([&b""[..]]) {
                let frame = Frame::raw(FrameKind::CopyData, piece.to_vec());
                if writer.send(&frame).await.is_err() {
                    break;
                }
            }
        };
        let receiving = async {
            let mut archive = Vec::new();
            loop {
                let frame = reader.next().await.unwrap().expect("a last word");
                if frame.is(FrameKind::CopyData) {
                    archive.extend_from_slice(&frame.body);
                } else if frame.is(FrameKind::CopyDone) {
                    return (archive, Ok(frame.decode().unwrap()));
                } else {
                    assert!(frame.is(FrameKind::Error));
                    return (archive, Err(frame.decode().unwrap()));
                }
            }
        };
        tokio::join!(sending, receiving).1
    };
    let both = async { tokio::join!(guest, laptop).1 };
    tokio::time::timeout(BOUND, both).await.expect("an end in time")
}

#[tokio::test]
async fn what_goes_out_comes_in_again_with_modes_and_owner() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("work/tree")).unwrap();
    let bytes: Vec<u8> = (0..500_000u32).flat_map(u32::to_le_bytes).collect();
    fs::write(root.path().join("work/tree/file"), &bytes).unwrap();
    let mode = fs::Permissions::from_mode(0o751);
    fs::set_permissions(root.path().join("work/tree/file"), mode).unwrap();
    // A relative path begins at the project folder.
    let (archive, done) = copy(root.path(), me(), from("tree"), b"").await;
    let done = done.unwrap();
    assert_eq!((done.files, done.bytes), (2, bytes.len() as u64));
    let (_, done) = copy(root.path(), me(), to("/copy", "tree"), &archive).await;
    assert_eq!(done.unwrap().files, 2);
    assert!(fs::read(root.path().join("copy/file")).unwrap() == bytes);
    let made = fs::metadata(root.path().join("copy/file")).unwrap();
    assert_eq!((made.mode() & 0o777, made.uid()), (0o751, me().uid));
    // Cut in the middle: nothing half-written.
    let half = &archive[..archive.len() / 2];
    let (_, done) = copy(root.path(), me(), to("/half", "tree"), half).await;
    done.unwrap_err();
    assert!(!root.path().join("half/file").exists());
}

#[tokio::test]
async fn links_lead_nowhere_outside_and_refusals_say_why() {
    let (root, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(outside.path().join("secret"), "secret").unwrap();
    fs::create_dir(root.path().join("work")).unwrap();
    symlink(outside.path(), root.path().join("work/out")).unwrap();
    for path in ["out/secret", "/work/out/secret", "/../../../etc/passwd"] {
        let (archive, done) = copy(root.path(), me(), from(path), b"").await;
        assert!(archive.is_empty(), "{path}");
        assert_eq!(done.unwrap_err().code(), StreamErrorCode::NotFound, "{path}");
    }
    let (archive, _) = copy(outside.path(), me(), from("/secret"), b"").await;
    let (_, done) = copy(root.path(), me(), to("out/", "secret"), &archive).await;
    done.unwrap_err();
    let (_, done) = copy(root.path(), me(), to("/work", "other"), &archive).await;
    assert!(done.unwrap_err().message.contains("not asked for"));
    let (_, done) = copy(root.path(), me(), to("/work", "../x"), &archive).await;
    assert_eq!(done.unwrap_err().code(), StreamErrorCode::Invalid);
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn the_users_rights_count() {
    if !rustix::process::getuid().is_root() {
        eprintln!("SKIPPED: needs root to become another user");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(root.path().join("theirs")).unwrap();
    std::os::unix::fs::chown(root.path().join("theirs"), Some(4242), Some(4242)).unwrap();
    fs::write(root.path().join("private"), "x").unwrap();
    fs::set_permissions(root.path().join("private"), fs::Permissions::from_mode(0o600)).unwrap();
    let other = User { uid: 4242, gid: 4242, ..User::default() };
    let (archive, done) = copy(root.path(), me(), from("/private"), b"").await;
    done.unwrap();
    let (_, done) = copy(root.path(), other.clone(), from("/private"), b"").await;
    done.unwrap_err();
    let (_, done) = copy(root.path(), other.clone(), to("/", "private"), &archive).await;
    done.unwrap_err();
    let (_, done) = copy(root.path(), other, to("/theirs", "private"), &archive).await;
    done.unwrap();
    let made = fs::metadata(root.path().join("theirs/private")).unwrap();
    assert_eq!((made.uid(), made.gid(), made.mode() & 0o777), (4242, 4242, 0o600));
    // Only the copies' threads became somebody else.
    assert!(rustix::process::geteuid().is_root());
}
