//! Writes small OCI image layouts to import.

use std::fmt;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde_json::json;
use sha2::{Digest, Sha256};

/// One file of a layer.
#[derive(Debug, Clone)]
pub struct File<'a> {
    /// Path without a leading slash.
    pub path: &'a str,
    /// Permission bits.
    pub mode: u32,
    /// Content.
    pub content: &'a [u8],
}

/// A layer's archive as it is written, not compressed; folders are made as needed by whoever reads it.
pub struct Layer<W: Write>(tar::Builder<W>);

impl<W: Write> fmt::Debug for Layer<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layer").finish_non_exhaustive()
    }
}

impl<W: Write> Layer<W> {
    /// Begins one.
    pub fn new(output: W) -> Self {
        Self(tar::Builder::new(output))
    }

    /// Adds a file.
    pub fn add(&mut self, file: &File<'_>) -> io::Result<()> {
        let mut header = tar::Header::new_ustar();
        header.set_size(file.content.len() as u64);
        header.set_mode(file.mode);
        header.set_mtime(1);
        self.0.append_data(&mut header, file.path, file.content)
    }

    /// Ends it.
    pub fn finish(self) -> io::Result<W> {
        self.0.into_inner()
    }
}

/// Packs files into a layer.
pub fn layer(files: &[File<'_>]) -> Vec<u8> {
    let mut layer = Layer::new(Vec::new());
    files.iter().for_each(|file| layer.add(file).expect("memory"));
    layer.finish().expect("memory")
}

/// Writes an OCI image layout of these layers and config into `folder`; gives the manifest digest.
pub fn layout(folder: &Path, layers: &[Vec<u8>], config: &serde_json::Value) -> String {
    documents(folder, layers.iter().map(|layer| blob(folder, layer)).collect(), config)
}

/// The same of a layer in a file, which may be larger than memory; the file becomes part of it.
pub fn layout_of_file(folder: &Path, layer: &Path, config: &serde_json::Value) -> String {
    let mut file = std::fs::File::open(layer).expect("a layer");
    let (mut hash, mut size, mut piece) = (Sha256::new(), 0, vec![0; 1 << 20]);
    loop {
        let len = file.read(&mut piece).expect("a layer can be read");
        if len == 0 {
            break;
        }
        hash.update(&piece[..len]);
        size += len as u64;
    }
    let digest = name(&hash.finalize());
    std::fs::rename(layer, place(folder, &digest)).expect("on the same file system");
    documents(folder, vec![(digest, size)], config)
}

/// Writes all but the layers.
fn documents(folder: &Path, descriptors: Vec<(String, u64)>, config: &serde_json::Value) -> String {
    let blob = |bytes: &[u8]| blob(folder, bytes);
    let diff_ids: Vec<_> = descriptors.iter().map(|(digest, _)| digest.clone()).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let (config_digest, config_size) = blob(config.to_string().as_bytes());
    let descriptor = |media: &str, digest: &str, size: u64| {
        json!({"mediaType": format!("application/vnd.oci.image.{media}"), "digest": digest,
               "size": size})
    };
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config.v1+json", &config_digest, config_size),
        "layers": descriptors.iter().map(|(d, s)| descriptor("layer.v1.tar", d, *s))
            .collect::<Vec<_>>(),
    });
    let (digest, size) = blob(manifest.to_string().as_bytes());
    let index = json!({"schemaVersion": 2,
        "manifests": [descriptor("manifest.v1+json", &digest, size)]});
    std::fs::write(folder.join("index.json"), index.to_string()).expect("index.json");
    std::fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("file");
    digest
}

fn blob(folder: &Path, bytes: &[u8]) -> (String, u64) {
    let digest = digest(bytes);
    std::fs::write(place(folder, &digest), bytes).expect("a blob");
    (digest, bytes.len() as u64)
}

/// Where a layout has a blob.
fn place(folder: &Path, digest: &str) -> PathBuf {
    let blobs = folder.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).expect("a folder");
    blobs.join(digest.trim_start_matches("sha256:"))
}

/// As images name a blob.
pub fn digest(bytes: &[u8]) -> String {
    name(&Sha256::digest(bytes))
}

fn name(hash: &[u8]) -> String {
    let hex = hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    format!("sha256:{hex}")
}
