//! Sends an image of this node's store to a laptop: EXPORT_DATA frames with the archive, with
//! progress in between, or an ERROR.
//!
//! The archive is written on a blocking thread as the laptop takes it; a few pieces wait between, no
//! more. Only an empty EXPORT_DATA says that it is whole: an archive that broke off never does.

use tokio::sync::watch;
use tokio::task::spawn_blocking;
use towline_images::{Digest, ImageError, Progress, Store, export};
use towline_link::stream::LinkStream;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{ImageExportOpen, ImageImportProgress, StreamErrorCode};
use towline_streams::archive_writer;

use crate::gates::Refused;
use crate::{image_pull, streams};

/// Serves one export.
pub(crate) async fn serve(store: Store, open: &ImageExportOpen, stream: LinkStream) {
    let LinkStream { mut reader, mut writer } = stream;
    let digest: Digest = match open.digest.parse() {
        Ok(digest) => digest,
        Err(error) => {
            let refused = Refused::new(StreamErrorCode::Invalid, format!("{error}"));
            return streams::refuse(&mut writer, &refused).await;
        }
    };
    let name = open.name.clone();
    let (mut archive, mut pieces) = archive_writer();
    let (progress, mut told) = watch::channel(None);
    let exporting = spawn_blocking(move || {
        let mut on_progress = |step: Progress| {
            progress.send_replace(Some(step));
        };
        let bytes = export(&store, &digest, &name, &mut archive, &mut on_progress)?;
        archive.finish().map_err(ImageError::Output)?;
        Ok::<_, ImageError>(bytes)
    });
    let send = async {
        while let Some(piece) = pieces.recv().await {
            writer.send(&Frame::raw(FrameKind::ExportData, piece)).await?;
            if !told.has_changed().unwrap_or(false) {
                continue;
            }
            let step = told.borrow_and_update().clone();
            if let Some(Progress { stage, done, total }) = step {
                let message = ImageImportProgress { stage, done, total };
                writer.send_message(FrameKind::ImportProgress, &message).await?;
            }
        }
        std::io::Result::Ok(())
    };
    let sent = tokio::select! {
        sent = send => sent,
        // The laptop has nothing more to say: whatever comes is its end.
        _ = reader.next() => Err(std::io::ErrorKind::ConnectionAborted.into()),
    };
    if let Err(error) = sent {
        tracing::info!(%digest, %error, "image export ended: the laptop went away");
        return;
    }
    let refused = match exporting.await {
        Ok(Ok(bytes)) => {
            tracing::info!(%digest, bytes, "image exported");
            let _ = writer.finish().await;
            return;
        }
        Ok(Err(error)) => Refused::new(image_pull::image_code(&error), crate::chain(&error)),
        Err(error) => Refused::new(StreamErrorCode::Internal, error.to_string()),
    };
    tracing::info!(%digest, reason = refused.message, "image export failed");
    streams::refuse(&mut writer, &refused).await;
}
