//! A real registry on loopback (Debian's docker-registry), and images put into it by skopeo.

use std::fs::OpenOptions;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::cluster::in_path;
use crate::oci;
use crate::run::{Running, wait_for};

/// The one user that a registry with logins knows.
pub const USER: (&str, &str) = ("alice", "s3cret");
/// The user's line of an htpasswd file; bcrypt is all that docker-registry reads.
const HTPASSWD: &str = "alice:$2b$04$iLT2zAvq2PBJxKNKdlCs8eQPTzryHAu6p3YHozNBSqsFLjCjH8v3O\n";
/// Until it answers, or skopeo has copied a small image.
const BOUND: Duration = Duration::from_secs(120);

/// A registry that ends when dropped; what it stores stays in its folder.
#[derive(Debug)]
pub struct Registry {
    child: Option<Child>,
    folder: PathBuf,
    port: u16,
    login: bool,
}

impl Registry {
    /// Starts one with its files below `folder`. `Err` says what is missing on this machine.
    pub fn start(folder: &Path, login: bool) -> Result<Self, String> {
        for tool in ["docker-registry", "skopeo"] {
            if !in_path(tool) {
                return Err(format!("`{tool}` is not installed: make test installs it"));
            }
        }
        std::fs::create_dir_all(folder).map_err(|e| e.to_string())?;
        let listener = TcpListener::bind("127.0.0.1:0").map_err(|e| e.to_string())?;
        let port = listener.local_addr().map_err(|e| e.to_string())?.port();
        drop(listener);
        let mut registry = Self { child: None, folder: folder.to_owned(), port, login };
        registry.start_again();
        Ok(registry)
    }

    /// Starts it at the same place after [`Self::stop`].
    pub fn start_again(&mut self) {
        let at = self.folder.display();
        let auth = match self.login {
            true => format!("auth:\n  htpasswd:\n    realm: test\n    path: {at}/htpasswd\n"),
            false => String::new(),
        };
        let config = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: \
             {at}/store\nhttp:\n  addr: {}\n{auth}",
            self.address()
        );
        std::fs::write(self.folder.join("config.yml"), config).expect("its configuration");
        std::fs::write(self.folder.join("htpasswd"), HTPASSWD).expect("its users");
        let log = OpenOptions::new().create(true).append(true).open(self.access_log());
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(self.folder.join("config.yml"))
            .stdin(Stdio::null())
            .stdout(log.expect("its log"))
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry starts");
        self.child = Some(child);
        let address = self.address();
        wait_for("docker-registry to listen", BOUND, || TcpStream::connect(&address).ok());
    }

    /// Kills it.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// What it was given so far, by its own log: each upload that was begun, each blob and each
    /// manifest that it took in.
    pub fn taken(&self) -> Vec<String> {
        let log = std::fs::read_to_string(self.access_log()).expect("its log");
        let taken = |line: &str| {
            // ADDRESS - - [TIME] "METHOD PATH VERSION" STATUS …
            let mut parts = line.split('"').skip(1);
            let (request, after) = (parts.next()?, parts.next()?);
            let [method, path, _] = request.split(' ').collect::<Vec<_>>().try_into().ok()?;
            let digest = path.split_once("digest=").map(|(_, digest)| digest.replace("%3A", ":"));
            match (method, after.split_whitespace().next()?) {
                ("POST", "202") => Some("begun".to_owned()),
                ("POST", "201") => Some("mounted".to_owned()),
                ("PUT", "201") if path.contains("/blobs/uploads/") => digest,
                ("PUT", "201") => Some(path.to_owned()),
                _ => None,
            }
        };
        log.lines().filter_map(taken).collect()
    }

    fn access_log(&self) -> PathBuf {
        self.folder.join("access.log")
    }

    /// Copies an OCI layout into it as `NAME:latest`.
    #[track_caller]
    pub fn push(&self, layout: &Path, name: &str) {
        let mut command = Command::new("skopeo");
        command.args(["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"]);
        if self.login {
            command.arg("--dest-creds").arg(format!("{}:{}", USER.0, USER.1));
        }
        command.arg(format!("oci:{}", layout.display()));
        command.arg(format!("docker://{}/{name}:latest", self.address()));
        Running::start(&mut command, None).finish(BOUND).ok();
    }

    /// The file in which it keeps a blob.
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").expect("a digest");
        let blobs = self.folder.join("store/docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data")
    }

    /// The layers of an image in it, as skopeo sees them.
    #[track_caller]
    pub fn layers(&self, name: &str) -> Vec<String> {
        self.layers_of(name, "latest")
    }

    /// The same under another tag.
    #[track_caller]
    pub fn layers_of(&self, name: &str, tag: &str) -> Vec<String> {
        let manifest = self.manifest(name, tag);
        let layers = manifest["layers"].as_array().expect("its layers");
        layers.iter().map(|layer| layer["digest"].as_str().expect("a digest").to_owned()).collect()
    }

    /// An image's manifest as skopeo sees it.
    #[track_caller]
    pub fn manifest(&self, name: &str, tag: &str) -> serde_json::Value {
        let mut command = Command::new("skopeo");
        command.args(["inspect", "--raw", "--tls-verify=false"]);
        if self.login {
            command.arg("--creds").arg(format!("{}:{}", USER.0, USER.1));
        }
        command.arg(format!("docker://{}/{name}:{tag}", self.address()));
        let raw = Running::start(&mut command, None).finish(BOUND).ok();
        serde_json::from_slice(&raw.stdout).expect("a manifest")
    }

    /// Copies an image out of it into a folder, by skopeo, which checks all of it; gives the digest.
    #[track_caller]
    pub fn pull(&self, name: &str, tag: &str, folder: &Path) -> String {
        let mut command = Command::new("skopeo");
        command.args(["copy", "--quiet", "--insecure-policy", "--src-tls-verify=false"]);
        command.arg("--preserve-digests");
        if self.login {
            command.arg("--src-creds").arg(format!("{}:{}", USER.0, USER.1));
        }
        command.arg(format!("docker://{}/{name}:{tag}", self.address()));
        command.arg(format!("dir:{}", folder.display()));
        Running::start(&mut command, None).finish(BOUND).ok();
        oci::digest(&std::fs::read(folder.join("manifest.json")).expect("a manifest"))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop();
    }
}
