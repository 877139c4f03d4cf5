//! Sends an image to a registry for a laptop's stream: one ImagePushOpen, answered by progress and
//! at last PUSHED or an ERROR.
//!
//! The laptop's credentials live as long as the stream and are written nowhere. A laptop that goes
//! away ends the push: the registry keeps whole blobs, which the next push finds there.

use tokio::sync::{Semaphore, watch};
use towline_images::Progress;
use towline_images::digest::BadDigest;
use towline_images::registry::{Pace, PushError, PushRequest, Pushed, Pusher};
use towline_link::stream::LinkStream;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{ImagePushOpen, ImagePushed, StreamErrorCode};

use crate::gates::Refused;
use crate::images::Images;
use crate::{image_pull, streams, tunnel};

/// Pushes at once, over all laptops; further ones wait.
const PUSHES_MAX: usize = 8;

/// What pushes are served with.
#[derive(Debug)]
pub(crate) struct Pushes {
    pusher: Pusher,
    at_once: Semaphore,
}

impl Pushes {
    pub(crate) fn new(images: &Images) -> Pushes {
        let (store, private) = (images.store().clone(), images.private_registries().clone());
        let pusher = Pusher { store, private, pace: Pace::default() };
        Pushes { pusher, at_once: Semaphore::new(PUSHES_MAX) }
    }

    /// Serves one push.
    pub(crate) async fn serve(&self, open: ImagePushOpen, stream: LinkStream) {
        let LinkStream { mut reader, mut writer } = stream;
        let reference = open.reference.clone();
        let request = match checked(open) {
            Ok(request) => request,
            Err(refused) => return streams::refuse(&mut writer, &refused).await,
        };
        let (progress, mut told) = watch::channel(None);
        // Boxed: it is far larger than what other streams need.
        let push = Box::pin(async move {
            let waiting = Progress { stage: "waiting for other pushes".into(), done: 0, total: 0 };
            progress.send_replace(Some(waiting));
            let _permit = self.at_once.acquire().await;
            self.pusher.push(request, &progress).await
        });
        // The reports end with the push, which drops its end: no frame is cut in the middle.
        let work = async { tokio::join!(push, image_pull::report(&mut told, &mut writer)) };
        let result = tokio::select! {
            (result, ()) = work => result,
            // The laptop has nothing more to say: whatever comes is its end.
            _ = reader.next() => {
                tracing::info!(reference, "image push ended: the laptop went away");
                return;
            }
        };
        match result {
            Ok(pushed) => {
                tracing::info!(reference, digest = %pushed.digest, "image pushed");
                answer(LinkStream { reader, writer }, pushed).await;
            }
            Err(error) => {
                let reason = crate::chain(&error);
                tracing::info!(reference, reason, "image push failed");
                streams::refuse(&mut writer, &Refused::new(code(&error), reason)).await;
            }
        }
    }
}

fn checked(open: ImagePushOpen) -> Result<PushRequest, Refused> {
    let invalid = |error: BadDigest| Refused::new(StreamErrorCode::Invalid, error.to_string());
    let ImagePushOpen { digest, reference, credentials, insecure, mount_from } = open;
    Ok(PushRequest {
        digest: digest.parse().map_err(invalid)?,
        reference,
        credentials: credentials.map(image_pull::checked).transpose()?.flatten(),
        insecure,
        mount_from,
    })
}

async fn answer(mut stream: LinkStream, pushed: Pushed) {
    let pushed = ImagePushed {
        digest: pushed.digest.to_string(),
        reference: pushed.reference,
        bytes_sent: pushed.bytes_sent,
        blobs_sent: pushed.blobs_sent,
        blobs_there: pushed.blobs_there,
        blobs_mounted: pushed.blobs_mounted,
    };
    let frame = Frame::message(FrameKind::Pushed, &pushed);
    if stream.writer.send(&frame).await.is_err() || stream.writer.finish().await.is_err() {
        tunnel::give_up(stream);
    }
}

fn code(error: &PushError) -> StreamErrorCode {
    match error {
        PushError::Registry(error) => image_pull::code(error),
        // Not that the node lacks the image, which another node may have.
        PushError::NoRepository { .. } | PushError::Unauthorized { .. } => {
            StreamErrorCode::Unauthorized
        }
        PushError::OtherDigest { .. } | PushError::NamedByDigest { .. } => StreamErrorCode::Invalid,
    }
}
