//! Has a node fetch an image from a registry; only news and the result come back.

use towline_proto::frame::FrameKind;
use towline_proto::v1::{self, stream_open::Kind};

use super::guest::{Guest, open_failed};
use crate::error::Failure;
use crate::output::human;

/// Asks for the image; returns what the node made of it.
pub async fn run(
    guest: &Guest<'_>,
    open: v1::ImagePullOpen,
    show: impl Fn(&v1::ImageImportProgress),
) -> anyhow::Result<v1::ImageImported> {
    let opened = guest.open(Kind::ImagePull(open)).await.map_err(open_failed)?;
    // The writer stays open to the end: the node ends the pull when it closes.
    let (mut reader, _writer) = (opened.reader, opened.writer);
    loop {
        let frame = match reader.next().await {
            Ok(Some(frame)) => frame,
            Ok(None) => return Err(broke().into()),
            Err(error) => return Err(broke().because(error).into()),
        };
        if frame.is(FrameKind::ImportProgress) {
            show(&frame.decode()?);
        } else if frame.is(FrameKind::Imported) {
            return Ok(frame.decode()?);
        } else if frame.is(FrameKind::Error) {
            let error: v1::StreamError = frame.decode()?;
            return Err(Failure::new(human::printable(&error.message)).into());
        }
    }
}

fn broke() -> Failure {
    Failure::new("the node went away during the pull")
        .hint("`tow status` says how it is; pulling again goes on where it stopped")
}
