//! The honest answers of a registry that takes images, and keeps them in memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use towline_images::Digest;

use super::{Reply, Seen};

/// What a registry has.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shelf(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    /// By repository and digest.
    blobs: BTreeMap<(String, String), Vec<u8>>,
    /// By repository and tag or digest.
    manifests: BTreeMap<(String, String), Vec<u8>>,
    uploads: BTreeMap<String, Vec<u8>>,
    begun: usize,
    /// Bytes of blobs that came, whatever became of them.
    came: usize,
}

impl Shelf {
    /// Puts a blob there by another way.
    pub(crate) fn put(&self, repository: &str, bytes: &[u8]) {
        let name = (repository.to_owned(), Digest::of(bytes).to_string());
        self.0.lock().unwrap().blobs.insert(name, bytes.to_vec());
    }

    pub(crate) fn manifest(&self, repository: &str, version: &str) -> Option<Vec<u8>> {
        let name = (repository.to_owned(), version.to_owned());
        self.0.lock().unwrap().manifests.get(&name).cloned()
    }

    pub(crate) fn blobs(&self) -> usize {
        self.0.lock().unwrap().blobs.len()
    }

    pub(crate) fn came(&self) -> usize {
        self.0.lock().unwrap().came
    }

    /// Uploads that were begun and neither ended nor given up.
    pub(crate) fn open(&self) -> usize {
        self.0.lock().unwrap().uploads.len()
    }

    /// Forgets what of blobs is not whole.
    pub(crate) fn forget_uploads(&self) {
        self.0.lock().unwrap().uploads.clear();
    }

    pub(crate) fn answer(&self, seen: &Seen) -> Reply {
        self.0.lock().unwrap().answer(seen).unwrap_or_else(|| Reply::new(404, ""))
    }
}

impl Kept {
    fn answer(&mut self, seen: &Seen) -> Option<Reply> {
        let rest = seen.path.strip_prefix("/v2/")?;
        if rest.is_empty() {
            return Some(Reply::new(200, "{}"));
        }
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        if let Some((repository, id)) = path.split_once("/blobs/uploads/") {
            return match (&seen.method[..], id) {
                ("POST", "") => Some(self.begin(repository, query)),
                _ => self.upload(seen, repository, id, query),
            };
        }
        if let Some((repository, digest)) = path.split_once("/blobs/") {
            let bytes = self.blobs.get(&(repository.to_owned(), digest.to_owned()))?;
            return Some(match &seen.method[..] {
                "HEAD" => Reply::new(200, "").with("content-length", bytes.len().to_string()),
                _ => Reply::new(200, &bytes[..]),
            });
        }
        let (repository, version) = path.split_once("/manifests/")?;
        match &seen.method[..] {
            "PUT" => Some(self.name(seen, repository, version)),
            _ => {
                let found = self.manifests.get(&(repository.to_owned(), version.to_owned()))?;
                Some(Reply::new(200, &found[..]))
            }
        }
    }

    fn begin(&mut self, repository: &str, query: &str) -> Reply {
        let mount = query.strip_prefix("mount=").and_then(|query| query.split_once("&from="));
        if let Some((digest, from)) = mount
            && let Some(bytes) = self.blobs.get(&(from.to_owned(), digest.to_owned())).cloned()
        {
            self.blobs.insert((repository.to_owned(), digest.to_owned()), bytes);
            return Reply::new(201, "").with("location", format!("/v2/x/blobs/{digest}"));
        }
        self.begun += 1;
        let id = format!("u{}", self.begun);
        self.uploads.insert(id.clone(), Vec::new());
        Reply::new(202, "").with("location", format!("/v2/{repository}/blobs/uploads/{id}?s=0"))
    }

    fn upload(&mut self, seen: &Seen, repository: &str, id: &str, query: &str) -> Option<Reply> {
        let got = self.uploads.get_mut(id)?;
        let stands = |got: &[u8], status| {
            let (len, last) = (got.len(), got.len().saturating_sub(1));
            Reply::new(status, "")
                .with("range", format!("0-{last}"))
                .with("location", format!("/v2/{repository}/blobs/uploads/{id}?s={len}"))
        };
        // Each answer says where the next request goes: an old place is of no use.
        let state = format!("s={}", got.len());
        match &seen.method[..] {
            "GET" => Some(stands(got, 204)),
            "DELETE" => {
                self.uploads.remove(id);
                Some(Reply::new(204, ""))
            }
            "PATCH" => {
                let from = seen.header("content-range")?.split_once('-')?.0.parse().ok();
                if from != Some(got.len()) || query != state {
                    return Some(stands(got, 416));
                }
                got.extend_from_slice(&seen.body);
                self.came += seen.body.len();
                Some(stands(got, 202))
            }
            "PUT" => {
                let digest = query.strip_prefix(&format!("{state}&digest="))?.replace("%3A", ":");
                let bytes = [&got[..], &seen.body].concat();
                self.came += seen.body.len();
                if seen.cut || Digest::of(&bytes).to_string() != digest {
                    return Some(Reply::new(400, ""));
                }
                self.uploads.remove(id);
                self.blobs.insert((repository.to_owned(), digest), bytes);
                Some(Reply::new(201, ""))
            }
            _ => None,
        }
    }

    /// As every registry does: nothing is named before all of its parts are there.
    fn name(&mut self, seen: &Seen, repository: &str, version: &str) -> Reply {
        let manifest: serde_json::Value = serde_json::from_slice(&seen.body).unwrap();
        let layers = manifest["layers"].as_array().unwrap().iter();
        for part in layers.chain([&manifest["config"]]) {
            let digest = part["digest"].as_str().unwrap().to_owned();
            if !self.blobs.contains_key(&(repository.to_owned(), digest)) {
                let body = r#"{"errors":[{"message":"blob unknown to registry"}]}"#;
                return Reply::new(400, body);
            }
        }
        if seen.header("content-type") != manifest["mediaType"].as_str() {
            return Reply::new(400, "");
        }
        self.manifests.insert((repository.to_owned(), version.to_owned()), seen.body.clone());
        let digest = Digest::of(&seen.body).to_string();
        Reply::new(201, "").with("docker-content-digest", digest)
    }
}
