//! The guest's end of file synchronisation: carries out what the laptop asks on the folder, and
//! reports what is there. It decides nothing about whose version wins.
//!
//! A session is plain blocking code on a thread of its own between two bounded queues of frames;
//! here is the plumbing around it. One session at a time holds a tree.

mod index;
mod ops;
mod session;

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::limits::GUEST_PROTOCOL;
use towline_proto::v1::{FilesOpen, StreamErrorCode};
use towline_streams::{FrameReader, FrameWriter};

use crate::refusal::Refusal;
use session::{Session, Wire};

/// How long a session waits for the one before it to end.
const TURN_MAX: Duration = Duration::from_secs(30);

/// Frames that wait in each queue; with the bound of a frame this bounds the memory of a session.
const QUEUE: usize = 4;

/// Serves one files stream whose OPEN was read, on the folder at `root`, whose files are `uid`'s.
pub async fn serve<R, W>(
    open: FilesOpen,
    reader: FrameReader<R>,
    mut writer: FrameWriter<W>,
    root: &Path,
    uid: u32,
    gid: u32,
) where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let served = match prepare(&open, root, uid, gid).await {
        Ok(session) => carry(session, reader, &mut writer).await,
        Err(refusal) => Err(refusal),
    };
    if let Err(refusal) = served {
        let _ = writer.send_message(FrameKind::Error, &refusal.to_message()).await;
    }
    let _ = writer.finish().await;
}

/// Holds the files of a folder as they are; `None` while a session syncs them.
pub(crate) fn hold(root: &Path) -> Option<impl Drop + Send + use<>> {
    index::of(root).try_lock_owned().ok()
}

async fn prepare(open: &FilesOpen, root: &Path, uid: u32, gid: u32) -> Result<Session, Refusal> {
    if open.protocol != GUEST_PROTOCOL {
        let text = format!(
            "file synchronisation of version {} was asked for; this guest agent has {GUEST_PROTOCOL}",
            open.protocol
        );
        return Err(Refusal::new(StreamErrorCode::Unsupported, text));
    }
    let turn = tokio::time::timeout(TURN_MAX, index::of(root).lock_owned()).await;
    let index = turn.map_err(|_| {
        let text = format!("another sync session has held the folder for {TURN_MAX:?}");
        Refusal::new(StreamErrorCode::Limit, text)
    })?;
    Session::new(root, uid, gid, index).map_err(|error| Refusal::io("opening the folder", &error))
}

/// Runs the session and moves its frames until it ends or the stream does.
async fn carry<R, W>(
    session: Session,
    mut reader: FrameReader<R>,
    writer: &mut FrameWriter<W>,
) -> Result<(), Refusal>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let (to_session, incoming) = mpsc::channel(QUEUE);
    let (outgoing, mut from_session) = mpsc::channel::<Frame>(QUEUE);
    let work = tokio::task::spawn_blocking(move || session.run(Wire { incoming, outgoing }));
    let feed = async {
        while let Ok(Some(frame)) = reader.next().await {
            if to_session.send(frame).await.is_err() {
                break;
            }
        }
        drop(to_session);
        std::future::pending::<()>().await;
    };
    let drain = async {
        while let Some(frame) = from_session.recv().await {
            if writer.send(&frame).await.is_err() {
                break;
            }
        }
        // A session that can no longer send ends at its next frame.
        drop(from_session);
        let ended = work.await.map_err(io::Error::other);
        ended.map_err(|error| Refusal::io("synchronising files", &error))?
    };
    tokio::select! {
        () = feed => Ok(()),
        ended = drain => ended,
    }
}
