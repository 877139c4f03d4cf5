//! The laptop's end of `tow cp`: moves an archive between a stream and the code that makes or
//! applies it here. What comes from a sandbox is a stranger's: `towline_filesync::copy` checks it.

use std::time::Duration;

use anyhow::Context as _;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use towline_filesync::copy::Totals;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{self, CopyDone, CopyOpen, StreamErrorCode, stream_open::Kind};
use towline_streams::{ArchiveReader, ArchiveWriter, archive_reader, archive_writer};

use super::guest::{Guest, open_failed};
use crate::daemon::client::OpenedStream;
use crate::error::Failure;
use crate::output::{Progress, human};

/// How long the other end may say nothing at all: it may be walking a large folder.
const SILENCE_MAX: Duration = Duration::from_secs(180);

/// Sends what `make` writes; returns what the sandbox took.
pub async fn to_sandbox<M>(
    guest: &Guest<'_>,
    open: CopyOpen,
    make: M,
    shown: &Progress,
) -> anyhow::Result<Totals>
where
    M: FnOnce(&mut ArchiveWriter) -> anyhow::Result<Totals> + Send + 'static,
{
    let OpenedStream { mut reader, mut writer, .. } = begin(guest, open).await?;
    let (mut archive, mut pieces) = archive_writer();
    let making = spawn_blocking(move || {
        let totals = make(&mut archive)?;
        archive.finish().context("the copy's stream broke")?;
        anyhow::Ok(totals)
    });
    let mut sent = 0;
    let send = async {
        while let Some(piece) = pieces.recv().await {
            sent += piece.len() as u64;
            shown.set(format!("copying: {}", human::bytes(sent)));
            let last = piece.is_empty();
            timeout(SILENCE_MAX, writer.send(&Frame::raw(FrameKind::CopyData, piece))).await??;
            if last {
                return anyhow::Ok(true);
            }
        }
        Ok(false)
    };
    // The sandbox may refuse in the middle.
    let whole = tokio::select! {
        whole = send => whole.context("the link to the sandbox broke: copy again")?,
        said = reader.next() => {
            let said = said.context("the link to the sandbox broke: copy again")?;
            return Err(unexpected(said));
        }
    };
    drop(pieces);
    let made = making.await.context("making the archive")?;
    if !whole {
        made?;
        anyhow::bail!("the archive ended before its end");
    }
    let skipped = made?.skipped;
    let totals = done(timeout(SILENCE_MAX, reader.next()).await)?;
    Ok(Totals { skipped, ..totals })
}

/// Gives what the sandbox sends to `take`; returns what was taken.
pub async fn from_sandbox<T>(
    guest: &Guest<'_>,
    open: CopyOpen,
    take: T,
    shown: &Progress,
) -> anyhow::Result<Totals>
where
    T: FnOnce(&mut ArchiveReader) -> anyhow::Result<Totals> + Send + 'static,
{
    let OpenedStream { mut reader, writer: _writer, .. } = begin(guest, open).await?;
    let (pieces, mut archive) = archive_reader();
    let taking = spawn_blocking(move || {
        let totals = take(&mut archive)?;
        archive.drain().context("the copy's stream broke")?;
        anyhow::Ok(totals)
    });
    let mut received = 0;
    let ended = loop {
        let frame = match timeout(SILENCE_MAX, reader.next()).await {
            Ok(Ok(Some(frame))) if frame.is(FrameKind::CopyData) => frame,
            Ok(Ok(said)) => break Err(unexpected(said)),
            Ok(Err(error)) => {
                break Err(
                    anyhow::Error::from(error).context("the link to the sandbox broke: copy again")
                );
            }
            Err(_) => break Err(silent()),
        };
        received += frame.body.len() as u64;
        shown.set(format!("copying: {}", human::bytes(received)));
        let last = frame.body.is_empty();
        // Who takes no more says why below.
        if pieces.send(frame.body).await.is_err() {
            break Ok(false);
        }
        if last {
            break Ok(true);
        }
    };
    drop(pieces);
    let taken = taking.await.context("applying the archive")?;
    let whole = ended?;
    let taken = taken?;
    anyhow::ensure!(whole, "the archive ended before its end");
    let told = done(timeout(SILENCE_MAX, reader.next()).await)?;
    Ok(Totals { skipped: told.skipped, ..taken })
}

async fn begin(guest: &Guest<'_>, open: CopyOpen) -> anyhow::Result<OpenedStream> {
    guest.open(Kind::Copy(open)).await.map_err(open_failed)
}

type Said = Result<std::io::Result<Option<Frame>>, tokio::time::error::Elapsed>;

/// The sandbox's last word.
fn done(said: Said) -> anyhow::Result<Totals> {
    match said {
        Ok(Ok(Some(frame))) if frame.is(FrameKind::CopyDone) => {
            let CopyDone { files, bytes, skipped } = frame.decode()?;
            Ok(Totals { files, bytes, skipped })
        }
        Ok(Ok(said)) => Err(unexpected(said)),
        Ok(Err(error)) => {
            Err(anyhow::Error::from(error).context("the link to the sandbox broke: copy again"))
        }
        Err(_) => Err(silent()),
    }
}

fn silent() -> anyhow::Error {
    let text = format!("the sandbox has said nothing for {} s", SILENCE_MAX.as_secs());
    Failure::new(text).hint("`tow status` says how the cluster is").into()
}

fn unexpected(said: Option<Frame>) -> anyhow::Error {
    let Some(frame) = said else {
        return Failure::new("the link to the sandbox broke: copy again").into();
    };
    match frame.decode::<v1::StreamError>() {
        Ok(error) if frame.is(FrameKind::Error) => {
            let failure = Failure::new(human::printable(&error.message));
            match error.code() {
                StreamErrorCode::Unsupported => {
                    failure.hint("the sandbox was started by an older version: stop and start it")
                }
                _ => failure,
            }
            .into()
        }
        _ => Failure::new("the sandbox answered something else").into(),
    }
}
