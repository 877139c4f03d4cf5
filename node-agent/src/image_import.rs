//! Takes an OCI image in from a laptop's stream: IMPORT_DATA frames with the archive, answered by
//! progress and at last IMPORTED or an ERROR.
//!
//! The archive is read on a blocking thread as it comes; a few frames wait between, no more.

use std::io::{self, Read};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::sync::{mpsc, watch};
use towline_images::{Imported, Progress, Store};
use towline_link::stream::LinkStream;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{ImageImportProgress, ImageImported, StreamErrorCode};

use crate::gates::Refused;
use crate::{image_pull, streams, tunnel};

/// Frames of up to 1 MiB that wait for the importer.
const WAITING_MAX: usize = 4;
/// Between two reports of progress.
const PROGRESS_PAUSE: Duration = Duration::from_millis(100);

/// Serves one import.
pub(crate) async fn serve(store: Store, name: String, stream: LinkStream) {
    let LinkStream { mut reader, mut writer } = stream;
    let (data, archive) = mpsc::channel(WAITING_MAX);
    let (progress, mut told) = watch::channel(None);
    let import = tokio::task::spawn_blocking(move || {
        let mut on_progress = |step: Progress| {
            progress.send_replace(Some(step));
        };
        towline_images::import(&store, Archive::new(archive), &mut on_progress)
    });
    let feed = async move {
        loop {
            let frame = tokio::select! {
                frame = reader.next() => frame,
                // An importer that stopped reading has its reason.
                () = data.closed() => return reader,
            };
            let piece = match frame {
                Ok(Some(frame)) if frame.is(FrameKind::ImportData) => Ok(frame.body),
                Ok(Some(_)) => Err(io::ErrorKind::InvalidData.into()),
                // The laptop went away: what was read so far is not an archive.
                Ok(None) | Err(_) => Err(io::ErrorKind::ConnectionAborted.into()),
            };
            let last = piece.as_ref().map_or(true, Bytes::is_empty);
            if data.send(piece).await.is_err() || last {
                return reader;
            }
        }
    };
    let report = async {
        while told.changed().await.is_ok() {
            let step = told.borrow_and_update().clone();
            if let Some(Progress { stage, done, total }) = step {
                let message = ImageImportProgress { stage, done, total };
                if writer.send_message(FrameKind::ImportProgress, &message).await.is_err() {
                    return;
                }
            }
            tokio::time::sleep(PROGRESS_PAUSE).await;
        }
    };
    // The report ends with the importer, which drops its end of the progress.
    let (reader, ()) = tokio::join!(feed, report);
    let result = import.await;
    let mut stream = LinkStream { reader, writer };
    match result {
        Ok(Ok(imported)) => {
            let Imported { digest, bytes, layers } = imported;
            tracing::info!(name, %digest, bytes, layers, "image imported");
            answer(stream, &imported).await;
        }
        Ok(Err(error)) => {
            let reason = crate::chain(&error);
            tracing::info!(name, reason, "image import refused");
            let refused = Refused::new(image_pull::image_code(&error), reason);
            streams::refuse(&mut stream.writer, &refused).await;
        }
        Err(error) => {
            let refused = Refused::new(StreamErrorCode::Internal, error.to_string());
            streams::refuse(&mut stream.writer, &refused).await;
        }
    }
}

/// Says what came out, at the stream's end.
pub(crate) async fn answer(mut stream: LinkStream, imported: &Imported) {
    let Imported { digest, bytes, layers } = *imported;
    let imported = ImageImported { digest: digest.to_string(), bytes, layers };
    let frame = Frame::message(FrameKind::Imported, &imported);
    if stream.writer.send(&frame).await.is_err() || stream.writer.finish().await.is_err() {
        tunnel::give_up(stream);
    }
}

/// The archive's bytes, as a blocking reader.
struct Archive {
    frames: mpsc::Receiver<io::Result<Bytes>>,
    now: Bytes,
    ended: bool,
}

impl Archive {
    fn new(frames: mpsc::Receiver<io::Result<Bytes>>) -> Self {
        Self { frames, now: Bytes::new(), ended: false }
    }
}

impl Read for Archive {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.now.is_empty() && !self.ended {
            match self.frames.blocking_recv() {
                Some(Ok(bytes)) if bytes.is_empty() => self.ended = true,
                Some(Ok(bytes)) => self.now = bytes,
                Some(Err(error)) => return Err(error),
                None => return Err(io::ErrorKind::ConnectionAborted.into()),
            }
        }
        let len = self.now.len().min(into.len());
        self.now.copy_to_slice(&mut into[..len]);
        Ok(len)
    }
}
