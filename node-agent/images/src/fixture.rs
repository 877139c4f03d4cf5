//! Small OCI image layouts for tests: of this crate, of the node agent, end to end.
//!
//! Only what a test cannot do without: layers are built entry by entry, also wrong ones.

use std::io::Write;

use crate::Digest;
use crate::tar::{Header, Type, Writer};

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// As it is.
    Plain,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

/// A layer's tar archive, in the making.
#[derive(Debug)]
pub struct Layer {
    tar: Writer<Vec<u8>>,
}

impl Default for Layer {
    fn default() -> Layer {
        Layer::new()
    }
}

impl Layer {
    /// Begins an empty layer.
    pub fn new() -> Layer {
        Layer { tar: Writer::new(Vec::new()) }
    }

    /// Adds a file.
    pub fn file(self, path: impl AsRef<[u8]>, mode: u32, content: &[u8]) -> Layer {
        let header = header(Type::Regular, path.as_ref(), mode);
        self.entry(Header { size: content.len() as u64, ..header }, content)
    }

    /// Adds a file with an extended attribute.
    pub fn file_with_xattr(
        self,
        path: impl AsRef<[u8]>,
        content: &[u8],
        name: &[u8],
        value: &[u8],
    ) -> Layer {
        let xattrs = vec![(name.to_vec(), value.to_vec())];
        let header = header(Type::Regular, path.as_ref(), 0o755);
        self.entry(Header { size: content.len() as u64, xattrs, ..header }, content)
    }

    /// Adds a folder.
    pub fn folder(self, path: impl AsRef<[u8]>, mode: u32) -> Layer {
        self.entry(header(Type::Directory, path.as_ref(), mode), b"")
    }

    /// Adds a symlink.
    pub fn symlink(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Layer {
        let header = header(Type::Symlink, path.as_ref(), 0o777);
        self.entry(Header { link: target.as_ref().to_vec(), ..header }, b"")
    }

    /// Adds a hard link.
    pub fn hard_link(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Layer {
        let header = header(Type::HardLink, path.as_ref(), 0o644);
        self.entry(Header { link: target.as_ref().to_vec(), ..header }, b"")
    }

    /// Adds a character device.
    pub fn device(self, path: impl AsRef<[u8]>, major: u32, minor: u32) -> Layer {
        let header = header(Type::Character, path.as_ref(), 0o666);
        self.entry(Header { device: (major, minor), ..header }, b"")
    }

    /// Adds a FIFO.
    pub fn fifo(self, path: impl AsRef<[u8]>) -> Layer {
        self.entry(header(Type::Fifo, path.as_ref(), 0o644), b"")
    }

    /// Returns the archive.
    pub fn finish(self) -> Vec<u8> {
        self.tar.finish().unwrap_or_default()
    }

    fn entry(mut self, header: Header, content: &[u8]) -> Layer {
        let wrote =
            self.tar.header(&header).and_then(|()| self.tar.data(header.size, &mut { content }));
        wrote.expect("writing to memory does not fail");
        self
    }
}

fn header(kind: Type, path: &[u8], mode: u32) -> Header {
    Header {
        kind,
        path: path.to_vec(),
        link: Vec::new(),
        mode,
        uid: 0,
        gid: 0,
        mtime: 1_700_000_000,
        size: 0,
        device: (0, 0),
        xattrs: Vec::new(),
    }
}

/// An OCI image layout, in the making.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Layer archives, unpacked, the lowest first.
    pub layers: Vec<Vec<u8>>,
    /// How they are stored.
    pub compression: Compression,
    /// The config's `config` object, in JSON.
    pub config: String,
    /// `os/architecture`.
    pub platform: String,
}

impl Layout {
    /// Begins a layout of some layers for this machine.
    pub fn new(layers: Vec<Vec<u8>>) -> Layout {
        Layout {
            layers,
            compression: Compression::Gzip,
            config: "{}".into(),
            platform: format!("linux/{}", crate::error::wanted_architecture()),
        }
    }

    /// Returns every file of the layout with its path, and the manifest's digest.
    pub fn files(&self) -> (Vec<(String, Vec<u8>)>, Digest) {
        let (os, architecture) = self.platform.split_once('/').unwrap_or(("linux", "amd64"));
        let mut files = Vec::new();
        let mut blob = |bytes: Vec<u8>| {
            let described = (Digest::of(&bytes), bytes.len());
            files.push((format!("blobs/sha256/{}", described.0.hex()), bytes));
            described
        };
        let diff_ids: Vec<_> =
            self.layers.iter().map(|layer| format!("\"{}\"", Digest::of(layer))).collect();
        let (media, layers): (&str, Vec<_>) = match self.compression {
            Compression::Plain => ("tar", self.layers.clone()),
            Compression::Gzip => ("tar+gzip", self.layers.iter().map(|l| gzip(l)).collect()),
            Compression::Zstd => ("tar+zstd", self.layers.iter().map(|l| zstd(l)).collect()),
        };
        let layers: Vec<_> = layers
            .into_iter()
            .map(|layer| {
                let (digest, size) = blob(layer);
                let media = format!("application/vnd.oci.image.layer.v1.{media}");
                format!(r#"{{"mediaType":"{media}","digest":"{digest}","size":{size}}}"#)
            })
            .collect();
        let (config, config_size) = blob(
            format!(
                r#"{{"os":"{os}","architecture":"{architecture}","config":{},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
                self.config,
                diff_ids.join(",")
            )
            .into_bytes(),
        );
        let (manifest, manifest_size) = blob(
            format!(
                r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":{config_size}}},"layers":[{}]}}"#,
                layers.join(",")
            )
            .into_bytes(),
        );
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{manifest}","size":{manifest_size},"platform":{{"os":"{os}","architecture":"{architecture}"}}}}]}}"#
        );
        files.push(("oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
        files.push(("index.json".into(), index.into_bytes()));
        (files, manifest)
    }

    /// Returns the layout as a tar archive.
    pub fn archive(&self) -> Vec<u8> {
        archive_of(&self.files().0)
    }
}

/// Makes a tar archive of some files.
pub fn archive_of(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let layer =
        files.iter().fold(Layer::new(), |layer, (path, bytes)| layer.file(path, 0o644, bytes));
    layer.finish()
}

/// Compresses with gzip.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).expect("writing to memory does not fail");
    out.finish().expect("writing to memory does not fail")
}

/// Compresses with zstd.
pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 1).expect("writing to memory does not fail")
}
