//! Asks the node: for a connection, a flow of datagrams, or what a name is. Waits a bounded time for
//! a session where there is none, and asks again where one ended before it answered.

use std::io;
use std::time::Duration;

use tokio::time::timeout;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{
    EgressOpen, LookupAnswer, LookupOpen, StreamError, StreamErrorCode, StreamOpen,
    stream_open::Kind,
};
use towline_streams::{FrameReader, FrameWriter, MuxHandle, MuxRecv, MuxSend, Priority};

use super::network::Shared;

/// How long a node agent that restarts is waited for.
const SESSION_MAX: Duration = Duration::from_secs(30);
/// How long the node may take to dial: Linux' own patience with a target that does not answer.
const OPEN_MAX: Duration = Duration::from_secs(130);
/// How long a name may take. Clients ask again after 5 s.
const LOOKUP_MAX: Duration = Duration::from_secs(10);

/// Why there is no connection, as the workload is to see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// Connection refused: nobody listens there, or the policy forbids it.
    Reset,
    /// No route to host.
    Unreachable,
    /// Nobody answers.
    Silent,
}

type Stream = (FrameReader<MuxRecv>, FrameWriter<MuxSend>);

/// Asks for a connection or flow.
pub(super) async fn open(shared: &Shared, open: EgressOpen) -> Result<Stream, Refused> {
    let answered = timeout(OPEN_MAX, ask(shared, Kind::Egress(open), Priority::Bulk));
    let (frame, stream) = answered.await.unwrap_or(Err(Refused::Silent))?;
    if frame.is(FrameKind::EgressOpened) {
        return Ok(stream);
    }
    Err(refusal(&frame))
}

/// Asks what a name is.
pub(super) async fn look_up(shared: &Shared, look_up: LookupOpen) -> Option<LookupAnswer> {
    let answered = timeout(LOOKUP_MAX, ask(shared, Kind::Lookup(look_up), Priority::Demand));
    let (frame, _) = answered.await.ok()?.ok()?;
    frame.is(FrameKind::LookupAnswer).then(|| frame.decode().ok()).flatten()
}

/// What an ERROR frame, or anything that should not come, means to the workload.
pub(super) fn refusal(frame: &Frame) -> Refused {
    let error: Result<StreamError, _> = frame.decode();
    match error.as_ref().map(StreamError::code) {
        Ok(StreamErrorCode::TimedOut) => Refused::Silent,
        Ok(
            StreamErrorCode::Unreachable
            | StreamErrorCode::NameNotFound
            | StreamErrorCode::NotRunning,
        ) => Refused::Unreachable,
        _ => Refused::Reset,
    }
}

/// Opens a stream and waits for its first frame.
async fn ask(shared: &Shared, kind: Kind, priority: Priority) -> Result<(Frame, Stream), Refused> {
    let open = StreamOpen { kind: Some(kind), ..StreamOpen::default() };
    loop {
        let session = session(shared).await.ok_or(Refused::Unreachable)?;
        match ask_over(&session, &open, priority).await {
            Ok(answer) => return Ok(answer),
            // The node knows nothing of it any more: the next session is asked.
            Err(_) if session.is_ended() => {}
            // It may not have more streams, or ended this one without a word.
            Err(_) => return Err(Refused::Reset),
        }
    }
}

async fn session(shared: &Shared) -> Option<MuxHandle> {
    let mut node = shared.node.subscribe();
    let alive = node.wait_for(|node| node.as_ref().is_some_and(|session| !session.is_ended()));
    timeout(SESSION_MAX, alive).await.ok()?.ok()?.clone()
}

async fn ask_over(
    session: &MuxHandle,
    open: &StreamOpen,
    priority: Priority,
) -> io::Result<(Frame, Stream)> {
    let (send, receive) = session.open(priority)?;
    let (mut reader, mut writer) = (FrameReader::new(receive), FrameWriter::new(send));
    writer.send_message(FrameKind::Open, open).await?;
    let frame = reader.next().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok((frame, (reader, writer)))
}
