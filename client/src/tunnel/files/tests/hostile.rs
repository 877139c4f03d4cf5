//! Guests that want to get at the laptop: by their trees, and by their frames.

use std::fs;
use std::os::unix::fs::symlink;

use tokio::io::duplex;
use towline_filesync::wire::{self, FilesKind};
use towline_proto::limits::GUEST_PROTOCOL;
use towline_proto::v1;

use super::support::{Pair, framed, read, tree, write};
use crate::tunnel::files::Direction;

#[tokio::test(flavor = "multi_thread")]
async fn what_could_run_code_here_is_held_and_said() {
    let pair = Pair::new();
    write(&pair.laptop().join(".git/config"), "[core]\n");
    write(&pair.laptop().join(".git/HEAD"), "ref: refs/heads/main\n");
    write(&pair.laptop().join(".git/index"), "laptop's index");
    pair.push().await;
    assert_eq!(read(&pair.guest().join(".git/config")), "[core]\n", "it goes up");
    let guest = pair.guest();
    write(&guest.join(".git/hooks/pre-commit"), "evil");
    write(&guest.join(".git/config"), "[core]\nfsmonitor = evil\n");
    write(&guest.join(".git/index"), "the sandbox's index");
    write(&guest.join(".git/refs/heads/main"), "1234\n");
    write(&guest.join(".GIT/config"), "evil");
    write(&guest.join("sub/.git"), "gitdir: ../evil\n");
    write(&guest.join("bare/HEAD"), "ref: refs/heads/main\n");
    write(&guest.join(".vscode/tasks.json"), "evil");
    write(&guest.join(".envrc"), "evil");
    symlink("/etc/passwd", guest.join("absolute")).unwrap();
    symlink("../outside", guest.join("leaving")).unwrap();
    symlink("bare", guest.join("within")).unwrap();
    let report = pair.pull().await;
    let laptop = pair.laptop();
    assert_eq!(read(&laptop.join(".git/config")), "[core]\n");
    assert_eq!(read(&laptop.join(".git/index")), "laptop's index");
    assert_eq!(read(&laptop.join(".git/refs/heads/main")), "1234\n");
    for held in [
        ".git/hooks",
        ".GIT/config",
        "sub/.git",
        "bare/HEAD",
        ".vscode",
        ".envrc",
        "absolute",
        "leaving",
    ] {
        assert!(fs::symlink_metadata(laptop.join(held)).is_err(), "{held}");
        assert!(
            report.held.iter().any(|(path, _)| path.to_string().starts_with(held)),
            "{held}: {report:?}"
        );
    }
    assert!(fs::symlink_metadata(laptop.join("within")).is_ok());
    let again = pair.pull().await;
    assert!(again.held.is_empty(), "it is told once: {again:?}");
    assert_eq!(again.went_up + again.came_down, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_with_a_parent_swapped_for_a_symlink_is_not_left() {
    let pair = Pair::new();
    let outside = tempfile::tempdir().unwrap();
    write(&pair.laptop().join("d/f"), "base");
    pair.push().await;
    write(&pair.guest().join("d/f"), "from the sandbox");
    write(&pair.guest().join("d/g"), "from the sandbox");
    fs::remove_dir_all(pair.laptop().join("d")).unwrap();
    symlink(outside.path(), pair.laptop().join("d")).unwrap();
    let report = pair.pull().await;
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0, "{report:?}");
}

/// A guest that answers the greeting and the scan as told, and then whatever is asked with `answer`.
async fn against(
    pair: &Pair,
    entries: Vec<v1::Entry>,
    answer: impl Fn(u8) -> Vec<towline_proto::frame::Frame> + Clone + Send + Sync + 'static,
) -> anyhow::Result<crate::tunnel::files::Report> {
    let open = async |_| {
        let (near, far) = duplex(64 << 10);
        let (mut reader, mut writer) = framed(far);
        let (entries, answer) = (entries.clone(), answer.clone());
        tokio::spawn(async move {
            while let Ok(Some(frame)) = reader.next().await {
                let frames = match frame.kind {
                    kind if kind == FilesKind::Hello as u8 => vec![ready()],
                    kind if kind == FilesKind::Scan as u8 => listing(&entries),
                    kind => answer(kind),
                };
                for frame in frames {
                    if writer.send(&frame).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(framed(near))
    };
    pair.attempt(Direction::Down, open).await
}

fn ready() -> towline_proto::frame::Frame {
    let index = Some(v1::FilesIndex { id: vec![1; 16], sequence: 1 });
    let ready = v1::FilesReady { protocol: GUEST_PROTOCOL, incarnation: vec![7], index };
    wire::frame(FilesKind::Ready, &ready)
}

fn listing(entries: &[v1::Entry]) -> Vec<towline_proto::frame::Frame> {
    let page = v1::FilesEntries { changed: entries.to_vec(), unlisted: Vec::new() };
    let scanned = v1::FilesScanned { complete: true, ..v1::FilesScanned::default() };
    vec![wire::frame(FilesKind::Entries, &page), wire::frame(FilesKind::Scanned, &scanned)]
}

fn file(path: &[&[u8]], size: u64) -> v1::Entry {
    v1::Entry {
        path: path.iter().map(|name| name.to_vec()).collect(),
        kind: v1::FileKind::File.into(),
        mode: 0o644,
        size,
        inode: 1,
        ..v1::Entry::default()
    }
}

fn content(entry: v1::Entry, inline: &[u8], streamed: bool) -> towline_proto::frame::Frame {
    let outcome = if streamed { 0 } else { v1::FilesOutcome::Done.into() };
    let content = v1::FilesContent {
        outcome,
        entry: Some(entry),
        inline: inline.to_vec(),
        streamed,
        message: String::new(),
    };
    wire::frame(FilesKind::Contents, &v1::FilesContents { contents: vec![content] })
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_that_no_guest_sends_end_the_barrier_and_change_nothing() {
    let bad_paths: [&[&[u8]]; 5] = [
        &[b"..", b"x"],
        &[b"a", b"..", b"..", b"x"],
        &[b"a/../../x"],
        &[b""],
        &[b".tow-stage", b"x"],
    ];
    for path in bad_paths {
        let pair = Pair::new();
        let error = against(&pair, vec![file(path, 1)], |_| Vec::new()).await.unwrap_err();
        assert!(format!("{error:#}").contains("broke the file protocol"), "{error:#}");
        assert!(tree(pair.laptop()).is_empty());
    }
    type Answer = fn(u8) -> Vec<towline_proto::frame::Frame>;
    let answers: [(&str, Answer); 7] = [
        ("another path", |_| vec![content(file(&[b".git", b"config"], 4), b"evil", false)]),
        ("more than its size", |_| vec![content(file(&[b"f"], 2), b"evil", false)]),
        ("a block beyond the end", |_| {
            vec![content(file(&[b"f"], 4), b"", true), wire::data(1 << 40, b"evil")]
        }),
        ("blocks out of place", |_| {
            vec![content(file(&[b"f"], 200_000), b"", true), wire::data(3, b"evil")]
        }),
        ("the same block twice", |_| {
            let block = vec![1; towline_filesync::BLOCK];
            vec![
                content(file(&[b"f"], 200_000), b"", true),
                wire::data(0, &block),
                wire::data(0, &block),
            ]
        }),
        ("an answer of another kind", |_| vec![ready()]),
        ("an empty page", |_| {
            vec![wire::frame(FilesKind::Contents, &v1::FilesContents::default())]
        }),
    ];
    for (name, answer) in answers {
        let pair = Pair::new();
        let error = against(&pair, vec![file(&[b"f"], 4)], answer).await.unwrap_err();
        assert!(format!("{error:#}").contains("broke the file protocol"), "{name}: {error:#}");
        assert!(
            tree(pair.laptop()).keys().all(|path| path.starts_with(".tow-stage")),
            "{name}: {:?}",
            tree(pair.laptop())
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_that_cannot_be_is_not_made() {
    let pair = Pair::new();
    let entries = vec![file(&[b"a"], 4), file(&[b"a", b"b"], 4), file(&[b"nowhere", b"c"], 4)];
    let report = against(&pair, entries, |kind| {
        assert_eq!(kind, FilesKind::Get as u8);
        [&[&b"a"[..]][..], &[b"a", b"b"], &[b"nowhere", b"c"]]
            .iter()
            .map(|path| content(file(path, 4), b"text", false))
            .collect()
    })
    .await;
    let names: Vec<_> = tree(pair.laptop()).into_keys().collect();
    assert!(names.iter().all(|name| name == std::path::Path::new("a")), "{names:?} {report:?}");
}
