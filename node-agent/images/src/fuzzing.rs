//! Entry points for fuzzing: each takes any bytes, must end, and must neither panic nor use
//! memory beyond what the bytes explain.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::BytesMut;
use towline_proto::frame;
use towline_proto::v1::LayerPart;

use crate::document;
use crate::layer::listing::Listing;
use crate::layer::normal::{self, Archive, Budget};
use crate::local::manifest::{Identity, Kind, NewEntry, Writer};
use crate::local::{Manifest, Server};
use crate::save;

/// Bounds of one fuzzing step, far below the real ones so that it stays quick.
const BUDGET: Budget = Budget { bytes: 8 << 20, entries: 10_000 };

/// Reads bytes as an index, as a manifest and as a config.
pub fn oci_document(bytes: &[u8]) {
    let _ = document::index(bytes);
    let _ = document::manifest(bytes);
    let _ = document::config(bytes);
    if document::kind(bytes).is_ok_and(|kind| kind == document::Kind::Index) {
        assert!(document::manifest(bytes).is_err(), "no document is an index and an image");
    }
}

/// Reads bytes as the `manifest.json` of a `docker save` archive.
pub fn docker_manifest(bytes: &[u8]) {
    crate::import::docker::fuzz(bytes);
}

/// Reads bytes as what a registry says besides documents: how to log in, and why it refuses.
pub fn registry_answer(bytes: &[u8]) {
    if let Ok(header) = std::str::from_utf8(bytes) {
        assert!(crate::registry::challenges(header).len() <= 8, "challenges are bounded");
        let _ = crate::registry::begins_at(header, 5, 10);
        let _ = crate::registry::bytes_of(header);
        let _ = crate::registry::parses(header);
    }
    assert!(crate::registry::words(bytes).len() <= 4 * 200 + 3, "repeated words are bounded");
}

/// Reads bytes as frames of a guest that tells what changed.
pub fn layer_stream(bytes: &[u8]) {
    let mut buffer = BytesMut::from(bytes);
    let mut entries = Vec::new();
    while let Ok(Some(frame)) = frame::decode(&mut buffer) {
        entries.extend(frame.decode::<LayerPart>().unwrap_or_default().entries);
    }
    save::entry::fuzz(&entries);
}

/// Reads bytes as a layer's archive and writes what it means to nowhere; what was written is then
/// read again and must mean the same.
pub fn layer_archive(bytes: &[u8]) {
    let archive = |bytes: Vec<u8>| Archive {
        name: "layer".into(),
        diff_id: None,
        open: Box::new(move || Ok(Box::new(io::Cursor::new(bytes.clone())))),
    };
    let archives = [archive(bytes.to_vec())];
    let empty = Listing::default();
    let Ok(outcome) = normal::scan(&archives, &empty, &mut BUDGET.clone()) else { return };
    let Ok(written) = normal::write(&archives, &outcome, Vec::new()) else { return };
    let again = [archive(written)];
    let again = normal::scan(&again, &empty, &mut Budget::default());
    let again = again.expect("what we write can be read");
    assert_eq!(again.folders.len(), outcome.folders.len(), "folders");
    assert_eq!(again.inodes.len(), outcome.inodes.len(), "files");
    assert_eq!(again.merged.children(b""), outcome.merged.children(b""), "names");
}

/// Lets a server of a small image answer bytes as a FUSE request; the answer's own length must be
/// right.
pub fn fuse_request(bytes: &[u8]) {
    let Ok(root) = rustix::fs::open(
        c"/proc/self",
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY,
        rustix::fs::Mode::empty(),
    ) else {
        return;
    };
    let server = small_server(root);
    if let Some(answer) = server.handle(bytes) {
        let len = u32::from_le_bytes([answer[0], answer[1], answer[2], answer[3]]);
        assert_eq!(len as usize, answer.len(), "an answer says its length");
        assert!(answer.len() <= crate::local::READ_MAX + 16, "an answer is bounded");
    }
}

/// Reads bytes as a manifest of a local image, and if it is one, asks about each entry.
pub fn local_manifest(bytes: &[u8]) {
    let Ok(manifest) = Manifest::parse(bytes) else { return };
    for index in 0..manifest.count().min(1000) {
        let path = manifest.path(index);
        let _ = manifest.find(&path);
    }
}

fn small_server(root: OwnedFd) -> Server {
    let mut writer = Writer::default();
    let mut push = |kind, parent, first, number, name: &[u8], target: &[u8], size| {
        let identity = Identity { inode: 1, size, ..Identity::default() };
        let entry = NewEntry {
            kind,
            permissions: 0o755,
            uid: 0,
            gid: 0,
            identity,
            parent,
            first,
            number,
            name,
            target,
        };
        writer.push(&entry).expect("a small image fits");
    };
    push(Kind::Folder, 0, 1, 3, b"", b"", 0);
    push(Kind::Folder, 0, 4, 1, b"a", b"", 0);
    push(Kind::File, 0, 2, 1, b"b", b"", 100);
    push(Kind::Symlink, 0, 0, 1, b"c", b"a/d", 0);
    push(Kind::File, 1, 4, 1, b"d", b"", u64::MAX);
    let bytes = writer.finish().expect("a small image fits");
    let manifest = Manifest::parse(bytes).expect("what we write can be read");
    Server::new(Arc::new(manifest), root)
}
