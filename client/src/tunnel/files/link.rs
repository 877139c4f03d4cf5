//! A files stream as blocking code sees it: frames out, frames in, each wait bounded.
//!
//! The engine reads and writes the disk all the time, so it runs on a thread of its own; here are
//! the two queues between it and the stream, and the errors that it ends with.

use std::future::Future;
use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use towline_filesync::wire::{self, FilesKind, WireError};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{StreamError, StreamErrorCode};
use towline_streams::{FrameReader, FrameWriter};

/// How long either side may be silent, or take nothing, before the stream counts as cut. A guest at
/// work on a long scan says so every two seconds.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Frames that wait in each queue.
const QUEUE: usize = 4;

/// Why a barrier ended early.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// The stream broke: a new one may succeed.
    #[error("the stream to the sandbox broke while {doing}")]
    Cut {
        /// What was being waited for.
        doing: &'static str,
        /// The stream's error, if it had one.
        #[source]
        source: Option<io::Error>,
    },
    /// The sandbox said no.
    #[error("the sandbox could not synchronise files: {message}")]
    Refused {
        /// For programs.
        code: StreamErrorCode,
        /// For people.
        message: String,
    },
    /// The sandbox sent what no guest agent sends.
    #[error("the sandbox broke the file protocol: {0}")]
    Protocol(String),
    /// The laptop's file system.
    #[error("could not {what}")]
    Local {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Another barrier holds the folder.
    #[error("another `tow` has synchronised this folder for more than {0:?}; it may hang")]
    Busy(Duration),
}

impl From<WireError> for SyncError {
    fn from(error: WireError) -> Self {
        Self::Protocol(error.to_string())
    }
}

impl SyncError {
    /// Whether a new stream may help.
    pub fn may_retry(&self) -> bool {
        match self {
            Self::Cut { .. } => true,
            Self::Refused { code, .. } => *code == StreamErrorCode::Internal,
            Self::Protocol(_) | Self::Local { .. } | Self::Busy(_) => false,
        }
    }

    /// Wraps an error of the laptop's file system.
    pub(super) fn local(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Local { what, source }
    }
}

/// The receiving half.
#[derive(Debug)]
pub(super) struct Receiver {
    handle: Handle,
    frames: mpsc::Receiver<io::Result<Frame>>,
}

/// The sending half; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Sender {
    handle: Handle,
    frames: mpsc::Sender<Frame>,
}

impl Receiver {
    /// The next frame; an ERROR frame ends the barrier with what it says.
    pub(super) fn next(&mut self, doing: &'static str) -> Result<Frame, SyncError> {
        let next = async { tokio::time::timeout(SILENCE_MAX, self.frames.recv()).await };
        let frame = match self.handle.block_on(next) {
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(error))) => return Err(SyncError::Cut { doing, source: Some(error) }),
            Ok(None) => return Err(SyncError::Cut { doing, source: None }),
            Err(_) => {
                let text = format!("nothing came for {SILENCE_MAX:?}");
                let source = Some(io::Error::new(io::ErrorKind::TimedOut, text));
                return Err(SyncError::Cut { doing, source });
            }
        };
        if frame.is(FrameKind::Error) {
            let error: StreamError = frame.decode().map_err(WireError::from)?;
            return Err(SyncError::Refused {
                code: error.code(),
                message: printable(&error.message),
            });
        }
        Ok(frame)
    }

    /// The next frame as the message that must come.
    pub(super) fn expect<M: prost::Message + Default>(
        &mut self,
        kind: FilesKind,
        doing: &'static str,
    ) -> Result<M, SyncError> {
        let frame = self.next(doing)?;
        Ok(wire::expect(&frame, kind, doing)?)
    }
}

impl Sender {
    /// Sends a message.
    pub(super) fn send(
        &self,
        kind: FilesKind,
        message: &impl prost::Message,
    ) -> Result<(), SyncError> {
        self.frame(wire::frame(kind, message))
    }

    /// Sends a frame.
    pub(super) fn frame(&self, frame: Frame) -> Result<(), SyncError> {
        let doing = "sending to it";
        let send = async { tokio::time::timeout(SILENCE_MAX, self.frames.send(frame)).await };
        match self.handle.block_on(send) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(SyncError::Cut { doing, source: None }),
            Err(_) => Err(SyncError::Cut { doing, source: Some(io::ErrorKind::TimedOut.into()) }),
        }
    }
}

/// Runs blocking work over a stream and moves its frames until the work is done.
pub(super) async fn with_stream<R, W, T>(
    mut reader: FrameReader<R>,
    mut writer: FrameWriter<W>,
    work: impl FnOnce(Sender, Receiver) -> T + Send + 'static,
) -> T
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
    T: Send + 'static,
{
    let handle = Handle::current();
    let (to_work, incoming) = mpsc::channel(QUEUE);
    let (outgoing, mut from_work) = mpsc::channel::<Frame>(QUEUE);
    let sender = Sender { handle: handle.clone(), frames: outgoing };
    let receiver = Receiver { handle, frames: incoming };
    let work = tokio::task::spawn_blocking(move || work(sender, receiver));
    let feed = async {
        loop {
            let next = match reader.next().await {
                Ok(Some(frame)) => Ok(frame),
                Ok(None) => break,
                Err(error) => Err(error),
            };
            let last = next.is_err();
            if to_work.send(next).await.is_err() || last {
                break;
            }
        }
        drop(to_work);
        forever().await;
    };
    let drain = async {
        while let Some(frame) = from_work.recv().await {
            if writer.send(&frame).await.is_err() {
                break;
            }
        }
        drop(from_work);
        let _ = writer.finish().await;
        forever().await;
    };
    tokio::select! {
        () = feed => unreachable!("it waits for the work"),
        () = drain => unreachable!("it waits for the work"),
        done = work => match done {
            Ok(done) => done,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        },
    }
}

fn forever() -> impl Future<Output = ()> {
    std::future::pending()
}

/// What a guest says, without what a terminal would obey.
pub(super) fn printable(text: &str) -> String {
    text.chars().take(500).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
