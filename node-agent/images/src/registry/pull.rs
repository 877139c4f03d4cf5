//! A whole pull: manifest, config, layers; layers become disks while later ones are downloaded.
//!
//! An image is recorded last, when all its blobs are checked and its disks are made. A pull that
//! is dropped in the middle leaves whole blobs, whole disks and partial downloads, all of which
//! the next pull uses.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::spawn_blocking;

use super::blob;
use super::board::Board;
use super::credentials::Credentials;
use super::error::PullError;
use super::manifest::{self, Chosen};
use super::pace::Pace;
use super::reach::Private;
use super::reference::Reference;
use super::session::{Options, Session};
use crate::document::{self, Blob, Config};
use crate::error::ImageError;
use crate::prepare::{Blobs, make_layers};
use crate::store::read_document;
use crate::{Digest, Imported, Progress, Store, StoredImage, limits};

/// Layers of one image that are downloaded at once.
const DOWNLOADS_MAX: usize = 3;
/// Between two reports of progress.
const REPORT_PAUSE: Duration = Duration::from_millis(100);

/// What is to be pulled.
#[derive(Debug)]
pub struct PullRequest {
    /// As it was typed.
    pub reference: String,
    /// For this pull only.
    pub credentials: Option<Credentials>,
    /// Plain HTTP is allowed.
    pub insecure: bool,
}

/// Pulls images into a store.
#[derive(Debug, Clone)]
pub struct Puller {
    /// Where images go.
    pub store: Store,
    /// Held while a layer is made into a disk, which uses all CPUs.
    pub turns: Arc<Semaphore>,
    /// Which registries may be on private addresses.
    pub private: Private,
    /// How patient it is.
    pub pace: Pace,
}

impl Puller {
    /// Pulls an image. `progress` is told what it does; dropping the future stops it.
    pub async fn pull(
        &self,
        request: PullRequest,
        progress: &watch::Sender<Option<Progress>>,
    ) -> Result<Imported, PullError> {
        let reference = Reference::parse(&request.reference)?;
        let say =
            |stage: String| progress.send_replace(Some(Progress { stage, done: 0, total: 0 }));
        say(format!("asking {}", reference.registry));
        // While it is held nothing is collected: what this pull finds in the store stays there.
        let store = self.store.clone();
        let adding = spawn_blocking(move || store.scratch());
        let _adding = adding.await.map_err(|_| PullError::Interrupted)??;
        let options = Options {
            credentials: request.credentials,
            insecure: request.insecure,
            private: &self.private,
            pace: self.pace.clone(),
            scopes: vec![format!("repository:{}:pull", reference.repository)],
        };
        let session = Session::open(&reference, options).await?;
        let chosen = manifest::choose(&session, &self.store, &reference).await?;
        self.check(&chosen)?;
        let of_config = chosen.manifest.config;
        let nobody = Board::new([of_config.size]);
        blob::fetch(&session, &self.store, of_config, "the config", nobody.line(0)).await?;
        let config =
            read_document(&self.store.blob(&of_config.digest), &of_config.digest, "config")?;
        let config = document::config(&config)?;
        let board = Arc::new(Board::new(chosen.manifest.layers.iter().map(|layer| layer.size)));
        let work = self.layers(&session, &chosen, config, &board);
        let report = async {
            loop {
                progress.send_replace(Some(board.progress()));
                tokio::time::sleep(REPORT_PAUSE).await;
            }
        };
        tokio::select! {
            done = work => done?,
            () = report => {}
        }
        self.record(chosen).await
    }

    fn check(&self, chosen: &Chosen) -> Result<(), ImageError> {
        let manifest = &chosen.manifest;
        if manifest.config.size > limits::DOCUMENT_MAX {
            let limit = format!("{} MiB", limits::DOCUMENT_MAX >> 20);
            return Err(ImageError::Limit { what: "size of the config".into(), limit });
        }
        let total = manifest.layers.iter().fold(0u64, |sum, layer| sum.saturating_add(layer.size));
        if total > limits::IMAGE_BYTES_MAX {
            let limit = format!("{} GiB", limits::IMAGE_BYTES_MAX >> 30);
            return Err(ImageError::Limit { what: "size of the layers".into(), limit });
        }
        Ok(())
    }

    /// Downloads the layers and makes their disks beside.
    async fn layers(
        &self,
        session: &Session,
        chosen: &Chosen,
        config: Config,
        board: &Arc<Board>,
    ) -> Result<(), PullError> {
        let (came, coming) = mpsc::channel();
        let cut = Arc::new(AtomicBool::new(false));
        let arriving = Arriving {
            store: self.store.clone(),
            coming,
            cut: Arc::clone(&cut),
            here: BTreeSet::new(),
            turns: Arc::clone(&self.turns),
            runtime: Handle::current(),
        };
        let (store, manifest) = (self.store.clone(), chosen.manifest.clone());
        let shown = Arc::clone(board);
        let making = spawn_blocking(move || {
            let mut arriving = arriving;
            let mut told =
                |step: Progress| shown.set_unpacking(format!("unpacking {}", step.stage));
            make_layers(&store, &manifest, &config, &mut arriving, &mut told)
        });
        let making = async {
            match making.await {
                Ok(Ok(_disks)) => Ok(()),
                // The downloads ended before it did: their error is the reason, and ends this too.
                Ok(Err(_)) if cut.load(Ordering::Relaxed) => std::future::pending().await,
                Ok(Err(error)) => Err(error.into()),
                Err(_) => Err(PullError::Interrupted),
            }
        };
        let count = chosen.manifest.layers.len();
        let mut fetches: Vec<BoxFuture<'_, Result<(), PullError>>> = Vec::with_capacity(count);
        for (number, layer) in chosen.manifest.layers.iter().enumerate() {
            let (came, what) = (came.clone(), format!("layer {} of {count}", number + 1));
            fetches.push(Box::pin(async move {
                blob::fetch(session, &self.store, *layer, &what, board.line(number)).await?;
                // A maker that has ended already needs to know nothing.
                let _ = came.send(layer.digest);
                Ok(())
            }));
        }
        // Each fetch has its own: with the last one the maker knows that no more will come.
        drop(came);
        let downloading = stream::iter(fetches).buffer_unordered(DOWNLOADS_MAX).try_collect::<()>();
        tokio::try_join!(downloading, making).map(|((), ())| ())
    }

    async fn record(&self, chosen: Chosen) -> Result<Imported, PullError> {
        let store = self.store.clone();
        let record = move || {
            manifest::keep(&store, &chosen)?;
            let digest = chosen.digest;
            let bytes = chosen.manifest.layers.iter().map(|layer| layer.size).sum();
            let layers = u32::try_from(chosen.manifest.layers.len()).unwrap_or(u32::MAX);
            store.record(&StoredImage { digest, bytes, layers })?;
            Ok::<_, ImageError>(Imported { digest, bytes, layers })
        };
        Ok(spawn_blocking(record).await.map_err(|_| PullError::Interrupted)??)
    }
}

/// Blobs on their way into the store.
struct Arriving {
    store: Store,
    coming: mpsc::Receiver<Digest>,
    /// No more will come, though not all came.
    cut: Arc<AtomicBool>,
    here: BTreeSet<Digest>,
    turns: Arc<Semaphore>,
    runtime: Handle,
}

impl Blobs for Arriving {
    fn path(&self, digest: &Digest) -> PathBuf {
        self.store.blob(digest)
    }

    fn wait(&mut self, blobs: &[Blob]) -> Result<(), ImageError> {
        while !blobs.iter().all(|blob| self.here.contains(&blob.digest)) {
            let came = self.coming.recv().map_err(|_| {
                self.cut.store(true, Ordering::Relaxed);
                ImageError::Input(std::io::ErrorKind::ConnectionAborted.into())
            })?;
            self.here.insert(came);
        }
        Ok(())
    }

    fn turn(&mut self) -> Option<OwnedSemaphorePermit> {
        // Never closed, and whoever holds one makes one disk.
        self.runtime.block_on(Arc::clone(&self.turns).acquire_owned()).ok()
    }
}
