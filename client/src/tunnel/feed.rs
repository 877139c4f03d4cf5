//! A sandbox's feed, as its node keeps it: read to its end, followed, or looked at around a command.

use std::time::Duration;

use anyhow::Context as _;
use prost::Message as _;
use towline_proto::frame::FrameKind;
use towline_proto::v1::{self, FeedEntry, stream_open::Kind};

use super::guest::{Guest, open_failed};
use crate::daemon::client::OpenedStream;
use crate::error::Failure;
use crate::output::{Printer, events, human};

/// Bound on reading what there is: the node has it in memory.
const READ_MAX: Duration = Duration::from_secs(20);
/// Bound on asking around a command: nobody waits for hints.
const HINT_MAX: Duration = Duration::from_secs(2);
/// Pause before a feed that was cut is followed further, and how often in vain.
const AGAIN: Duration = Duration::from_secs(1);
const CUTS_MAX: u32 = 60;

/// Reads the entries after a sequence.
pub async fn read(guest: &Guest<'_>, after: u64) -> anyhow::Result<Vec<FeedEntry>> {
    let mut all = Vec::new();
    let read = once(guest, after, false, |entry| {
        all.push(entry);
        Ok(())
    });
    let read = tokio::time::timeout(READ_MAX, read).await;
    read.map_err(|_| Failure::new("the node did not tell what happened to the sandbox in time"))??;
    Ok(all)
}

/// Follows a feed from its first entry on, until `tell` fails. One that is cut is taken up again.
pub async fn follow(
    guest: &Guest<'_>,
    mut tell: impl FnMut(&FeedEntry) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (mut after, mut cuts) = (0, 0);
    loop {
        let mut told = Ok(());
        let cut = once(guest, after, true, |entry| {
            (after, cuts) = (entry.sequence, 0);
            told = tell(&entry);
            if told.is_ok() { Ok(()) } else { Err(Failure::new("not wanted any more").into()) }
        });
        let cut = cut.await;
        told?;
        cuts += 1;
        if let (Err(error), true) = (cut, cuts > CUTS_MAX) {
            return Err(error);
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Runs a command, and returns a line for each distinct connection that was blocked meanwhile.
/// Where nobody would see the lines, nothing is asked.
pub async fn around<T>(
    guest: &Guest<'_>,
    printer: &Printer,
    command: impl Future<Output = T>,
) -> (T, Vec<String>) {
    if !printer.hints() {
        return (command.await, Vec::new());
    }
    let before = async {
        let entries = tokio::time::timeout(HINT_MAX, read(guest, 0)).await.ok()?.ok()?;
        Some(entries.last().map_or(0, |entry| entry.sequence))
    };
    let (ended, before) = tokio::join!(command, before);
    let Some(before) = before else { return (ended, Vec::new()) };
    let entries = tokio::time::timeout(HINT_MAX, read(guest, before)).await;
    let lines = entries.ok().and_then(Result::ok);
    (ended, lines.map(|entries| events::blocked_lines(&entries)).unwrap_or_default())
}

async fn once(
    guest: &Guest<'_>,
    after_sequence: u64,
    follow: bool,
    mut tell: impl FnMut(FeedEntry) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let open = v1::FeedOpen { after_sequence, follow };
    let opened = guest.open(Kind::Feed(open)).await.map_err(open_failed)?;
    let OpenedStream { mut reader, writer: _held, .. } = opened;
    loop {
        let frame = reader.next().await?.context("the feed ended in the middle")?;
        if frame.is(FrameKind::FeedEntry) {
            tell(frame.decode()?)?;
        } else if frame.is(FrameKind::FeedEnd) {
            return Ok(());
        } else if frame.is(FrameKind::Error) {
            let error = v1::StreamError::decode(frame.body)?;
            return Err(Failure::new(human::printable(&error.message)).into());
        } else {
            return Err(Failure::new("the node's feed has a frame that is not of a feed").into());
        }
    }
}
