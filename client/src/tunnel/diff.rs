//! The laptop's end of `tow diff`: reads what the sandbox tells, part by part.

use std::time::Duration;

use tokio::time::timeout;
use towline_proto::frame::FrameKind;
use towline_proto::v1::{self, DiffDone, DiffOpen, DiffPart, StreamErrorCode, stream_open::Kind};

use super::guest::{Guest, open_failed};
use crate::daemon::client::OpenedStream;
use crate::error::Failure;
use crate::output::human;

/// How long the sandbox may say nothing at all: it tells every second that it goes on, and a file of
/// a local image may have to come from here first.
const SILENCE_MAX: Duration = Duration::from_secs(180);

/// Gives each part to `take`; returns how it ended.
pub async fn diff(
    guest: &Guest<'_>,
    mut take: impl FnMut(DiffPart) -> anyhow::Result<()>,
) -> anyhow::Result<DiffDone> {
    let open = guest.open(Kind::Diff(DiffOpen {})).await.map_err(open_failed)?;
    // What the sandbox is sent stays open for as long as its answer is wanted.
    let OpenedStream { mut reader, writer: _writer, .. } = open;
    loop {
        let said = timeout(SILENCE_MAX, reader.next()).await.map_err(|_| {
            let text = format!("the sandbox has said nothing for {} s", SILENCE_MAX.as_secs());
            Failure::new(text).hint("`tow status` says how the cluster is")
        })?;
        let Some(frame) = said.map_err(|error| broken().because(error))? else {
            return Err(broken().into());
        };
        if frame.is(FrameKind::DiffPart) {
            take(frame.decode()?)?;
        } else if frame.is(FrameKind::DiffDone) {
            return Ok(frame.decode()?);
        } else if frame.is(FrameKind::Error) {
            let error: v1::StreamError = frame.decode()?;
            let failure = Failure::new(human::printable(&error.message));
            return Err(match error.code() {
                StreamErrorCode::Unsupported => {
                    failure.hint("the sandbox was started by an older version: stop and start it")
                }
                _ => failure,
            }
            .into());
        } else {
            return Err(Failure::new("the sandbox answered something else").into());
        }
    }
}

fn broken() -> Failure {
    Failure::new("the link to the sandbox broke").hint("try again: nothing was changed")
}
