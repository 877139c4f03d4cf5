//! A laptop's view of a feed: what there is after what it knows, then what comes.

use std::sync::Arc;

use towline_link::stream::LinkStream;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{FeedEnd, FeedOpen};

use super::Feed;

/// Entries that are copied out at once.
const BATCH: usize = 128;

/// Serves a stream that began with `open`, until the laptop leaves.
pub(crate) async fn serve(feed: Arc<Feed>, open: FeedOpen, stream: LinkStream) {
    let LinkStream { mut reader, mut writer } = stream;
    let mut newest = feed.newest.subscribe();
    feed.flush();
    let work = async {
        let mut after = open.after_sequence;
        loop {
            newest.borrow_and_update();
            let batch = feed.after(after, BATCH);
            for entry in &batch {
                after = entry.sequence;
                writer.send(&Frame::message(FrameKind::FeedEntry, entry)).await?;
            }
            if !batch.is_empty() {
                continue;
            }
            if !open.follow || newest.changed().await.is_err() {
                let end = Frame::message(FrameKind::FeedEnd, &FeedEnd { last_sequence: after });
                writer.send(&end).await?;
                return writer.finish().await;
            }
        }
    };
    // A laptop says nothing more, so anything it does is leaving; but one that only follows no
    // longer than what there is may have finished its side at once.
    let left = async {
        while let Ok(Some(_)) = reader.next().await {}
        if !open.follow {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        result = work => if let Err(error) = result {
            tracing::debug!(%error, "feed's reader left");
        },
        () = left => {}
    }
}
