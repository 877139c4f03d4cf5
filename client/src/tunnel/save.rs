//! Has a node make an image of a sandbox; only news and the result come back.

use towline_proto::frame::FrameKind;
use towline_proto::v1::{self, SaveOpen, SaveSecrets, Saved, StreamErrorCode, stream_open::Kind};

use super::guest::{Guest, open_failed};
use crate::error::Failure;
use crate::output::human;

/// What came out.
#[derive(Debug)]
pub enum Outcome {
    /// The image is in the node's store.
    Saved(Saved),
    /// It is not: it would give secrets away.
    Secrets(SaveSecrets),
}

/// Asks for the image.
pub async fn run(
    guest: &Guest<'_>,
    open: SaveOpen,
    show: impl Fn(&v1::ImageImportProgress),
) -> anyhow::Result<Outcome> {
    let opened = guest.open(Kind::Save(open)).await.map_err(open_failed)?;
    // The writer stays open to the end: the node gives up when it closes.
    let (mut reader, _writer) = (opened.reader, opened.writer);
    loop {
        let frame = match reader.next().await {
            Ok(Some(frame)) => frame,
            Ok(None) => return Err(broke().into()),
            Err(error) => return Err(broke().because(error).into()),
        };
        if frame.is(FrameKind::ImportProgress) {
            show(&frame.decode()?);
        } else if frame.is(FrameKind::Saved) {
            return Ok(Outcome::Saved(frame.decode()?));
        } else if frame.is(FrameKind::SaveSecrets) {
            return Ok(Outcome::Secrets(frame.decode()?));
        } else if frame.is(FrameKind::Error) {
            let error: v1::StreamError = frame.decode()?;
            let failure = Failure::new(human::printable(&error.message));
            return Err(match error.code() {
                StreamErrorCode::NoSpace => failure.hint("`tow prune` removes what nobody uses"),
                _ => failure,
            }
            .into());
        }
    }
}

fn broke() -> Failure {
    Failure::new("the node went away while the sandbox was saved: there is no image")
        .hint("`tow status` says how it is; the sandbox is as it was, save it again")
}
