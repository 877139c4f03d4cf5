//! From a tag or digest to the one manifest for this machine.
//!
//! A document is only ever what its bytes say, and its bytes are checked against every digest that
//! named them.

use std::io::Write as _;

use reqwest::header::HeaderName;

use super::error::PullError;
use super::reference::{Reference, Version};
use super::session::{Get, Session};
use super::transport::read;
use crate::document::{self, Kind, Manifest};
use crate::error::ImageError;
use crate::{Digest, Store, limits};

/// Indexes within indexes that are followed.
const NESTED_MAX: usize = 4;

/// Every kind of manifest that we understand.
const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json";

pub(crate) const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// A manifest with what it is called by.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) digest: Digest,
    pub(crate) bytes: Vec<u8>,
    pub(crate) manifest: Manifest,
}

/// Asks for what was named, and follows indexes to this machine's image.
pub(crate) async fn choose(
    session: &Session,
    store: &Store,
    reference: &Reference,
) -> Result<Chosen, PullError> {
    let (mut name, mut expected) = match &reference.version {
        Version::Tag(tag) => (tag.clone(), None),
        Version::Digest(digest) => (digest.to_string(), Some(*digest)),
    };
    for _ in 0..=NESTED_MAX {
        let bytes = match expected.and_then(|digest| kept(store, &digest)) {
            Some(bytes) => bytes,
            None => session.retrying(|| fetch(session, reference, &name, expected)).await?,
        };
        match document::kind(&bytes)? {
            Kind::Manifest => {
                let manifest = document::manifest(&bytes)?;
                return Ok(Chosen { digest: Digest::of(&bytes), bytes, manifest });
            }
            Kind::Index => {
                let next = next(&bytes)?;
                (name, expected) = (next.to_string(), Some(next));
            }
        }
    }
    Err(ImageError::document("index", "indexes within indexes").into())
}

/// What an index leads to: the best manifest for this machine, else a further index.
fn next(index: &[u8]) -> Result<Digest, ImageError> {
    let mut index = document::index(index)?;
    if let Some(found) = index.manifests.first().or(index.indexes.first()) {
        return Ok(*found);
    }
    if index.others.is_empty() {
        return Err(ImageError::document("index", "it names no image"));
    }
    index.others.sort();
    index.others.dedup();
    Err(ImageError::OtherPlatform { found: index.others.join(", ") })
}

/// A manifest that was pulled before and is named by its digest need not be asked for.
fn kept(store: &Store, digest: &Digest) -> Option<Vec<u8>> {
    crate::store::read_document(&store.blob(digest), digest, "manifest").ok()
}

async fn fetch(
    session: &Session,
    reference: &Reference,
    name: &str,
    expected: Option<Digest>,
) -> Result<Vec<u8>, PullError> {
    let path = format!("manifests/{name}");
    let what = format!("manifest {name} of {}", reference.repository);
    let get = Get { path: &path, accept: Some(ACCEPT), from: 0, what: &what };
    let response = session.get(get).await?;
    // A proxy that answers with something else is noticed even where a tag promises nothing.
    let said = response.headers().get(CONTENT_DIGEST).and_then(|value| value.to_str().ok());
    let said: Option<Digest> = said.and_then(|text| text.parse().ok());
    let bytes = read(response, limits::DOCUMENT_MAX, session.pace.document, "manifest").await?;
    let found = Digest::of(&bytes);
    for expected in expected.into_iter().chain(said) {
        if found != expected {
            return Err(PullError::WrongDigest { host: session.host(), expected, found });
        }
    }
    Ok(bytes)
}

/// Puts a manifest into the store under its digest.
pub(crate) fn keep(store: &Store, chosen: &Chosen) -> Result<(), ImageError> {
    let path = store.blob(&chosen.digest);
    if path.exists() {
        return Ok(());
    }
    store.publish(&path, |file| file.write_all(&chosen.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(entries: &[(&str, char)]) -> Vec<u8> {
        let entries: Vec<_> = entries
            .iter()
            .map(|(platform, hex)| {
                let digest = format!("sha256:{}", hex.to_string().repeat(64));
                format!(
                    r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":1,"digest":"{digest}"{platform}}}"#
                )
            })
            .collect();
        format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(",")).into_bytes()
    }

    #[test]
    fn this_machines_plainest_image_is_chosen() {
        let ours = crate::error::wanted_architecture();
        let platform = |os: &str, architecture: &str, more: &str| {
            format!(r#","platform":{{"os":"{os}","architecture":"{architecture}"{more}}}"#)
        };
        let (arm, v3) =
            (platform("linux", "s390x", ""), platform("linux", ours, r#","variant":"v3""#));
        let plain = platform("linux", ours, "");
        let unknown = platform("unknown", "unknown", "");
        let all =
            [(&arm[..], 'a'), ("", 'b'), (&v3[..], 'c'), (&plain[..], 'd'), (&unknown[..], 'e')];
        assert_eq!(next(&index(&all)).unwrap().hex(), "d".repeat(64));
        assert_eq!(next(&index(&all[..3])).unwrap().hex(), "c".repeat(64));
        let windows = platform("windows", ours, "");
        let error = next(&index(&[(&arm, 'a'), (&windows, 'b'), (&unknown, 'c')])).unwrap_err();
        let expected =
            format!("the image is for linux/s390x, windows/{ours}; this node runs linux/{ours}");
        assert_eq!(error.to_string(), expected);
    }
}
