//! What the node agent keeps on disk: `<data_dir>/{lock,node,link_port,sandboxes/<id>/…}`.
//!
//! A file is written beside its name, synced and renamed, so what is found is whole. Each sandbox's
//! folder holds `spec` (its record), `state` (of its newest start), `vm/` (the VMM's own folder),
//! `upper.img`, `feed` (see `feed.rs`) and, with a local image, `local.manifest`. Every name derives from
//! the id, so removing twice is harmless; where a ready guest was taken over (`ready.rs`), `vm` is a
//! link to its folder, `ready/<name>/vm`. All of it blocks.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use prost::Message;
use rustix::fs::{FlockOperation, flock};
use towline_node_core::{Assignment, Record, Rest};
use towline_proto::ids::SandboxId;
use towline_proto::v1::{DesiredSandbox, ExitStatus, NodeRegistered};

/// A sandbox's writable disk.
pub const UPPER: &str = "upper.img";
/// The folder of a VM.
pub const VM: &str = "vm";
const READY: &str = "ready";
const SPEC: &str = "spec";
const STATE: &str = "state";
const REGISTERED: &str = "node";
const LINK_PORT: &str = "link_port";

/// The record on disk.
#[derive(Clone, PartialEq, Message)]
struct StoredRecord {
    #[prost(message, optional, tag = "1")]
    desired: Option<DesiredSandbox>,
    #[prost(bool, tag = "2")]
    came_up: bool,
    /// 0 not at rest, 1 stopped, 2 failed.
    #[prost(uint32, tag = "3")]
    rest: u32,
    #[prost(string, tag = "4")]
    rest_reason: String,
    #[prost(message, optional, tag = "5")]
    main_exit: Option<ExitStatus>,
    #[prost(string, tag = "6")]
    image_digest: String,
}

/// What is known of a sandbox's newest start.
#[derive(Clone, PartialEq, Message)]
pub struct State {
    /// Marks guest-link sessions after the first.
    #[prost(bytes = "vec", tag = "1")]
    pub resync_marker: Vec<u8>,
    /// Kernel boot id of the machine when it was started.
    #[prost(string, tag = "2")]
    pub boot_id: String,
    /// The record's version that was started.
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
    /// See `epoch`.
    #[prost(uint64, tag = "4")]
    pub generation: u64,
}

/// The data directory, held by this process alone.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    _lock: File,
}

/// Says why the data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another node agent has it.
    #[error("another node agent uses `{0}`; stop it first")]
    Locked(PathBuf),
    /// Any other failure.
    #[error("could not {action} `{path}`")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn failed<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> StoreError + use<'a> {
    move |source| StoreError::Io { action, path: path.to_owned(), source }
}

impl Store {
    /// Takes the directory, making it if needed.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        private_dir(&root.join("sandboxes"))?;
        private_dir(&root.join(READY))?;
        let path = root.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("open", &path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { root: root.to_owned(), _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StoreError::Locked(root.to_owned())),
            Err(error) => Err(failed("lock", &path)(error.into())),
        }
    }

    /// A sandbox's folder.
    pub fn sandbox(&self, id: SandboxId) -> SandboxDir {
        SandboxDir { root: self.root.join("sandboxes").join(id.to_string()) }
    }

    /// The sandboxes that have a folder.
    pub fn sandboxes(&self) -> Result<Vec<SandboxId>, StoreError> {
        let path = self.root.join("sandboxes");
        let entries = fs::read_dir(&path).map_err(failed("read", &path))?;
        Ok(entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
    }

    /// Where ready guests wait.
    pub fn ready(&self) -> PathBuf {
        self.root.join(READY)
    }

    /// The folders of those that sandboxes have taken, without links.
    pub fn taken(&self) -> Result<BTreeSet<PathBuf>, StoreError> {
        let sandboxes = self.sandboxes()?;
        Ok(sandboxes.into_iter().filter_map(|id| self.sandbox(id).taken()).collect())
    }

    /// What the control plane said when it last registered this node: tickets can be checked with
    /// it before the control plane is reached again.
    pub fn registered(&self) -> Option<NodeRegistered> {
        let bytes = fs::read(self.root.join(REGISTERED)).ok()?;
        NodeRegistered::decode(bytes.as_slice()).ok()
    }

    /// Keeps that.
    pub fn set_registered(&self, registered: &NodeRegistered) -> Result<(), StoreError> {
        write(&self.root, REGISTERED, &registered.encode_to_vec())
    }

    /// The link's port of the last time: laptops may know it still.
    pub fn link_port(&self) -> Option<u16> {
        fs::read_to_string(self.root.join(LINK_PORT)).ok()?.trim().parse().ok()
    }

    /// Keeps that.
    pub fn set_link_port(&self, port: u16) -> Result<(), StoreError> {
        write(&self.root, LINK_PORT, port.to_string().as_bytes())
    }
}

/// One sandbox's folder.
#[derive(Debug, Clone)]
pub struct SandboxDir {
    root: PathBuf,
}

impl SandboxDir {
    /// The VMM's own folder.
    pub fn vm(&self) -> PathBuf {
        self.root.join(VM)
    }

    /// Takes over a ready guest's disk and VM, in the place of a disk that nothing was written to and
    /// of a folder that no VM has used. The disk keeps its old name as well: QEMU opens it anew by that
    /// when it is saved.
    pub fn take(&self, folder: &Path) -> Result<(), StoreError> {
        let (vm, disk) = (self.vm(), folder.join(UPPER));
        let name = folder.file_name().unwrap_or_default();
        // As seen from the sandbox's folder: the data directory may be moved.
        let target = Path::new("../..").join(READY).join(name).join(VM);
        fs::remove_dir(&vm).map_err(failed("replace", &vm))?;
        fs::remove_file(self.upper()).map_err(failed("replace", &self.upper()))?;
        fs::hard_link(&disk, self.upper()).map_err(failed("take", &disk))?;
        symlink(target, &vm).map_err(failed("make", &vm))
    }

    /// The folder of the ready guest that was taken.
    fn taken(&self) -> Option<PathBuf> {
        let target = fs::read_link(self.vm()).ok()?;
        fs::canonicalize(self.root.join(target.parent()?)).ok()
    }

    /// The writable disk.
    pub fn upper(&self) -> PathBuf {
        self.root.join(UPPER)
    }

    /// The manifest of its local image.
    pub fn local_manifest(&self) -> PathBuf {
        self.root.join("local.manifest")
    }

    /// Where its feed is kept.
    pub fn feed(&self) -> PathBuf {
        self.root.clone()
    }

    /// Whether this node has the sandbox.
    pub fn exists(&self) -> bool {
        self.root.join(SPEC).exists()
    }

    /// Makes the folders.
    pub fn create(&self) -> Result<(), StoreError> {
        private_dir(&self.vm())
    }

    /// The record, if there is a whole one.
    pub fn record(&self) -> Option<Record> {
        let bytes = fs::read(self.root.join(SPEC)).ok()?;
        let stored = StoredRecord::decode(bytes.as_slice()).ok()?;
        let reason = stored.rest_reason;
        Some(Record {
            assignment: Assignment::try_from(stored.desired?).ok()?,
            came_up: stored.came_up,
            rest: match stored.rest {
                1 => Some(Rest::Stopped { reason }),
                2 => Some(Rest::Failed { reason }),
                _ => None,
            },
            main_exit: stored.main_exit,
            image_digest: stored.image_digest,
        })
    }

    /// Writes the record durably.
    pub fn set_record(&self, record: &Record) -> Result<(), StoreError> {
        let (rest, rest_reason) = match &record.rest {
            None => (0, String::new()),
            Some(Rest::Stopped { reason }) => (1, reason.clone()),
            Some(Rest::Failed { reason }) => (2, reason.clone()),
        };
        let stored = StoredRecord {
            desired: Some((&record.assignment).into()),
            came_up: record.came_up,
            rest,
            rest_reason,
            main_exit: record.main_exit.clone(),
            image_digest: record.image_digest.clone(),
        };
        self.create()?;
        write(&self.root, SPEC, &stored.encode_to_vec())
    }

    /// The state of the newest start.
    pub fn state(&self) -> Option<State> {
        State::decode(fs::read(self.root.join(STATE)).ok()?.as_slice()).ok()
    }

    /// Writes it durably.
    pub fn set_state(&self, state: &State) -> Result<(), StoreError> {
        write(&self.root, STATE, &state.encode_to_vec())
    }

    /// Removes everything; that there is nothing is fine. The record goes first, so that a removal
    /// that is cut off is not mistaken for a sandbox. Returns the bytes that are free now.
    pub fn remove(&self) -> Result<u64, StoreError> {
        let taken = self.taken();
        let mut freed = disk_use(&self.root);
        for path in [self.root.join(SPEC), self.upper()] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &path)(error));
                }
                _ => {}
            }
        }
        // The disk that was taken over has one name left. The link to its folder goes last.
        freed += taken.as_deref().map_or(0, disk_use);
        for path in taken.iter().chain([&self.root]) {
            match fs::remove_dir_all(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", path)(error));
                }
                _ => {}
            }
        }
        Ok(freed)
    }
}

/// What the files below take on the disk; one with another name elsewhere frees nothing.
fn disk_use(folder: &Path) -> u64 {
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => disk_use(&entry.path()),
        Ok(meta) if meta.nlink() == 1 => meta.blocks() * 512,
        Ok(_) | Err(_) => 0,
    };
    fs::read_dir(folder).into_iter().flatten().flatten().map(size).sum()
}

/// Makes a folder that only its owner may look into.
pub fn private_dir(path: &Path) -> Result<(), StoreError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make", path))
}

/// Writes a file whole and durably, or not at all.
fn write(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
    let path = dir.join(name);
    let keep = || -> io::Result<()> {
        let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(dir)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(&path)?;
        File::open(dir)?.sync_all()
    };
    keep().map_err(failed("write", &path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_node_core::Fork;
    use towline_proto::ids::ForkId;
    use towline_proto::v1::{Desired, SandboxSpec};

    fn id() -> SandboxId {
        SandboxId::from_bytes([5; 16])
    }

    #[test]
    fn a_record_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let folder = store.sandbox(id());
        assert_eq!(folder.record(), None);
        let record = Record {
            assignment: Assignment {
                sandbox: id(),
                epoch: 3,
                generation: 4,
                desired: Desired::Stopped,
                reason: "timeout 2h".into(),
                ran: true,
                spec: SandboxSpec { name: "a".into(), ..SandboxSpec::default() },
                image_digest: "sha256:1".into(),
                revision: 9,
                fork: Some(Fork { source: id(), id: ForkId::from_bytes([8; 16]) }),
            },
            came_up: true,
            rest: Some(Rest::Failed { reason: "why".into() }),
            main_exit: None,
            image_digest: "sha256:2".into(),
        };
        folder.set_record(&record).unwrap();
        assert_eq!(folder.record(), Some(record));
        assert_eq!(store.sandboxes().unwrap(), [id()]);
        assert!(folder.remove().unwrap() > 0);
        assert_eq!(folder.remove().unwrap(), 0);
        assert_eq!(store.sandboxes().unwrap(), []);
    }

    #[test]
    fn a_ready_guest_that_is_taken_goes_with_its_sandbox() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&fs::canonicalize(dir.path()).unwrap()).unwrap();
        let (folder, other) = (store.ready().join("a"), store.ready().join("b"));
        for folder in [&folder, &other] {
            fs::create_dir_all(folder.join(VM)).unwrap();
            fs::write(folder.join(UPPER), "its disk").unwrap();
        }
        let sandbox = store.sandbox(id());
        sandbox.create().unwrap();
        fs::write(sandbox.upper(), "an empty one").unwrap();
        sandbox.take(&folder).unwrap();
        assert_eq!(fs::read(sandbox.upper()).unwrap(), b"its disk");
        assert_eq!(fs::canonicalize(sandbox.vm()).unwrap(), folder.join(VM));
        assert_eq!(store.taken().unwrap(), BTreeSet::from([folder.clone()]));
        // A later start has the folder as it is.
        sandbox.create().unwrap();
        fs::write(sandbox.vm().join("vm.json"), "{}").unwrap();
        // One that a VM has used is not replaced.
        assert!(sandbox.take(&other).is_err());
        let disk = fs::metadata(sandbox.upper()).unwrap().blocks() * 512;
        assert!(sandbox.remove().unwrap() >= disk && disk > 0);
        assert!(!folder.exists() && other.exists());
        assert_eq!(store.taken().unwrap(), BTreeSet::new());
    }

    #[test]
    fn two_node_agents_do_not_share_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let _held = Store::open(dir.path()).unwrap();
        assert!(matches!(Store::open(dir.path()), Err(StoreError::Locked(_))));
    }
}
