//! A whole push: layers, config, and the manifest last.
//!
//! So a tag never names what is not all there, and a push that is dropped in the middle leaves whole
//! blobs, which the next one finds. A few layers go out at once, as they come in at once.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use reqwest::Method;
use reqwest::header::CONTENT_TYPE;
use tokio::sync::watch;
use tokio::task::spawn_blocking;

use super::board::Board;
use super::credentials::Credentials;
use super::error::PullError;
use super::manifest::CONTENT_DIGEST;
use super::pace::Pace;
use super::push_error::PushError;
use super::reach::Private;
use super::reference::{Reference, Version};
use super::session::{Ask, Body, Options, Session};
use super::upload::{How, Mounts, upload};
use crate::document::Blob;
use crate::export::{CONFIG, Stored, open_blob};
use crate::{Digest, ImageError, Progress, Store};

/// Layers of one image that are sent at once.
const UPLOADS_MAX: usize = 3;
/// Repositories that are looked at for what they may have.
const FROM_MAX: usize = 8;
/// Between two reports of progress.
const REPORT_PAUSE: Duration = Duration::from_millis(100);

/// What is to be pushed, and where to.
#[derive(Debug)]
pub struct PushRequest {
    /// Of the image's manifest.
    pub digest: Digest,
    /// As it was typed.
    pub reference: String,
    /// For this push only.
    pub credentials: Option<Credentials>,
    /// Plain HTTP is allowed.
    pub insecure: bool,
    /// Names of images that may share layers with it; those of other registries are of no use.
    pub mount_from: Vec<String>,
}

/// What a push did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// Of the manifest.
    pub digest: Digest,
    /// Its name in full.
    pub reference: String,
    /// Bytes of the blobs that were sent.
    pub bytes_sent: u64,
    /// Blobs that were sent: layers, and the config.
    pub blobs_sent: u32,
    /// Blobs that were there already.
    pub blobs_there: u32,
    /// Blobs that the registry took over from another repository.
    pub blobs_mounted: u32,
}

/// Pushes images out of a store.
#[derive(Debug, Clone)]
pub struct Pusher {
    /// Where images are.
    pub store: Store,
    /// Which registries may be on private addresses.
    pub private: Private,
    /// How patient it is.
    pub pace: Pace,
}

impl Pusher {
    /// Pushes an image. `progress` is told what it does; dropping the future stops it.
    pub async fn push(
        &self,
        request: PushRequest,
        progress: &watch::Sender<Option<Progress>>,
    ) -> Result<Pushed, PushError> {
        let to = Reference::parse(&request.reference)?;
        let version = match &to.version {
            Version::Tag(tag) => tag.clone(),
            Version::Digest(named) if *named == request.digest => named.to_string(),
            Version::Digest(named) => {
                return Err(PushError::NamedByDigest { named: *named, digest: request.digest });
            }
        };
        let say =
            |stage: String| progress.send_replace(Some(Progress { stage, done: 0, total: 0 }));
        say(format!("asking {}", to.registry));
        let (store, digest) = (self.store.clone(), request.digest);
        let opening = spawn_blocking(move || {
            // While it is held nothing is collected: what is here now stays until it is sent.
            let adding = store.scratch()?;
            let image = Stored::open(&store, &digest)?;
            // What is missing altogether is said before anything is sent.
            for (blob, what) in parts(&image) {
                open_blob(&store, blob, &what)?;
            }
            Ok::<_, ImageError>((image, adding))
        });
        let (image, _adding) = opening.await.map_err(|_| PullError::Interrupted)??;
        let from = repositories(&to, &request.mount_from);
        let scopes = std::iter::once(format!("repository:{}:pull,push", to.repository));
        let options = Options {
            credentials: request.credentials,
            insecure: request.insecure,
            private: &self.private,
            pace: self.pace.clone(),
            scopes: scopes.chain(from.iter().map(|f| format!("repository:{f}:pull"))).collect(),
        };
        let session = Session::open(&to, options).await.map_err(|e| PushError::of(&to, e))?;
        let pushing = Pushing { session: &session, store: &self.store, tally: Tally::default() };
        let sent = pushing.blobs(&image, &Mounts::new(from), progress).await;
        sent.map_err(|error| PushError::of(&to, error))?;
        say("naming it".into());
        pushing.manifest(&image, &version, &to).await?;
        Ok(pushing.tally.pushed(digest, to.to_string()))
    }
}

/// The blobs of an image: its layers, then its config.
fn parts(image: &Stored) -> Vec<(Blob, String)> {
    let mut parts = image.layers();
    let config = image.manifest.config;
    parts.retain(|(blob, _)| blob.digest != config.digest);
    parts.push((config, CONFIG.into()));
    parts
}

/// Other repositories of the registry, of images by their names.
fn repositories(to: &Reference, names: &[String]) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for name in names {
        let Ok(other) = Reference::parse(name) else { continue };
        let is_new = other.repository != to.repository && !found.contains(&other.repository);
        if other.registry == to.registry && is_new && found.len() < FROM_MAX {
            found.push(other.repository);
        }
    }
    found
}

/// A push under way.
struct Pushing<'a> {
    session: &'a Session,
    store: &'a Store,
    tally: Tally,
}

#[derive(Default)]
struct Tally {
    bytes: AtomicU64,
    sent: AtomicU32,
    there: AtomicU32,
    mounted: AtomicU32,
}

impl Pushing<'_> {
    async fn blobs(
        &self,
        image: &Stored,
        mounts: &Mounts,
        progress: &watch::Sender<Option<Progress>>,
    ) -> Result<(), PullError> {
        let mut layers = parts(image);
        let config = layers.pop();
        let board = Board::sending(layers.iter().map(|(blob, _)| blob.size));
        let mut uploads: Vec<BoxFuture<'_, Result<(), PullError>>> =
            Vec::with_capacity(layers.len());
        for (number, (blob, what)) in layers.iter().enumerate() {
            let line = board.line(number);
            uploads.push(Box::pin(async move {
                let how = upload(self.session, self.store, *blob, what, mounts, line).await?;
                self.tally.add(*blob, how);
                Ok(())
            }));
        }
        let sending = stream::iter(uploads).buffer_unordered(UPLOADS_MAX).try_collect::<()>();
        let report = async {
            loop {
                progress.send_replace(Some(board.progress()));
                tokio::time::sleep(REPORT_PAUSE).await;
            }
        };
        tokio::select! {
            sent = sending => sent?,
            () = report => {}
        }
        if let Some((blob, what)) = config {
            let nobody = Board::sending([blob.size]);
            let line = nobody.line(0);
            let how = upload(self.session, self.store, blob, &what, mounts, line).await?;
            self.tally.add(blob, how);
        }
        Ok(())
    }

    /// Gives the image its name.
    async fn manifest(
        &self,
        image: &Stored,
        version: &str,
        to: &Reference,
    ) -> Result<(), PushError> {
        let wrong = |error| PushError::of(to, error);
        let what = format!("manifest {version} of {}", to.repository);
        let ask = Ask {
            method: Method::PUT,
            url: self.session.url(&format!("manifests/{version}")).map_err(wrong)?,
            headers: vec![(CONTENT_TYPE, image.media_type.clone())],
            body: Body::Bytes(image.bytes.clone().into()),
            what: &what,
        };
        let response = self.session.retrying(|| self.session.ask(&ask)).await.map_err(wrong)?;
        // Some say nothing; a registry that changed what it was sent says another one.
        let Some(said) = response.headers().get(CONTENT_DIGEST) else { return Ok(()) };
        let found = said.to_str().unwrap_or("something unreadable");
        if found == image.digest.to_string() {
            return Ok(());
        }
        let printable = |c: &char| !c.is_control();
        Err(PushError::OtherDigest {
            host: self.session.host(),
            expected: image.digest,
            found: found.chars().filter(printable).take(100).collect(),
        })
    }
}

impl Tally {
    fn add(&self, blob: Blob, how: How) {
        let count = match how {
            How::There => &self.there,
            How::Mounted => &self.mounted,
            How::Sent => {
                self.bytes.fetch_add(blob.size, Ordering::Relaxed);
                &self.sent
            }
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    fn pushed(self, digest: Digest, reference: String) -> Pushed {
        Pushed {
            digest,
            reference,
            bytes_sent: self.bytes.into_inner(),
            blobs_sent: self.sent.into_inner(),
            blobs_there: self.there.into_inner(),
            blobs_mounted: self.mounted.into_inner(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_other_repositories_of_the_same_registry_are_asked() {
        let to = Reference::parse("reg:5000/mine:1").unwrap();
        let names = ["reg:5000/base:1", "reg:5000/base:2", "other/base", "reg:5000/mine", "A B"];
        assert_eq!(repositories(&to, &names.map(str::to_owned)), ["base"]);
    }
}
