//! Keeps guests ready, as `towline_node_core::Ready` decides: restored from the template of their
//! shape, with an image's disks and an empty one, greeted, and told nothing yet. A sandbox that takes
//! one over need only configure it.
//!
//! Each lives in a folder of its own, `<data_dir>/ready/<name>/{vm/,upper.img}`. A VMM is known by the
//! folder that it runs in, so that folder stays where it is: the sandbox's `vm` becomes a link to it.
//! What no sandbox links to is a dead node agent's, and is ended by the next one.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};
use towline_node_core::{Ready, ReadyEffect, ReadyId, ReadyKind};

use crate::capacity::boottime;
use crate::disks;
use crate::guest_configure::random;
use crate::guest_link::GuestLink;
use crate::hypervisor::{Hypervisor, Hypervisors, Vm, VmSpec};
use crate::store::{Store, UPPER, VM};

/// From spawn to hello, for a guest that nobody waits for.
const HELLO_MAX: Duration = Duration::from_secs(60);
/// Until those are gone for which there is no room any more.
const ROOM_MAX: Duration = Duration::from_secs(30);
/// Ends that wait to be noticed; the guests that end so are few.
const EXITS_MAX: usize = 64;

/// The ready guests of this node.
#[derive(Debug)]
pub struct ReadyGuests {
    state: Mutex<State>,
    changed: watch::Sender<()>,
    dir: PathBuf,
    cache_dir: PathBuf,
}

#[derive(Debug)]
struct State {
    core: Ready,
    waiting: BTreeMap<ReadyId, ReadyGuest>,
}

/// A guest that waits. Its VM ends with it, unless a sandbox takes it.
#[derive(Debug)]
pub struct ReadyGuest {
    /// What a sandbox takes over.
    pub folder: PathBuf,
    /// Marks its guest link's sessions, once it is told.
    pub secret: [u8; 32],
    /// The session in which it can be configured.
    pub link: GuestLink,
    vm: Ending,
    watcher: Option<AbortHandle>,
}

/// A VM that ends with its holder.
#[derive(Debug)]
struct Ending(Option<Arc<Vm>>);

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(vm) = self.0.take()
            && let Err(error) = vm.kill()
        {
            tracing::error!(%error, dir = %vm.dir().display(), "ready guest could not be killed");
        }
    }
}

impl ReadyGuest {
    /// The VM, which lives on, and the session with its guest.
    pub fn take(mut self) -> (Arc<Vm>, GuestLink) {
        if let Some(watcher) = self.watcher.take() {
            watcher.abort();
        }
        (self.vm.0.take().expect("taken once"), self.link)
    }
}

/// How an order was carried out.
#[derive(Debug)]
enum Done {
    Made(ReadyId, Box<ReadyGuest>),
    Failed(ReadyId),
    Absent(ReadyId),
    Ended(ReadyId),
}

impl ReadyGuests {
    /// Keeps `wanted` of each kind in this store, once `keep` runs.
    pub fn new(wanted: usize, store: &Store, cache_dir: &Path) -> Self {
        let state = State { core: Ready::new(wanted), waiting: BTreeMap::new() };
        Self {
            state: Mutex::new(state),
            changed: watch::Sender::default(),
            dir: store.ready(),
            cache_dir: cache_dir.to_owned(),
        }
    }

    /// So much memory of what this node offers is promised to nobody.
    pub fn free(&self, free_mib: u64) {
        if self.lock().core.free(free_mib) {
            self.changed.send_replace(());
        }
    }

    /// A sandbox of this kind is being started.
    pub fn started(&self, kind: ReadyKind) {
        self.with(|core| core.started(boottime(), kind));
    }

    /// A guest that is ready for just that.
    pub fn claim(&self, kind: &ReadyKind) -> Option<ReadyGuest> {
        let mut state = self.lock();
        let id = state.core.claim(kind)?;
        let guest = state.waiting.remove(&id);
        drop(state);
        self.changed.send_replace(());
        guest
    }

    /// Waits until what is promised has room beside the guests that are left.
    pub async fn room(&self) -> Result<(), String> {
        let mut changed = self.changed.subscribe();
        let fits = async {
            while !self.lock().core.fits() {
                // We hold the sender.
                let _ = changed.changed().await;
            }
        };
        timeout(ROOM_MAX, fits).await.map_err(|_| {
            let waited = ROOM_MAX.as_secs();
            format!("waited {waited} s for ready guests to give their memory back, in vain")
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with(&self, tell: impl FnOnce(&mut Ready)) {
        tell(&mut self.lock().core);
        self.changed.send_replace(());
    }

    /// Makes and ends guests as decided, until `stop` is ready; then ends all that no sandbox has taken.
    pub(crate) async fn keep(
        self: Arc<Self>,
        driver: Arc<dyn Hypervisor>,
        stop: impl Future<Output = ()>,
    ) {
        // Also where this is given up in the middle.
        let _all = EndAll(&self);
        tokio::pin!(stop);
        let mut changed = self.changed.subscribe();
        let (exits, mut exited) = mpsc::channel(EXITS_MAX);
        let (mut work, mut watchers) = (JoinSet::new(), JoinSet::new());
        let mut making = BTreeMap::new();
        loop {
            changed.mark_unchanged();
            let (effects, deadline) = {
                let core = &mut self.lock().core;
                (core.next(boottime()), core.next_deadline(boottime()))
            };
            for effect in effects {
                match effect {
                    ReadyEffect::Make(id, kind) => {
                        let (cancel, cancelled) = oneshot::channel();
                        making.insert(id, cancel);
                        let (ready, driver) = (Arc::clone(&self), Arc::clone(&driver));
                        work.spawn(async move { ready.make(driver, id, kind, cancelled).await });
                    }
                    // The task that makes it ends it.
                    ReadyEffect::End(id) if making.remove(&id).is_some() => {}
                    ReadyEffect::End(id) => {
                        let guest = self.lock().waiting.remove(&id);
                        work.spawn(end(id, guest));
                    }
                }
            }
            let wait = deadline.map(|at| at.saturating_sub(boottime()));
            tokio::select! {
                biased;
                () = &mut stop => break,
                _ = changed.changed() => {}
                () = sleep(wait.unwrap_or(Duration::MAX)), if wait.is_some() => {}
                Some(id) = exited.recv() => {
                    let Some(guest) = self.lock().waiting.remove(&id) else { continue };
                    tracing::warn!(dir = %guest.folder.display(), "ready guest ended");
                    end(id, Some(guest)).await;
                    self.with(|core| core.failed(boottime(), id));
                }
                Some(_) = watchers.join_next() => {}
                Some(done) = work.join_next() => match done {
                    Ok(Done::Made(id, mut guest)) if making.remove(&id).is_some() => {
                        let vm = guest.vm.0.clone().expect("not taken yet");
                        let exits = exits.clone();
                        guest.watcher = Some(watchers.spawn(async move {
                            vm.wait_exit().await;
                            let _ = exits.send(id).await;
                        }));
                        let mut state = self.lock();
                        state.waiting.insert(id, *guest);
                        state.core.made(id);
                        drop(state);
                        tracing::debug!(id, "guest ready");
                    }
                    Ok(Done::Made(id, guest)) => drop(work.spawn(end(id, Some(*guest)))),
                    Ok(Done::Failed(id)) => {
                        making.remove(&id);
                        self.with(|core| core.failed(boottime(), id));
                    }
                    Ok(Done::Absent(id)) => {
                        making.remove(&id);
                        self.with(|core| core.absent(boottime(), id));
                    }
                    Ok(Done::Ended(id)) => self.with(|core| core.ended(id)),
                    // Nothing is known of it any more, so its memory stays counted.
                    Err(error) => tracing::error!(%error, "work on a ready guest broke"),
                },
            }
        }
        making.clear();
        let waiting = std::mem::take(&mut self.lock().waiting);
        for (id, guest) in waiting {
            work.spawn(end(id, Some(guest)));
        }
        while let Some(done) = work.join_next().await {
            if let Ok(Done::Made(id, guest)) = done {
                end(id, Some(*guest)).await;
            }
        }
    }

    async fn make(
        &self,
        driver: Arc<dyn Hypervisor>,
        id: ReadyId,
        kind: ReadyKind,
        cancelled: oneshot::Receiver<()>,
    ) -> Done {
        let (folder, vm) = (OnceLock::new(), OnceLock::new());
        let made = tokio::select! {
            biased;
            // Its sender is dropped.
            _ = cancelled => None,
            made = self.start(driver.as_ref(), &kind, &folder, &vm) => Some(made),
        };
        let done = match made {
            Some(Ok(Some(guest))) => return Done::Made(id, Box::new(guest)),
            Some(Ok(None)) => Done::Absent(id),
            Some(Err(reason)) => {
                tracing::warn!(reason, "no guest could be made ready");
                Done::Failed(id)
            }
            None => Done::Ended(id),
        };
        if let Some(vm) = vm.into_inner() {
            vm.wait_exit().await;
        }
        if let Some(folder) = folder.into_inner() {
            remove(folder).await;
        }
        done
    }

    /// `None` where there is no template. Notes what it has made, for who gives it up.
    async fn start(
        &self,
        driver: &dyn Hypervisor,
        kind: &ReadyKind,
        made_folder: &OnceLock<PathBuf>,
        made_vm: &OnceLock<Arc<Vm>>,
    ) -> Result<Option<ReadyGuest>, String> {
        let secret = random::<32>().map_err(|error| error.to_string())?;
        let folder = new_folder(&self.dir).map_err(|error| error.to_string())?;
        let folder = made_folder.get_or_init(|| folder).clone();
        let (cache, upper, disk_mib) = (self.cache_dir.clone(), folder.join(UPPER), kind.disk_mib);
        let disk = upper.clone();
        tokio::task::spawn_blocking(move || disks::create(&cache, &disk, disk_mib))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| crate::chain(&error))?;
        let spec = VmSpec {
            cpus: kind.cpus,
            memory_mib: kind.memory_mib,
            processes_max: 0,
            layers: kind.layers.clone(),
            upper: Some(upper),
            dir: folder.join(VM),
            console: false,
        };
        let restored = driver.restore(&spec).await.map_err(|error| crate::chain(&error))?;
        let Some(vm) = restored.map(Arc::new) else { return Ok(None) };
        let vm = made_vm.get_or_init(|| vm);
        let ending = Ending(Some(Arc::clone(vm)));
        let link = GuestLink::connect(vm, secret, HELLO_MAX).await;
        let link = link.map_err(|error| crate::chain(&error))?;
        if link.hello.configured {
            return Err("the guest says that it is configured already".into());
        }
        Ok(Some(ReadyGuest { folder, secret, link, vm: ending, watcher: None }))
    }
}

/// Ends all that wait.
struct EndAll<'a>(&'a ReadyGuests);

impl Drop for EndAll<'_> {
    fn drop(&mut self) {
        self.0.lock().waiting.clear();
    }
}

fn new_folder(dir: &Path) -> io::Result<PathBuf> {
    let folder = tempfile::Builder::new().prefix("guest-").tempdir_in(dir)?.keep();
    fs::create_dir(folder.join(VM))?;
    Ok(folder)
}

async fn end(id: ReadyId, guest: Option<ReadyGuest>) -> Done {
    if let Some(guest) = guest {
        let folder = guest.folder.clone();
        let (vm, link) = guest.take();
        drop(link);
        drop(Ending(Some(Arc::clone(&vm))));
        vm.wait_exit().await;
        remove(folder).await;
    }
    Done::Ended(id)
}

async fn remove(folder: PathBuf) {
    let removed = tokio::task::spawn_blocking(move || fs::remove_dir_all(folder)).await;
    if let Ok(Err(error)) = removed {
        tracing::warn!(%error, "folder of a ready guest not removed");
    }
}

/// Ends and removes the guests of an earlier node agent that no sandbox has taken.
pub(crate) async fn end_leftovers(hypervisors: &Hypervisors, store: &Store) -> io::Result<()> {
    let taken = store.taken().map_err(io::Error::other)?;
    for entry in fs::read_dir(store.ready())?.flatten() {
        let folder = fs::canonicalize(entry.path())?;
        if taken.contains(&folder) {
            continue;
        }
        let dir = folder.join(VM);
        let found = hypervisors.adopt(&dir).map_err(io::Error::other)?;
        // It may be of a VMM that is not configured any more.
        if let Some(vm) = found.or_else(|| Vm::noted(&dir)) {
            tracing::info!(dir = %folder.display(), "ready guest of an earlier node agent ends");
            vm.kill()?;
            vm.wait_exit().await;
        }
        remove(folder).await;
    }
    Ok(())
}
