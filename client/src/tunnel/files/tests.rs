//! Both ends in one process over an in-memory stream, each with a real tree of its own.

mod faults;
mod hostile;
mod support;

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use support::{Pair, read, tree, write};

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_in_is_what_is_there() {
    let pair = Pair::new();
    let odd = std::ffi::OsStr::from_bytes(b"caf\xe9 \xff\n");
    write(&pair.laptop().join("src/main.rs"), "fn main() {}");
    write(&pair.laptop().join(odd), "odd");
    write(&pair.laptop().join("run.sh"), "#!/bin/sh");
    fs::set_permissions(pair.laptop().join("run.sh"), fs::Permissions::from_mode(0o751)).unwrap();
    symlink("/etc/passwd", pair.laptop().join("out")).unwrap();
    symlink("src/main.rs", pair.laptop().join("in")).unwrap();
    fs::create_dir_all(pair.laptop().join("empty/deep")).unwrap();
    fs::File::open(pair.laptop().join("run.sh"))
        .unwrap()
        .set_modified(std::time::UNIX_EPOCH + std::time::Duration::new(1_600_000_000, 123_456_789))
        .unwrap();
    let report = pair.push().await;
    assert_eq!(tree(pair.laptop()), tree(pair.guest()));
    assert_eq!(report.went_up, 8, "{report:?}");
    let meta = fs::metadata(pair.guest().join("run.sh")).unwrap();
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (1_600_000_000, 123_456_789));
    assert!(!pair.guest().join(".tow-stage").exists());

    let again = pair.push().await;
    assert_eq!((again.went_up, again.bytes), (0, 0), "nothing moves twice");
    let back = pair.pull().await;
    assert_eq!((back.came_down, back.went_up), (0, 0), "{back:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_command_changed_comes_back() {
    let pair = Pair::new();
    for name in ["kept", "edited", "deleted", "d/moved", "mode"] {
        write(&pair.laptop().join(name), name);
    }
    pair.push().await;
    let guest = pair.guest();
    write(&guest.join("edited"), "by the command");
    fs::remove_file(guest.join("deleted")).unwrap();
    fs::rename(guest.join("d"), guest.join("e")).unwrap();
    fs::set_permissions(guest.join("mode"), fs::Permissions::from_mode(0o755)).unwrap();
    write(&guest.join("new/a/b"), "made");
    symlink("a/b", guest.join("new/link")).unwrap();
    let report = pair.pull().await;
    assert_eq!(tree(pair.laptop()), tree(guest));
    assert_eq!(report.lines(), Vec::<String>::new());
    assert_eq!(read(&pair.laptop().join("e/moved")), "d/moved");
    assert!(!pair.laptop().join("d").exists());
    assert!(!pair.laptop().join(".tow-stage").exists());
    let report = pair.pull().await;
    assert_eq!((report.came_down, report.went_up), (0, 0), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kinds_may_change_on_either_side() {
    let pair = Pair::new();
    write(&pair.laptop().join("a/x"), "x");
    write(&pair.laptop().join("b"), "b");
    write(&pair.laptop().join("c"), "c");
    pair.push().await;
    fs::remove_dir_all(pair.laptop().join("a")).unwrap();
    write(&pair.laptop().join("a"), "now a file");
    fs::remove_file(pair.guest().join("b")).unwrap();
    write(&pair.guest().join("b/inside"), "now a directory");
    fs::remove_file(pair.guest().join("c")).unwrap();
    symlink("b", pair.guest().join("c")).unwrap();
    let report = pair.pull().await;
    assert_eq!(tree(pair.laptop()), tree(pair.guest()), "{report:?}");
    assert_eq!(read(&pair.guest().join("a")), "now a file");
    assert_eq!(read(&pair.laptop().join("b/inside")), "now a directory");
    assert!(report.conflicts.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn both_versions_of_a_conflict_are_kept() {
    let pair = Pair::new();
    write(&pair.laptop().join("d/f"), "base");
    write(&pair.laptop().join("same"), "base");
    pair.push().await;
    write(&pair.laptop().join("d/f"), "laptop's");
    write(&pair.guest().join("d/f"), "sandbox!");
    write(&pair.laptop().join("same"), "equal");
    write(&pair.guest().join("same"), "equal");
    let report = pair.pull().await;
    assert_eq!(read(&pair.laptop().join("d/f")), "laptop's");
    assert_eq!(read(&pair.guest().join("d/f")), "laptop's");
    assert_eq!(read(&pair.laptop().join(".tow/conflicts/d/f.1")), "sandbox!");
    assert_eq!(report.conflicts.len(), 1);
    assert!(report.lines()[0].contains(".tow/conflicts/d/f.1"), "{:?}", report.lines());
    let after = pair.push().await;
    assert!(after.conflicts.is_empty() && after.went_up == 0, "it is told once: {after:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_survives_a_deletion_on_the_other_side() {
    let pair = Pair::new();
    for name in ["d/a", "d/b"] {
        write(&pair.laptop().join(name), "base");
    }
    pair.push().await;
    fs::remove_dir_all(pair.guest().join("d")).unwrap();
    write(&pair.laptop().join("d/a"), "edited here");
    pair.pull().await;
    assert_eq!(read(&pair.guest().join("d/a")), "edited here");
    assert!(!pair.laptop().join("d/b").exists());
    assert_eq!(tree(pair.laptop()), tree(pair.guest()));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_tree_never_deletes_here() {
    let pair = Pair::new();
    for number in 0..10 {
        write(&pair.laptop().join(format!("f{number}")), "precious");
    }
    pair.push().await;
    fs::remove_dir_all(pair.guest()).unwrap();
    fs::create_dir(pair.guest()).unwrap();
    write(&pair.guest().join("f1"), "another's");
    let report = pair.pull().await;
    assert_eq!(report.removed_here, 0);
    assert_eq!(read(&pair.laptop().join("f0")), "precious");
    assert_eq!(read(&pair.laptop().join("f1")), "precious");
    assert_eq!(read(&pair.laptop().join(".tow/conflicts/f1.1")), "another's");
    assert_eq!(tree(pair.laptop()), tree(pair.guest()), "the new tree is filled");
}

#[tokio::test(flavor = "multi_thread")]
async fn ignored_outputs_stay_and_are_counted() {
    let pair = Pair::new();
    write(&pair.laptop().join(".git/HEAD"), "ref: refs/heads/main\n");
    write(&pair.laptop().join(".gitignore"), "/target\n*.o\n");
    write(&pair.laptop().join("target/laptop"), "not up");
    write(&pair.laptop().join("gone/only.o"), "shell");
    write(&pair.laptop().join("crate/src/lib.rs"), "code");
    pair.push().await;
    assert!(!pair.guest().join("target").exists() && !pair.guest().join("gone").exists());
    write(&pair.guest().join("target/debug/huge"), "not down");
    write(&pair.guest().join("crate/x.o"), "not down");
    write(&pair.guest().join("result.txt"), "down");
    let report = pair.pull().await;
    assert_eq!(read(&pair.laptop().join("result.txt")), "down");
    assert!(
        !pair.laptop().join("target/debug").exists() && !pair.laptop().join("crate/x.o").exists()
    );
    assert_eq!(report.lines(), ["2 ignored paths stayed in the sandbox (crate/x.o, target)"]);

    fs::remove_dir_all(pair.laptop().join("crate")).unwrap();
    pair.push().await;
    assert!(!pair.guest().join("crate").exists(), "its ignored leftovers do not keep it");

    write(&pair.guest().join(".gitignore"), "result.txt\n/target\n");
    pair.pull().await;
    assert!(pair.laptop().join("result.txt").exists(), "newly ignored is not deleted");
    fs::remove_file(pair.guest().join("result.txt")).unwrap();
    pair.pull().await;
    assert!(pair.laptop().join("result.txt").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_stay_even_when_the_sandbox_changes_the_rules() {
    let pair = Pair::new();
    write(&pair.laptop().join(".git/HEAD"), "ref: refs/heads/main\n");
    write(&pair.laptop().join(".gitignore"), "/secrets.yaml\n");
    write(&pair.laptop().join("secrets.yaml"), "hunter2");
    write(&pair.laptop().join(".env"), "TOKEN=1");
    write(&pair.laptop().join("tls/key.pem"), "-----BEGIN PRIVATE KEY-----\n");
    write(&pair.laptop().join("tls/cert.pem"), "-----BEGIN CERTIFICATE-----\n");
    let report = pair.push().await;
    assert!(pair.guest().join("tls/cert.pem").exists());
    assert!(!pair.guest().join(".env").exists() && !pair.guest().join("tls/key.pem").exists());
    assert_eq!(report.secrets.len(), 2);
    write(&pair.guest().join(".gitignore"), "");
    write(&pair.guest().join(".towignore"), "!.env\n");
    let report = pair.pull().await;
    assert!(report.lines().iter().any(|line| line.starts_with("held: .towignore")), "{report:?}");
    let report = pair.push().await;
    assert!(!pair.guest().join("secrets.yaml").exists(), "{report:?}");
    assert!(!pair.guest().join(".env").exists());
    assert_eq!(report.kept_back.len(), 1);
    write(&pair.laptop().join(".towignore"), "!.env\n");
    pair.push().await;
    assert_eq!(read(&pair.guest().join(".env")), "TOKEN=1", "the user let it go up");
}

#[tokio::test(flavor = "multi_thread")]
async fn huge_and_sparse_files_cost_what_they_hold() {
    let pair = Pair::new();
    let huge = fs::File::create(pair.laptop().join("huge")).unwrap();
    huge.set_len(8 << 30).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&huge, b"in the middle", (5 << 30) + 17).unwrap();
    write(&pair.laptop().join("big"), &"0123456789abcdef".repeat(60_000));
    write(&pair.laptop().join("none"), "");
    fs::File::create(pair.laptop().join("hole")).unwrap().set_len(10_000_000).unwrap();
    pair.push().await;
    let meta = fs::metadata(pair.guest().join("huge")).unwrap();
    assert_eq!(meta.len(), 8 << 30);
    assert!(meta.blocks() * 512 < 4 << 20, "{} blocks", meta.blocks());
    assert_eq!(read(&pair.guest().join("big")), read(&pair.laptop().join("big")));
    assert_eq!(fs::metadata(pair.guest().join("hole")).unwrap().len(), 10_000_000);
    let guest = fs::OpenOptions::new().write(true).open(pair.guest().join("huge")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&guest, b"from the guest", 1 << 30).unwrap();
    let report = pair.pull().await;
    assert_eq!(report.came_down, 1, "{report:?}");
    let mut bytes = [0; 14];
    let laptop = fs::File::open(pair.laptop().join("huge")).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&laptop, &mut bytes, 1 << 30).unwrap();
    assert_eq!(&bytes, b"from the guest");
    assert!(laptop.metadata().unwrap().blocks() * 512 < 4 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_files_go_in_and_come_back() {
    let pair = Pair::new();
    for number in 0..10_000 {
        write(
            &pair.laptop().join(format!("d{}/f{number}", number % 100)),
            &format!("file {number}"),
        );
    }
    let report = pair.push().await;
    assert_eq!(report.went_up, 10_100);
    for number in (0..10_000).step_by(100) {
        write(&pair.guest().join(format!("d0/f{number}")), "changed");
    }
    let report = pair.pull().await;
    assert_eq!((report.came_down, report.went_up), (100, 0), "{:?}", report.lines());
    assert_eq!(tree(pair.laptop()), tree(pair.guest()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_agent_that_started_anew_is_told_nothing_twice() {
    let mut pair = Pair::new();
    write(&pair.laptop().join("f"), "text");
    pair.push().await;
    pair.restart_guest();
    write(&pair.guest().join("g"), "made");
    let report = pair.pull().await;
    assert_eq!((report.came_down, report.went_up), (1, 0), "{report:?}");
    fs::remove_file(pair.guest().join("g")).unwrap();
    pair.restart_guest();
    let report = pair.pull().await;
    assert_eq!(report.removed_here, 1, "a deletion is still known: {report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn barriers_of_one_folder_take_turns() {
    let pair = Pair::new();
    for number in 0..300 {
        write(&pair.laptop().join(format!("f{number}")), "x");
    }
    let (first, second) = tokio::join!(pair.push(), pair.push());
    assert_eq!(first.went_up + second.went_up, 300);
    assert_eq!(tree(pair.laptop()), tree(pair.guest()));
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_and_pipes_are_named_and_left() {
    let pair = Pair::new();
    let _socket = std::os::unix::net::UnixListener::bind(pair.laptop().join("socket")).unwrap();
    let report = pair.push().await;
    assert_eq!(report.lines(), ["not synced: socket (it is a socket, a pipe or a device)"]);
    assert!(!pair.guest().join("socket").exists());
}
