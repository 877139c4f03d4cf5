//! Has a node send an image to a registry; only news and the result come back.

use towline_proto::frame::FrameKind;
use towline_proto::v1::{self, stream_open::Kind};

use super::export::refused;
use super::guest::{Guest, open_failed};
use crate::error::Failure;

/// Asks for the push; returns what the node did.
pub async fn run(
    guest: &Guest<'_>,
    open: v1::ImagePushOpen,
    show: impl Fn(&v1::ImageImportProgress),
) -> anyhow::Result<v1::ImagePushed> {
    let opened = guest.open(Kind::ImagePush(open)).await.map_err(open_failed)?;
    // The writer stays open to the end: the node ends the push when it closes.
    let (mut reader, _writer) = (opened.reader, opened.writer);
    loop {
        let frame = match reader.next().await {
            Ok(Some(frame)) => frame,
            Ok(None) => return Err(broke().into()),
            Err(error) => return Err(broke().because(error).into()),
        };
        if frame.is(FrameKind::ImportProgress) {
            show(&frame.decode()?);
        } else if frame.is(FrameKind::Pushed) {
            return Ok(frame.decode()?);
        } else if frame.is(FrameKind::Error) {
            return Err(refused(&frame.decode()?));
        }
    }
}

fn broke() -> Failure {
    Failure::new("the node went away during the push")
        .hint("`tow status` says how it is; pushing again sends only what is not there yet")
}
