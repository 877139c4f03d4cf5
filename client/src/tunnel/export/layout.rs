//! Reads the archive of an exported image, and unpacks it where a folder is wanted.
//!
//! Only the names of a layout are accepted, each once and as a plain file; a blob must have the
//! digest that its name says. Nothing is looked up through a name that came.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use ring::digest::{Context, SHA256};
use serde::Deserialize;

/// Bytes of a document.
const DOCUMENT_MAX: u64 = 4 << 20;
/// Files in one archive: an image has at most 128 layers.
const FILES_MAX: usize = 256;

/// A file of the archive, by its name.
enum Name<'n> {
    /// Of the layout itself.
    Document(&'n str),
    /// What only docker reads, beside the layout.
    Docker,
    /// Content, by the hexadecimal digits of its digest.
    Blob(&'n str),
}

fn name(path: &str) -> Option<Name<'_>> {
    match path {
        "oci-layout" | "index.json" => Some(Name::Document(path)),
        "manifest.json" => Some(Name::Docker),
        _ => {
            let hex = path.strip_prefix("blobs/sha256/")?;
            let is_hex = hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            (hex.len() == 64 && is_hex).then_some(Name::Blob(hex))
        }
    }
}

/// Reads a whole archive, writes the layout into `folder` if there is one, and fails unless the image
/// `digest` is in it with all of its parts.
pub(super) fn check(archive: impl Read, digest: &str, folder: Option<&Path>) -> anyhow::Result<()> {
    if let Some(folder) = folder {
        fs::create_dir_all(folder.join("blobs/sha256")).context("making the layout's folders")?;
    }
    let wanted = digest.strip_prefix("sha256:").context("the image's digest")?;
    let mut sizes = BTreeMap::new();
    let (mut manifest, mut index, mut layout) = (None, None, false);
    let mut archive = tar::Archive::new(archive);
    for entry in archive.entries().context("the archive")? {
        let mut entry = entry.context("the archive")?;
        let path = String::from_utf8(entry.path_bytes().into_owned()).context("a file's name")?;
        let is_file = entry.header().entry_type() == tar::EntryType::Regular;
        let known = name(&path).filter(|_| is_file);
        let Some(known) = known else {
            bail!("the node sent `{}`, which no image layout has", path.escape_debug());
        };
        ensure!(sizes.len() < FILES_MAX, "the node sent more files than an image has");
        let size = entry.size();
        let to = folder.filter(|_| !matches!(known, Name::Docker)).map(|f| f.join(&path));
        let keep = match known {
            Name::Document(_) | Name::Docker => true,
            Name::Blob(hex) => hex == wanted,
        };
        ensure!(!keep || size <= DOCUMENT_MAX, "the node sent a document of {size} bytes");
        let (bytes, found) = copy(&mut entry, to.as_deref(), keep)?;
        match known {
            Name::Blob(hex) => {
                ensure!(hex == found, "the node sent something else than sha256:{hex}");
                if hex == wanted {
                    manifest = Some(bytes);
                }
            }
            Name::Document("index.json") => index = Some(bytes),
            Name::Document(_) => layout = true,
            Name::Docker => {}
        }
        ensure!(sizes.insert(path, size).is_none(), "the node sent a file twice");
    }
    ensure!(layout, "the archive has no `oci-layout`");
    let index: Index = serde_json::from_slice(&index.context("the archive has no `index.json`")?)?;
    let named = matches!(&index.manifests[..], [only] if only.digest == digest);
    ensure!(named, "the archive's index does not name {digest}");
    let manifest = manifest.with_context(|| format!("the archive lacks {digest}"))?;
    let manifest: Manifest = serde_json::from_slice(&manifest)?;
    for part in std::iter::once(&manifest.config).chain(&manifest.layers) {
        let path = format!("blobs/{}", part.digest.replacen(':', "/", 1));
        ensure!(sizes.get(&path) == Some(&part.size), "the archive lacks {}", part.digest);
    }
    Ok(())
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
    size: u64,
}

/// Reads a file's content on to its own file; returns its bytes, if they are kept, and its digest.
fn copy(from: &mut impl Read, to: Option<&Path>, keep: bool) -> anyhow::Result<(Vec<u8>, String)> {
    let failed = |path: &Path| format!("writing `{}`", path.display());
    let mut file = match to {
        Some(path) => Some(File::create_new(path).with_context(|| failed(path))?),
        None => None,
    };
    let mut digest = Context::new(&SHA256);
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 128 << 10];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("the archive"),
        };
        digest.update(&buffer[..n]);
        if keep {
            bytes.extend_from_slice(&buffer[..n]);
        }
        if let (Some(file), Some(path)) = (&mut file, to) {
            file.write_all(&buffer[..n]).with_context(|| failed(path))?;
        }
    }
    let found = digest.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((bytes, found))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        let digest = ring::digest::digest(&SHA256, bytes);
        digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// An image of one layer, as path and content.
    fn image() -> (Vec<(String, Vec<u8>)>, String) {
        let layer = b"layer".to_vec();
        let config = b"{}".to_vec();
        let part = |bytes: &[u8]| {
            format!(r#"{{"digest":"sha256:{}","size":{}}}"#, hex(bytes), bytes.len())
        };
        let manifest =
            format!(r#"{{"config":{},"layers":[{}]}}"#, part(&config), part(&layer)).into_bytes();
        let digest = format!("sha256:{}", hex(&manifest));
        let index = format!(r#"{{"manifests":[{}]}}"#, part(&manifest)).into_bytes();
        let mut files = vec![
            ("oci-layout".to_owned(), b"{}".to_vec()),
            ("index.json".to_owned(), index),
            ("manifest.json".to_owned(), b"[]".to_vec()),
        ];
        for blob in [manifest, config, layer] {
            files.push((format!("blobs/sha256/{}", hex(&blob)), blob));
        }
        (files, digest)
    }

    fn packed(files: &[(String, Vec<u8>)]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, bytes) in files {
            let mut header = tar::Header::new_ustar();
            // Written past the crate's own checks: a stranger has none.
            header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            header.set_entry_type(tar::EntryType::Regular);
            header.set_cksum();
            tar.append(&header, &bytes[..]).unwrap();
        }
        tar.into_inner().unwrap()
    }

    #[test]
    fn a_whole_image_is_unpacked() {
        let (files, digest) = image();
        let folder = tempfile::tempdir().unwrap();
        check(&packed(&files)[..], &digest, Some(folder.path())).unwrap();
        for (path, bytes) in &files {
            let found = fs::read(folder.path().join(path)).ok();
            assert_eq!(found.as_ref(), Some(bytes).filter(|_| path != "manifest.json"), "{path}");
        }
        check(&packed(&files)[..], &digest, None).unwrap();
    }

    #[test]
    fn what_is_no_part_of_an_image_is_refused() {
        let (files, digest) = image();
        let refused = |files: &[(String, Vec<u8>)]| {
            let folder = tempfile::tempdir().unwrap();
            let inner = folder.path().join("inner");
            let error = check(&packed(files)[..], &digest, Some(&inner)).unwrap_err();
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing beside it");
            format!("{error:#}")
        };
        let long = format!("blobs/sha256/../{}", "a".repeat(61));
        for bad in ["../x", "/etc/x", "x", "blobs/sha256/../../../x", "blobs/sha256/A", &long] {
            let mut files = files.clone();
            files.push((bad.to_owned(), b"x".to_vec()));
            assert!(refused(&files).contains("which no image layout has"), "{bad}");
        }
        for at in 0..files.len() {
            let mut less = files.clone();
            let (path, _) = less.remove(at);
            if path != "manifest.json" {
                let error = refused(&less);
                assert!(error.contains("lacks") || error.contains("has no"), "{path}: {error}");
            }
            let mut twice = files.clone();
            twice.push(files[at].clone());
            refused(&twice);
            if path.starts_with("blobs/") {
                let mut changed = files.clone();
                changed[at].1[0] ^= 1;
                assert!(refused(&changed).contains("something else than sha256:"), "{path}");
            }
        }
        let other = check(&packed(&files)[..], &format!("sha256:{}", "a".repeat(64)), None);
        assert!(other.unwrap_err().to_string().contains("does not name"));
    }

    #[test]
    fn an_archive_that_is_cut_is_an_error() {
        let (files, digest) = image();
        let whole = packed(&files);
        for cut in [0, 100, 600, whole.len() / 2] {
            assert!(check(&whole[..cut], &digest, None).is_err(), "{cut}");
        }
    }
}
