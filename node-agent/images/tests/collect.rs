//! What collecting removes and what it leaves, and that it never runs beside an import.
#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "a test that fails, fails here")]

use std::collections::BTreeSet;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use towline_images::fixture::{Layer, Layout};
use towline_images::{Collected, Digest, ImageError, Store, collect, import, prepare};

const HOUR: Duration = Duration::from_secs(3600);

fn has_tools() -> bool {
    let has = Command::new("mksquashfs").arg("-version").output().is_ok();
    if !has {
        eprintln!("SKIPPED: mksquashfs (squashfs-tools) is not installed");
    }
    has
}

/// An image of a layer that all share and one of its own.
fn image(own: &[u8]) -> Layout {
    let shared = Layer::new().file("shared", 0o644, &[7; 70_000]).finish();
    Layout::new(vec![shared, Layer::new().file("own", 0o644, own).finish()])
}

fn disk_use(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).unwrap().flatten();
    entries
        .map(|entry| match entry.metadata().unwrap() {
            meta if meta.is_dir() => disk_use(&entry.path()),
            meta => meta.blocks() * 512,
        })
        .sum()
}

fn keep(digests: &[Digest]) -> BTreeSet<Digest> {
    digests.iter().copied().collect()
}

#[test]
fn what_no_kept_image_needs_goes_and_is_counted_as_it_is() {
    if !has_tools() {
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    let store = Store::open(cache.path()).unwrap();
    let add = |layout: Layout| import(&store, &layout.archive()[..], &mut |_| {}).unwrap().digest;
    let (kept, unwanted) = (add(image(&[1; 50_000])), add(image(b"other")));

    // All is young: nothing goes, wanted or not.
    assert_eq!(collect(&store, &keep(&[]), HOUR).unwrap(), Collected::default());

    let before = disk_use(cache.path());
    let done = collect(&store, &keep(&[kept]), Duration::ZERO).unwrap();
    assert_eq!(done.images, 1);
    // Of the other one: manifest, config, layer; disk and listing. The record is small change.
    assert_eq!(done.files, 5);
    let freed = before - disk_use(cache.path());
    assert!(freed >= done.bytes && freed - done.bytes <= 8192, "{freed} freed, {done:?}");
    assert_eq!(prepare(&store, &kept, &mut |_| {}).unwrap().layers.len(), 2);
    let gone = prepare(&store, &unwanted, &mut |_| {}).unwrap_err();
    assert!(matches!(gone, ImageError::Unknown(_)), "{gone}");
    assert_eq!(collect(&store, &keep(&[kept]), Duration::ZERO).unwrap(), Collected::default());

    // It may come again, and what it shares is used.
    add(image(b"other"));
    prepare(&store, &unwanted, &mut |_| {}).unwrap();
}

#[test]
fn an_image_that_cannot_be_read_keeps_everything() {
    if !has_tools() {
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    let store = Store::open(cache.path()).unwrap();
    let add = |layout: Layout| import(&store, &layout.archive()[..], &mut |_| {}).unwrap().digest;
    let (broken, other) = (add(image(b"a")), add(image(b"b")));
    let manifest = cache.path().join("images/blobs/sha256").join(broken.hex());
    std::fs::write(&manifest, b"{}").unwrap();
    let error = collect(&store, &keep(&[broken]), Duration::ZERO).unwrap_err();
    assert!(matches!(error, ImageError::WrongDigest { .. }), "{error}");
    prepare(&store, &other, &mut |_| {}).unwrap();
}

/// Bytes that come when they are let go.
struct Held(mpsc::Receiver<()>, std::io::Cursor<Vec<u8>>);

impl Read for Held {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let _ = self.0.recv();
        self.1.read(into)
    }
}

#[test]
fn an_import_finds_what_it_counted_on() {
    if !has_tools() {
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    let store = Store::open(cache.path()).unwrap();
    let layout = image(b"x");
    let digest = import(&store, &layout.archive()[..], &mut |_| {}).unwrap().digest;
    // The same once more: it finds every blob, which nobody else wants, and is held in the middle.
    let (go, held) = mpsc::channel();
    let (again, archive) = (store.clone(), layout.archive());
    let importing = std::thread::spawn(move || {
        import(&again, Held(held, std::io::Cursor::new(archive)), &mut |_| {}).unwrap()
    });
    go.send(()).unwrap();
    let cleaned = store.clone();
    let collecting = std::thread::spawn(move || collect(&cleaned, &keep(&[]), Duration::ZERO));
    drop(go);
    assert_eq!(importing.join().unwrap().digest, digest);
    // Before or after it, never in the middle.
    let _ = collecting.join().unwrap().unwrap();
    match prepare(&store, &digest, &mut |_| {}) {
        Ok(_) | Err(ImageError::Unknown(_)) => {}
        Err(error) => panic!("half of the image is left: {error}"),
    }
}
