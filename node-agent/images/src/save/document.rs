//! The config and the manifest of a saved image, from those of the image that its sandbox was of.
//!
//! What is not known here stays as it is. The keys come out sorted, so the same content is the same
//! bytes.

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::layer::Layer;
use super::{Compression, SaveRequest, Settings};
use crate::Digest;
use crate::error::ImageError;

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// What a build of docker leaves in a config of the container that it was made in.
const OF_A_BUILD: [&str; 3] = ["container", "container_config", "docker_version"];
/// Which secrets were let into the image, and why.
const ALLOWED: &str = "towline.allowed-secrets";

/// The two documents of an image.
#[derive(Debug, Clone)]
pub(super) struct Documents {
    pub(super) manifest: Map<String, Value>,
    pub(super) config: Map<String, Value>,
}

fn object(bytes: &[u8], what: &str) -> Result<Map<String, Value>, ImageError> {
    serde_json::from_slice(bytes).map_err(|e| ImageError::document(what, e))
}

impl Documents {
    pub(super) fn parse(manifest: &[u8], config: &[u8]) -> Result<Self, ImageError> {
        Ok(Self { manifest: object(manifest, "manifest")?, config: object(config, "config")? })
    }

    /// When the image was made, in seconds since 1970, if it says so.
    pub(super) fn created_s(&self) -> Option<i64> {
        let created: Timestamp = self.config.get("created")?.as_str()?.parse().ok()?;
        Some(created.as_second())
    }

    /// Puts the settings into the config; returns whether that changes it.
    pub(super) fn set(&mut self, settings: &Settings) -> Result<bool, ImageError> {
        let entry = self.config.entry("config").or_insert_with(|| json!({}));
        if entry.is_null() {
            *entry = json!({});
        }
        let no_object = || ImageError::document("config", "its settings are no object");
        let config = entry.as_object_mut().ok_or_else(no_object)?;
        let before = config.clone();
        if let Some(entrypoint) = &settings.entrypoint {
            config.insert("Entrypoint".into(), json!(entrypoint));
            // The arguments were another program's.
            config.remove("Cmd");
        }
        if let Some(cmd) = &settings.cmd {
            config.insert("Cmd".into(), json!(cmd));
        }
        if let Some(workdir) = &settings.workdir {
            config.insert("WorkingDir".into(), json!(workdir));
        }
        if let Some(user) = &settings.user {
            config.insert("User".into(), json!(user));
        }
        if !settings.env.is_empty() {
            let mut env: Vec<String> = config
                .get("Env")
                .and_then(|env| serde_json::from_value(env.clone()).ok())
                .unwrap_or_default();
            for (name, value) in &settings.env {
                let pair = format!("{name}={value}");
                let is_it = |old: &&mut String| old.split('=').next() == Some(name);
                match env.iter_mut().find(is_it) {
                    Some(old) => *old = pair,
                    None => env.push(pair),
                }
            }
            config.insert("Env".into(), json!(env));
        }
        if !settings.labels.is_empty() {
            let labels = config.entry("Labels").or_insert_with(|| json!({}));
            if labels.is_null() {
                *labels = json!({});
            }
            let labels = labels.as_object_mut().ok_or_else(no_object)?;
            labels.extend(settings.labels.iter().map(|(name, value)| (name.clone(), json!(value))));
        }
        Ok(*config != before)
    }

    /// Whether this is the only layer.
    pub(super) fn is_of(&self, layer: &Digest) -> bool {
        let layers = self.manifest.get("layers").and_then(Value::as_array);
        layers.is_some_and(|layers| match &layers[..] {
            [only] => only.get("digest").and_then(Value::as_str) == Some(&layer.to_string()),
            _ => false,
        })
    }

    /// Takes all layers away. What made them stays in the history, as having made none.
    pub(super) fn squash(&mut self) -> Result<(), ImageError> {
        list(&mut self.manifest, "layers", "manifest")?.clear();
        for event in list(&mut self.config, "history", "config")? {
            if let Some(event) = event.as_object_mut() {
                event.insert("empty_layer".into(), json!(true));
            }
        }
        list(self.rootfs()?, "diff_ids", "config")?.clear();
        Ok(())
    }

    fn rootfs(&mut self) -> Result<&mut Map<String, Value>, ImageError> {
        let rootfs = self.config.get_mut("rootfs").and_then(Value::as_object_mut);
        rootfs.ok_or_else(|| ImageError::document("config", "it has no rootfs"))
    }

    /// Puts the layer on top, or only notes that the settings have changed.
    pub(super) fn add(
        &mut self,
        layer: Option<&Layer>,
        compression: Compression,
        created: &str,
        message: &str,
    ) -> Result<(), ImageError> {
        for key in OF_A_BUILD {
            self.config.remove(key);
        }
        self.config.insert("created".into(), json!(created));
        let mut event = json!({ "created": created, "created_by": "tow save" });
        if !message.is_empty() {
            event["comment"] = json!(message);
        }
        if layer.is_none() {
            event["empty_layer"] = json!(true);
        }
        list(&mut self.config, "history", "config")?.push(event);
        let Some(layer) = layer else { return Ok(()) };
        list(self.rootfs()?, "diff_ids", "config")?.push(json!(layer.diff_id.to_string()));
        let suffix = match compression {
            Compression::Zstd => "zstd",
            Compression::Gzip => "gzip",
        };
        list(&mut self.manifest, "layers", "manifest")?.push(json!({
            "mediaType": format!("{LAYER}+{suffix}"),
            "digest": layer.digest.to_string(),
            "size": layer.bytes,
        }));
        Ok(())
    }

    /// The config's bytes, and the manifest's around them.
    pub(super) fn finish(
        mut self,
        created: &str,
        request: &SaveRequest,
        allowed: &[Value],
    ) -> Result<(Vec<u8>, Vec<u8>), ImageError> {
        let bytes = |map: &Map<String, Value>, what: &str| {
            serde_json::to_vec(map).map_err(|e| ImageError::document(what, e))
        };
        let config = bytes(&self.config, "config")?;
        for layer in list(&mut self.manifest, "layers", "manifest")? {
            let Some(kind) = layer.get_mut("mediaType") else { continue };
            if let Some(ours) = kind.as_str().and_then(oci_layer) {
                *kind = json!(ours);
            }
        }
        let mut annotations = json!({ "org.opencontainers.image.created": created });
        if !request.squash {
            // By the specification, a base is what an image has the first layers of.
            annotations["org.opencontainers.image.base.digest"] = json!(request.base.to_string());
            annotations["org.opencontainers.image.base.name"] = json!(request.base_name);
        }
        if !allowed.is_empty() {
            annotations[ALLOWED] = json!(Value::from(allowed.to_vec()).to_string());
        }
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {
                "mediaType": CONFIG,
                "digest": Digest::of(&config).to_string(),
                "size": config.len(),
            },
            "layers": self.manifest.remove("layers"),
            "annotations": annotations,
        });
        let manifest =
            serde_json::to_vec(&manifest).map_err(|e| ImageError::document("manifest", e))?;
        Ok((config, manifest))
    }
}

/// A time as the documents have it.
pub(super) fn time(seconds: i64) -> Result<String, ImageError> {
    let at = Timestamp::from_second(seconds).map_err(|e| ImageError::document("config", e))?;
    Ok(at.to_string())
}

fn list<'a>(
    map: &'a mut Map<String, Value>,
    key: &str,
    what: &str,
) -> Result<&'a mut Vec<Value>, ImageError> {
    let entry = map.entry(key).or_insert_with(|| json!([]));
    if entry.is_null() {
        *entry = json!([]);
    }
    entry.as_array_mut().ok_or_else(|| ImageError::document(what, format!("its {key} is no list")))
}

/// Docker's name of a layer's kind in OCI's words.
fn oci_layer(kind: &str) -> Option<String> {
    let rest = kind.strip_prefix("application/vnd.docker.image.rootfs.")?;
    match rest {
        "diff.tar" => Some(LAYER.into()),
        "diff.tar.gzip" => Some(format!("{LAYER}+gzip")),
        "diff.tar.zstd" => Some(format!("{LAYER}+zstd")),
        "foreign.diff.tar.gzip" => {
            Some("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip".into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Docker's names of kinds in it would make a manifest that is neither docker's nor OCI's.
    #[test]
    fn what_docker_made_becomes_an_oci_image() {
        let docker = "application/vnd.docker.image.rootfs.diff.tar";
        for (kind, ours) in [("", ""), (".gzip", "+gzip"), (".zstd", "+zstd")] {
            assert_eq!(oci_layer(&format!("{docker}{kind}")).unwrap(), format!("{LAYER}{ours}"));
        }
        assert_eq!(oci_layer(LAYER), None);
    }

    #[test]
    fn a_base_says_when_it_was_made_or_does_not() {
        let of = |created: &str| {
            let config = format!(r#"{{"created":{created}}}"#);
            Documents::parse(b"{}", config.as_bytes()).unwrap().created_s()
        };
        assert_eq!(of(r#""2024-06-19T19:22:45.5+02:00""#), Some(1_718_817_765));
        assert_eq!(of(r#""yesterday""#), None);
        assert_eq!(of("7"), None);
        assert_eq!(time(1_718_817_765).unwrap(), "2024-06-19T17:22:45Z");
        assert!(time(i64::MAX).is_err());
    }
}
