//! The guest's end of file synchronisation. Until it exists, its streams are refused by name.

use std::path::Path;

use tokio::io::{AsyncRead, AsyncWrite};
use towline_proto::frame::FrameKind;
use towline_proto::v1::{FilesOpen, StreamErrorCode};
use towline_streams::{FrameReader, FrameWriter};

use crate::refusal::Refusal;

/// Serves one files stream whose OPEN was read, on the folder at `root`, whose files are `uid`'s.
pub async fn serve<R, W>(
    _open: FilesOpen,
    _reader: FrameReader<R>,
    mut writer: FrameWriter<W>,
    _root: &Path,
    _uid: u32,
    _gid: u32,
) where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let refusal =
        Refusal::new(StreamErrorCode::Unsupported, "this guest agent does not synchronise files");
    let _ = writer.send_message(FrameKind::Error, &refusal.to_message()).await;
    let _ = writer.finish().await;
}
