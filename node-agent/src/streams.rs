//! The beginning of every stream: one OPEN frame within a bound, or one ERROR frame as the answer.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{StreamError, StreamErrorCode, StreamOpen};
use towline_streams::{FrameReader, FrameWriter};

use crate::gates::Refused;

/// Bound on a stream's first frame, and on telling why it was refused.
const OPEN_MAX: Duration = Duration::from_secs(10);

/// Frames both ways.
pub(crate) fn framed<R, W>(reader: R, writer: W) -> (FrameReader<R>, FrameWriter<W>)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    (FrameReader::new(reader), FrameWriter::new(writer))
}

/// Reads the first frame.
pub(crate) async fn read_open<R: AsyncRead + Unpin>(
    reader: &mut FrameReader<R>,
) -> Result<StreamOpen, Refused> {
    let invalid = |message: &str| Refused::new(StreamErrorCode::Invalid, message);
    match timeout(OPEN_MAX, reader.next()).await {
        Ok(Ok(Some(frame))) => open_of(&frame),
        Ok(Ok(None)) => Err(invalid("the stream ended before its OPEN")),
        Ok(Err(error)) => Err(invalid(&format!("the stream's first frame is broken: {error}"))),
        Err(_) => Err(invalid("the stream did not say what it is for")),
    }
}

pub(crate) fn open_of(frame: &Frame) -> Result<StreamOpen, Refused> {
    let invalid = |message: String| Refused::new(StreamErrorCode::Invalid, message);
    if !frame.is(FrameKind::Open) {
        return Err(invalid(format!("a stream begins with OPEN, not with kind {}", frame.kind)));
    }
    frame.decode().map_err(|error| invalid(error.to_string()))
}

/// Says why a stream is refused, and ends it.
pub(crate) async fn refuse<W: AsyncWrite + Unpin>(writer: &mut FrameWriter<W>, refused: &Refused) {
    let error = StreamError { code: refused.code.into(), message: refused.message.clone() };
    let told = async {
        writer.send_message(FrameKind::Error, &error).await?;
        writer.finish().await
    };
    // Who does not listen is not told.
    let _ = timeout(OPEN_MAX, told).await;
}
