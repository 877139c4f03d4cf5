//! Serves a guest's Fuse stream from the machine's own files: FUSE_REQUEST frames in, FUSE_ANSWER
//! frames out, in any order, a bounded number at once on blocking threads. What people should know
//! (a file changed on the laptop) is left in `notices`, the newest only.
//!
//! What may be read, and that nothing else can be named, is the affair of `towline-images`.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use towline_images::local::Server;
use towline_proto::frame::{Frame, FrameKind};
use towline_streams::{FrameReader, FrameWriter};

/// Requests of one guest that are worked on at once. Each may hold an answer of 1 MiB.
const REQUESTS_MAX: usize = 16;

/// Serves until the stream ends. The answers under way are dropped then: the guest asks again.
pub(crate) async fn serve<R, W>(
    server: Arc<Server>,
    notices: watch::Sender<String>,
    mut reader: FrameReader<R>,
    mut writer: FrameWriter<W>,
) where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
{
    let (answers, mut ready) = mpsc::channel::<Vec<u8>>(REQUESTS_MAX);
    let work = async {
        let mut workers = JoinSet::new();
        while let Ok(Some(frame)) = reader.next().await {
            if !frame.is(FrameKind::FuseRequest) {
                return;
            }
            while workers.len() >= REQUESTS_MAX {
                let _ = workers.join_next().await;
            }
            while workers.try_join_next().is_some() {}
            let (server, notices) = (Arc::clone(&server), notices.clone());
            let answers = answers.clone();
            workers.spawn(async move {
                let handled = tokio::task::spawn_blocking(move || {
                    let answer = server.handle(&frame.body);
                    // Before the answer: people are told before the guest's command fails of it.
                    if let Some(newest) = server.take_messages().pop() {
                        notices.send_replace(newest);
                    }
                    answer
                });
                if let Ok(Some(answer)) = handled.await {
                    let _ = answers.send(answer).await;
                }
            });
        }
    };
    let send = async {
        while let Some(answer) = ready.recv().await {
            let frame = Frame::raw(FrameKind::FuseAnswer, answer);
            if writer.send(&frame).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = work => {}
        () = send => {}
    }
}
