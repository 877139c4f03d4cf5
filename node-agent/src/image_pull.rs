//! Fetches an image from a registry for a laptop's stream: one ImagePullOpen, answered by progress
//! and at last IMPORTED or an ERROR.
//!
//! The laptop's credentials live as long as the stream and are written nowhere. A laptop that goes
//! away ends the pull; what came by then is used by the next one.

use std::sync::Arc;

use tokio::sync::{Semaphore, watch};
use towline_images::registry::{Credentials, Pace, PullError, PullRequest, Puller};
use towline_images::{ImageError, Progress};
use towline_link::stream::{LinkSend, LinkStream};
use towline_proto::frame::FrameKind;
use towline_proto::v1::{ImageImportProgress, ImagePullOpen, RegistryCredentials, StreamErrorCode};
use towline_streams::FrameWriter;

use crate::gates::Refused;
use crate::images::Images;
use crate::{image_import, streams};

/// Pulls at once, over all laptops; further ones wait.
const PULLS_MAX: usize = 8;

/// What pulls are served with.
#[derive(Debug)]
pub(crate) struct Pulls {
    puller: Puller,
    at_once: Semaphore,
}

impl Pulls {
    /// `turns` is shared with imports: making disks uses all CPUs.
    pub(crate) fn new(images: &Images, turns: Arc<Semaphore>) -> Pulls {
        let (store, private) = (images.store().clone(), images.private_registries().clone());
        let puller = Puller { store, turns, private, pace: Pace::default() };
        Pulls { puller, at_once: Semaphore::new(PULLS_MAX) }
    }

    /// Serves one pull.
    pub(crate) async fn serve(&self, open: ImagePullOpen, stream: LinkStream) {
        let LinkStream { mut reader, mut writer } = stream;
        let reference = open.reference.clone();
        let credentials = match open.credentials.map(checked).transpose() {
            Ok(credentials) => credentials.flatten(),
            Err(refused) => return streams::refuse(&mut writer, &refused).await,
        };
        let request =
            PullRequest { reference: open.reference, credentials, insecure: open.insecure };
        let (progress, mut told) = watch::channel(None);
        let pull = async move {
            let waiting = Progress { stage: "waiting for other pulls".into(), done: 0, total: 0 };
            progress.send_replace(Some(waiting));
            let _permit = self.at_once.acquire().await;
            self.puller.pull(request, &progress).await
        };
        // The reports end with the pull, which drops its end: no frame is cut in the middle.
        let work = async { tokio::join!(pull, report(&mut told, &mut writer)) };
        let result = tokio::select! {
            (result, ()) = work => result,
            // The laptop has nothing more to say: whatever comes is its end.
            _ = reader.next() => {
                tracing::info!(reference, "image pull ended: the laptop went away");
                return;
            }
        };
        let stream = LinkStream { reader, writer };
        match result {
            Ok(imported) => {
                tracing::info!(reference, digest = %imported.digest, "image pulled");
                image_import::answer(stream, &imported).await;
            }
            Err(error) => {
                let mut stream = stream;
                let reason = crate::chain(&error);
                tracing::info!(reference, reason, "image pull failed");
                streams::refuse(&mut stream.writer, &Refused::new(code(&error), reason)).await;
            }
        }
    }
}

/// Sends each news; ends when no more can come, or the laptop takes none.
pub(crate) async fn report(
    told: &mut watch::Receiver<Option<Progress>>,
    writer: &mut FrameWriter<LinkSend>,
) {
    while told.changed().await.is_ok() {
        let step = told.borrow_and_update().clone();
        if let Some(Progress { stage, done, total }) = step {
            let message = ImageImportProgress { stage, done, total };
            if writer.send_message(FrameKind::ImportProgress, &message).await.is_err() {
                return;
            }
        }
    }
}

/// Bytes of each part of the credentials; cloud registries' tokens have some thousands.
const SECRET_MAX: usize = 64 << 10;

/// Bounds and checks a login as a laptop sent it.
pub(crate) fn checked(sent: RegistryCredentials) -> Result<Option<Credentials>, Refused> {
    let RegistryCredentials { username, password, identity_token } = sent;
    if [&username, &password, &identity_token].iter().any(|part| part.len() > SECRET_MAX) {
        let why = format!("registry credentials of more than {} KiB", SECRET_MAX >> 10);
        return Err(Refused::new(StreamErrorCode::Limit, why));
    }
    if !identity_token.is_empty() {
        return Ok(Some(Credentials::Identity(identity_token)));
    }
    if username.contains(':') {
        let why = "a registry's user name cannot have a colon";
        return Err(Refused::new(StreamErrorCode::Invalid, why));
    }
    let given = !username.is_empty() || !password.is_empty();
    Ok(given.then_some(Credentials::Basic { username, password }))
}

/// What a program goes by when a registry cannot be used.
pub(crate) fn code(error: &PullError) -> StreamErrorCode {
    match error {
        PullError::Blocked { .. } => StreamErrorCode::Blocked,
        PullError::Unreachable { .. }
        | PullError::Certificate { .. }
        | PullError::Cut { .. }
        | PullError::Status { .. }
        | PullError::TooMany { .. } => StreamErrorCode::Unreachable,
        PullError::UnknownHost { .. } => StreamErrorCode::NameNotFound,
        PullError::Slow { .. } | PullError::Waited { .. } => StreamErrorCode::TimedOut,
        PullError::Unauthorized { .. } => StreamErrorCode::Unauthorized,
        PullError::NotFound { .. } => StreamErrorCode::NotFound,
        PullError::BadReference { .. }
        | PullError::Protocol { .. }
        | PullError::WrongDigest { .. } => StreamErrorCode::Invalid,
        PullError::NoRoots | PullError::Interrupted => StreamErrorCode::Internal,
        PullError::Image(error) => image_code(error),
    }
}

/// What a program goes by when an image is refused.
pub(crate) fn image_code(error: &ImageError) -> StreamErrorCode {
    match error {
        ImageError::NoSpace { .. } => StreamErrorCode::NoSpace,
        ImageError::Limit { .. } => StreamErrorCode::Limit,
        // Another node may have it.
        ImageError::Unknown(_) | ImageError::LostBlob { .. } => StreamErrorCode::NotFound,
        ImageError::DamagedBlob { .. }
        | ImageError::Io { .. }
        | ImageError::Imager { .. }
        | ImageError::NoImager(_) => StreamErrorCode::Internal,
        _ => StreamErrorCode::Invalid,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_checked_and_may_be_none() {
        let sent = |username: &str, password: &str, identity_token: &str| RegistryCredentials {
            username: username.into(),
            password: password.into(),
            identity_token: identity_token.into(),
        };
        assert_eq!(checked(sent("", "", "")).unwrap(), None);
        assert_eq!(checked(sent("a", "b", "t")).unwrap(), Some(Credentials::Identity("t".into())));
        assert!(matches!(checked(sent("a", "b", "")), Ok(Some(Credentials::Basic { .. }))));
        assert_eq!(checked(sent("a:b", "c", "")).unwrap_err().code, StreamErrorCode::Invalid);
        let long = "x".repeat(SECRET_MAX + 1);
        assert_eq!(checked(sent("a", &long, "")).unwrap_err().code, StreamErrorCode::Limit);
    }
}
