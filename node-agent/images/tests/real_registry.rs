//! Pushes to Debian's docker-registry on loopback, looked at with skopeo.
#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "a test that fails, fails here")]

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt as _;
use tokio::sync::watch;
use tokio::task::JoinSet;
use towline_images::fixture::{Compression, Layer, Layout};
use towline_images::registry::{
    Credentials, Pace, Private, PushError, PushRequest, Pushed, Pusher,
};
use towline_images::{Digest, Store, export, import, import_layout};

/// alice, s3cret; bcrypt is all that docker-registry reads.
const HTPASSWD: &str = "alice:$2b$04$iLT2zAvq2PBJxKNKdlCs8eQPTzryHAu6p3YHozNBSqsFLjCjH8v3O\n";

fn has_tools() -> bool {
    for (tool, version) in
        [("mksquashfs", "-version"), ("docker-registry", "--version"), ("skopeo", "--version")]
    {
        if Command::new(tool).arg(version).output().is_err() {
            eprintln!("SKIPPED: {tool} is not installed");
            return false;
        }
    }
    true
}

/// A registry that ends when dropped.
struct Registry {
    folder: tempfile::TempDir,
    child: Child,
    address: String,
    login: bool,
}

impl Registry {
    fn start(login: bool) -> Registry {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().display();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let auth = match login {
            true => format!("auth:\n  htpasswd:\n    realm: test\n    path: {at}/htpasswd\n"),
            false => String::new(),
        };
        let config = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: \
             {at}/store\nhttp:\n  addr: {address}\n{auth}"
        );
        fs::write(folder.path().join("config.yml"), config).unwrap();
        fs::write(folder.path().join("htpasswd"), HTPASSWD).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(folder.path().join("config.yml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(120);
        while TcpStream::connect(&address).is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        Registry { folder, child, address, login }
    }

    fn skopeo(&self, words: &[&str], source: bool) -> Command {
        let mut command = Command::new("skopeo");
        command.args(words);
        let prefix = if source { "src-" } else { "" };
        command.arg(format!("--{prefix}tls-verify=false"));
        if self.login {
            command.arg(format!("--{prefix}creds")).arg("alice:s3cret");
        }
        command
    }

    /// The manifest that it has under a name.
    fn manifest(&self, name: &str) -> Vec<u8> {
        let mut inspect = self.skopeo(&["inspect", "--raw"], false);
        let out = inspect.arg(format!("docker://{}/{name}", self.address)).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        out.stdout
    }

    /// Copies an image out of it by skopeo, which checks all of it, and imports that.
    fn copied(&self, name: &str) -> Digest {
        let folder = tempfile::tempdir().unwrap();
        let mut copy =
            self.skopeo(&["copy", "--quiet", "--insecure-policy", "--preserve-digests"], true);
        copy.arg(format!("docker://{}/{name}", self.address));
        copy.arg(format!("oci:{}", folder.path().join("layout").display()));
        let out = copy.output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let store = Store::open(folder.path()).unwrap();
        import_layout(&store, &folder.path().join("layout"), &mut |_| {}).unwrap().digest
    }

    fn has_blob(&self, digest: &str) -> bool {
        let hex = &digest["sha256:".len()..];
        let blobs = self.folder.path().join("store/docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data").exists()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Layers of noise and of zeros: one is larger than what goes out in one part.
fn layout() -> Layout {
    let lower = Layer::new().file("lower", 0o644, b"lower").finish();
    let upper = Layer::new().file("upper", 0o644, &vec![7; 70 << 20]).finish();
    let mut layout = Layout::new(vec![lower, upper]);
    layout.compression = Compression::Plain;
    layout
}

fn stored(layout: &Layout, cache: &Path) -> (Pusher, Digest) {
    let store = Store::open(cache).unwrap();
    let digest = import(&store, &layout.archive()[..], &mut |_| {}).unwrap().digest;
    (Pusher { store, private: Private::Any, pace: Pace::default() }, digest)
}

async fn push(
    pusher: &Pusher,
    digest: Digest,
    reference: &str,
    login: Option<&str>,
    mount_from: &[&str],
) -> Result<Pushed, PushError> {
    let credentials = login
        .map(|password| Credentials::Basic { username: "alice".into(), password: password.into() });
    let mount_from = mount_from.iter().map(|name| (*name).to_owned()).collect();
    let request = PushRequest {
        digest,
        reference: reference.into(),
        credentials,
        insecure: false,
        mount_from,
    };
    pusher.push(request, &watch::Sender::new(None)).await
}

#[tokio::test]
async fn docker_registry_has_what_was_pushed() {
    if !has_tools() {
        return;
    }
    for login in [None, Some("s3cret")] {
        let registry = Registry::start(login.is_some());
        let cache = tempfile::tempdir().unwrap();
        let (pusher, digest) = stored(&layout(), cache.path());
        let name = |name: &str| format!("{}/{name}", registry.address);
        if login.is_some() {
            let error = push(&pusher, digest, &name("a/x:1"), None, &[]).await.unwrap_err();
            assert!(error.to_string().contains("wants a login"), "{error}");
            let wrong = push(&pusher, digest, &name("a/x:1"), Some("no"), &[]).await.unwrap_err();
            assert!(matches!(wrong, PushError::Unauthorized { .. }), "{wrong}");
        }
        let pushed = push(&pusher, digest, &name("a/x:1"), login, &[]).await.unwrap();
        assert_eq!((pushed.blobs_sent, pushed.blobs_there), (3, 0));
        assert!(pushed.bytes_sent > 70 << 20);
        assert_eq!(Digest::of(&registry.manifest("a/x:1")), digest);
        assert_eq!(registry.copied("a/x:1"), digest);

        // Again: nothing is sent.
        let again = push(&pusher, digest, &name("a/x:2"), login, &[]).await.unwrap();
        assert_eq!((again.blobs_sent, again.blobs_there, again.bytes_sent), (0, 3, 0));
        assert_eq!(Digest::of(&registry.manifest("a/x:2")), digest);

        // Elsewhere in the same registry: it has all of it already.
        let elsewhere = push(&pusher, digest, &name("b"), login, &[&name("a/x:1")]).await.unwrap();
        assert_eq!((elsewhere.blobs_sent, elsewhere.blobs_mounted), (0, 3));
        assert_eq!(registry.copied("b:latest"), digest);

        // One layer more: that layer and a config.
        let mut more = layout();
        more.layers.push(Layer::new().file("more", 0o644, b"more").finish());
        let (pusher, more) = stored(&more, cache.path());
        let pushed = push(&pusher, more, &name("a/x:3"), login, &[]).await.unwrap();
        assert_eq!((pushed.blobs_sent, pushed.blobs_there), (2, 2));
        assert!(pushed.bytes_sent < 1 << 20, "{}", pushed.bytes_sent);
        assert_eq!(registry.copied("a/x:3"), more);
    }
}

/// Passes connections on; those of the first `times` that send more than `most` bytes end there.
async fn cutting(to: String, most: u64, times: usize) -> (String, JoinSet<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let left = Arc::new(AtomicUsize::new(times));
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((client, _)) = listener.accept().await {
            let (to, left) = (to.clone(), Arc::clone(&left));
            connections.spawn(async move {
                let server = tokio::net::TcpStream::connect(to).await.unwrap();
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = server.into_split();
                let up = async {
                    let mut beginning = (&mut from_client).take(most);
                    let sent = tokio::io::copy(&mut beginning, &mut to_server).await.unwrap_or(0);
                    let cut = sent == most && left.load(Ordering::Relaxed) > 0;
                    if cut {
                        left.fetch_sub(1, Ordering::Relaxed);
                        return;
                    }
                    drop(tokio::io::copy(&mut from_client, &mut to_server).await);
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    () = up => {}
                    _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
                }
            });
        }
    });
    (address, serving)
}

#[tokio::test]
async fn an_upload_that_docker_registry_lost_begins_anew() {
    if !has_tools() {
        return;
    }
    let registry = Registry::start(false);
    let cache = tempfile::tempdir().unwrap();
    let (mut pusher, digest) = stored(&layout(), cache.path());
    pusher.pace.first_pause = Duration::from_millis(10);
    // It keeps no part that did not come whole, and forgets the upload with it.
    let (address, _serving) = cutting(registry.address.clone(), 9 << 20, 3).await;
    let name = format!("{address}/x:1");
    let pushed = push(&pusher, digest, &name, None, &[]).await.unwrap();
    assert_eq!(pushed.blobs_sent, 3);
    assert_eq!(registry.copied("x:1"), digest);
}

#[tokio::test]
async fn what_is_damaged_here_is_not_there() {
    if !has_tools() {
        return;
    }
    let registry = Registry::start(false);
    let cache = tempfile::tempdir().unwrap();
    let (pusher, digest) = stored(&layout(), cache.path());
    let blobs = fs::read_dir(cache.path().join("images/blobs/sha256")).unwrap();
    let blobs = blobs.map(|entry| entry.unwrap().path());
    let largest = blobs.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let mut bytes = fs::read(&largest).unwrap();
    bytes[65 << 20] ^= 1;
    fs::write(&largest, &bytes).unwrap();
    let name = format!("{}/x", registry.address);
    let error = push(&pusher, digest, &name, None, &[]).await.unwrap_err();
    assert!(error.to_string().contains("is damaged on this node"), "{error}");
    let hex = largest.file_name().unwrap().to_str().unwrap();
    assert!(!registry.has_blob(&format!("sha256:{hex}")));
    bytes[65 << 20] ^= 1;
    fs::write(&largest, &bytes).unwrap();
    push(&pusher, digest, &name, None, &[]).await.unwrap();
    assert_eq!(registry.copied("x:latest"), digest);
}

#[tokio::test]
async fn docker_manifests_keep_their_kind() {
    if !has_tools() {
        return;
    }
    let registry = Registry::start(false);
    let cache = tempfile::tempdir().unwrap();
    let mut files = layout_of_docker();
    let store = Store::open(cache.path()).unwrap();
    let archive = towline_images::fixture::archive_of(&files);
    let digest = import(&store, &archive[..], &mut |_| {}).unwrap().digest;
    let pusher = Pusher { store, private: Private::Any, pace: Pace::default() };
    let name = format!("{}/x", registry.address);
    push(&pusher, digest, &name, None, &[]).await.unwrap();
    assert_eq!(Digest::of(&registry.manifest("x:latest")), digest);
    // And out as an archive, with the kind that it has.
    let mut out = Vec::new();
    export(&pusher.store, &digest, "x", &mut out, &mut |_| {}).unwrap();
    files.clear();
    let again = tempfile::tempdir().unwrap();
    let store = Store::open(again.path()).unwrap();
    assert_eq!(import(&store, &out[..], &mut |_| {}).unwrap().digest, digest);
}

/// A layout whose manifest is written as docker wrote it before there was OCI.
fn layout_of_docker() -> Vec<(String, Vec<u8>)> {
    let layer = Layer::new().file("x", 0o644, b"x").finish();
    let (files, manifest) = Layout::new(vec![layer]).files();
    let oci = format!("blobs/sha256/{}", manifest.hex());
    let docker = |bytes: &[u8]| {
        String::from_utf8(bytes.to_vec())
            .unwrap()
            .replace("vnd.oci.image.manifest.v1+json", "vnd.docker.distribution.manifest.v2+json")
            .replace("vnd.oci.image.config.v1+json", "vnd.docker.container.image.v1+json")
            .replace("vnd.oci.image.layer.v1.tar+gzip", "vnd.docker.image.rootfs.diff.tar.gzip")
    };
    let (_, bytes) = files.iter().find(|(path, _)| *path == oci).unwrap();
    let changed = docker(bytes).into_bytes();
    let digest = Digest::of(&changed);
    let index = |bytes: &[u8]| {
        docker(bytes).replace(&manifest.hex(), &digest.hex()).replace(
            &format!("\"size\":{}", bytes_len(&files, &oci)),
            &format!("\"size\":{}", changed.len()),
        )
    };
    files
        .iter()
        .map(|(path, bytes)| match path {
            _ if *path == oci => (format!("blobs/sha256/{}", digest.hex()), changed.clone()),
            _ if path == "index.json" => (path.clone(), index(bytes).into_bytes()),
            _ => (path.clone(), bytes.clone()),
        })
        .collect()
}

fn bytes_len(files: &[(String, Vec<u8>)], path: &str) -> usize {
    files.iter().find(|(name, _)| name == path).unwrap().1.len()
}
