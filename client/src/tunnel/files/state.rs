//! What the laptop keeps of its last barrier with a sandbox: the common ancestor of each path, and
//! the sandbox's tree as last seen.
//!
//! One file, replaced atomically, readable by its owner only. One that cannot be read counts as
//! none: then both trees are compared by content, which loses nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use prost::Message as _;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use towline_filesync::{Entry, TreePath};
use towline_proto::v1;

use super::link::SyncError;

/// Version of the file; another one counts as no state.
const VERSION: u32 = 1;

/// How long a barrier waits for one of another `tow`.
const TURN_MAX: Duration = Duration::from_secs(300);

/// How often it looks whether its turn has come.
const TURN_POLL: Duration = Duration::from_millis(50);

/// The ancestor of one path: how each side had it when they last agreed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Base {
    pub(super) laptop: Entry,
    pub(super) guest: Entry,
}

/// The state of one sandbox's folder.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct State {
    pub(super) incarnation: Vec<u8>,
    pub(super) index: Option<v1::FilesIndex>,
    pub(super) guest: BTreeMap<TreePath, Entry>,
    pub(super) bases: BTreeMap<TreePath, Base>,
    pub(super) kept_back: BTreeSet<TreePath>,
}

/// The directory of a sandbox's state, held by this barrier.
#[derive(Debug)]
pub(super) struct Store {
    directory: PathBuf,
    _turn: File,
}

impl Store {
    /// Opens it and waits for our turn; `waiting` is told when there is something to wait for.
    pub(super) fn open(directory: &Path, waiting: impl FnOnce()) -> Result<Self, SyncError> {
        let shown = directory.display();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(SyncError::local(format!("make `{shown}`")))?;
        let turn = File::options()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(directory.join("lock"))
            .map_err(SyncError::local(format!("open the lock in `{shown}`")))?;
        wait_for_turn(&turn, waiting)?;
        Ok(Self { directory: directory.to_owned(), _turn: turn })
    }

    /// Reads the state; none when there is none that can be trusted.
    pub(super) fn load(&self) -> State {
        let read = fs::read(self.file()).ok().and_then(|bytes| decode(&bytes));
        read.unwrap_or_default()
    }

    /// Replaces the state.
    pub(super) fn save(&self, state: &State) -> Result<(), SyncError> {
        let path = self.file();
        let replace = || -> io::Result<()> {
            let new = path.with_extension("new");
            let mut file =
                File::options().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
            file.write_all(&encode(state))?;
            file.sync_data()?;
            fs::rename(&new, &path)
        };
        replace().map_err(SyncError::local(format!("save `{}`", path.display())))
    }

    fn file(&self) -> PathBuf {
        self.directory.join("state")
    }
}

fn wait_for_turn(turn: &File, waiting: impl FnOnce()) -> Result<(), SyncError> {
    let started = Instant::now();
    let mut waiting = Some(waiting);
    loop {
        match flock(turn, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK | Errno::INTR) => {}
            Err(error) => return Err(SyncError::local("lock the sync state")(error.into())),
        }
        if let Some(waiting) = waiting.take() {
            waiting();
        }
        if started.elapsed() > TURN_MAX {
            return Err(SyncError::Busy(TURN_MAX));
        }
        std::thread::sleep(TURN_POLL);
    }
}

fn encode(state: &State) -> Vec<u8> {
    let message = v1::SyncState {
        version: VERSION,
        incarnation: state.incarnation.clone(),
        index: state.index.clone(),
        guest: state.guest.iter().map(|(path, entry)| entry.to_wire(path)).collect(),
        bases: state
            .bases
            .iter()
            .map(|(path, base)| v1::SyncBase {
                laptop: Some(base.laptop.to_wire(path)),
                guest: Some(base.guest.to_wire(path)),
            })
            .collect(),
        kept_back: state.kept_back.iter().map(towline_filesync::wire::path).collect(),
    };
    let body = message.encode_to_vec();
    let mut bytes = blake3::hash(&body).as_bytes().to_vec();
    bytes.extend(body);
    bytes
}

fn decode(bytes: &[u8]) -> Option<State> {
    let (sum, body) = bytes.split_at_checked(32)?;
    if blake3::hash(body).as_bytes() != sum {
        return None;
    }
    let message = v1::SyncState::decode(body).ok().filter(|state| state.version == VERSION)?;
    let entry = |message: v1::Entry| {
        let (path, entry) = Entry::from_wire(message).ok()?;
        Some((path, entry?))
    };
    let mut bases = BTreeMap::new();
    for base in message.bases {
        let (path, laptop) = entry(base.laptop?)?;
        bases.insert(path, Base { laptop, guest: entry(base.guest?)?.1 });
    }
    let kept_back = message
        .kept_back
        .iter()
        .map(|path| TreePath::from_components(&path.path).ok())
        .collect::<Option<_>>()?;
    Some(State {
        incarnation: message.incarnation,
        index: message.index,
        guest: message.guest.into_iter().map(entry).collect::<Option<_>>()?,
        bases,
        kept_back,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_filesync::Kind;

    #[test]
    fn a_damaged_state_counts_as_none() {
        let scratch = tempfile::tempdir().unwrap();
        let store = Store::open(&scratch.path().join("a/b"), || panic!("nobody else")).unwrap();
        let path = TreePath::from_bytes(b"x/\xff").unwrap();
        let entry = Entry::new(Kind::File, 0o644);
        let state = State {
            incarnation: vec![1],
            bases: [(path.clone(), Base { laptop: entry.clone(), guest: entry.clone() })].into(),
            guest: [(path.clone(), entry)].into(),
            kept_back: [path].into(),
            ..State::default()
        };
        store.save(&state).unwrap();
        assert_eq!(store.load(), state);
        let mut bytes = fs::read(store.file()).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(store.file(), &bytes).unwrap();
        assert_eq!(store.load(), State::default());
    }
}
