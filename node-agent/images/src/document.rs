//! The JSON documents of an image, from a stranger's bytes to checked types: index, manifest,
//! config.

use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::Digest;
use crate::error::{ImageError, wanted_architecture};
use crate::limits;

/// What an image says about how its programs are started.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ImageConfig {
    /// `NAME=value`.
    pub env: Vec<Vec<u8>>,
    /// `user[:group]`, by name or number; empty means root.
    pub user: String,
    /// Working directory; empty means `/`.
    pub workdir: Vec<u8>,
    /// What is always started.
    pub entrypoint: Vec<Vec<u8>>,
    /// Its arguments, or the command where there is no entrypoint.
    pub cmd: Vec<Vec<u8>>,
}

/// The two ways of writing one image's manifest.
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// A blob as a manifest names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// A checked manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) config: Blob,
    pub(crate) layers: Vec<Blob>,
}

/// A checked config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) diff_ids: Vec<Digest>,
    pub(crate) config: ImageConfig,
}

/// What a registry's document is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One image.
    Manifest,
    /// A choice of images.
    Index,
}

/// Says what a document is by its fields alone. One that could be read either way is refused: two
/// readers would see two images under one digest.
pub(crate) fn kind(bytes: &[u8]) -> Result<Kind, ImageError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Fields {
        schema_version: Option<u64>,
        manifests: Option<IgnoredAny>,
        config: Option<IgnoredAny>,
        layers: Option<IgnoredAny>,
        fs_layers: Option<IgnoredAny>,
    }
    let fields: Fields =
        serde_json::from_slice(bytes).map_err(|e| ImageError::document("manifest", e))?;
    let bad = |why: &str| Err(ImageError::document("manifest", why));
    let has_image = fields.config.is_some() || fields.layers.is_some();
    match (fields.schema_version, fields.manifests.is_some(), has_image) {
        (Some(1), ..) => bad(
            "it is in docker's schema 1, which is out of use since 2017 and proves nothing of its \
             content: push the image again with a newer docker",
        ),
        _ if fields.fs_layers.is_some() => bad("it mixes docker's schema 1 with another"),
        (_, true, true) => bad("it is an index and an image at once"),
        (_, true, false) => Ok(Kind::Index),
        (_, false, true) => Ok(Kind::Manifest),
        (_, false, false) => bad("it is neither an image nor an index"),
    }
}

/// What an index leads to: manifests that may be for this machine, and further indexes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Index {
    /// The best first: for this very platform, then for a variant of it, then for any.
    pub(crate) manifests: Vec<Digest>,
    pub(crate) indexes: Vec<Digest>,
    /// Platforms that it has instead, for the error.
    pub(crate) others: Vec<String>,
}

pub(crate) fn index(bytes: &[u8]) -> Result<Index, ImageError> {
    let index: ImageIndex =
        serde_json::from_slice(bytes).map_err(|e| ImageError::document("index", e))?;
    let mut found = Index::default();
    let mut ours = Vec::new();
    for descriptor in index.manifests().iter().take(limits::BLOBS_MAX) {
        let digest = blob(descriptor, "index")?.digest;
        match descriptor.media_type() {
            MediaType::ImageIndex => found.indexes.push(digest),
            MediaType::Other(other) if other.contains("manifest.list") => {
                found.indexes.push(digest);
            }
            _ => match descriptor.platform() {
                // Attestations of buildkit call themselves unknown/unknown.
                Some(platform) if platform.os().to_string() == "unknown" => {}
                Some(platform)
                    if platform.os().to_string() != "linux"
                        || platform.architecture().to_string() != wanted_architecture() =>
                {
                    found.others.push(format!("{}/{}", platform.os(), platform.architecture()));
                }
                Some(platform) => ours.push((u8::from(platform.variant().is_some()), digest)),
                None => ours.push((2, digest)),
            },
        }
    }
    ours.sort_by_key(|(rank, _)| *rank);
    found.manifests = ours.into_iter().map(|(_, digest)| digest).collect();
    Ok(found)
}

pub(crate) fn manifest(bytes: &[u8]) -> Result<Manifest, ImageError> {
    let manifest: ImageManifest =
        serde_json::from_slice(bytes).map_err(|e| ImageError::document("manifest", e))?;
    if manifest.schema_version() != 2 {
        return Err(ImageError::document("manifest", "its schemaVersion is not 2"));
    }
    match manifest.config().media_type() {
        MediaType::ImageConfig => {}
        MediaType::Other(other) if other == "application/vnd.docker.container.image.v1+json" => {}
        other => {
            let why = format!("it is no container image but `{other}`");
            return Err(ImageError::document("manifest", why));
        }
    }
    if manifest.layers().len() > limits::LAYERS_MAX {
        return Err(ImageError::Limit {
            what: format!("an image of {} layers", manifest.layers().len()),
            limit: limits::LAYERS_MAX.to_string(),
        });
    }
    let layers = manifest.layers().iter().map(|layer| {
        if layer.media_type().to_string().contains("encrypted") {
            return Err(ImageError::document("manifest", "its layers are encrypted"));
        }
        blob(layer, "manifest")
    });
    Ok(Manifest {
        config: blob(manifest.config(), "manifest")?,
        layers: layers.collect::<Result<_, _>>()?,
    })
}

/// Returns what a manifest is called by where it is handed on: its own word, else by what it holds.
pub(crate) fn media_type(bytes: &[u8]) -> Result<String, ImageError> {
    let manifest: ImageManifest =
        serde_json::from_slice(bytes).map_err(|e| ImageError::document("manifest", e))?;
    let is_docker = matches!(manifest.config().media_type(), MediaType::Other(_));
    match manifest.media_type().as_ref().map(ToString::to_string) {
        Some(said) if said == OCI_MANIFEST || said == DOCKER_MANIFEST => Ok(said),
        Some(said) => {
            let why = format!("its mediaType is `{}`", said.escape_debug());
            Err(ImageError::document("manifest", why))
        }
        None if is_docker => Ok(DOCKER_MANIFEST.into()),
        None => Ok(OCI_MANIFEST.into()),
    }
}

pub(crate) fn config(bytes: &[u8]) -> Result<Config, ImageError> {
    let config: ImageConfiguration =
        serde_json::from_slice(bytes).map_err(|e| ImageError::document("config", e))?;
    let (os, architecture) = (config.os().to_string(), config.architecture().to_string());
    if os != "linux" || architecture != wanted_architecture() {
        return Err(ImageError::OtherPlatform { found: format!("{os}/{architecture}") });
    }
    if config.rootfs().diff_ids().len() > limits::LAYERS_MAX {
        return Err(ImageError::document("config", "it has too many layers"));
    }
    let diff_ids = config.rootfs().diff_ids().iter().map(|id| {
        id.parse().map_err(|e: crate::digest::BadDigest| ImageError::document("config", e))
    });
    let diff_ids = diff_ids.collect::<Result<_, _>>()?;
    let said = config.config().as_ref();
    let bytes = |list: Option<&Vec<String>>| -> Vec<Vec<u8>> {
        list.into_iter().flatten().map(|text| text.as_bytes().to_vec()).collect()
    };
    let mut env = bytes(said.and_then(|said| said.env().as_ref()));
    env.retain(|pair| pair.iter().position(|b| *b == b'=').is_some_and(|at| at > 0));
    let found = ImageConfig {
        env,
        user: said.and_then(|said| said.user().clone()).unwrap_or_default(),
        workdir: said.and_then(|said| said.working_dir().clone()).unwrap_or_default().into(),
        entrypoint: bytes(said.and_then(|said| said.entrypoint().as_ref())),
        cmd: bytes(said.and_then(|said| said.cmd().as_ref())),
    };
    let texts = [&found.workdir].into_iter().chain(&found.env).chain(&found.entrypoint);
    if texts.chain(&found.cmd).any(|text| text.contains(&0)) || found.user.contains('\0') {
        return Err(ImageError::document("config", "a NUL in what is started"));
    }
    if !found.workdir.is_empty() && !found.workdir.starts_with(b"/") {
        return Err(ImageError::document("config", "its WorkingDir is not absolute"));
    }
    Ok(Config { diff_ids, config: found })
}

fn blob(descriptor: &Descriptor, what: &str) -> Result<Blob, ImageError> {
    let digest = descriptor.digest().to_string();
    let digest =
        digest.parse().map_err(|e: crate::digest::BadDigest| ImageError::document(what, e))?;
    Ok(Blob { digest, size: descriptor.size() })
}
