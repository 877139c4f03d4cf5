//! Writes small OCI image layouts to import.

use std::path::Path;

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

/// Packs files into an uncompressed layer; folders are made as needed by whoever reads it.
pub fn layer(files: &[File<'_>]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for file in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(file.content.len() as u64);
        header.set_mode(file.mode);
        header.set_mtime(1);
        tar.append_data(&mut header, file.path, file.content).expect("memory");
    }
    tar.into_inner().expect("memory")
}

/// Writes an OCI image layout of these layers and config into `folder`; gives the manifest digest.
pub fn layout(folder: &Path, layers: &[Vec<u8>], config: &serde_json::Value) -> String {
    let blobs = folder.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).expect("a folder");
    let blob = |bytes: &[u8]| {
        let digest = hex(&Sha256::digest(bytes));
        std::fs::write(blobs.join(&digest), bytes).expect("a blob");
        (format!("sha256:{digest}"), bytes.len())
    };
    let descriptors: Vec<_> = layers.iter().map(|layer| blob(layer)).collect();
    let diff_ids: Vec<_> = descriptors.iter().map(|(digest, _)| digest.clone()).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let (config_digest, config_size) = blob(config.to_string().as_bytes());
    let descriptor = |media: &str, digest: &str, size: usize| {
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

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
