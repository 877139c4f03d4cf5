//! Archives of `docker save` (and of podman and skopeo in that format): which of their files are
//! parts of the image, and the OCI manifest that they amount to.
//!
//! `manifest.json` names the config and the layers by path, and often comes last, so every file
//! that could be a part is kept until then. Older dockers link one layer's file to another's.
//! Paths are only names here: nothing is looked up in a file system.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::Digest;
use crate::document::Blob;
use crate::error::ImageError;
use crate::limits;

/// Links that lead to links.
const LINKS_MAX: usize = 8;

/// What an archive holds besides an OCI layout.
#[derive(Debug, Default)]
pub(super) struct Docker {
    manifest: Option<Vec<u8>>,
    parts: BTreeMap<Vec<u8>, Blob>,
    /// From a path to the path that it stands for.
    links: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    config: String,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// Whether a file could be a config or a layer.
pub(super) fn is_part(path: &[u8]) -> bool {
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or(path);
    name.ends_with(b".tar") || (name.ends_with(b".json") && name.len() == path.len())
}

impl Docker {
    pub(super) fn set_manifest(&mut self, bytes: Vec<u8>) {
        self.manifest = Some(bytes);
    }

    pub(super) fn is_there(&self) -> bool {
        self.manifest.is_some()
    }

    pub(super) fn add_part(&mut self, path: &[u8], blob: Blob) {
        self.parts.insert(path.to_vec(), blob);
    }

    /// `target` is as a symlink has it; a hard link's is from the archive's root.
    pub(super) fn add_link(&mut self, path: &[u8], target: &[u8], is_hard: bool) {
        let from: &[u8] = if is_hard { b"" } else { parent(path) };
        if let Some(target) = joined(from, target) {
            self.links.insert(path.to_vec(), target);
        }
    }

    /// Returns the OCI manifest of the one image in the archive. `blob` finds what lies under
    /// `blobs/sha256` there.
    pub(super) fn to_manifest(
        &self,
        blob: &dyn Fn(&Digest) -> Option<Blob>,
    ) -> Result<String, ImageError> {
        let bad = |why: String| ImageError::document("manifest.json", why);
        let bytes = self.manifest.as_deref().unwrap_or_default();
        let entries: Vec<Entry> =
            serde_json::from_slice(bytes).map_err(|e| ImageError::document("manifest.json", e))?;
        let [entry] = &entries[..] else {
            return Err(bad(format!("it names {} images: save one alone", entries.len())));
        };
        let layers = entry.layers.as_deref().unwrap_or_default();
        if layers.len() > limits::LAYERS_MAX {
            return Err(ImageError::Limit {
                what: format!("an image of {} layers", layers.len()),
                limit: limits::LAYERS_MAX.to_string(),
            });
        }
        let find = |path: &str| {
            self.find(path.as_bytes(), blob)
                .ok_or_else(|| bad(format!("the archive lacks `{}`", path.escape_debug())))
        };
        let descriptor = |kind: &str, blob: Blob| {
            format!(
                r#"{{"mediaType":"application/vnd.oci.image.{kind}","digest":"{}","size":{}}}"#,
                blob.digest, blob.size
            )
        };
        let config = descriptor("config.v1+json", find(&entry.config)?);
        let layers: Vec<_> = layers
            .iter()
            .map(|path| Ok(descriptor("layer.v1.tar", find(path)?)))
            .collect::<Result<_, ImageError>>()?;
        Ok(format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{config},"layers":[{}]}}"#,
            layers.join(",")
        ))
    }

    fn find(&self, path: &[u8], blob: &dyn Fn(&Digest) -> Option<Blob>) -> Option<Blob> {
        let mut path = joined(b"", path)?;
        for _ in 0..=LINKS_MAX {
            if let Some(part) = self.parts.get(&path) {
                return Some(*part);
            }
            if let Some(hex) = path.strip_prefix(b"blobs/sha256/") {
                return blob(&Digest::from_hex(std::str::from_utf8(hex).ok()?).ok()?);
            }
            path = self.links.get(&path)?.clone();
        }
        None
    }
}

fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|byte| *byte == b'/').map_or(b"", |at| &path[..at])
}

/// Follows a relative path by its words alone; `None` if it leaves the archive.
fn joined(from: &[u8], path: &[u8]) -> Option<Vec<u8>> {
    if path.starts_with(b"/") {
        return None;
    }
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in from.split(|byte| *byte == b'/').chain(path.split(|byte| *byte == b'/')) {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join(&b'/'))
}

/// Reads bytes as a `manifest.json` whose every path is there, for fuzzing.
pub(crate) fn fuzz(bytes: &[u8]) {
    let any = Blob { digest: Digest::of(b""), size: 0 };
    let mut docker = Docker::default();
    docker.set_manifest(bytes.to_vec());
    docker.add_part(b"c.json", any);
    docker.add_link(b"a/layer.tar", b"../b/layer.tar", false);
    docker.add_link(b"b/layer.tar", b"../a/layer.tar", false);
    docker.add_link(b"d/layer.tar", b"../c.json", false);
    if let Ok(manifest) = docker.to_manifest(&|_| Some(any)) {
        let read = crate::document::manifest(manifest.as_bytes());
        read.expect("what we write can be read");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(n: u8) -> Blob {
        Blob { digest: Digest::of(&[n]), size: n.into() }
    }

    #[test]
    fn parts_are_found_through_links() {
        let mut docker = Docker::default();
        docker.add_part(b"c.json", blob(1));
        docker.add_part(b"a/layer.tar", blob(2));
        docker.add_link(b"b/layer.tar", b"../a/layer.tar", false);
        docker.add_link(b"d/layer.tar", b"b/layer.tar", true);
        docker.add_link(b"loop/layer.tar", b"layer.tar", false);
        docker.add_link(b"out/layer.tar", b"../../etc/x.tar", false);
        let none = |_: &Digest| None;
        for (path, found) in [
            (&b"a/layer.tar"[..], Some(blob(2))),
            (b"./b/layer.tar", Some(blob(2))),
            (b"d/layer.tar", Some(blob(2))),
            (b"loop/layer.tar", None),
            (b"out/layer.tar", None),
            (b"/a/layer.tar", None),
            (b"../a/layer.tar", None),
        ] {
            assert_eq!(docker.find(path, &none), found, "{}", String::from_utf8_lossy(path));
        }
        docker.set_manifest(br#"[{"Config":"c.json","Layers":["b/layer.tar"]}]"#.to_vec());
        let manifest = docker.to_manifest(&none).unwrap();
        let manifest = crate::document::manifest(manifest.as_bytes()).unwrap();
        assert_eq!((manifest.config, &manifest.layers[..]), (blob(1), &[blob(2)][..]));
    }

    #[test]
    fn what_is_missing_or_too_much_is_named() {
        let error = |manifest: &str| {
            let mut docker = Docker::default();
            docker.set_manifest(manifest.as_bytes().to_vec());
            docker.to_manifest(&|_| None).unwrap_err().to_string()
        };
        let one = r#"{"Config":"c.json","Layers":[]}"#;
        assert!(error(&format!("[{one}]")).contains("lacks `c.json`"));
        assert!(error(&format!("[{one},{one}]")).contains("2 images: save one alone"));
        assert!(error("[]").contains("0 images"));
        assert!(error("{").contains("manifest.json"));
    }
}
