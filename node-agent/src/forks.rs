//! Moments of running sandboxes of which copies are made: `<data_dir>/forks/<fork>/{moment,saved,
//! upper.img,local.manifest}`.
//!
//! The source's workload is frozen by its guest agent, so that nothing of it runs in a copy before that
//! knows that it is one; its VM is halted, memory and disk are saved, and it goes on, whatever
//! happened. What lies under a fork's name is complete. The core says which are kept.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prost::Message;
use tokio::sync::watch;
use tokio::time::timeout;
use towline_node_core::{Failure, Fork};
use towline_proto::ids::ForkId;
use towline_proto::v1::{GuestCommand, SetClock, Thaw, guest_command::Command};

use crate::disks::{self, DiskError};
use crate::guest_configure::unix_ns;
use crate::guests::Guest;
use crate::hypervisor::Hypervisor;
use crate::images::lasting;
use crate::seal::{Key, Seal};
use crate::store::{SandboxDir, Store, UPPER};

/// What is kept of a moment besides memory and disk.
#[derive(Clone, PartialEq, Message)]
struct Kept {
    /// With which the source's guest agent is spoken to, and so each copy's at first.
    #[prost(bytes = "vec", tag = "1")]
    secret: Vec<u8>,
    /// What must be found again to restore it.
    #[prost(string, tag = "2")]
    fits: String,
    /// Memory and disk as they were saved, with the rest of this and the fork's id.
    #[prost(message, optional, tag = "3")]
    seal: Option<Seal>,
}

impl Kept {
    fn sealed_with(&self, fork: ForkId) -> Vec<u8> {
        let rest = Self { seal: None, ..self.clone() };
        [&fork.to_vec()[..], &rest.encode_to_vec()].concat()
    }
}

/// What to do about a copy that never came to be.
pub(crate) const AGAIN: &str = "remove it (`tow rm`) and fork again";
/// The key of their seals.
const KEY: &str = "key";
const KEPT: &str = "moment";
const SAVED: &str = "saved";
const MANIFEST: &str = "local.manifest";
/// Names that `cleaning` removes when their maker was killed.
const MAKING: &str = ".new-";
/// Halting a VM.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Writing all of a guest's memory, on a busy disk.
const SAVE_MAX: Duration = Duration::from_secs(300);
/// Letting it go on.
const RESUME_MAX: Duration = Duration::from_secs(30);

/// A moment that copies can be made of.
#[derive(Debug)]
pub struct Moment {
    dir: PathBuf,
    /// With which a copy is spoken to at first.
    pub secret: [u8; 32],
}

impl Moment {
    /// Its memory and devices.
    pub fn saved(&self) -> PathBuf {
        self.dir.join(SAVED)
    }

    /// Gives a sandbox this moment's disk, whatever it had. Blocks.
    pub fn give_disk(&self, to: &SandboxDir) -> Result<(), Failure> {
        disks::replace(&self.dir.join(UPPER), &to.upper()).map_err(no_disk)?;
        let (manifest, own) = (self.dir.join(MANIFEST), to.local_manifest());
        if manifest.exists() && !own.exists() {
            link_or_copy(&manifest, &own).map_err(|error| not_saved(&error))?;
        }
        Ok(())
    }
}

type Outcome = watch::Receiver<Option<Result<(), Failure>>>;

/// The moments of this node.
#[derive(Debug)]
pub struct Forks {
    dir: PathBuf,
    making: Mutex<BTreeMap<ForkId, Outcome>>,
    /// Which are kept; all of them before it was first said.
    kept: Mutex<Option<BTreeSet<ForkId>>>,
}

impl Forks {
    /// Those beneath the node's data directory.
    pub fn new(data: &Path) -> Self {
        Self { dir: data.join("forks"), making: Mutex::default(), kept: Mutex::default() }
    }

    /// Makes a moment unless it was made; all copies of a fork wait for the same one.
    pub async fn ready(
        self: &Arc<Self>,
        fork: Fork,
        source: Result<Source, Failure>,
    ) -> Result<(), Failure> {
        if self.path(fork.id).exists() {
            return Ok(());
        }
        let mut outcome = {
            let mut making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
            making.retain(|_, outcome| outcome.borrow().is_none());
            match making.get(&fork.id) {
                Some(outcome) => outcome.clone(),
                None => {
                    let (forks, source) = (Arc::clone(self), source?);
                    let (done, outcome) = watch::channel(None);
                    making.insert(fork.id, outcome.clone());
                    // Of its own: a copy that is given up must not leave the source halted.
                    tokio::spawn(async move {
                        let made = forks.make(fork, source).await;
                        forks.drop_unwanted();
                        let _ = done.send(Some(made));
                    });
                    outcome
                }
            }
        };
        let made = outcome.wait_for(Option::is_some).await;
        made.ok().and_then(|made| made.clone()).unwrap_or_else(|| {
            Err(lasting(format!("the node could not save what it is a copy of: {AGAIN}")))
        })
    }

    /// A moment that was made; an error if this driver could not restore it.
    pub fn open(&self, fork: ForkId, driver: &dyn Hypervisor) -> Result<Moment, Failure> {
        let dir = self.path(fork);
        let kept = fs::read(dir.join(KEPT)).ok().and_then(|bytes| Kept::decode(&*bytes).ok());
        let gone = || lasting(format!("what it is a copy of is not kept here any more: {AGAIN}"));
        let kept = kept.ok_or_else(gone)?;
        let sealed = self.check(fork, &dir, &kept);
        sealed.map_err(|problem| {
            lasting(format!("what it is a copy of cannot be used, {problem}: {AGAIN}"))
        })?;
        if driver.fits() != Some(&kept.fits) {
            return Err(lasting(format!(
                "what it is a copy of was saved under another VMM, kernel or processor, or before \
                 this host was restarted: {AGAIN}"
            )));
        }
        let secret = kept.secret.try_into().map_err(|_| gone())?;
        Ok(Moment { dir, secret })
    }

    fn key(&self) -> io::Result<Key> {
        Key::open(&self.dir.join(KEY))
    }

    /// Notes the rest beside what was saved, which counts with that only.
    fn seal(&self, fork: ForkId, dir: &Path, mut kept: Kept) -> io::Result<()> {
        kept.seal = Some(self.key()?.seal(dir, &[SAVED, UPPER], &kept.sealed_with(fork))?);
        fs::write(dir.join(KEPT), kept.encode_to_vec())
    }

    fn check(&self, fork: ForkId, dir: &Path, kept: &Kept) -> io::Result<()> {
        let seal = kept.seal.as_ref().ok_or_else(|| io::Error::other("it has no seal"))?;
        self.key()?.check(seal, dir, &[SAVED, UPPER], &kept.sealed_with(fork))
    }

    /// Removes all but these. Blocks.
    pub fn keep(&self, forks: BTreeSet<ForkId>) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(forks);
        self.drop_unwanted();
    }

    fn drop_unwanted(&self) {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(kept) = &*kept else { return };
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let fork = entry.file_name().to_str().and_then(|name| name.parse::<ForkId>().ok());
            if fork.is_some_and(|fork| !kept.contains(&fork)) {
                tracing::debug!(fork = ?entry.file_name(), "what was saved for copies is removed");
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    fn path(&self, fork: ForkId) -> PathBuf {
        self.dir.join(fork.to_string())
    }

    async fn make(&self, fork: Fork, source: Source) -> Result<(), Failure> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(|error| not_saved(&error))?;
        let work = tempfile::Builder::new()
            .prefix(MAKING)
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir_in(&self.dir)
            .map_err(|error| not_saved(&error))?;
        let kept = source.save(fork.id, work.path()).await?;
        self.seal(fork.id, work.path(), kept).map_err(|error| not_saved(&error))?;
        fs::rename(work.path(), self.path(fork.id)).map_err(|error| not_saved(&error))?;
        // It has another name by now.
        drop(work);
        Ok(())
    }
}

/// A running sandbox that is to be saved.
#[derive(Debug)]
pub struct Source {
    /// Its guest.
    pub guest: Arc<Guest>,
    /// Its driver.
    pub driver: Arc<dyn Hypervisor>,
    /// Its folder.
    pub dir: SandboxDir,
}

impl Source {
    /// The sandbox that a fork is of, or why there is none.
    pub fn find(
        guest: Option<Arc<Guest>>,
        driver: Arc<dyn Hypervisor>,
        store: &Store,
        fork: Fork,
    ) -> Result<Self, Failure> {
        let guest = guest.ok_or_else(|| {
            lasting(format!("what it should be a copy of does not run any more: {AGAIN}"))
        })?;
        Ok(Self { guest, driver, dir: store.sandbox(fork.source) })
    }

    /// Saves it as it is, and lets it go on whatever happened.
    async fn save(&self, fork: ForkId, to: &Path) -> Result<Kept, Failure> {
        let state = self.dir.state();
        let secret = state.map(|state| state.resync_marker).unwrap_or_default();
        let fits = self.driver.fits();
        let fits = fits.ok_or_else(|| lasting("its driver cannot save memory".into()))?.to_owned();
        // Nobody else halts it or lets it go on meanwhile.
        let paused = self.guest.orders.lock().await;
        if *paused {
            // It was paused since the fork was asked for, and stays so.
            return Err(lasting(format!(
                "what it should be a copy of is paused: let it go on (`tow resume`), {AGAIN}"
            )));
        }
        let frozen = self.guest.freeze(fork).await;
        let saved = match frozen {
            Ok(()) => self.save_frozen(to).await.map(|()| Kept { secret, fits, seal: None }),
            Err(reason) => Err(lasting(format!(
                "the workload of what it should be a copy of could not be frozen, {reason}: {AGAIN}"
            ))),
        };
        let resumed = timeout(RESUME_MAX, self.guest.vm.resume()).await;
        let clock = Command::SetClock(SetClock { unix_ns: unix_ns() });
        let mut told = true;
        for command in [clock, Command::Thaw(Thaw {})] {
            let command = GuestCommand { command: Some(command) };
            told &= self.guest.command_within(command, RESUME_MAX).await;
        }
        if !told || !matches!(resumed, Ok(Ok(_))) {
            let sandbox = self.guest.sandbox;
            tracing::error!(%sandbox, ?resumed, "vm does not go on after it was saved: it is ended");
            let _ = self.guest.vm.kill();
        }
        saved
    }

    async fn save_frozen(&self, to: &Path) -> Result<(), Failure> {
        let bounded = |what: &str| {
            let problem = format!("{what} took too long");
            move |_| not_saved(&io::Error::other(problem))
        };
        let vm = &self.guest.vm;
        let paused = timeout(PAUSE_MAX, vm.pause()).await.map_err(bounded("halting its VM"))?;
        paused.map_err(|error| not_saved(&error))?;
        let saved = timeout(SAVE_MAX, self.driver.save(vm, &to.join(SAVED))).await;
        let saved = saved.map_err(bounded("saving its memory"))?;
        saved.map_err(|error| not_saved(&error))?;
        let (from, to) = (self.dir.clone(), to.to_owned());
        let copied = tokio::task::spawn_blocking(move || {
            disks::replace(&from.upper(), &to.join(UPPER)).map_err(no_disk)?;
            let manifest = from.local_manifest();
            if manifest.exists() {
                link_or_copy(&manifest, &to.join(MANIFEST)).map_err(|error| not_saved(&error))?;
            }
            Ok(())
        });
        copied.await.unwrap_or_else(|error| Err(not_saved(&io::Error::other(error))))
    }
}

fn link_or_copy(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(_) => fs::copy(from, to).map(drop),
        Ok(()) => Ok(()),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "as `map_err` gives it")]
fn no_disk(error: DiskError) -> Failure {
    lasting(format!("{}: {AGAIN}", crate::chain(&error)))
}

fn not_saved(error: &io::Error) -> Failure {
    if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
        let reason = "no space left on the node to save what it is a copy of: free some, or remove \
                      sandboxes (`tow rm`)";
        return lasting(reason.into());
    }
    let problem = crate::chain(error);
    lasting(format!("what it is a copy of could not be saved, {problem}: {AGAIN}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> ForkId {
        ForkId::from_bytes([n; 16])
    }

    #[test]
    fn only_what_is_wanted_stays() {
        let dir = tempfile::tempdir().unwrap();
        let forks = Forks::new(dir.path());
        for n in 1..=3 {
            fs::create_dir_all(forks.path(id(n)).join("saved")).unwrap();
        }
        fs::create_dir(forks.dir.join(".new-abc")).unwrap();
        forks.drop_unwanted();
        assert!(forks.path(id(1)).exists(), "nothing was said yet");
        forks.keep([id(2)].into());
        let left = |n: u8| forks.path(id(n)).exists();
        assert_eq!([left(1), left(2), left(3)], [false, true, false]);
        assert!(forks.dir.join(".new-abc").exists(), "one that is being made");
        forks.keep(BTreeSet::new());
        assert!(!left(2));
    }

    #[test]
    fn a_moment_is_good_for_its_own_fork_and_as_it_was_saved_only() {
        let dir = tempfile::tempdir().unwrap();
        let forks = Forks::new(dir.path());
        let saved = |n: u8| {
            let dir = forks.path(id(n));
            fs::create_dir_all(&dir).unwrap();
            for name in [SAVED, UPPER] {
                fs::write(dir.join(name), format!("{name} of {n}")).unwrap();
            }
            let kept = Kept { secret: vec![n; 32], fits: "this".into(), seal: None };
            forks.seal(id(n), &dir, kept).unwrap();
            let kept = Kept::decode(&*fs::read(dir.join(KEPT)).unwrap()).unwrap();
            (dir, kept)
        };
        let ((one, kept), (other, others)) = (saved(1), saved(2));
        forks.check(id(1), &one, &kept).unwrap();
        forks.check(id(2), &one, &kept).unwrap_err();
        forks.check(id(1), &other, &others).unwrap_err();
        for changed in [
            Kept { secret: vec![7; 32], ..kept.clone() },
            Kept { fits: "that".into(), ..kept.clone() },
            Kept { seal: others.seal, ..kept.clone() },
            Kept { seal: None, ..kept.clone() },
        ] {
            forks.check(id(1), &one, &changed).unwrap_err();
        }
        fs::copy(other.join(SAVED), one.join(SAVED)).unwrap();
        let error = forks.check(id(1), &one, &kept).unwrap_err();
        assert_eq!(error.to_string(), "`saved` was changed since");
    }
}
