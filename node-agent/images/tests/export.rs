//! Images out of the store as archives, read back by ourselves and by skopeo.
#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "a test that fails, fails here")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use towline_images::fixture::{Compression, Layer, Layout};
use towline_images::{Digest, ImageError, Store, export, import, import_layout};

fn has(tool: &str, version: &str) -> bool {
    let has = Command::new(tool).arg(version).output().is_ok();
    if !has {
        eprintln!("SKIPPED: {tool} is not installed");
    }
    has
}

/// A store with one image of three layers, of which two are the same.
struct Node {
    cache: tempfile::TempDir,
    store: Store,
    digest: Digest,
}

impl Node {
    fn new(compression: Compression) -> Node {
        let content: Vec<u8> =
            (0..300_000u32).flat_map(|n| n.wrapping_mul(n).to_le_bytes()).collect();
        let lower = Layer::new().file("lower", 0o644, b"lower").finish();
        let upper = Layer::new().file("upper", 0o644, &content).finish();
        let mut layout = Layout::new(vec![lower.clone(), upper, lower]);
        layout.compression = compression;
        let cache = tempfile::tempdir().unwrap();
        let store = Store::open(cache.path()).unwrap();
        let digest = import(&store, &layout.archive()[..], &mut |_| {}).unwrap().digest;
        Node { cache, store, digest }
    }

    fn export(&self, name: &str) -> (Vec<u8>, Result<u64, ImageError>) {
        let mut out = Vec::new();
        let result = export(&self.store, &self.digest, name, &mut out, &mut |_| {});
        (out, result)
    }

    /// The largest blob's file.
    fn largest(&self) -> PathBuf {
        let blobs = fs::read_dir(self.cache.path().join("images/blobs/sha256")).unwrap();
        blobs
            .map(|entry| entry.unwrap().path())
            .max_by_key(|path| path.metadata().unwrap().len())
            .unwrap()
    }
}

fn imported(archive: &[u8]) -> Result<Digest, ImageError> {
    let cache = tempfile::tempdir().unwrap();
    let store = Store::open(cache.path()).unwrap();
    import(&store, archive, &mut |_| {}).map(|imported| imported.digest)
}

fn untar(archive: &[u8], to: &Path) {
    let path = to.join("image.tar");
    fs::write(&path, archive).unwrap();
    let mut tar = Command::new("tar");
    assert!(tar.arg("-xf").arg(&path).arg("-C").arg(to).status().unwrap().success());
}

#[test]
fn what_goes_out_comes_in_again_and_is_the_same_bytes_twice() {
    if !has("mksquashfs", "-version") {
        return;
    }
    for compression in [Compression::Plain, Compression::Gzip, Compression::Zstd] {
        let node = Node::new(compression);
        let (archive, bytes) = node.export("app:1");
        assert_eq!(bytes.unwrap(), archive.len() as u64);
        assert!(node.export("app:1").0 == archive, "the same bytes");
        assert_eq!(imported(&archive).unwrap(), node.digest);

        let folder = tempfile::tempdir().unwrap();
        untar(&archive, folder.path());
        let other = tempfile::tempdir().unwrap();
        let store = Store::open(other.path()).unwrap();
        let image = import_layout(&store, folder.path(), &mut |_| {}).unwrap();
        assert_eq!((image.digest, image.layers), (node.digest, 3));
        // What that store gives out again is the same once more.
        let mut again = Vec::new();
        export(&store, &node.digest, "app:1", &mut again, &mut |_| {}).unwrap();
        assert!(again == archive, "another store's bytes");
    }
}

#[test]
fn its_names_are_those_that_docker_and_podman_look_for() {
    if !has("mksquashfs", "-version") {
        return;
    }
    let node = Node::new(Compression::Gzip);
    let said = |name: &str, file: &str| {
        let folder = tempfile::tempdir().unwrap();
        untar(&node.export(name).0, folder.path());
        let bytes = fs::read(folder.path().join(file)).unwrap();
        serde_json::from_slice::<serde_json::Value>(&bytes).unwrap()
    };
    let index = said("debian", "index.json");
    let annotations = &index["manifests"][0]["annotations"];
    assert_eq!(annotations["org.opencontainers.image.ref.name"], "debian:latest");
    assert_eq!(annotations["io.containerd.image.name"], "docker.io/library/debian:latest");
    assert_eq!(index["manifests"][0]["digest"], node.digest.to_string());
    let docker = said("debian", "manifest.json");
    assert_eq!(docker[0]["RepoTags"][0], "debian:latest");
    assert_eq!(docker[0]["Layers"].as_array().unwrap().len(), 3);
    // An image by its digest alone has no name there.
    let digest = node.digest.to_string();
    assert!(said(&digest, "index.json")["manifests"][0]["annotations"].is_null());
    assert!(said(&digest, "manifest.json")[0]["RepoTags"].is_null());
}

#[test]
fn docker_without_layouts_reads_the_same_layers() {
    if !has("mksquashfs", "-version") {
        return;
    }
    let node = Node::new(Compression::Plain);
    let folder = tempfile::tempdir().unwrap();
    untar(&node.export("app:1").0, folder.path());
    let path = folder.path().join("docker.tar");
    let mut tar = Command::new("tar");
    tar.arg("-cf").arg(&path).arg("-C").arg(folder.path()).args(["manifest.json", "blobs"]);
    assert!(tar.status().unwrap().success());
    let cache = tempfile::tempdir().unwrap();
    let store = Store::open(cache.path()).unwrap();
    let image = import(&store, fs::File::open(path).unwrap(), &mut |_| {}).unwrap();
    assert_eq!(image.layers, 3);
}

#[test]
fn damage_ends_it_in_the_middle_and_says_where() {
    if !has("mksquashfs", "-version") {
        return;
    }
    let node = Node::new(Compression::Plain);
    let blob = node.largest();
    let good = fs::read(&blob).unwrap();
    for at in [0, good.len() / 2, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&blob, &bad).unwrap();
        let (archive, result) = node.export("app:1");
        let error = result.unwrap_err().to_string();
        assert!(error.contains("layer 2 of 3 of the image is damaged"), "{at}: {error}");
        assert!(error.contains(blob.to_str().unwrap()), "{error}");
        let error = imported(&archive).unwrap_err();
        assert!(matches!(error, ImageError::Input(_)), "{at}: {error}");
    }
    fs::write(&blob, &good[..good.len() - 1]).unwrap();
    let (archive, result) = node.export("app:1");
    assert!(matches!(result.unwrap_err(), ImageError::DamagedBlob { .. }));
    assert!(archive.is_empty(), "what is seen at once is said before anything is sent");
    fs::remove_file(&blob).unwrap();
    let (archive, result) = node.export("app:1");
    let error = result.unwrap_err().to_string();
    assert!(error.contains("missing on this node") && error.contains("tow image pull"), "{error}");
    assert!(archive.is_empty());
    fs::write(&blob, &good).unwrap();
    assert_eq!(imported(&node.export("app:1").0).unwrap(), node.digest);
    let error = export(&node.store, &Digest::of(b""), "x", Vec::new(), &mut |_| {}).unwrap_err();
    assert!(matches!(error, ImageError::Unknown(_)), "{error}");
}

#[test]
fn skopeo_reads_it_both_ways() {
    if !has("mksquashfs", "-version") || !has("skopeo", "--version") {
        return;
    }
    let node = Node::new(Compression::Gzip);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.tar");
    fs::write(&path, node.export("app:1").0).unwrap();
    for transport in ["oci-archive", "docker-archive"] {
        let to = folder.path().join(transport);
        let mut copy = Command::new("skopeo");
        copy.args(["copy", "--quiet", "--insecure-policy"]);
        copy.arg(format!("{transport}:{}", path.display()));
        copy.arg(format!("oci:{}:copied", to.display()));
        let out = copy.output().unwrap();
        assert!(out.status.success(), "{transport}: {}", String::from_utf8_lossy(&out.stderr));
        let cache = tempfile::tempdir().unwrap();
        let store = Store::open(cache.path()).unwrap();
        let image = import_layout(&store, &to, &mut |_| {}).unwrap();
        assert_eq!(image.layers, 3, "{transport}");
        if transport == "oci-archive" {
            assert_eq!(image.digest, node.digest);
        }
    }
}
